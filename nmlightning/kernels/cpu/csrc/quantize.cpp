// The passes of quantisation, with the results of nmlightning/int8/quantizer.py bit by bit.
//
// The operators give nothing for what they are not for, which is left to the formula.
#include <torch/library.h>

#include "elements.h"
#include "tensors.h"

namespace nmlightning {
namespace {

using at::MemoryFormat;

constexpr float LARGE = 0x1p20f;           // above all steps that are not cut off
constexpr float TO_WHOLE = 0x1.8p23f;      // which, added, leaves no bits for a fraction
constexpr float A_RANDOM_BIT = 0x1p-16f;

bool is_for_us(const Tensor& x, bool bytes = false) {
  if (at::GradMode::is_enabled() && x.requires_grad()) return false;
  return is_plain(x) && x.is_non_overlapping_and_dense() &&
         (x.scalar_type() == (bytes ? at::kByte : at::kFloat) || x.scalar_type() == at::kBFloat16);
}

bool is_factor(const Tensor& values, int64_t n = 1) {
  return is_plain(values) && values.scalar_type() == at::kFloat && values.is_contiguous() &&
         (values.numel() == 1 || values.numel() == n);
}

// Whether the elements of each x[i] lie together.
bool has_rows(const Tensor& x) {
  return x.dim() && (x.size(0) < 2 || x.stride(0) == x.numel() / x.size(0));
}

// Takes n elements into the extremes; both are NaN where an element is.
template <class T>
void find_ends(const T* x, int64_t n, float& low, float& high) {
  constexpr int G = 4;
  Floats<LANES> least[G], most[G];
  Words<LANES> unordered{};
  for (int g = 0; g < G; g++) least[g] = low - Floats<LANES>{}, most[g] = high - Floats<LANES>{};
  const auto take = [&](int g, Floats<LANES> values) {
    least[g] = values < least[g] ? values : least[g];
    most[g] = values > most[g] ? values : most[g];
    unordered |= same_bits<Words<LANES>>(values != values);
  };
  int64_t i = 0;
  for (; i + G * LANES <= n; i += G * LANES)
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) take(g, load<LANES>(x + i + g * LANES));
  for (; i < n; i++) take(0, load(x[i]) - Floats<LANES>{});
  bool is_nan = false;
  for (int lane = 0; lane < LANES; lane++) {
    for (int g = 0; g < G; g++) {
      low = std::min(low, least[g][lane]);
      high = std::max(high, most[g][lane]);
    }
    is_nan |= unordered[lane] != 0;
  }
  if (is_nan) low = high = NAN;
}

// Returns the smallest and the largest element of each row, or of all: (2, rows) or (2,).
std::optional<Tensor> ends(const Tensor& x, bool each_row) {
  if (!is_for_us(x) || !x.numel() || (each_row && !has_rows(x))) return {};
  const int64_t rows = each_row ? x.size(0) : 1, length = x.numel() / rows;
  const int64_t parts = each_row ? 1 : std::clamp<int64_t>(length / ELEMENTS_A_TASK, 1, PARTS);
  std::vector<float> low(rows * parts, INFINITY), high(rows * parts, -INFINITY);
  with_type(x, [&]<class T>(T*) {
    const int64_t grain = std::max<int64_t>(1, ELEMENTS_A_TASK * parts / length);
    at::parallel_for(0, rows * parts, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t from = i / parts * length + length * (i % parts) / parts;
        const int64_t to = i / parts * length + length * (i % parts + 1) / parts;
        find_ends(data<T>(x) + from, to - from, low[i], high[i]);
      }
    });
  });
  Tensor found = each_row ? allocate({2, rows}) : allocate({2});
  float *least = data<float>(found), *most = least + rows;
  std::fill(least, least + rows, INFINITY);
  std::fill(most, most + rows, -INFINITY);
  for (int64_t i = 0; i < rows * parts; i++) {
    float &own = least[i / parts], &other = most[i / parts];
    own = std::isnan(low[i]) || low[i] < own ? low[i] : own;
    other = std::isnan(high[i]) || high[i] > other ? high[i] : other;
  }
  return found;
}

// clamp(round(x/s + u) + z, 0, N), less z if that is asked for.
struct Quantizer {
  float scale, zero_point, levels, less;
  const int16_t* bits;

  template <class F>
  F operator()(F values, int64_t i) const {
    constexpr int W = sizeof(F) / sizeof(float);
    F steps = values / scale;
    if (bits) {
      typename VectorOf<int16_t, W>::Type drawn;
      std::memcpy(&drawn, bits + i, sizeof drawn);
      steps += convert<F>(convert<typename VectorOf<int32_t, W>::Type>(drawn)) * A_RANDOM_BIT;
    }
    steps = steps < -LARGE ? F{} - LARGE : steps > LARGE ? F{} + LARGE : steps;
    steps = (steps + TO_WHOLE) - TO_WHOLE + zero_point;
    steps = steps > 0.f ? steps : F{};  // NaN too
    return (steps < levels ? steps : F{} + levels) - less;
  }
};

// Returns n random int16 of a seed by SplitMix64.
Tensor random_bits(const Tensor& seed, int64_t n) {
  constexpr int W = 8, EACH = sizeof(uint64_t) / sizeof(int16_t) * W;
  using Longs = VectorOf<uint64_t, W>::Type;
  Tensor bits = allocate({(n + EACH - 1) / EACH * EACH}, at::kShort);
  const uint64_t start = *data<int64_t>(seed);
  at::parallel_for(0, bits.numel() / EACH, ELEMENTS_A_TASK / EACH, [&](int64_t i, int64_t end) {
    for (; i < end; i++) {
      const Longs number = uint64_t(i * W) + Longs{1, 2, 3, 4, 5, 6, 7, 8};
      Longs z = start + number * 0x9E3779B97F4A7C15;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
      z = z ^ (z >> 31);
      std::memcpy(data<int16_t>(bits) + i * EACH, &z, sizeof z);
    }
  });
  return bits;
}

