// From tensors to the arrays that the kernels read and write.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include "batch_norm.h"

namespace nmlightning {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t SHORTEST_RUN = AT_ONCE * LANES;  // of NHWC, for which there are registers
constexpr float HUGE_SCALE = 0x1p48f;  // of larger ŝ, sums in float may be infinite

// Calls part(null pointer of the element's type) for float32 or bfloat16.
template <class Part>
void with_type(const Tensor& x, Part part) {
  TORCH_CHECK(x.is_cpu(), "expected a tensor of the CPU");
  if (x.scalar_type() == at::kFloat) return part(static_cast<float*>(nullptr));
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "expected float32 or bfloat16");
  part(static_cast<BFloat16*>(nullptr));
}

// Whether a tensor is torch's own in the CPU's memory: no subclass, and not wrapped by a transform.
inline bool is_plain(const Tensor& tensor) {
  return tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView -
             c10::autocast_dispatch_keyset ==
         c10::DispatchKeySet(c10::DispatchKey::CPU);
}

// What is computed for the formula to take over: nothing.
template <class Result, class... Arguments>
auto cannot(Result (*)(Arguments...)) -> Result (*)(Arguments...) {
  return [](Arguments...) -> Result { return {}; };
}

// As at::empty_like and at::empty, without the dispatcher, which takes as long as a small norm.
inline Tensor allocate_like(const Tensor& x) {
  return at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type());
}

inline Tensor allocate(at::IntArrayRef sizes, at::ScalarType type = at::kFloat) {
  return at::detail::empty_cpu(sizes, type);
}

inline bool is_channels_last(const Tensor& x) {
  return (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
         (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d));
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
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

template <class T>
T* data(const Optional& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// The values of channels in float32, repeated along a run; they stay alive as long as this does.
struct Values {
  Tensor held;
  std::vector<float> repeated;
  float* data = nullptr;

  Values(const Optional& values, int64_t repeats) {
    if (!values || !values->defined()) return;
    held = values->scalar_type() == at::kFloat ? *values : values->to(at::kFloat);
    held = held.contiguous();
    data = held.data_ptr<float>();
    if (repeats > 1) repeat(repeats);
  }

  Values(Values&&) = default;

  // Zeros where there are none.
  static Values or_zeros(const Optional& values, const Layout& layout) {
    Values found(values, layout.repeats);
    if (!found.data) found.data = (found.repeated = std::vector<float>(layout.length())).data();
    return found;
  }

 private:
  void repeat(int64_t repeats) {
    for (int64_t i = 0; i < repeats; i++) repeated.insert(repeated.end(), data, data + held.numel());
    data = repeated.data();
  }
};

// Whether all values are from low to high; of NaN it is false.
inline bool all_within(const float* values, int64_t n, float low, float high) {
  int64_t outside = 0;
#pragma omp simd reduction(+ : outside)
  for (int64_t i = 0; i < n; i++) outside += !(low <= values[i] && values[i] <= high);
  return outside == 0;
}

}  // namespace nmlightning
