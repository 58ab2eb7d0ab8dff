// The operators torch.ops.nmlightning.*: they check tensors and call the kernels.
//
// Each is registered for all dispatch keys, because autograd functions call them.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "tensors.h"

namespace nmlightning {
namespace {

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

}  // namespace

TORCH_LIBRARY(nmlightning, m) {
  m.def("sums", sums_op);
  m.def("sums_of_sizes", sums_of_sizes_op);
  m.def("largest", largest_op);
  m.def("affine", affine_op);
  m.def("gradient_sums", gradient_sums_op);
  m.def("gradient", gradient_op);
}

}  // namespace nmlightning
