// Operators on the weights of a network, all in one call: the norms of their output channels and of
// steps, and the weights w = s v / ‖v‖ as one node of autograd.
//
// A channel is a row of memory. Each is worked on by one thread: their number changes no result.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <numeric>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "tensors.h"

namespace nmlightning {
namespace {

using at::TensorList;
using torch::autograd::Node;
using torch::autograd::variable_list;
using Orders = at::ArrayRef<double>;  // p of each weight: 1, 2 or infinity

constexpr int64_t ELEMENTS_A_SUM = 1024;  // in the type of the norm, before they are added in double
constexpr int64_t ELEMENTS_A_LOOK = 64;
constexpr int64_t ELEMENTS_A_THREAD = 32768;

#define WITH_TYPE(tensor, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, tensor.scalar_type(), "norm", __VA_ARGS__)

bool is_readable(const Tensor& x) {
  const auto type = x.scalar_type();
  return x.is_cpu() && x.layout() == at::kStrided && x.numel() && !x.is_neg() &&
         !torch::autograd::isFwGradDefined(x) &&
         (type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16);
}

// Returns the weights with each channel in one piece, or nothing where one is not for the kernels.
variable_list in_rows(TensorList vs) {
  variable_list found;
  for (const Tensor& v : vs) {
    if (!is_readable(v)) return {};
    const bool fits = v.dim() < 2 || v.size(0) == 1 || v.stride(0) == v.numel() / v.size(0);
    found.push_back(fits && v.is_non_overlapping_and_dense() ? v : v.contiguous());
  }
  return found;
}

// The rows of one weight, and how many rows and elements the weights before it have.
struct Rows {
  int64_t count, length, row, element;
};

std::vector<Rows> rows_of(TensorList vs) {
  std::vector<Rows> all;
  Rows next{0, 0, 0, 0};
  for (const Tensor& v : vs) {
    const int64_t count = v.dim() > 1 ? v.size(0) : 1;
    next = {count, v.numel() / count, next.row + next.count, next.element + next.count * next.length};
    all.push_back(next);
  }
  return all;
}

// Calls work(number of a weight, first and last row, null pointer of its type) for all rows, each in
// the thread that has its first element.
template <class Work>
void each_rows(TensorList vs, const std::vector<Rows>& all, Work work) {
  const int64_t elements = all.back().element + vs.back().numel();
  at::parallel_for(0, elements, ELEMENTS_A_THREAD, [&](int64_t from, int64_t to) {
    for (size_t k = 0; k < all.size(); k++) {
      const Rows& rows = all[k];
      const auto row = [&](int64_t element) {
        return std::clamp<int64_t>((element - rows.element + rows.length - 1) / rows.length, 0, rows.count);
      };
      if (row(from) < row(to))
        WITH_TYPE(vs[k], [&] { work(k, row(from), row(to), static_cast<scalar_t*>(nullptr)); });
    }
  });
}

template <class A, class Term>
A sum(int64_t n, Term term) {
  double total = 0;
  for (int64_t from = 0; from < n; from += ELEMENTS_A_SUM) {
    A part = 0;
    const int64_t to = std::min(n, from + ELEMENTS_A_SUM);
#pragma omp simd reduction(+ : part)
    for (int64_t i = from; i < to; i++) part += term(i);
    total += part;
  }
  return A(total);
}

template <class A, class T>
A norm_of(const T* x, int64_t n, double p) {
  if (p == 1) return sum<A>(n, [=](int64_t i) { return std::abs(A(x[i])); });
  if (p == 2) return std::sqrt(sum<A>(n, [=](int64_t i) { return A(x[i]) * A(x[i]); }));
  A largest = 0;
  int64_t nans = 0;
#pragma omp simd reduction(max : largest) reduction(+ : nans)
  for (int64_t i = 0; i < n; i++) {
    const A size = std::abs(A(x[i]));
    largest = size > largest ? size : largest;
    nans += size != size;
  }
  return nans ? std::numeric_limits<A>::quiet_NaN() : largest;
}

template <class A, class T>
A dot_of(const T* x, const T* y, int64_t n) {
  return sum<A>(n, [=](int64_t i) { return A(x[i]) * A(y[i]); });
}

template <class A, class T>
void scale_row(const T* v, T* w, int64_t n, A factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) w[i] = T(A(v[i]) * factor);
}

// Returns the first element of this size, or else the last of all.
template <class A, class T>
int64_t find_size(const T* x, int64_t n, A size) {
  int64_t from = 0;
  for (int found = 0; from + ELEMENTS_A_LOOK <= n; from += ELEMENTS_A_LOOK) {
#pragma omp simd reduction(| : found)
    for (int64_t i = from; i < from + ELEMENTS_A_LOOK; i++) found |= std::abs(A(x[i])) == size;
    if (found) break;
  }
  while (from < n - 1 && std::abs(A(x[from])) != size) from++;
  return std::min(from, n - 1);
}

// Writes dv = factor (dw - dot ∂‖v‖), perhaps over dw; of p = ∞, the first of several largest moves.
template <class A, class T>
void differentiate_row(const T* v, const T* dw, T* dv, int64_t n, double p, A norm, A factor, A dot) {
  const A along = factor * dot / (p == 2 ? norm : 1);
  if (p == 2) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dv[i] = T(A(dw[i]) * factor - A(v[i]) * along);
  } else if (p == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
      dv[i] = T(A(dw[i]) * factor - (A(v[i]) > 0 ? along : A(v[i]) < 0 ? -along : A(0)));
  } else {
    const int64_t i = find_size(v, n, norm);
    const T moved = T(A(dw[i]) * factor - (A(v[i]) > 0 ? along : -along));
    scale_row(dw, dv, n, factor);
    dv[i] = moved;
  }
}

