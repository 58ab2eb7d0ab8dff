// L1 layer and RMS norms of rows of features: loops, autograd and the operator layer_norm. An RMS
// norm does not centre, its μ is 0. All passes over a row are made while it is in the cache.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "tensors.h"

namespace nmlightning {
namespace {

constexpr int64_t ELEMENTS_IN_FLOAT = 4096;  // of a row, summed in float before double
constexpr int64_t ROWS_IN_FLOAT = 64;        // whose gradients are, too
constexpr int64_t ROWS_AT_ONCE = 4;  // of long ones, so that sums are read and written less often
constexpr int64_t LONG_ROW = 4096;   // bytes, of which a few leave the first cache
constexpr int64_t MOST_PARTS = 32;   // of the rows, for threads; sums do not depend on threads

template <int value>
using Number = std::integral_constant<int, value>;

inline float sum_of(Floats<LANES> values) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(same_bits<__m512>(values));
#else
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += values[i];
  return sum;
#endif
}

// Adds K sums over a row to the totals: part(place, sums) adds the terms of its elements.
template <int K, class Part>
inline void add_sums(int64_t n, Part part, double* totals) {
  constexpr int64_t UNROLLED = K == 1 ? 4 : 2;
  for (int64_t from = 0; from < n; from += ELEMENTS_IN_FLOAT) {
    const int64_t to = std::min(n, from + ELEMENTS_IN_FLOAT);
    Floats<LANES> sums[UNROLLED][K] = {};
    float rest[K] = {};
    int64_t i = from;
    for (; i + UNROLLED * LANES <= to; i += UNROLLED * LANES)
      for (int64_t u = 0; u < UNROLLED; u++) part(Place<LANES>{i + u * LANES}, sums[u]);
    for (; i + LANES <= to; i += LANES) part(Place<LANES>{i}, sums[0]);
    for (; i < to; i++) part(Place<1>{i}, rest);
    for (int k = 0; k < K; k++) {
      for (int64_t u = 1; u < UNROLLED; u++) sums[0][k] += sums[u][k];
      totals[k] += sum_of(sums[0][k]) + rest[k];
    }
  }
}

// Settings: how many dimensions, c, eps, whether it centres, the type of its bias or −1.
using Packed = std::vector<double>;

struct RowNorm {
  int64_t rank, features = 1, rows;
  double constant, eps;
  bool centred;
  std::optional<at::ScalarType> bias;

