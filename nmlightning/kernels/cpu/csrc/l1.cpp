// L1: ŝ = constant · mean|x − μ|, whose slope is s = +1 where x > μ and −1 elsewhere.
#include <cmath>

#include "batch_norm.h"
#include "gradients.h"
#include "sign_bits.h"

namespace nmlightning {

template <class T>
void measure(const Slab& slab, const Settings& settings, const Forward<T>& to) {
  write_means(slab, to.arrays.x, to.channels.mean);
  const auto totals = slab.sums([x = to.arrays.x, mean = to.arrays.mean](int64_t offset, auto at) {
    const T* p = x + offset;
    const auto m = at(mean);
    return Terms{[=](int64_t i) { return std::fabs(load(p[i]) - m[i]); },
                 [=](int64_t i) { return load(p[i]) > m[i] ? 1.f : 0.f; }};
  });
  const int64_t count = slab.layout.count();
  for (int64_t c = slab.first(), i = 0; c < slab.last(); c++, i++) {
    write_channel(settings, to.channels, to.weight, to.variance, count, c, totals[i] / count);
    to.channels.slopes[c] = float(2 * totals[slab.width() + i] - count);
  }
  slab.layout.repeat(to.channels.gain);
}

// As apply_affine, and marks x > μ in the words of the bits.
template <Fused fused, class T>
void apply_and_mark(const Slab& slab, const AffineArrays<T>& arrays, const SignBits& bits,
                    uint32_t* words, double* squares) {
  write_runs(slab, bits.group, arrays.y, squares, [&](int64_t run) {
    slab.with_run(run, [&](int64_t offset, auto at) {
      const auto affine = affine_of_run<fused>(arrays, offset, at);
      T* y = arrays.y + offset;
      bits.each_stretch(slab, run, words, [&](int64_t start, int64_t n, uint32_t* own, int bit) {
        const uint32_t kept = bit ? ~0u : 0u;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
          const bool above = load(affine.x[start + i]) > affine.mean[start + i];
          own[i] = (own[i] & kept) | (uint32_t(above) << bit);
          store(y + start + i, affine(start + i));
        }
      });
    });
  });
}

template <class T>
void l1_forward(const Layout& layout, const Settings& settings, const Forward<T>& to,
                uint32_t* words, double* squares) {
  const SignBits bits(layout);
  in_slabs(layout, [&](const Slab& slab) {
    measure(slab, settings, to);
    with_fused(to.fused, [&](auto fused) {
      if (words)
        apply_and_mark<fused>(slab, to.arrays, bits, words, squares);
      else
        apply_affine<fused>(slab, to.arrays, squares);
    });
  });
}

// Writes grad_x = gain · g + offset ∓ pull with the sign where x > μ, taken from the bits.
template <class T>
void write_by_bits(const Slab& slab, const Backward<T>& to, const SignBits& bits,
                   const uint32_t* words, const float* above, const float* below) {
  const int64_t runs = slab.runs_of_sample();
  slab.in_parallel(1, [&](int64_t begin, int64_t end, int) {
    for (int64_t run = begin * runs; run < end * runs; run++)
      slab.with_run(run, [&](int64_t offset, auto at) {
        const T *g = to.grad + offset, *y = to.y + offset;
        const auto gain = at(to.channels.gain), high = at(above), low = at(below);
        T* grad_x = to.grad_x + offset;
        bits.each_stretch(slab, run, words,
                          [&](int64_t start, int64_t n, const uint32_t* own, int bit) {
#pragma omp simd
                            for (int64_t i = 0; i < n; i++) {
                              const bool is_above = (own[i] >> bit) & 1;
                              const int64_t j = start + i;
                              store(grad_x + j,
                                    given<true>(g, y, j) * gain[j] + (is_above ? high[j] : low[j]));
                            }
                          });
        if (to.grad_residual)
          copy_given<true>(g, y, to.grad_residual + offset, slab.run_length());
      });
  });
}

template <class T>
void l1_backward(const Layout& layout, const Backward<T>& to, const uint32_t* words) {
  const SignBits bits(layout);
  std::vector<float> above(layout.length()), below(layout.length());
  in_slabs(layout, [&](const Slab& slab) {
    write_gradients_of_learned(slab, to);
    for (int64_t c = slab.first(); c < slab.last(); c++) {
      const Channels& channels = to.channels;
      const double n = double(layout.count()), gain = channels.gain[c];
      const double pull = gain * channels.pull[c] * to.grad_weight[c] / n;
      const double offset = (pull * channels.slopes[c] - gain * to.grad_bias[c]) / n;
      above[c] = float(offset - pull);
      below[c] = float(offset + pull);
    }
    layout.repeat(above.data());
    layout.repeat(below.data());
    if (words)
      write_by_bits(slab, to, bits, words, above.data(), below.data());
    else
      write_gradient(slab, to, above.data(), below.data());
  });
}

template void l1_forward(const Layout&, const Settings&, const Forward<float>&, uint32_t*, double*);
template void l1_forward(const Layout&, const Settings&, const Forward<BFloat16>&, uint32_t*,
                         double*);
template void l1_backward(const Layout&, const Backward<float>&, const uint32_t*);
template void l1_backward(const Layout&, const Backward<BFloat16>&, const uint32_t*);

}  // namespace nmlightning