// w in torch's operations, for derivatives of the gradients.
Tensor formula(const Tensor& v, const Tensor& scales, double p) {
  const auto type = at::promote_types(v.scalar_type(), at::kFloat);
  const Tensor x = v.reshape({v.dim() > 1 ? v.size(0) : 1, -1});
  const Tensor norms = p == 1   ? x.abs().sum(1, true, type)
                       : p == 2 ? at::linalg_vector_norm(x, 2, 1, true, type)
                                : x.gather(1, x.detach().abs().argmax(1, true)).abs().to(type);
  const Tensor zero = norms == 0;
  const Tensor factors = scales.reshape({-1, 1}) * zero.logical_not();
  return (x / norms.masked_fill(zero, 1) * factors).to(v.scalar_type()).view(v.sizes());
}

// The node. It holds its inputs as they are, not as saved variables: several backward passes may use
// it, and none of what it holds counts in a checkpointed part of a network.
struct NormalisedWeights : Node {
  variable_list vs, scales;
  std::vector<double> orders, norms;  // p of each weight, and ‖v_i‖ of each row
  std::vector<Rows> rows;
  std::vector<uint32_t> versions;

  std::vector<uint32_t> count_changes() const {
    std::vector<uint32_t> changes;
    for (const auto* tensors : {&vs, &scales})
      for (const Tensor& tensor : *tensors) changes.push_back(tensor._version());
    return changes;
  }

  template <class T>
  void normalise(const Tensor& w, size_t k, int64_t row, int64_t last) {
    using A = at::opmath_type<T>;
    const int64_t n = rows[k].length;
    const T* v = vs[k].const_data_ptr<T>();
    T* to = w.mutable_data_ptr<T>();
    for (; row < last; row++) {
      const A norm = norm_of<A>(v + row * n, n, orders[k]);
      norms[rows[k].row + row] = norm;
      scale_row(v + row * n, to + row * n, n, factor(k, row, norm));
    }
  }

  template <class A>
  A factor(size_t k, int64_t row, A norm) const {
    const int64_t i = scales[k].numel() == 1 ? 0 : row;
    return norm == 0 ? A(0) : WITH_TYPE(scales[k], [&] { return A(scales[k].const_data_ptr<scalar_t>()[i]) / norm; });
  }