  RowNorm(const Tensor& x, const Packed& of)
      : rank(int64_t(of[0])), constant(of[1]), eps(of[2]), centred(of[3] != 0) {
    for (int64_t dim = x.dim() - rank; dim < x.dim(); dim++) features *= x.size(dim);
    rows = x.numel() / features;
    if (of[4] >= 0) bias = at::ScalarType(of[4]);
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
void normalise_row(const RowNorm& of, const T* x, const float* weight, const float* bias, T* y,
                   const RowValues& to, int64_t row) {
  const int64_t n = of.features;
  float mean = 0;
  // By distances from the first element, divided and not times 1 / n: exact where all are the same,
  // and where the mean is an element, so that x > μ is false there.
  if (of.centred) {
    double total = 0;
    const float first = load(x[0]);
    add_sums<1>(n, [=](auto in, auto* sums) { sums[0] += in(x) - first; }, &total);
    mean = float(first + total / double(n));
  }
  double size = 0;
  add_sums<1>(n, [=](auto in, auto* sums) { sums[0] += magnitude(in(x) - mean); }, &size);
  const double scale = of.constant * size / double(n);
  const double exact = 1 / std::sqrt(scale * scale + of.eps);
  const float inverse = float(exact);
  to.mean[row] = mean;
  to.inverse[row] = inverse;
  to.pull[row] = float(of.constant * scale * exact);
  each_place(0, n, [=](auto in) {
    auto result = (in(x) - mean) * inverse;
    if constexpr (weighted) result *= in(weight);
    if constexpr (biased) result += in(bias);
    in.write(y, result);
  });
}

template <class T>
void normalise(const RowNorm& of, const T* x, const float* weight, const float* bias, T* y,
               const RowValues& to) {
  const int64_t n = of.features, grain = std::max<int64_t>(1, ELEMENTS_A_THREAD / n);
  with_flag(weight != nullptr, [&](auto weighted) {
    with_flag(bias != nullptr, [&](auto biased) {
      at::parallel_for(0, of.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
          normalise_row<weighted, biased>(of, x + row * n, weight, bias, y + row * n, to, row);
      });
    });
  });
}

// Writes the gradients by R rows of x, and adds to the sums of weight and bias, if there are any.
template <int R, bool weighted, bool centred, class T>
void differentiate_rows(const RowNorm& of, const T* grad, const T* x, const float* weight,
                        const RowValues& values, int64_t row, T* grad_x, float* weight_sums,
                        float* bias_sums) {
  const int64_t n = of.features;
  const double share = 1 / double(n);
  float mean[R], inverse[R], above[R], below[R];
  for (int r = 0; r < R; r++) {
    double totals[3] = {0, 0, 0};
    const float middle = mean[r] = values.mean[row + r];
    const auto terms = [=, g = grad + r * n, p = x + r * n](auto in, auto* sums) {
      auto inner = in(g);
      if constexpr (weighted) inner *= in(weight);
      const auto d = in(p) - middle;
      sums[0] += inner * d;
      if constexpr (centred) {
        sums[1] += inner;
        sums[2] += d > 0.f ? in(Same{1.f}) : in(Same{-1.f});
      }
    };
    add_sums<centred ? 3 : 1>(n, terms, totals);
    inverse[r] = values.inverse[row + r];
    const double each = values.pull[row + r] * (totals[0] * inverse[r] * share);
    const double shift = (each * totals[2] - totals[1]) * share;
    above[r] = float(inverse[r] * (shift - each));
    below[r] = float(inverse[r] * (shift + each));
  }
  each_place(0, n, [=](auto in) {
    decltype(in(x)) products{}, sums{};
    for (int r = 0; r < R; r++) {
      const auto given = in(grad + r * n), d = in(x + r * n) - mean[r];
      auto inner = given * inverse[r];
      if constexpr (weighted) {
        inner *= in(weight);
        products += given * (d * inverse[r]);
        sums += given;
      }
      in.write(grad_x + r * n, inner + (d > 0.f ? in(Same{above[r]}) : in(Same{below[r]})));
    }
    if constexpr (weighted) {
      in.add(weight_sums, products);
      in.add(bias_sums, sums);
    }
  });
}

// Writes the gradients by x and, where there is a weight, by weight and bias, (features,).
template <class T>
void differentiate(const RowNorm& of, const T* grad, const T* x, const float* weight,
                   const RowValues& values, T* grad_x, float* grad_weight, float* grad_bias) {
  const int64_t n = of.features, length = weight ? 2 * n : 0;
  const int64_t wanted = std::min(of.rows * n / ELEMENTS_A_THREAD, of.rows / ROWS_IN_FLOAT);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, MOST_PARTS);
  std::vector<double> totals(parts * length);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    std::vector<float> sums(length);
    for (int64_t part = first; part < last; part++) {
      const int64_t end = of.rows * (part + 1) / parts;
      for (int64_t row = of.rows * part / parts, to; row < end;) {
        std::fill(sums.begin(), sums.end(), 0.f);
        to = std::min(end, row + ROWS_IN_FLOAT);
        with_flag(weight != nullptr, [&](auto weighted) {
          with_flag(of.centred, [&](auto centred) {
            const auto write = [&]<int R>(Number<R>) {
              for (; row + R <= to; row += R)
                differentiate_rows<R, weighted, centred>(of, grad + row * n, x + row * n, weight,
                                                         values, row, grad_x + row * n, sums.data(),
                                                         sums.data() + n);
            };
            if (n * int64_t(sizeof(T)) >= LONG_ROW) write(Number<ROWS_AT_ONCE>{});
            write(Number<1>{});
          });
        });
        for (int64_t i = 0; i < length; i++) totals[part * length + i] += sums[i];
      }
    }
  });
  for (int64_t i = 0; i < length; i++) {
    double total = 0;
    for (int64_t part = 0; part < parts; part++) total += totals[part * length + i];
    (i < n ? grad_weight[i] : grad_bias[i - n]) = float(total);
  }
}

