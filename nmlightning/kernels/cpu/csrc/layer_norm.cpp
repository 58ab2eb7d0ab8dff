// L1 layer and RMS norms of rows of features: loops, autograd and the operator layer_norm. An RMS
// norm does not centre, its μ is 0. All passes over a row are made while it is in the cache.
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "tensors.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace nmlightning {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t LaneBits __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));
constexpr int64_t LANES = 16;
constexpr int64_t ROWS_IN_FLOAT = 64;  // whose gradients are summed in float before double
constexpr int64_t ROWS_AT_ONCE = 4;    // so that sums of gradients are read and written less often
constexpr int64_t LONG_ROW = 2048;     // of which those sums leave the first cache
constexpr int64_t MOST_PARTS = 32;     // of the rows, for threads; sums do not depend on threads

// What elements are read as and written from: V is float, or Lanes of consecutive elements.
template <class V, class T>
inline V get(const T* from) {
  if constexpr (std::is_same_v<V, float>) {
    return load(*from);
  } else if constexpr (std::is_same_v<T, float>) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
  } else {
    HalfLanes half;
    std::memcpy(&half, from, sizeof half);
    return (Lanes)(__builtin_convertvector(half, LaneBits) << 16);
  }
}

inline void put(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }
inline void put(auto* to, float value) { store(to, value); }

inline void put(BFloat16* to, Lanes lanes) {
#ifdef __AVX512BF16__
  const __m256bh half = _mm512_cvtneps_pbh((__m512)lanes);
  std::memcpy(to, &half, sizeof half);
#else
  for (int64_t i = 0; i < LANES; i++) store(to + i, lanes[i]);
#endif
}

inline float size_of(float value) { return std::fabs(value); }
inline Lanes size_of(Lanes lanes) { return (Lanes)((LaneBits)lanes & 0x7fffffff); }

inline float sum_of(Lanes lanes) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)lanes);
#else
  float sum = 0;
  for (int64_t i = 0; i < LANES; i++) sum += lanes[i];
  return sum;
#endif
}

// Calls part(i, V) for all elements, V being Lanes or, of those left over, float.
template <class Part>
inline void each_element(int64_t from, int64_t to, Part part) {
  int64_t i = from;
  for (; i + LANES <= to; i += LANES) part(i, Lanes{});
  for (; i < to; i++) part(i, float{});
}

// Adds K sums over a row to the totals, in float in a block: part(i, sums) adds its i-th terms.
template <int K, class Part>
inline void add_sums(int64_t n, Part part, double* totals) {
  constexpr int64_t UNROLLED = K == 1 ? 4 : 2;
  for (int64_t from = 0; from < n; from += ELEMENTS_A_BLOCK) {
    const int64_t to = std::min(n, from + ELEMENTS_A_BLOCK);
    Lanes sums[UNROLLED][K] = {};
    float rest[K] = {};
    int64_t i = from;
    for (; i + UNROLLED * LANES <= to; i += UNROLLED * LANES)
      for (int64_t u = 0; u < UNROLLED; u++) part(i + u * LANES, sums[u]);
    for (; i + LANES <= to; i += LANES) part(i, sums[0]);
    for (; i < to; i++) part(i, rest);
    for (int k = 0; k < K; k++) {
      for (int64_t u = 1; u < UNROLLED; u++) sums[0][k] += sums[u][k];
      totals[k] += sum_of(sums[0][k]) + rest[k];
    }
  }
}

struct Rows {
  int64_t features, number;
  bool centred;

  Rows(const Tensor& x, int64_t rank, bool centred) : features(1), centred(centred) {
    for (int64_t dim = x.dim() - rank; dim < x.dim(); dim++) features *= x.size(dim);
    number = x.numel() / features;
  }
};

// Of each row: μ, 1 / σ, and constant · ŝ / σ.
struct RowValues {
  float *mean, *inverse, *pull;

  explicit RowValues(const Tensor& values) : mean(data<float>(values)) {
    inverse = mean + values.size(1);
    pull = inverse + values.size(1);
  }
};

