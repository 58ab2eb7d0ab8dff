// The operators torch.ops.nmlightning.*: they check tensors and call the kernels.
//
// Each is registered for all dispatch keys, because autograd functions call them.
#include <torch/library.h>

#include "sign_bits.h"
#include "tensors.h"

namespace nmlightning {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, bool> l1_forward_op(
    const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias,
    double constant, double eps, int64_t fused, double limit) {
  check_like(residual, x);
  Forwarding to(x, weight, bias, fused, limit);
  const SignBits bits(to.layout);
  Tensor words = at::empty({to.x_free ? bits.words() : 0}, x.options().dtype(at::kInt));
  with_type(x, [&]<class T>(T*) {
    l1_forward<T>(to.layout, {constant, eps}, to.arrays<T>(x, residual),
                  to.x_free ? data<uint32_t>(words) : nullptr, to.squares_if_asked());
  });
  if (!to.stays_x_free()) words = at::empty({0}, words.options());
  return {to.y, to.mean(), to.variance, to.values, words, to.bounded()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> l1_backward_op(
    const Tensor& grad, const Optional& x, const Optional& y, const Optional& residual,
    const Optional& words, const Optional& weight, const Optional& bias, const Tensor& values,
    bool added) {
  Backwarding to(grad, x ? *x : *y, weight, bias, added);
  with_type(grad, [&]<class T>(T*) {
    l1_backward<T>(to.layout, to.arrays<T>(x, y, residual, channels_of(values)),
                   data<uint32_t>(words));
  });
  return to.results();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, bool> largest_forward_op(
    const Tensor& x, const Optional& residual, const Optional& weight, const Optional& bias,
    double constant, double eps, int64_t fused, int64_t k, double limit) {
  check_like(residual, x);
  Forwarding to(x, weight, bias, fused, limit);
  TORCH_CHECK(1 <= k && k <= to.layout.count(), "expected 1 <= k <= n");
  const Tensor positions = at::empty({x.size(1), k}, x.options().dtype(at::kLong));
  const Tensor deviations = at::empty({x.size(1), k}, x.options().dtype(at::kFloat));
  with_type(x, [&]<class T>(T*) {
    largest_forward<T>(to.layout, {constant, eps}, to.arrays<T>(x, residual), k,
                       data<int64_t>(positions), data<float>(deviations),
                       to.squares_if_asked());
  });
  return {to.y,      to.mean(),  to.variance,       to.values,
          positions, deviations, to.stays_x_free(), to.bounded()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> largest_backward_op(
    const Tensor& grad, const Optional& x, const Optional& y, const Optional& residual,
    const Tensor& positions, const Tensor& deviations, const Optional& weight,
    const Optional& bias, const Tensor& values, bool added) {
  Backwarding to(grad, x ? *x : *y, weight, bias, added);
  with_type(grad, [&]<class T>(T*) {
    largest_backward<T>(to.layout, to.arrays<T>(x, y, residual, channels_of(values)),
                        positions.size(1), data<int64_t>(positions), data<float>(deviations));
  });
  return to.results();
}

Tensor sums_op(const Tensor& x) {
  Tensor totals = at::empty({x.size(1)}, x.options().dtype(at::kFloat));
  with_type(x, [&]<class T>(T*) {
    sums<T>(layout_of(x), data<T>(x), data<float>(totals));
  });
  return totals;
}

Tensor sums_of_sizes_op(const Tensor& x, const Tensor& mean) {
  Tensor totals = at::empty({x.size(1)}, x.options().dtype(at::kFloat));
  with_type(x, [&]<class T>(T*) {
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
  with_type(x, [&]<class T>(T*) {
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
  with_type(x, [&]<class T>(T*) {
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
  with_type(x, [&]<class T>(T*) {
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
  with_type(x, [&]<class T>(T*) {
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
}

}  // namespace nmlightning
