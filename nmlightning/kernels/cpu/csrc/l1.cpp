// L1: ŝ = constant · mean|x − μ|, whose slope is s = +1 where x > μ and −1 elsewhere.
#include "gradients.h"

namespace nmlightning {

template <class T>
void measure(const Slab& slab, const Settings& settings, const Forward<T>& to) {
  write_means(slab, to.arrays.x, to.channels.mean);
  const auto totals = slab.sums([&](auto at) {
    return [x = to.arrays.x, mean = at(to.channels.mean)](Run run) {
      return [&mean, p = x + run.offset](auto in) {
        return Terms{magnitude(in(p) - in(mean)), in(p) > in(mean) ? 1.f : 0.f};
      };
    };
  });
  const int64_t count = slab.layout.count();
  for (int64_t c = slab.first(), i = 0; c < slab.last(); c++, i++) {
    write_channel(settings, to.channels, to.weight, to.variance, count, c, totals[i] / count);
    to.channels.slopes[c] = float(2 * totals[slab.width() + i] - count);
  }
  slab.layout.repeat(to.channels.gain);
}

template <class T>
void l1_forward(const Layout& layout, const Settings& settings, const Forward<T>& to,
                uint32_t* words, double* squares) {
  in_slabs(layout, [&](const Slab& slab) {
    measure(slab, settings, to);
    with_fused(to.fused, [&](auto fused) {
      with_flag(words != nullptr, [&](auto marked) {
        write_affine<fused, marked>(slab, to.arrays, reinterpret_cast<Bits*>(words), squares);
      });
    });
  });
}

template <class T>
void l1_backward(const Layout& layout, const Backward<T>& to, const uint32_t* words) {
  const BackwardBits bits(layout, words, true, fused_of(to) == RELU);
  std::vector<float> above(layout.length()), below(layout.length());
  in_slabs(layout, [&](const Slab& slab) {
    write_gradients_of_learned(slab, to, bits);
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
    write_gradient(slab, to, bits, above.data(), below.data());
  });
}

template void l1_forward(const Layout&, const Settings&, const Forward<float>&, uint32_t*, double*);
template void l1_forward(const Layout&, const Settings&, const Forward<BFloat16>&, uint32_t*,
                         double*);
template void l1_backward(const Layout&, const Backward<float>&, const uint32_t*);
template void l1_backward(const Layout&, const Backward<BFloat16>&, const uint32_t*);

}  // namespace nmlightning
