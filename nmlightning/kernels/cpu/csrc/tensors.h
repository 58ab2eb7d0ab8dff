// From tensors to the arrays that the kernels read and write.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "batch_norm.h"

namespace nmlightning {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t SHORTEST_RUN = AT_ONCE * LANES;  // of NHWC, for which there are registers
constexpr float SMALLEST_WEIGHT = 1e-30f;  // its products with gradients are normal floats
constexpr float HUGE_SCALE = 0x1p48f;  // of larger ŝ, sums in float may be infinite

// Calls part(null pointer of the element's type) for float32 or bfloat16.
template <class Part>
void with_type(const Tensor& x, Part part) {
  TORCH_CHECK(x.is_cpu(), "expected a tensor of the CPU");
  if (x.scalar_type() == at::kFloat) return part(static_cast<float*>(nullptr));
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "expected float32 or bfloat16");
  part(static_cast<BFloat16*>(nullptr));
}

inline at::MemoryFormat format_of(const Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  return x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

// What is read by the indices of x has to lie as x does.
inline void check_like(const Optional& tensor, const Tensor& x) {
  if (!tensor) return;
  TORCH_CHECK(tensor->device() == x.device() && tensor->scalar_type() == x.scalar_type() &&
                  tensor->sizes() == x.sizes() && tensor->is_contiguous(format_of(x)),
              "expected a residual like x");
}

inline Layout layout_of(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous(format_of(x)), "expected contiguous or channels-last elements");
  int64_t size = 1;
  for (int64_t dim = 2; dim < x.dim(); dim++) size *= x.size(dim);
  Layout layout{x.size(0), x.size(1), size, size == 1 || !x.is_contiguous()};
  while (layout.channels_last && layout.length() < SHORTEST_RUN &&
         layout.count() % (2 * layout.repeats) == 0 && layout.count())
    layout.repeats *= 2;
  return layout;
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const Optional& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// The values of channels, float32, repeated along a run; they stay alive as long as this does.
struct Values {
  Tensor held;
  float* data = nullptr;

  Values(const Optional& values, int64_t repeats) {
    if (!values) return;
    TORCH_CHECK(values->scalar_type() == at::kFloat, "expected float32 for channels");
    held = repeats == 1 ? values->contiguous() : values->repeat({repeats});
    data = held.data_ptr<float>();
  }
};

inline Values or_zeros(const Optional& values, const Layout& layout) {
  if (values) return Values(values, layout.repeats);
  return Values(at::zeros({layout.length()}, at::kFloat), 1);
}

inline Tensor empty_values(const Layout& layout) { return at::empty({5, layout.length()}, at::kFloat); }

inline Channels channels_of(const Tensor& values) {
  const int64_t n = values.size(1);
  float* p = values.data_ptr<float>();
  return {p, p + n, p + 2 * n, p + 3 * n, p + 4 * n};
}

// Whether x̂ = (y − residual − bias) / weight is near enough x − μ over σ to do without x. The
// rounding of y then is an error of x̂ below limit · (half a unit in the last place of 1). Where
// bias is negative, y > 0 is below |weight · x̂|, so only a large positive one harms.
inline bool learned_within(double limit, Fused fused, const float* weight, const float* bias, int64_t c) {
  for (int64_t i = 0; i < c; i++) {
    const float size = weight ? std::fabs(weight[i]) : 1.f;
    const bool reached = size >= SMALLEST_WEIGHT && size <= 1 / SMALLEST_WEIGHT &&
                         (fused == ADD_RELU || bias[i] <= limit * size);
    if (!reached) return false;
  }
  return limit >= 0;
}

// The same for what a residual makes of y: its root mean square within limit · |weight|.
inline bool squares_within(double limit, const float* weight, const std::vector<double>& squares,
                    int64_t count) {
  for (size_t i = 0; i < squares.size(); i++) {
    const double size = weight ? std::fabs(weight[i]) : 1;
    if (!(std::sqrt(squares[i] / double(count)) <= limit * size)) return false;
  }
  return true;
}

// Whether all values are from low to high; of NaN it is false.
inline bool all_within(const float* values, int64_t n, float low, float high) {
  int64_t outside = 0;
#pragma omp simd reduction(+ : outside)
  for (int64_t i = 0; i < n; i++) outside += !(low <= values[i] && values[i] <= high);
  return outside == 0;
}

// What forward writes, and whether x can be done without.
struct Forwarding {
  Layout layout;
  Values weight, bias;
  Fused fused;
  Tensor y, variance, values;
  double limit;
  bool x_free;
  std::vector<double> squares;

  Forwarding(const Tensor& x, const Optional& weight, const Optional& bias, int64_t fused,
             double limit)
      : layout(layout_of(x)), weight(weight, 1), bias(or_zeros(bias, layout)),
        fused(Fused(fused)), y(at::empty_like(x)), limit(limit) {
    variance = at::empty({x.size(1)}, at::kFloat);
    values = empty_values(layout);
    x_free = fused != NOTHING && learned_within(limit, this->fused, this->weight.data,
                                                this->bias.data, x.size(1));
    if (x_free && fused == ADD_RELU) squares.resize(x.size(1));
  }

  double* squares_if_asked() { return squares.empty() ? nullptr : squares.data(); }

  bool stays_x_free() const {
    return x_free && squares_within(limit, weight.data, squares, layout.count());
  }

  bool bounded() const {
    const float* p = variance.data_ptr<float>();
    return all_within(p, variance.numel(), 0, HUGE_SCALE * HUGE_SCALE);
  }

  // A copy: what is returned to a user may be changed in place.
  Tensor mean() const { return values.select(0, 0).slice(0, 0, layout.channels).clone(); }

  template <class T>
  Forward<T> arrays(const Tensor& x, const Optional& residual) {
    const Channels channels = channels_of(values);
    return {{data<T>(x), data<T>(residual), data<T>(y), channels.mean, channels.gain, bias.data},
            fused, weight.data, variance.data_ptr<float>(), channels};
  }
};

// What backward reads and writes, laid out as y or x.
struct Backwarding {
  Layout layout;
  Values weight, bias;
  Tensor grad, grad_x, grad_residual, grad_weight, grad_bias;

  Backwarding(const Tensor& given, const Tensor& like, const Optional& weight,
              const Optional& bias, bool added)
      : layout(layout_of(like)), weight(weight, 1), bias(or_zeros(bias, layout)),
        grad(given.contiguous(format_of(like))), grad_x(at::empty_like(like)) {
    TORCH_CHECK(grad.scalar_type() == like.scalar_type(), "expected a gradient of y's dtype");
    const auto options = like.options().dtype(at::kFloat);
    grad_residual = added ? at::empty_like(like) : at::empty({0}, like.options());
    grad_weight = at::empty({like.size(1)}, options);
    grad_bias = at::empty({like.size(1)}, options);
  }

  template <class T>
  Backward<T> arrays(const Optional& x, const Optional& y, const Optional& residual,
                     const Channels& channels) {
    return {data<T>(grad), data<T>(x), data<T>(y), data<T>(residual), weight.data, bias.data,
            channels, data<T>(grad_x), grad_residual.numel() ? data<T>(grad_residual) : nullptr,
            grad_weight.data_ptr<float>(), grad_bias.data_ptr<float>()};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> results() {
    return {grad_x, grad_residual, grad_weight, grad_bias};
  }
};

}  // namespace nmlightning
