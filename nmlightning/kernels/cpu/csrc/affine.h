// y = (x − mean) · gain + bias, then ReLU(y) or ReLU(y + residual). Elements in memory are float32
// or bfloat16; all arithmetic is in float.
#pragma once

#include <cstring>

#include "layout.h"

namespace nmlightning {

struct BFloat16 {
  uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(BFloat16 value) {
  const uint32_t wide = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

inline void store(float* to, float value) { *to = value; }

// Rounds to nearest, ties to even. A NaN stays one, whatever its bits.
inline void store(BFloat16* to, float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  to->bits = uint16_t(value == value ? rounded : 0x7fc0);
}

// NaN stays NaN, as in torch.
inline float relu(float value) { return 0.f > value ? 0.f : value; }

enum Fused { NOTHING = 0, RELU = 1, ADD_RELU = 2 };

template <Fused fused, class T, class Values>
struct Affine {
  const T* x;
  const T* residual;
  Values mean, gain, bias;

  float operator()(int64_t i) const {
    float y = (load(x[i]) - mean[i]) * gain[i] + bias[i];
    if constexpr (fused == ADD_RELU) y += load(residual[i]);
    return fused == NOTHING ? y : relu(y);
  }
};

// The arrays of an affine pass over all channels.
template <class T>
struct AffineArrays {
  const T* x;
  const T* residual;
  T* y;
  const float *mean, *gain, *bias;
};

template <Fused fused, class T>
auto affine_of_run(const AffineArrays<T>& arrays, int64_t offset, auto at) {
  return Affine<fused, T, decltype(at(arrays.mean))>{
      arrays.x + offset, fused == ADD_RELU ? arrays.residual + offset : nullptr, at(arrays.mean),
      at(arrays.gain), at(arrays.bias)};
}

constexpr int64_t ROWS_AT_A_TIME = 128;  // written, then read again for their squares

// Calls write(run) for all runs, of which threads take multiples of `together` samples, and writes
// Σy² of each channel while y is in the cache, if that is asked for.
template <class T, class Write>
void write_runs(const Slab& slab, int64_t together, const T* y, double* squares, Write write) {
  if (slab.layout.channels_last) together = ROWS_AT_A_TIME;
  const int64_t runs = slab.runs_of_sample();
  std::vector<double> totals(slab.threads * slab.width());
  slab.in_parallel(together, [&](int64_t begin, int64_t end, int task) {
    for (int64_t from = begin; from < end; from += together) {
      const int64_t to = std::min(end, from + together);
      for (int64_t run = from * runs; run < to * runs; run++) write(run);
      if (!squares) continue;
      const auto square = [&](int64_t offset, auto) {
        return Terms{[p = y + offset](int64_t i) { return load(p[i]) * load(p[i]); }};
      };
      slab.add(from, to, square, &totals[task * slab.width()]);
    }
  });
  if (!squares) return;
  totals = slab.fold(std::move(totals), slab.width());
  std::copy(totals.begin(), totals.end(), squares + slab.first());
}

template <Fused fused, class T>
void apply_affine(const Slab& slab, const AffineArrays<T>& arrays, double* squares = nullptr) {
  write_runs(slab, 1, arrays.y, squares, [&](int64_t run) {
    slab.with_run(run, [&](int64_t offset, auto at) {
      const auto affine = affine_of_run<fused>(arrays, offset, at);
      T* y = arrays.y + offset;
#pragma omp simd
      for (int64_t i = 0; i < slab.run_length(); i++) store(y + i, affine(i));
    });
  });
}

// Calls part(constant) with `fused` as a constant of the compiler's.
template <class Part>
void with_fused(Fused fused, Part part) {
  if (fused == NOTHING) part(std::integral_constant<Fused, NOTHING>{});
  if (fused == RELU) part(std::integral_constant<Fused, RELU>{});
  if (fused == ADD_RELU) part(std::integral_constant<Fused, ADD_RELU>{});
}

}  // namespace nmlightning
