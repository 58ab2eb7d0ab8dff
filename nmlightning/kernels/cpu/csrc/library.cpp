// The operators torch.ops.nmlightning.*: they look at tensors and call the kernels.
//
// Each is registered for all dispatch keys, because autograd functions call them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "batch_norm.h"
#include "layer_norm.h"
#include "sign_bits.h"

namespace nmlightning {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t SHORTEST_RUN = 64;  // of NHWC; a few vectors, so that starting a loop costs little
constexpr float SMALLEST_WEIGHT = 1e-30f;  // its products with gradients are normal floats

// Calls part(null pointer of the element's type) for float32 or bfloat16.
template <class Part>
void with_type(const Tensor& x, Part part) {
  TORCH_CHECK(x.is_cpu(), "expected a tensor of the CPU");
  if (x.scalar_type() == at::kFloat) return part(static_cast<float*>(nullptr));
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "expected float32 or bfloat16");
  part(static_cast<BFloat16*>(nullptr));
}

at::MemoryFormat format_of(const Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  return x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

// What is read by the indices of x has to lie as x does.
void check_like(const Optional& tensor, const Tensor& x) {
  if (!tensor) return;
  TORCH_CHECK(tensor->device() == x.device() && tensor->scalar_type() == x.scalar_type() &&
                  tensor->sizes() == x.sizes() && tensor->is_contiguous(format_of(x)),
              "expected a residual like x");
}

Layout layout_of(const Tensor& x) {
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

Values or_zeros(const Optional& values, const Layout& layout) {
  if (values) return Values(values, layout.repeats);
  return Values(at::zeros({layout.length()}, at::kFloat), 1);
}

Tensor empty_values(const Layout& layout) { return at::empty({5, layout.length()}, at::kFloat); }

Channels channels_of(const Tensor& values) {
  const int64_t n = values.size(1);
  float* p = values.data_ptr<float>();
  return {p, p + n, p + 2 * n, p + 3 * n, p + 4 * n};
}

// Whether x̂ = (y − residual − bias) / weight is near enough x − μ over σ to do without x. The
// rounding of y then is an error of x̂ below limit · (half a unit in the last place of 1). Where
// bias is negative, y > 0 is below |weight · x̂|, so only a large positive one harms.
bool learned_within(double limit, Fused fused, const float* weight, const float* bias, int64_t c) {
  for (int64_t i = 0; i < c; i++) {
    const float size = weight ? std::fabs(weight[i]) : 1.f;
    const bool reached = size >= SMALLEST_WEIGHT && size <= 1 / SMALLEST_WEIGHT &&
                         (fused == ADD_RELU || bias[i] <= limit * size);
    if (!reached) return false;
  }
  return limit >= 0;
}

// The same for what a residual makes of y: its root mean square within limit · |weight|.
bool squares_within(double limit, const float* weight, const std::vector<double>& squares,
                    int64_t count) {
  for (size_t i = 0; i < squares.size(); i++) {
    const double size = weight ? std::fabs(weight[i]) : 1;
    if (!(std::sqrt(squares[i] / double(count)) <= limit * size)) return false;
  }
  return true;
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> l1_forward_op(
    const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias,
    double constant, double eps, int64_t fused, double limit) {
  check_like(residual, x);
  Forwarding to(x, weight, bias, fused, limit);
  const SignBits bits(to.layout);
  Tensor words = at::empty({to.x_free ? bits.words() : 0}, x.options().dtype(at::kInt));
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    l1_forward<T>(to.layout, {constant, eps}, to.arrays<T>(x, residual),
                  to.x_free ? data<uint32_t>(words) : nullptr, to.squares_if_asked());
  });
  if (!to.stays_x_free()) words = at::empty({0}, words.options());
  return {to.y, to.mean(), to.variance, to.values, words};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> l1_backward_op(
    const Tensor& grad, const Optional& x, const Optional& y, const Optional& residual,
    const Optional& words, const Optional& weight, const Optional& bias, const Tensor& values,
    bool added) {
  Backwarding to(grad, x ? *x : *y, weight, bias, added);
  with_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    l1_backward<T>(to.layout, to.arrays<T>(x, y, residual, channels_of(values)),
                   data<uint32_t>(words));
  });
  return to.results();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool> largest_forward_op(
    const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias,
    double constant, double eps, int64_t fused, int64_t k, double limit) {
  check_like(residual, x);
  Forwarding to(x, weight, bias, fused, limit);
  TORCH_CHECK(1 <= k && k <= to.layout.count(), "expected 1 <= k <= n");
  const Tensor positions = at::empty({x.size(1), k}, x.options().dtype(at::kLong));
  const Tensor deviations = at::empty({x.size(1), k}, x.options().dtype(at::kFloat));
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    largest_forward<T>(to.layout, {constant, eps}, to.arrays<T>(x, residual), k,
                       data<int64_t>(positions), data<float>(deviations),
                       to.squares_if_asked());
  });
  return {to.y, to.mean(), to.variance, to.values, positions, deviations, to.stays_x_free()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> largest_backward_op(
    const Tensor& grad, const Optional& x, const Optional& y, const Optional& residual,
    const Tensor& positions, const Tensor& deviations, const Optional& weight,
    const Optional& bias, const Tensor& values, bool added) {
  Backwarding to(grad, x ? *x : *y, weight, bias, added);
  with_type(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    largest_backward<T>(to.layout, to.arrays<T>(x, y, residual, channels_of(values)),
                        positions.size(1), data<int64_t>(positions), data<float>(deviations));
  });
  return to.results();
}

