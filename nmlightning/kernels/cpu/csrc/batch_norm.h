// What the kernels of batch norms are given, and what they give. Arrays of channels are float, and
// as long as `Layout::length` says, but for weight, variance, and the gradients of what is learned.
#pragma once

#include <cmath>

#include "affine.h"

namespace nmlightning {

struct Settings {
  double constant, eps;
};

// With ŝ = constant · m, σ = √(ŝ² + eps) and the sum over s = ±1 of the channel's elements:
// 1 / σ; constant · ŝ / σ; Σs (L1 only); weight / σ.
struct Channels {
  float *mean, *inverse, *pull, *slopes, *gain;
};

template <class T>
struct Forward {
  AffineArrays<T> arrays;
  Fused fused;
  const float* weight;  // or null for 1
  float* variance;
  Channels channels;
};

template <class T>
struct Backward {
  const T *grad, *x, *y, *residual;  // y to mask grad with, or null; no x where that is not kept
  const float *weight, *bias;
  Channels channels;
  T *grad_x, *grad_residual;
  float *grad_weight, *grad_bias;
};

// The derivative of what is before the ReLU: grad where y > 0. NaN lets it pass.
template <class F>
inline F given(F grad, F y) {
  return y <= 0.f ? F{} : grad;
}

// Calls part(constant) with `value` as a constant of the compiler's.
template <class Part>
void with_flag(bool value, Part part) {
  if (value)
    part(std::true_type{});
  else
    part(std::false_type{});
}

// Writes the means. Sums distances from a channel's first element, so that they are exactly 0 in a
// constant channel, and precise far from 0.
template <class T>
void write_means(const Slab& slab, const T* x, float* mean);

// Writes what does not depend on a mean and Σs of a channel, from its m.
inline void write_channel(const Settings& settings, const Channels& channels, const float* weight,
                          float* variance, int64_t count, int64_t c, double magnitude) {
  const double scale = settings.constant * magnitude;
  const double total = std::sqrt(scale * scale + settings.eps);
  channels.inverse[c] = float(1 / total);
  channels.pull[c] = float(settings.constant * scale / total);
  channels.gain[c] = float((weight ? weight[c] : 1.f) / total);
  variance[c] = float(scale * scale * count / (count - 1));
}

// L1. Writes the words of bits and Σy² of each channel, where there is room for them.
template <class T>
void l1_forward(const Layout&, const Settings&, const Forward<T>&, uint32_t* words,
                double* squares);
template <class T>
void l1_backward(const Layout&, const Backward<T>&, const uint32_t* words);

// L∞ and Top(k). Positions (C, k) count along (N, *spatial); deviations are x − mean there.
template <class T>
void largest_forward(const Layout&, const Settings&, const Forward<T>&, int64_t k,
                     int64_t* positions, float* deviations, double* squares);
template <class T>
void largest_backward(const Layout&, const Backward<T>&, int64_t k, const int64_t* positions,
                      const float* deviations);

// Range. Writes positions and signs (C, 2, chunks) for the backward of the largest.
template <class T>
void range_forward(const Layout&, const Settings&, const Forward<T>&, int64_t chunks,
                   int64_t* positions, float* signs, double* squares);

// The stages, for ranks that share their statistics.
template <class T>
void sums(const Layout&, const T* x, float* totals);
template <class T>
void sums_of_sizes(const Layout&, const T* x, const float* mean, float* totals);
template <class T>
void largest(const Layout&, const T* x, const float* mean, int64_t k, int64_t* positions,
             float* deviations);
template <class T>
void affine(const Layout&, const AffineArrays<T>&, Fused);
template <class T>
void gradient_sums(const Layout&, const T* grad, const T* x, const T* y, const float* mean,
                   bool slopes, float* totals);
template <class T>
void gradient(const Layout&, const Backward<T>&, const float* offset, const float* pull);

}  // namespace nmlightning