template <bool weighted, bool biased, class T>
void normalise_row(const Rows& of, double constant, double eps, const T* x, const float* weight,
                   const float* bias, T* y, const RowValues& to, int64_t row) {
  const int64_t n = of.features;
  const double share = 1 / double(n);
  float mean = 0;
  if (of.centred) {  // by distances from the first element: exact where all are the same
    double total = 0;
    const float first = load(x[0]);
    const auto distances = [=](int64_t i, auto* sums) {
      sums[0] += get<std::remove_reference_t<decltype(*sums)>>(x + i) - first;
    };
    add_sums<1>(n, distances, &total);
    mean = float(first + total * share);
  }
  double size = 0;
  const auto sizes = [=](int64_t i, auto* sums) {
    sums[0] += size_of(get<std::remove_reference_t<decltype(*sums)>>(x + i) - mean);
  };
  add_sums<1>(n, sizes, &size);
  const double scale = constant * size * share, exact = 1 / std::sqrt(scale * scale + eps);
  const float inverse = float(exact);
  to.mean[row] = mean;
  to.inverse[row] = inverse;
  to.pull[row] = float(constant * scale * exact);
  each_element(0, n, [=](int64_t i, auto v) {
    using V = decltype(v);
    V result = (get<V>(x + i) - mean) * inverse;
    if constexpr (weighted) result *= get<V>(weight + i);
    if constexpr (biased) result += get<V>(bias + i);
    put(y + i, result);
  });
}

template <class T>
void normalise(const Rows& of, double constant, double eps, const T* x, const float* weight,
               const float* bias, T* y, const RowValues& to) {
  const int64_t n = of.features, grain = std::max<int64_t>(1, ELEMENTS_A_THREAD / n);
  with_flag(weight != nullptr, [&](auto weighted) {
    with_flag(bias != nullptr, [&](auto biased) {
      at::parallel_for(0, of.number, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
          normalise_row<weighted, biased>(of, constant, eps, x + row * n, weight, bias, y + row * n,
                                          to, row);
      });
    });
  });
}

// Writes the gradients by R rows of x, and adds to the sums of weight and bias, if there is a weight.
template <int R, bool weighted, class T>
void differentiate_rows(const Rows& of, const T* grad, const T* x, const float* weight,
                        const RowValues& values, int64_t row, T* grad_x, float* weight_sums,
                        float* bias_sums) {
  const int64_t n = of.features;
  const double share = 1 / double(n);
  float mean[R], inverse[R], above[R], below[R];
  for (int r = 0; r < R; r++) {
    const T *g = grad + (row + r) * n, *p = x + (row + r) * n;
    const float middle = mean[r] = values.mean[row + r];
    double totals[3] = {0, 0, 0};
    const auto terms = [=](int64_t i, auto* sums) {
      using V = std::remove_reference_t<decltype(*sums)>;
      V inner = get<V>(g + i), d = get<V>(p + i) - middle;
      if constexpr (weighted) inner *= get<V>(weight + i);
      sums[0] += inner;
      sums[1] += inner * d;
      sums[2] += d > 0.f ? V{} + 1.f : V{} - 1.f;
    };
    add_sums<3>(n, terms, totals);
    inverse[r] = values.inverse[row + r];
    const double each = values.pull[row + r] * (totals[1] * inverse[r] * share);
    const double shift = of.centred ? (each * totals[2] - totals[0]) * share : 0;
    above[r] = float(inverse[r] * (shift - each));
    below[r] = float(inverse[r] * (shift + each));
  }
  const T *g = grad + row * n, *p = x + row * n;
  T* to = grad_x + row * n;
  each_element(0, n, [=](int64_t i, auto v) {
    using V = decltype(v);
    V products{}, sums{}, scale{};
    if constexpr (weighted) scale = get<V>(weight + i);
    for (int r = 0; r < R; r++) {
      const V given = get<V>(g + r * n + i), d = get<V>(p + r * n + i) - mean[r];
      const V sided = d > 0.f ? V{} + above[r] : V{} + below[r];
      if constexpr (weighted) {
        put(to + r * n + i, given * scale * inverse[r] + sided);
        products += given * (d * inverse[r]);
        sums += given;
      } else {
        put(to + r * n + i, given * inverse[r] + sided);
      }
    }
    if constexpr (weighted) {
      put(weight_sums + i, get<V>(weight_sums + i) + products);
      put(bias_sums + i, get<V>(bias_sums + i) + sums);
    }
  });
}

