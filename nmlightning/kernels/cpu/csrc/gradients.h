// The passes of backward that every statistic has.
#pragma once

#include "batch_norm.h"

namespace nmlightning {

template <bool masked, class T>
inline void copy_given(const T* grad, const T* y, T* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) store(to + i, given<masked>(grad, y, i));
}

template <class T>
const T* from(const T* array, int64_t offset) {
  return array ? array + offset : nullptr;
}

// Returns Σg and Σ g · (x − mean), (2, width).
template <class T>
std::vector<double> sums_by_x(const Slab& slab, const Backward<T>& of) {
  std::vector<double> totals;
  with_flag(of.y != nullptr, [&](auto masked) {
    constexpr bool M = decltype(masked)::value;
    totals = slab.sums([&](int64_t offset, auto at) {
      const T *g = of.grad + offset, *y = from(of.y, offset), *x = of.x + offset;
      const auto mean = at(of.channels.mean);
      return Terms{[=](int64_t i) { return given<M>(g, y, i); },
                   [=](int64_t i) { return given<M>(g, y, i) * (load(x[i]) - mean[i]); }};
    });
  });
  return totals;
}

// Returns Σg and Σ g · (y − bias − residual), (2, width): where g is not 0 that is weight · x̂.
template <class T>
std::vector<double> sums_by_y(const Slab& slab, const Backward<T>& of) {
  std::vector<double> totals;
  with_flag(of.residual != nullptr, [&](auto added) {
    totals = slab.sums([&](int64_t offset, auto at) {
      const T *g = of.grad + offset, *y = of.y + offset, *r = from(of.residual, offset);
      const auto bias = at(of.bias);
      return Terms{[=](int64_t i) { return given<true>(g, y, i); }, [=](int64_t i) {
                     const float sum = load(y[i]) - bias[i];
                     if constexpr (decltype(added)::value)
                       return given<true>(g, y, i) * (sum - load(r[i]));
                     return given<true>(g, y, i) * sum;
                   }};
    });
  });
  return totals;
}

// Writes the gradients by weight and bias, by x where it is kept.
template <class T>
void write_gradients_of_learned(const Slab& slab, const Backward<T>& to) {
  const auto totals = to.x ? sums_by_x(slab, to) : sums_by_y(slab, to);
  for (int64_t c = slab.first(), i = 0; c < slab.last(); c++, i++) {
    const double product = totals[slab.width() + i];
    to.grad_bias[c] = float(totals[i]);
    to.grad_weight[c] = float(to.x         ? product * to.channels.inverse[c]
                              : to.weight ? product / to.weight[c]
                                          : product);
  }
}

// Writes grad_x = gain · g + (x > mean ? above : below), or + below if there is no above, and g.
template <class T>
void write_gradient(const Slab& slab, const Backward<T>& to, const float* above,
                    const float* below) {
  with_flag(to.y != nullptr, [&](auto masked) {
    with_flag(above != nullptr, [&](auto two_valued) {
      constexpr bool M = decltype(masked)::value;
      slab.each_run([&](int64_t offset, auto at) {
        const T *g = to.grad + offset, *y = from(to.y, offset);
        const auto gain = at(to.channels.gain), low = at(below);
        const int64_t n = slab.run_length();
        T* grad_x = to.grad_x + offset;
        if constexpr (two_valued) {
          const auto mean = at(to.channels.mean), high = at(above);
          const T* x = to.x + offset;
#pragma omp simd
          for (int64_t i = 0; i < n; i++)
            store(grad_x + i, given<M>(g, y, i) * gain[i] +
                                  (load(x[i]) > mean[i] ? high[i] : low[i]));
        } else {
#pragma omp simd
          for (int64_t i = 0; i < n; i++)
            store(grad_x + i, given<M>(g, y, i) * gain[i] + low[i]);
        }
        if (to.grad_residual) copy_given<M>(g, y, to.grad_residual + offset, n);
      });
    });
  });
}

}  // namespace nmlightning
