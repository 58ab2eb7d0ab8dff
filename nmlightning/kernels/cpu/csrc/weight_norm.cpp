// Operators on the weights of a network, all in one call: the norms of their output channels, and the
// weights w = s v / ‖v‖ as one node of autograd.
//
// A channel is a row of memory. Each is worked on by one thread: their number changes no result.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <bit>
#include <cmath>
#include <numeric>

namespace nmlightning {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Orders = at::ArrayRef<double>;  // p of each weight: 1, 2 or infinity

constexpr int64_t ELEMENTS_A_SUM = 1024;  // in the type of the norm, before they are added in double
constexpr int64_t ELEMENTS_A_THREAD = 32768;

#define WITH_TYPE(tensor, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, tensor.scalar_type(), "norm", __VA_ARGS__)

bool is_readable(const Tensor& x) {
  const auto type = x.scalar_type();
  return x.is_cpu() && x.layout() == at::kStrided && x.numel() && !x.is_neg() &&
         (type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16);
}

// Returns the weights with each channel in one piece, or nothing where one is not for the kernels.
std::vector<Tensor> in_rows(TensorList vs) {
  std::vector<Tensor> found;
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

// Sums in four parts of a block, which do not wait for each other.
template <class A, class Term>
A sum(int64_t n, Term term) {
  double total = 0;
  for (int64_t from = 0; from < n; from += ELEMENTS_A_SUM) {
    const int64_t size = std::min(n - from, ELEMENTS_A_SUM), part = size / 4;
    A a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = from; i < from + part; i++) {
      a += term(i);
      b += term(i + part);
      c += term(i + 2 * part);
      d += term(i + 3 * part);
    }
    for (int64_t i = from + 4 * part; i < from + size; i++) a += term(i);
    total += (a + b) + (c + d);
  }
  return A(total);
}

template <class A, class T>
A norm_of(const T* x, int64_t n, double p) {
  if (p == 1) return sum<A>(n, [=](int64_t i) { return std::abs(A(x[i])); });
  if (p == 2) return std::sqrt(sum<A>(n, [=](int64_t i) { return A(x[i]) * A(x[i]); }));
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;  // those of NaN are the largest
  Bits largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; i++) largest = std::max(largest, std::bit_cast<Bits>(std::abs(A(x[i]))));
  return std::bit_cast<A>(largest);
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
    const int64_t largest = std::find_if(v, v + n - 1, [=](T x) { return std::abs(A(x)) == norm; }) - v;
    const T moved = T(A(dw[largest]) * factor - (A(v[largest]) > 0 ? along : -along));
    scale_row(dw, dv, n, factor);
    dv[largest] = moved;
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
  const Tensor factors = scales.reshape({-1, 1}) * zero.logical_not() / norms.masked_fill(zero, 1);
  return (x * factors).to(v.scalar_type()).view(v.sizes());
}

struct Inputs : torch::CustomClassHolder {
  std::vector<Tensor> vs, scales;
  std::vector<double> orders, factors, norms;  // p of each weight; s_i, and ‖v_i‖, of each row
  std::vector<Rows> rows;
  std::vector<uint32_t> versions;

  Inputs(TensorList vs, TensorList scales, Orders orders)
      : vs(vs.vec()), scales(scales.vec()), orders(orders.vec()), rows(rows_of(vs)),
        versions(count_changes()) {
    norms.resize(rows.back().row + rows.back().count);
    for (size_t k = 0; k < vs.size(); k++)
      WITH_TYPE(scales[k], [&] {
        const scalar_t* s = scales[k].const_data_ptr<scalar_t>();
        const bool each = scales[k].numel() > 1;
        for (int64_t i = 0; i < rows[k].count; i++) factors.push_back(double(s[each ? i : 0]));
      });
  }

  std::vector<uint32_t> count_changes() const {
    std::vector<uint32_t> changes;
    for (const auto* tensors : {&vs, &scales})
      for (const Tensor& tensor : *tensors) changes.push_back(tensor._version());
    return changes;
  }
};