// Writes the gradients by x and, where there is a weight, by weight and bias, (features,).
template <class T>
void differentiate(const Rows& of, const T* grad, const T* x, const float* weight,
                   const RowValues& values, T* grad_x, float* grad_weight, float* grad_bias) {
  const int64_t n = of.features, length = weight ? 2 * n : 0;
  const int64_t wanted = std::min(of.number * n / ELEMENTS_A_THREAD, of.number / ROWS_IN_FLOAT);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, MOST_PARTS);
  std::vector<double> totals(parts * length);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    std::vector<float> block(length);
    for (int64_t part = first; part < last; part++) {
      const int64_t end = of.number * (part + 1) / parts;
      for (int64_t from = of.number * part / parts; from < end; from += ROWS_IN_FLOAT) {
        const int64_t to = std::min(end, from + ROWS_IN_FLOAT);
        std::fill(block.begin(), block.end(), 0.f);
        with_flag(weight != nullptr, [&](auto weighted) {
          float *first_sum = block.data(), *second_sum = first_sum + n;
          int64_t row = from;
          for (; n >= LONG_ROW && row + ROWS_AT_ONCE <= to; row += ROWS_AT_ONCE)
            differentiate_rows<ROWS_AT_ONCE, weighted>(of, grad, x, weight, values, row, grad_x,
                                                       first_sum, second_sum);
          for (; row < to; row++)
            differentiate_rows<1, weighted>(of, grad, x, weight, values, row, grad_x, first_sum,
                                            second_sum);
        });
        for (int64_t i = 0; i < length; i++) totals[part * length + i] += block[i];
      }
    }
  });
  for (int64_t i = 0; i < length; i++) {
    double total = 0;
    for (int64_t part = 0; part < parts; part++) total += totals[part * length + i];
    (i < n ? grad_weight[i] : grad_bias[i - n]) = float(total);
  }
}

Tensor empty(at::IntArrayRef sizes, at::ScalarType type) {  // without the dispatcher, which takes long
  return Tensor(at::detail::empty_cpu(sizes, type));
}

// Returns weight or bias in float32; ones for a weight that is not there where a bias is.
Optional in_float(const Optional& learned, bool other, int64_t features) {
  if (!learned) return other ? Optional(at::ones({features}, at::kFloat)) : learned;
  TORCH_CHECK(learned->is_cpu() && learned->numel() == features,
              "expected a weight and a bias for each feature");
  if (learned->scalar_type() == at::kFloat && learned->is_contiguous()) return learned;
  const at::AutoDispatchBelowADInplaceOrView guard;
  return learned->to(at::kFloat).contiguous();
}

// The gradients as a function that is differentiable itself, which Python registers.
std::vector<Tensor> plain_gradients(const Tensor& grad, const Tensor& x, const Optional& weight,
                                    std::optional<at::ScalarType> bias, int64_t rank,
                                    double constant, double eps, bool centred) {
  static const auto plain = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("nmlightning::plain_layer_norm_gradients", "")
                                .typed<decltype(plain_gradients)>();
  return plain.redispatch(c10::DispatchKeySet(c10::DispatchKey::AutogradCPU), grad, x, weight,
                          bias, rank, constant, eps, centred);
}

// Whether more than the elements of a gradient is asked for: its own derivative, or many at once.
bool is_transformed(const Tensor& grad) {
  using Key = c10::DispatchKey;
  const c10::DispatchKeySet wrapped{Key::Batched, Key::FuncTorchBatched, Key::FuncTorchGradWrapper,
                                    Key::Python};
  return at::GradMode::is_enabled() || grad._fw_grad(0).defined() ||
         grad.key_set().has_any(wrapped);
}