  variable_list apply(variable_list&& dws) override {
    const size_t count = vs.size();
    variable_list grads(2 * count), dvs(count);
    std::vector<double> dots(norms.size());
    const auto changes = count_changes();
    // By operations: gradients that are differentiated again, and many in one.
    const bool again = at::GradMode::is_enabled();
    const bool plainly = !again && std::all_of(dws.begin(), dws.end(), [](const Tensor& dw) {
      return !dw.defined() || is_plain(dw);
    });
    for (size_t k = 0; k < count; k++) {
      if (!dws[k].defined()) continue;
      TORCH_CHECK(changes[k] == versions[k] && changes[count + k] == versions[count + k],
                  "A normalised weight was changed in place since the forward pass, so the gradient "
                  "of that pass can no longer be computed.");
      if (!plainly) {
        at::AutoGradMode enabled(true);
        const Tensor w = formula(vs[k], scales[k], orders[k]);
        for (size_t i : {k, count + k})
          if (task_should_compute_output(i))
            grads[i] = torch::autograd::grad({w}, {i == k ? vs[k] : scales[k]}, {dws[k]}, true, again)[0];
        continue;
      }
      const bool is_ours = dws[k].use_count() == 1 && dws[k].storage().use_count() == 1;
      const bool is_alike = dws[k].strides() == vs[k].strides();
      if (!is_alike) dws[k] = at::empty_like(vs[k]).copy_(dws[k]);
      dvs[k] = is_ours || !is_alike ? dws[k] : at::empty_like(vs[k]);
    }
    if (!plainly) return grads;
    each_rows(vs, rows, [&]<class T>(size_t k, int64_t row, int64_t last, T*) {
      if (dws[k].defined()) differentiate<T>(dws[k], dvs[k], dots, k, row, last);
    });
    for (size_t k = 0; k < count; k++) {
      if (dws[k].defined() && task_should_compute_output(k)) grads[k] = dvs[k];
      if (dws[k].defined() && task_should_compute_output(count + k))
        grads[count + k] = scale_gradient(scales[k], &dots[rows[k].row], rows[k].count);
    }
    return grads;
  }

  template <class T>
  void differentiate(const Tensor& dw, const Tensor& dv, std::vector<double>& dots, size_t k,
                     int64_t row, int64_t last) const {
    using A = at::opmath_type<T>;
    const int64_t n = rows[k].length;
    const T *v = vs[k].const_data_ptr<T>(), *from = dw.const_data_ptr<T>();
    T* to = dv.mutable_data_ptr<T>();
    for (; row < last; row++) {
      const A saved = A(norms[rows[k].row + row]), norm = saved == 0 ? A(1) : saved;
      const A dot = dot_of<A>(v + row * n, from + row * n, n) / norm;
      dots[rows[k].row + row] = dot;
      differentiate_row(v + row * n, from + row * n, to + row * n, n, orders[k], norm,
                        factor(k, row, saved), dot);
    }
  }

  static Tensor scale_gradient(const Tensor& scales, const double* dots, int64_t rows) {
    Tensor grad = at::empty_like(scales);
    const double total = scales.numel() == 1 ? std::accumulate(dots, dots + rows, 0.0) : 0;
    WITH_TYPE(scales, [&] {
      scalar_t* to = grad.mutable_data_ptr<scalar_t>();
      for (int64_t i = 0; i < scales.numel(); i++) to[i] = scales.numel() == 1 ? total : dots[i];
    });
    return grad;
  }
};

// Torch holds nodes by another pointer from 2.15 on.
template <class Made, class Pointer = decltype(torch::autograd::Edge::function)>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) return std::make_shared<Made>();
  else return c10::make_intrusive<Made>();
}

// Returns nothing where a weight is not for it.
variable_list normalise_weights(TensorList given, TensorList scales, Orders orders) {
  for (size_t k = 0; k < given.size(); k++) {
    if (!is_readable(scales[k]) || !scales[k].is_contiguous()) return {};
    if (given[k].is_inference() || scales[k].is_inference()) return {};
  }
  auto node = make_node<NormalisedWeights>();
  node->vs = in_rows(given);
  if (node->vs.empty()) return {};
  const variable_list& vs = node->vs;
  node->scales = scales.vec();
  node->orders = orders.vec();
  node->rows = rows_of(vs);
  node->norms.resize(node->rows.back().row + node->rows.back().count);
  node->versions = node->count_changes();
  variable_list ws;
  for (const Tensor& v : vs) ws.push_back(at::empty_like(v));
  each_rows(vs, node->rows, [&]<class T>(size_t k, int64_t row, int64_t last, T*) {
    node->template normalise<T>(ws[k], k, row, last);
  });
  if (!torch::autograd::compute_requires_grad(vs, scales)) return ws;
  node->set_next_edges(torch::autograd::collect_next_edges(vs, scales));
  for (size_t k = 0; k < ws.size(); k++) {
    const bool learned = vs[k].requires_grad() || scales[k].requires_grad();
    torch::autograd::set_history(learned ? ws[k] : Tensor(), node);
  }
  return ws;
}

