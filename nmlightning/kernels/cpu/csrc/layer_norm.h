// Layer and RMS norms by L1 of (rows, features); an RMS norm does not centre, its μ is 0.
#pragma once

#include <cstdint>

namespace nmlightning {

struct Rows {
  int64_t rows, features;
  bool centred;
};

// Of each row: μ, 1 / σ, and constant · ŝ / σ.
struct RowValues {
  float *mean, *inverse, *pull;
};

template <class T>
void layer_norm_forward(const Rows&, double constant, double eps, const T* x, const float* weight,
                        const float* bias, T* y, RowValues);

// Writes the gradients by x and, where there is a weight, by weight and bias, (features,).
template <class T>
void layer_norm_backward(const Rows&, const T* grad, const T* x, const float* weight, RowValues,
                         T* grad_x, float* grad_weight, float* grad_bias);

}  // namespace nmlightning