Optional in_float(const Optional& learned, int64_t features) {
  if (!learned) return learned;
  TORCH_CHECK(learned->is_cpu() && learned->numel() == features,
              "expected a weight and a bias for each feature");
  if (learned->scalar_type() == at::kFloat && learned->is_contiguous()) return learned;
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

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;

  // Takes what has been computed.
  static Tensor forward(Context* ctx, const Tensor& x, const Optional& weight, const Optional&,
                        const Tensor* y, const Tensor* values, const Packed& settings) {
    ctx->save_for_backward({x, weight.value_or(Tensor()), *values});
    ctx->saved_data["settings"] = settings;
    return *y;
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    const Tensors saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const Optional weight = saved[1].defined() ? Optional(saved[1]) : std::nullopt;
    const RowNorm of(x, ctx->saved_data["settings"].toDoubleVector());
    Tensors found;
    if (at::GradMode::is_enabled() || !is_plain(grads[0]) || grads[0]._fw_grad(0).defined()) {
      found = plain_gradients(grads[0], x, weight, of.bias, of.rank, of.constant, of.eps,
                              of.centred);
    } else {
      const Tensor grad = grads[0].contiguous();
      TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.sizes() == x.sizes(),
                  "expected a gradient like y");
      const Optional weights = in_float(weight, of.features);
      const auto shape = x.sizes().slice(x.dim() - of.rank);
      found = {allocate(x.sizes(), x.scalar_type()), allocate(shape), allocate(shape)};
      with_type(x, [&]<class T>(T*) {
        differentiate<T>(of, data<T>(grad), data<T>(x), data<float>(weights), RowValues(saved[2]),
                         data<T>(found[0]), data<float>(found[1]), data<float>(found[2]));
      });
      found[1] = weight ? found[1].to(weight->scalar_type()) : Tensor();
      found[2] = of.bias ? found[2].to(*of.bias) : Tensor();
    }
    found.resize(6);
    return found;
  }
};

// Returns y like x, or nothing where the formula is to compute it: sums may be infinite in float,
// or a tensor is not what its memory holds, as a negative view is not.
Optional layer_norm(const Tensor& given, const Optional& weight, const Optional& bias, int64_t rank,
                    double constant, double eps, bool centred) {
  const auto readable = [](const Optional& tensor) { return !tensor || is_plain(*tensor); };
  if (!(is_plain(given) && readable(weight) && readable(bias))) return std::nullopt;
  if (bias && !weight) return std::nullopt;
  const Tensor x = given.contiguous();
  const Packed settings{double(rank), constant, eps, double(centred),
                        bias ? double(bias->scalar_type()) : -1};
  const RowNorm norm(x, settings);
  const Tensor y = allocate(x.sizes(), x.scalar_type()), values = allocate({3, norm.rows});
  const RowValues to(values);
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Optional weights = in_float(weight, norm.features);
    const Optional biases = in_float(bias, norm.features);
    with_type(x, [&]<class T>(T*) {
      normalise<T>(norm, data<T>(x), data<float>(weights), data<float>(biases), data<T>(y), to);
    });
  }
  if (!all_within(to.inverse, norm.rows, 1 / HUGE_SCALE, INFINITY)) return std::nullopt;
  const auto learns = [](const Optional& tensor) { return tensor && tensor->requires_grad(); };
  const bool recorded = x.requires_grad() || learns(weight) || learns(bias);
  if (!(recorded && at::GradMode::is_enabled())) return y;
  return LayerNorm::apply(x, weight, bias, &y, &values, settings);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nmlightning, m) { m.def("layer_norm", layer_norm); }

}  // namespace nmlightning