// The node. What it needs is held as data, not as saved variables: several backward passes may use
// it, and none of what it holds counts in a checkpointed part of a network.
struct NormaliseWeights : torch::autograd::Function<NormaliseWeights> {
  static variable_list forward(AutogradContext* ctx, TensorList vs, TensorList scales, Orders orders) {
    auto held = c10::make_intrusive<Inputs>(vs, scales, orders);
    Inputs& of = *held;
    variable_list ws, constant;
    for (size_t k = 0; k < vs.size(); k++) {
      ws.push_back(at::empty_like(vs[k]));
      if (!vs[k].requires_grad() && !scales[k].requires_grad()) constant.push_back(ws[k]);
    }
    each_rows(vs, of.rows, [&]<class T>(size_t k, int64_t row, int64_t last, T*) {
      using A = at::opmath_type<T>;
      const int64_t n = of.rows[k].length, first = of.rows[k].row;
      const T* v = vs[k].const_data_ptr<T>();
      T* w = ws[k].mutable_data_ptr<T>();
      for (; row < last; row++) {
        const A norm = norm_of<A>(v + row * n, n, orders[k]);
        of.norms[first + row] = norm;
        scale_row(v + row * n, w + row * n, n, norm == 0 ? A(0) : A(of.factors[first + row]) / norm);
      }
    });
    ctx->mark_non_differentiable(constant);
    ctx->set_materialize_grads(false);
    ctx->saved_data["inputs"] = at::IValue::make_capsule(std::move(held));
    return ws;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& dws) {
    const auto held = ctx->saved_data["inputs"].toCapsule();
    const Inputs& of = static_cast<const Inputs&>(*held);
    const auto &vs = of.vs, &scales = of.scales;
    const size_t count = vs.size();
    variable_list grads(2 * count + 1), dvs(count);
    std::vector<double> dots(of.norms.size());
    const auto versions = of.count_changes();
    for (size_t k = 0; k < count; k++) {
      if (!dws[k].defined()) continue;
      TORCH_CHECK(versions[k] == of.versions[k] && versions[count + k] == of.versions[count + k],
                  "A normalised weight was changed in place since the forward pass, so the gradient "
                  "of that pass can no longer be computed.");
      if (at::GradMode::is_enabled()) {
        const Tensor w = formula(vs[k], scales[k], of.orders[k]);
        for (size_t i : {k, count + k})
          if (ctx->needs_input_grad(i))
            grads[i] = torch::autograd::grad({w}, {i == k ? vs[k] : scales[k]}, {dws[k]}, true, true)[0];
        continue;
      }
      const bool is_ours = dws[k].use_count() == 1 && dws[k].storage().use_count() == 1;
      const bool is_alike = dws[k].strides() == vs[k].strides();
      if (!is_alike) dws[k] = at::empty_like(vs[k]).copy_(dws[k]);
      dvs[k] = is_ours || !is_alike ? dws[k] : at::empty_like(vs[k]);
    }
    if (at::GradMode::is_enabled()) return grads;
    each_rows(vs, of.rows, [&]<class T>(size_t k, int64_t row, int64_t last, T*) {
      if (!dws[k].defined()) return;
      using A = at::opmath_type<T>;
      const int64_t n = of.rows[k].length, first = of.rows[k].row;
      const T *v = vs[k].const_data_ptr<T>(), *dw = dws[k].const_data_ptr<T>();
      T* dv = dvs[k].mutable_data_ptr<T>();
      for (; row < last; row++) {
        const A saved = A(of.norms[first + row]), norm = saved == 0 ? A(1) : saved;
        const A factor = saved == 0 ? A(0) : A(of.factors[first + row]) / norm;
        const int64_t at = row * n;
        const A dot = dot_of<A>(v + at, dw + at, n) / norm;
        dots[first + row] = dot;
        differentiate_row(v + at, dw + at, dv + at, n, of.orders[k], norm, factor, dot);
      }
    });
    for (size_t k = 0; k < count; k++) {
      if (dws[k].defined() && ctx->needs_input_grad(k)) grads[k] = dvs[k];
      if (dws[k].defined() && ctx->needs_input_grad(count + k))
        grads[count + k] = scale_gradient(scales[k], &dots[of.rows[k].row], of.rows[k].count);
    }
    return grads;
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

// Returns nothing where a weight is not for it.
std::vector<Tensor> normalise_weights(TensorList vs, TensorList scales, Orders orders) {
  for (size_t k = 0; k < vs.size(); k++) {
    if (!is_readable(scales[k]) || !scales[k].is_contiguous()) return {};
    if (vs[k].is_inference() || scales[k].is_inference()) return {};
  }
  const std::vector<Tensor> rows = in_rows(vs);
  if (rows.empty()) return {};
  return NormaliseWeights::apply(TensorList(rows), scales, orders);
}

// Returns ‖w_i‖_p of all channels of all weights in float32; there is none in an empty one.
Tensor row_norms(TensorList given, double p) {
  const std::vector<Tensor> ws = in_rows(given);
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(nmlightning, m) {
  m.def("normalise_weights", normalise_weights);
  m.def("row_norms", row_norms);
}

}  // namespace nmlightning
