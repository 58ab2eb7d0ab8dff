// The parts of a batch norm, for ranks that share their statistics between them.
#include "gradients.h"

namespace nmlightning {

template <class T>
std::vector<double> distances_from_first(const Slab& slab, const T* x, float* first) {
  for (int64_t c = slab.first(); c < slab.last(); c++)
    first[c] = slab.layout.count() ? load(x[slab.layout.offset(0, c)]) : 0.f;
  slab.layout.repeat(first);
  return slab.sums([&](auto at) {
    return [x, first = at(first)](Run run) {
      return [&first, p = x + run.offset](auto in) { return Terms{in(p) - in(first)}; };
    };
  });
}

template <class T>
void write_means(const Slab& slab, const T* x, float* mean) {
  const auto totals = distances_from_first(slab, x, mean);
  for (int64_t c = slab.first(), i = 0; c < slab.last(); c++, i++)
    mean[c] = float(mean[c] + totals[i] / double(slab.layout.count()));
  slab.layout.repeat(mean);
}

template <class T>
void sums(const Layout& layout, const T* x, float* totals) {
  std::vector<float> first(layout.length());
  in_slabs(layout, [&](const Slab& slab) {
    const auto distances = distances_from_first(slab, x, first.data());
    for (int64_t c = slab.first(), i = 0; c < slab.last(); c++, i++)
      totals[c] = float(double(first[c]) * double(layout.count()) + distances[i]);
  });
}

template <class T>
void sums_of_sizes(const Layout& layout, const T* x, const float* mean, float* totals) {
  in_slabs(layout, [&](const Slab& slab) {
    const auto sizes = slab.sums([&](auto at) {
      return [x, mean = at(mean)](Run run) {
        return [&mean, p = x + run.offset](auto in) { return Terms{magnitude(in(p) - in(mean))}; };
      };
    });
    std::copy(sizes.begin(), sizes.end(), totals + slab.first());
  });
}

template <class T>
void affine(const Layout& layout, const AffineArrays<T>& arrays, Fused fused) {
  in_slabs(layout, [&](const Slab& slab) {
    with_fused(fused, [&](auto constant) { apply_affine<constant>(slab, arrays); });
  });
}

template <class T>
void gradient_sums(const Layout& layout, const T* grad, const T* x, const T* y, const float* mean,
                   bool slopes, float* totals) {
  in_slabs(layout, [&](const Slab& slab) {
    with_flag(y != nullptr, [&](auto masked) {
      const auto sums = slab.sums([&](auto at) {
        return [=, mean = at(mean)](Run run) {
          const T *own = grad + run.offset, *out = y + run.offset, *p = x + run.offset;
          return [=, &mean](auto in) {
            auto g = in(own);
            if constexpr (masked) g = given(g, in(out));
            return Terms{g, g * (in(p) - in(mean)), in(p) > in(mean) ? 1.f : -1.f};
          };
        };
      });
      for (int64_t c = slab.first(), i = 0; c < slab.last(); c++, i++)
        for (int64_t k = 0; k < 3; k++)
          totals[k * layout.channels + c] =
              k < 2 || slopes ? float(sums[k * slab.width() + i]) : 0.f;
    });
  });
}

template <class T>
void gradient(const Layout& layout, const Backward<T>& to, const float* offset,
              const float* pull) {
  std::vector<float> above(layout.length()), below(layout.length());
  for (int64_t c = 0; c < layout.length(); c++) {
    above[c] = offset[c] - (pull ? pull[c] : 0.f);
    below[c] = offset[c] + (pull ? pull[c] : 0.f);
  }
  in_slabs(layout, [&](const Slab& slab) {
    with_flag(to.y != nullptr, [&](auto masked) {
      slab.each_place_in_parallel([&](auto at) {
        return [&, mean = at(to.channels.mean), gain = at(to.channels.gain),
                high = at(above.data()), low = at(below.data())](Run run) {
          const T *grad = to.grad + run.offset, *y = to.y + run.offset, *x = to.x + run.offset;
          T *grad_x = to.grad_x + run.offset, *passed = to.grad_residual + run.offset;
          return [=, &mean, &gain, &high, &low](auto in) {
            auto g = in(grad);
            if constexpr (masked) in.write(passed, g = given(g, in(y)));
            in.write(grad_x, g * in(gain) + (in(x) > in(mean) ? in(high) : in(low)));
          };
        };
      });
    });
  });
}

#define INSTANTIATE(T)                                                                           \
  template void write_means(const Slab&, const T*, float*);                                      \
  template void sums(const Layout&, const T*, float*);                                           \
  template void sums_of_sizes(const Layout&, const T*, const float*, float*);                    \
  template void affine(const Layout&, const AffineArrays<T>&, Fused);                            \
  template void gradient_sums(const Layout&, const T*, const T*, const T*, const float*, bool,   \
                              float*);                                                           \
  template void gradient(const Layout&, const Backward<T>&, const float*, const float*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace nmlightning
