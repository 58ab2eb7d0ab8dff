// y = (x − mean) · gain + bias, then ReLU(y) or ReLU(y + residual). Elements in memory are float32
// or bfloat16; all arithmetic is in float.
#pragma once

#include "sign_bits.h"

namespace nmlightning {

// NaN stays NaN, as in torch.
template <class F>
inline F relu(F values) {
  return values < 0.f ? F{} : values;
}

enum Fused { NOTHING = 0, RELU = 1, ADD_RELU = 2 };

// The arrays of an affine pass over all channels.
template <class T>
struct AffineArrays {
  const T* x;
  const T* residual;
  T* y;
  const float *mean, *gain, *bias;
};

// Writes y, and Σy² of each channel if that is asked for, and marks x > mean in the bits of `above`,
// if they are there.
template <Fused fused, bool marked, class T>
void write_affine(const Slab& slab, const AffineArrays<T>& of, Bits* above, double* squares) {
  const auto write = [&, length = slab.run_length()](auto at) {
    return [=, &of, mean = at(of.mean), gain = at(of.gain), bias = at(of.bias)](Run run) {
      const T *x = of.x + run.offset, *residual = of.residual + run.offset;
      Bits* bits = bits_of(above, run, length);
      return [&, x, residual, bits, y = of.y + run.offset](auto in) {
        auto value = (in(x) - in(mean)) * in(gain) + in(bias);
        if constexpr (fused == ADD_RELU) value += in(residual);
        if constexpr (fused != NOTHING) value = relu(value);
        if constexpr (marked) in.mark(bits, in(x), in(mean));
        in.write(y, value);
        return Terms{value * value};
      };
    };
  };
  if (!squares) return slab.each_place_in_parallel(write);
  const auto totals = slab.sums(write);
  std::copy(totals.begin(), totals.end(), squares + slab.first());
}

template <Fused fused, class T>
void apply_affine(const Slab& slab, const AffineArrays<T>& of, double* squares = nullptr) {
  write_affine<fused, false>(slab, of, nullptr, squares);
}

// Calls part(constant) with `fused` as a constant of the compiler's.
template <class Part>
void with_fused(Fused fused, Part part) {
  if (fused == NOTHING) part(std::integral_constant<Fused, NOTHING>{});
  if (fused == RELU) part(std::integral_constant<Fused, RELU>{});
  if (fused == ADD_RELU) part(std::integral_constant<Fused, ADD_RELU>{});
}

}  // namespace nmlightning