Tensor sums_op(const Tensor& x) {
  Tensor totals = at::empty({x.size(1)}, x.options().dtype(at::kFloat));
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sums<T>(layout_of(x), data<T>(x), data<float>(totals));
  });
  return totals;
}

Tensor sums_of_sizes_op(const Tensor& x, const Tensor& mean) {
  Tensor totals = at::empty({x.size(1)}, x.options().dtype(at::kFloat));
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Layout layout = layout_of(x);
    const Values means(mean, layout.repeats);
    sums_of_sizes<T>(layout, data<T>(x), means.data, data<float>(totals));
  });
  return totals;
}

std::tuple<Tensor, Tensor> largest_op(const Tensor& x, const Tensor& mean, int64_t k) {
  TORCH_CHECK(k >= 1, "expected k >= 1");
  Tensor positions = at::empty({x.size(1), k}, x.options().dtype(at::kLong));
  Tensor deviations = at::empty({x.size(1), k}, x.options().dtype(at::kFloat));
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Layout layout = layout_of(x);
    const Values means(mean, layout.repeats);
    largest<T>(layout, data<T>(x), means.data, k, data<int64_t>(positions),
               data<float>(deviations));
  });
  return {positions, deviations};
}

Tensor affine_op(const Tensor& x, const Optional& residual, const Tensor& mean, const Tensor& gain,
                 const Tensor& bias, int64_t fused) {
  check_like(residual, x);
  Tensor y = at::empty_like(x);
  const Layout layout = layout_of(x);
  const Values means(mean, layout.repeats);
  const Values gains(gain, layout.repeats), biases(bias, layout.repeats);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    affine<T>(layout,
              {data<T>(x), data<T>(residual), data<T>(y), means.data, gains.data, biases.data},
              Fused(fused));
  });
  return y;
}

Tensor gradient_sums_op(const Tensor& grad, const Tensor& x, const Optional& y,
                        const Tensor& mean, bool slopes) {
  const Tensor laid_out = grad.contiguous(format_of(x));
  Tensor totals = at::empty({3, x.size(1)}, x.options().dtype(at::kFloat));
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Layout layout = layout_of(x);
    const Values means(mean, layout.repeats);
    gradient_sums<T>(layout, data<T>(laid_out), data<T>(x), data<T>(y), means.data, slopes,
                     data<float>(totals));
  });
  return totals;
}

std::tuple<Tensor, Tensor> gradient_op(const Tensor& grad, const Tensor& x, const Optional& y,
                                       const Tensor& mean, const Tensor& gain,
                                       const Tensor& offset, const Optional& pull) {
  const Tensor laid_out = grad.contiguous(format_of(x));
  Tensor grad_x = at::empty_like(x), masked = y ? at::empty_like(x) : laid_out;
  const Layout layout = layout_of(x);
  const Values means(mean, layout.repeats), gains(gain, layout.repeats);
  const Values offsets(offset, layout.repeats), pulls(pull, layout.repeats);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Channels channels{means.data, nullptr, nullptr, nullptr, gains.data};
    gradient<T>(layout,
                {data<T>(laid_out), data<T>(x), data<T>(y), nullptr, nullptr, nullptr, channels,
                 data<T>(grad_x), y ? data<T>(masked) : nullptr, nullptr, nullptr},
                offsets.data, pulls.data);
  });
  return {grad_x, masked};
}