MemoryFormat format_of_last(const Tensor& x) {
  return x.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// What is to be written, and how: like x, or with the channels of (N, C, *spatial) first or last.
struct Target {
  Tensor to;
  Matrices all;
};

std::optional<Target> make_target(const Tensor& x, at::ScalarType type,
                                  std::optional<bool> channels_last) {
  const auto strided = [&] { return at::detail::empty_strided_cpu(x.sizes(), x.strides(), type); };
  const Matrices same{1, 1, x.numel()};
  if (!channels_last) return Target{strided(), same};
  const bool last = *channels_last && x.dim() > 3;
  if (!x.is_contiguous() && !is_channels_last(x)) return {};
  const auto format = last ? format_of_last(x) : MemoryFormat::Contiguous;
  if (x.is_contiguous(format)) return Target{strided(), same};
  const int64_t size = x.numel() / std::max<int64_t>(1, x.size(0) * x.size(1));
  return Target{at::detail::empty_cpu(x.sizes(), type, false, format),
                {x.size(0), last ? x.size(1) : size, last ? size : x.size(1), true}};
}

// Returns q like x, or with the channels first or last; or q − z as int8. Where the scale is
// (rows, 1, …), each row has its own, and its own z if there are several. Random bits are in the
// order of x's memory.
std::optional<Tensor> quantize(const Tensor& x, const Optional& bits, const Tensor& scale,
                               const Tensor& zero_point, int64_t levels, bool is_signed,
                               std::optional<bool> channels_last) {
  const int64_t rows = scale.numel();
  if (!is_for_us(x) || !is_factor(scale, rows) || !is_factor(zero_point, rows)) return {};
  const bool by_row = scale.dim() == x.dim() && has_rows(x) && x.size(0) == rows;
  if (rows != 1 && (!by_row || scale.size(0) != rows)) return {};
  const auto target = make_target(x, is_signed ? at::kChar : at::kByte, channels_last);
  if (!target) return {};
  Matrices all = target->all;
  (all.transposed ? all.count : all.columns) /= std::max<int64_t>(1, rows);
  with_type(x, [&]<class T>(T*) {
    for (int64_t row = 0, i = 0; row < rows; row++, i += x.numel() / rows) {
      const float zero = data<float>(zero_point)[zero_point.numel() == 1 ? 0 : row];
      const int16_t* drawn = bits ? data<int16_t>(*bits) + i : nullptr;
      const Quantizer f{data<float>(scale)[row], zero, float(levels), is_signed ? zero : 0.f, drawn};
      write_elements(all, data<T>(x) + i, static_cast<uint8_t*>(target->to.data_ptr()) + i, f);
    }
  });
  return target->to;
}

// Returns float32 or bfloat16 of such, or q − z of uint8, times a factor.
std::optional<Tensor> convert_elements(const Tensor& x, const Optional& zero_point,
                                       const Optional& factor, at::ScalarType type,
                                       std::optional<bool> channels_last) {
  const bool wide = type == at::kFloat, bytes = x.scalar_type() == at::kByte;
  if (!is_for_us(x, bytes) || (!wide && type != at::kBFloat16)) return {};
  if ((zero_point && !is_factor(*zero_point)) || (factor && !is_factor(*factor))) return {};
  const auto target = make_target(x, type, channels_last);
  if (!target) return {};
  const float less = zero_point ? *data<float>(*zero_point) : 0.f;
  const float scale = factor ? *data<float>(*factor) : 1.f;
  const auto write = [&]<class From>(const From* from) {
    const auto f = [less, scale](auto values, int64_t) { return (values - less) * scale; };
    if (wide)
      write_elements(target->all, from, data<float>(target->to), f);
    else
      write_elements(target->all, from, data<BFloat16>(target->to), f);
  };
  if (bytes)
    write(data<uint8_t>(x));
  else
    with_type(x, [&]<class T>(T*) { write(data<T>(x)); });
  return target->to;
}

// Returns the (I, O, *kernel) of an int8 (O, I, *kernel), each kernel from its end to its begin. In
// the memory of both, the kernel's places are before the channels.
std::optional<Tensor> flip_kernels(const Tensor& weight) {
  const bool last = is_channels_last(weight) || weight.numel() == weight.size(0) * weight.size(1);
  if (!is_plain(weight) || weight.scalar_type() != at::kChar || !last || !weight.numel()) return {};
  std::vector<int64_t> sizes = weight.sizes().vec();
  std::swap(sizes[0], sizes[1]);
  const auto format = is_channels_last(weight) ? format_of_last(weight) : MemoryFormat::Contiguous;
  Tensor flipped = at::detail::empty_cpu(sizes, at::kChar, false, format);
  const int64_t inputs = sizes[0], outputs = sizes[1], size = weight.numel() / (inputs * outputs);
  const Matrices all{size,   outputs,       inputs,   true,
                     inputs, size * inputs, -outputs, size * outputs};
  write_elements(all, data<uint8_t>(weight), data<uint8_t>(flipped) + (size - 1) * outputs,
                 [](auto values, int64_t) { return values; });
  return flipped;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nmlightning, m) {
  m.def("ends", ends);
  m.def("random_bits", random_bits);
  m.def("quantize", quantize);
  m.def("convert_elements", convert_elements);
  m.def("flip_kernels", flip_kernels);
}

}  // namespace nmlightning