std::optional<Tensor> normalise_weight(const Tensor& v, const Tensor& scales, double p) {
  const variable_list ws = normalise_weights(v, scales, p);
  return ws.empty() ? std::nullopt : std::optional<Tensor>(ws[0]);
}

// Returns ‖w_i‖_p of all channels of all weights in float32; there is none in an empty one.
Tensor row_norms(TensorList given, double p) {
  const variable_list ws = in_rows(given);
  if (ws.empty()) return at::empty({0}, at::kFloat);
  const std::vector<Rows> rows = rows_of(ws);
  Tensor norms = at::empty({rows.back().row + rows.back().count}, at::kFloat);
  float* to = norms.mutable_data_ptr<float>();
  each_rows(ws, rows, [&]<class T>(size_t k, int64_t row, int64_t last, T*) {
    const int64_t n = rows[k].length;
    const T* w = ws[k].const_data_ptr<T>();
    for (; row < last; row++) to[rows[k].row + row] = norm_of<at::opmath_type<T>>(w + row * n, n, p);
  });
  return norms;
}

bool are_alike(const Tensor& x, const Tensor& y) {
  return x.sizes() == y.sizes() && x.strides() == y.strides() && x.dtype() == y.dtype();
}

// Copies weights, past the caches of x86, which would not keep them until the end of the step.
void copy_weights(TensorList to, TensorList from) {
  for (size_t k = 0; k < to.size(); k++) {
    const Tensor &y = to[k], &x = from[k];
#ifdef __SSE2__
    constexpr int64_t SIZE = sizeof(__m128i);
    if (is_readable(x) && x.is_non_overlapping_and_dense() && are_alike(x, y) && x.nbytes() % SIZE == 0 &&
        uintptr_t(y.mutable_data_ptr()) % SIZE == 0) {
      const auto* source = static_cast<const __m128i_u*>(x.const_data_ptr());
      auto* target = static_cast<__m128i*>(y.mutable_data_ptr());
      at::parallel_for(0, x.nbytes() / SIZE, ELEMENTS_A_THREAD, [=](int64_t i, int64_t last) {
        for (; i < last; i++) _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
        _mm_sfence();
      });
      continue;
    }
#endif
    y.copy_(x);
  }
}

// Returns ‖w_i‖₂, ‖b_i‖₂ and ‖w_i − b_i‖₂, (3, C) in float32, of all channels of weights after a step
// and before it, of which memory is read once; or nothing where one is not for it.
Tensor step_norms(TensorList after, TensorList before) {
  const variable_list ws = in_rows(after), bs = in_rows(before);
  bool alike = !ws.empty() && ws.size() == bs.size();
  for (size_t k = 0; alike && k < ws.size(); k++) alike = are_alike(ws[k], bs[k]);
  if (!alike) return at::empty({0}, at::kFloat);
  const std::vector<Rows> rows = rows_of(ws);
  const int64_t channels = rows.back().row + rows.back().count;
  Tensor norms = at::empty({3, channels}, at::kFloat);
  float* found = norms.mutable_data_ptr<float>();
  each_rows(ws, rows, [&]<class T>(size_t k, int64_t row, int64_t last, T*) {
    using A = at::opmath_type<T>;
    const int64_t n = rows[k].length;
    const T *w = ws[k].const_data_ptr<T>() + row * n, *b = bs[k].const_data_ptr<T>() + row * n;
    for (; row < last; row++, w += n, b += n) {
      float* to = found + rows[k].row + row;
      to[0] = norm_of<A>(w, n, 2);
      to[channels] = norm_of<A>(b, n, 2);
      to[2 * channels] = std::sqrt(sum<A>(n, [=](int64_t i) {
        const A step = A(w[i]) - A(b[i]);
        return step * step;
      }));
    }
  });
  return norms;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nmlightning, m) {
  m.def("normalise_weights", normalise_weights);
  m.def("normalise_weight", normalise_weight);
  m.def("row_norms", row_norms);
  m.def("step_norms", step_norms);
  m.def("copy_weights", copy_weights);
}

}  // namespace nmlightning