// Moves the running statistics towards the batch's in channels where these and the result are
// finite, and counts the batch.
void track_op(const Tensor& running_mean, const Tensor& running_var, const Optional& batches,
              const Tensor& mean, const Tensor& variance, double momentum) {
  const int64_t c = mean.numel();
  const auto move = [=](const Tensor& running, const float* own, const float* other) {
    TORCH_CHECK(running.is_contiguous() && running.scalar_type() == at::kFloat,
                "expected contiguous float32 running statistics");
    float* to = running.data_ptr<float>();
    for (int64_t i = 0; i < c; i++) {
      const float moved = to[i] + float(momentum) * (own[i] - to[i]);
      if (std::isfinite(own[i]) && std::isfinite(other[i]) && std::isfinite(moved)) to[i] = moved;
    }
    running.unsafeGetTensorImpl()->bump_version();
  };
  const float *means = mean.data_ptr<float>(), *variances = variance.data_ptr<float>();
  move(running_mean, means, variances);
  move(running_var, variances, means);
  if (!batches) return;
  *batches->data_ptr<int64_t>() += 1;
  batches->unsafeGetTensorImpl()->bump_version();
}

RowValues row_values(const Tensor& values) {
  const int64_t rows = values.size(1);
  float* p = values.data_ptr<float>();
  return {p, p + rows, p + 2 * rows};
}

Rows rows_of(const Tensor& x, int64_t features, bool centred) {
  TORCH_CHECK(x.is_contiguous(), "expected contiguous elements");
  return {features ? x.numel() / features : 0, features, centred};
}

std::tuple<Tensor, Tensor> layer_norm_forward_op(const Tensor& x, int64_t features,
                                                 const Optional& weight, const Optional& bias,
                                                 double constant, double eps, bool centred) {
  const Rows rows = rows_of(x, features, centred);
  const auto options = x.options().dtype(at::kFloat);
  const Values weights(weight || !bias ? weight : at::ones({features}, options), 1);
  const Values biases(bias || !weights.data ? bias : at::zeros({features}, options), 1);
  Tensor y = at::empty_like(x), values = at::empty({3, rows.rows}, options);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    layer_norm_forward<T>(rows, constant, eps, data<T>(x), weights.data, biases.data, data<T>(y),
                          row_values(values));
  });
  return {y, values};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_op(const Tensor& given, const Tensor& x,
                                                          int64_t features,
                                                          const Optional& weight,
                                                          const Tensor& values, bool learned,
                                                          bool centred) {
  const Rows rows = rows_of(x, features, centred);
  const auto options = x.options().dtype(at::kFloat);
  const Values weights(weight || !learned ? weight : at::ones({features}, options), 1);
  const Tensor grad = given.contiguous();
  Tensor grad_x = at::empty_like(x);
  Tensor grad_weight = at::empty({learned ? features : 0}, options);
  Tensor grad_bias = at::empty({learned ? features : 0}, options);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    layer_norm_backward<T>(rows, data<T>(grad), data<T>(x), weights.data, row_values(values),
                           data<T>(grad_x), data<float>(grad_weight), data<float>(grad_bias));
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY(nmlightning, m) {
  m.def("l1_forward", l1_forward_op);
  m.def("l1_backward", l1_backward_op);
  m.def("largest_forward", largest_forward_op);
  m.def("largest_backward", largest_backward_op);
  m.def("sums", sums_op);
  m.def("sums_of_sizes", sums_of_sizes_op);
  m.def("largest", largest_op);
  m.def("affine", affine_op);
  m.def("gradient_sums", gradient_sums_op);
  m.def("gradient", gradient_op);
  m.def("track", track_op);
  m.def("layer_norm_forward", layer_norm_forward_op);
  m.def("layer_norm_backward", layer_norm_backward_op);
}

}  // namespace nmlightning