struct RowNorm : torch::CustomClassHolder {
  int64_t rank;
  double constant, eps;
  bool centred;
  std::optional<at::ScalarType> bias;  // its type, if there is one

  RowNorm(int64_t rank, double constant, double eps, bool centred, const Optional& bias)
      : rank(rank), constant(constant), eps(eps), centred(centred) {
    if (bias) this->bias = bias->scalar_type();
  }
};

struct Output {
  Tensor y, values;
  bool bounded;
};

Output compute(const Tensor& x, const Optional& weight, const Optional& bias, const RowNorm& of) {
  const Rows rows(x, of.rank, of.centred);
  const Optional weights = in_float(weight, bias.has_value(), rows.features);
  const Optional biases = in_float(bias, false, rows.features);
  const Tensor y = empty(x.sizes(), x.scalar_type()), values = empty({3, rows.number}, at::kFloat);
  const RowValues to(values);
  with_type(x, [&]<class T>(T*) {
    normalise<T>(rows, of.constant, of.eps, data<T>(x), data<float>(weights), data<float>(biases),
                 data<T>(y), to);
  });
  return {y, values, all_within(to.inverse, rows.number, 1 / HUGE_SCALE, INFINITY)};
}

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;

  static Tensor forward(Context* ctx, const Tensor& x, const Optional& weight, const Optional& bias,
                        const c10::intrusive_ptr<RowNorm>& of, bool* bounded) {
    const Output output = compute(x, weight, bias, *of);
    *bounded = output.bounded;
    ctx->save_for_backward({x, weight.value_or(Tensor()), output.values});
    ctx->saved_data["norm"] = at::IValue::make_capsule(of);
    return output.y;
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    const Tensors saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &values = saved[2];
    const Optional weight = saved[1].defined() ? Optional(saved[1]) : std::nullopt;
    const auto held = ctx->saved_data["norm"].toCapsule();
    const auto& of = static_cast<const RowNorm&>(*held);
    Tensors found(5);
    if (is_transformed(grads[0])) {
      const auto all = plain_gradients(grads[0], x, weight, of.bias, of.rank, of.constant, of.eps,
                                       of.centred);
      found[0] = all[0];
      if (weight) found[1] = all[1];
      if (of.bias) found[2] = all.back();
      return found;
    }
    const Tensor grad = grads[0].contiguous();
    TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.sizes() == x.sizes(),
                "expected a gradient like y");
    const Rows rows(x, of.rank, of.centred);
    const Optional weights = in_float(weight, of.bias.has_value(), rows.features);
    const auto shape = x.sizes().slice(x.dim() - of.rank);
    found[0] = empty(x.sizes(), x.scalar_type());
    Tensor by_weight = empty(shape, at::kFloat), by_bias = empty(shape, at::kFloat);
    with_type(x, [&]<class T>(T*) {
      differentiate<T>(rows, data<T>(grad), data<T>(x), data<float>(weights), RowValues(values),
                       data<T>(found[0]), data<float>(by_weight), data<float>(by_bias));
    });
    if (weight) found[1] = by_weight.to(weight->scalar_type());
    if (of.bias) found[2] = by_bias.to(*of.bias);
    return found;
  }
};

// Returns y like x, or nothing where sums may be infinite in float: the formula is to compute it.
Optional layer_norm(const Tensor& given, const Optional& weight, const Optional& bias, int64_t rank,
                    double constant, double eps, bool centred) {
  const Tensor x = given.contiguous();
  const auto of = c10::make_intrusive<RowNorm>(rank, constant, eps, centred, bias);
  const auto learns = [](const Optional& tensor) { return tensor && tensor->requires_grad(); };
  if (!(at::GradMode::is_enabled() && (x.requires_grad() || learns(weight) || learns(bias)))) {
    const Output output = compute(x, weight, bias, *of);
    return output.bounded ? Optional(output.y) : std::nullopt;
  }
  bool bounded = false;
  const Tensor y = LayerNorm::apply(x, weight, bias, of, &bounded);
  return bounded ? Optional(y) : std::nullopt;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nmlightning, m) { m.def("layer_norm", layer_norm); }

}  // namespace nmlightning
