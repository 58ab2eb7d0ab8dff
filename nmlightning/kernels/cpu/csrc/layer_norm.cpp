// All passes over a row are made while it is in the cache.
#include "layer_norm.h"

#include <cmath>

#include "batch_norm.h"

namespace nmlightning {

constexpr int64_t ROWS_IN_FLOAT = 64;  // whose gradients are summed in float before double

template <class T>
void normalise_row(const Rows& of, double constant, double eps, const T* x, const float* weight,
                   const float* bias, T* y, RowValues to, int64_t row) {
  const int64_t n = of.features;
  const float first = load(x[0]);
  float mean = 0;
  if (of.centred) {
    double total = 0;
    add_run(n, Terms{[=](int64_t i) { return load(x[i]) - first; }}, &total);
    mean = float(first + total / double(n));
  }
  double size = 0;
  add_run(n, Terms{[=](int64_t i) { return std::fabs(load(x[i]) - mean); }}, &size);
  const double scale = constant * size / double(n), sigma = std::sqrt(scale * scale + eps);
  const float inverse = float(1 / sigma);
  to.mean[row] = mean;
  to.inverse[row] = inverse;
  to.pull[row] = float(constant * scale / sigma);
  if (weight) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
      store(y + i, (load(x[i]) - mean) * inverse * weight[i] + bias[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) store(y + i, (load(x[i]) - mean) * inverse);
  }
}

template <class T>
void layer_norm_forward(const Rows& of, double constant, double eps, const T* x,
                        const float* weight, const float* bias, T* y, RowValues to) {
  const int64_t n = of.features, grain = std::max<int64_t>(1, ELEMENTS_A_THREAD / n);
  at::parallel_for(0, of.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      normalise_row(of, constant, eps, x + row * n, weight, bias, y + row * n, to, row);
  });
}

// Writes the gradient by a row of x, and adds to the sums of weight and bias, if there is a weight.
template <bool weighted, class T>
void differentiate_row(const Rows& of, const T* grad, const T* x, const float* weight,
                       float mean, float inverse, float pull, T* grad_x, float* weight_sums,
                       float* bias_sums) {
  const int64_t n = of.features;
  const auto inner = [=](int64_t i) {
    if constexpr (weighted) return load(grad[i]) * weight[i];
    return load(grad[i]);
  };
  double totals[3] = {0, 0, 0};
  add_run(n,
          Terms{inner, [=](int64_t i) { return inner(i) * (load(x[i]) - mean); },
                [=](int64_t i) { return load(x[i]) > mean ? 1.f : -1.f; }},
          totals);
  const double each = pull * (totals[1] * inverse / double(n));
  const double middle = of.centred ? (each * totals[2] - totals[0]) / double(n) : 0;
  const float above = float(inverse * (middle - each)), below = float(inverse * (middle + each));
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float d = load(x[i]) - mean;
    store(grad_x + i, inner(i) * inverse + (d > 0.f ? above : below));
    if constexpr (weighted) {
      weight_sums[i] += load(grad[i]) * (d * inverse);
      bias_sums[i] += load(grad[i]);
    }
  }
}

template <class T>
void layer_norm_backward(const Rows& of, const T* grad, const T* x, const float* weight,
                         RowValues values, T* grad_x, float* grad_weight, float* grad_bias) {
  const int64_t n = of.features, elements = of.rows * n;
  const int64_t useful = (elements + ELEMENTS_A_THREAD - 1) / ELEMENTS_A_THREAD;
  const int64_t tasks = std::clamp<int64_t>(useful, 1, at::get_num_threads());
  std::vector<double> totals(weight ? tasks * 2 * n : 0);
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) {
      const int64_t end = of.rows * (task + 1) / tasks;
      std::vector<float> block(weight ? 2 * n : 0);
      for (int64_t from = of.rows * task / tasks; from < end; from += ROWS_IN_FLOAT) {
        std::fill(block.begin(), block.end(), 0.f);
        for (int64_t row = from; row < std::min(end, from + ROWS_IN_FLOAT); row++)
          with_flag(weight != nullptr, [&](auto weighted) {
            differentiate_row<weighted>(of, grad + row * n, x + row * n, weight,
                                        values.mean[row], values.inverse[row], values.pull[row],
                                        grad_x + row * n, block.data(), block.data() + n);
          });
        for (size_t i = 0; i < block.size(); i++) totals[task * 2 * n + i] += block[i];
      }
    }
  });
  if (!weight) return;
  for (int64_t i = 0; i < n; i++) {
    double by_weight = 0, by_bias = 0;
    for (int64_t task = 0; task < tasks; task++) {
      by_weight += totals[task * 2 * n + i];
      by_bias += totals[task * 2 * n + n + i];
    }
    grad_weight[i] = float(by_weight);
    grad_bias[i] = float(by_bias);
  }
}

#define INSTANTIATE(T)                                                                         \
  template void layer_norm_forward(const Rows&, double, double, const T*, const float*,        \
                                   const float*, T*, RowValues);                               \
  template void layer_norm_backward(const Rows&, const T*, const T*, const float*, RowValues,  \
                                    T*, float*, float*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace nmlightning
