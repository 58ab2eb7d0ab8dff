// Range: ŝ = constant · mean over 2 · chunks of max d and −min d of each chunk, d = x − μ. Its slope
// is ±1/(2 · chunks) at those, as if they were the largest |d|: so is backward.
#include "batch_norm.h"

namespace nmlightning {

template <int W>
using Positions = typename VectorOf<int32_t, W>::Type;

// The highest and the lowest d of a chunk, and the first position of each along (N, *spatial).
template <int W>
struct ChunkExtremes {
  Floats<W> high = Floats<W>{} - INFINITY, low = Floats<W>{} + INFINITY;
  Positions<W> high_at{}, low_at{};

  // Takes n times W elements, of which the first have these positions.
  template <class T>
  void take(const T* x, Floats<W> mean, int64_t n, int64_t apart, Positions<W> at, int32_t step) {
    for (int64_t i = 0; i < n; i++, x += apart, at += step) {
      const Floats<W> d = load<W>(x) - mean;
      high_at = d > high ? at : high_at;
      high = d > high ? d : high;
      low_at = d < low ? at : low_at;
      low = d < low ? d : low;
    }
  }
};

// Takes those of one lane.
inline void join(ChunkExtremes<1>& all, float high, int32_t high_at, float low, int32_t low_at) {
  if (high > all.high || (high == all.high && high_at < all.high_at))
    all.high = high, all.high_at = high_at;
  if (low < all.low || (low == all.low && low_at < all.low_at)) all.low = low, all.low_at = low_at;
}

// The extremes of the positions from one on of a channel of NCHW.
template <class T>
ChunkExtremes<1> find_in_planes(const Layout& layout, const T* x, float mean, int64_t c,
                                int64_t from, int64_t end) {
  ChunkExtremes<LANES> wide;
  ChunkExtremes<1> all;
  Positions<LANES> lanes;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
  for (int64_t to; from < end; from = to) {
    to = std::min(end, (from / layout.size + 1) * layout.size);
    const T* run = x + layout.offset(from, c);
    const int64_t n = (to - from) / LANES, taken = n * LANES;
    wide.take(run, mean - Floats<LANES>{}, n, LANES, int32_t(from) + lanes, LANES);
    all.take(run + taken, mean, to - from - taken, 1, int32_t(from + taken), 1);
  }
  for (int i = 0; i < LANES; i++)
    join(all, wide.high[i], wide.high_at[i], wide.low[i], wide.low_at[i]);
  return all;
}

// Calls write(channel, extremes) for n positions of all channels of a slab.
template <class T, class Write>
void find_in_slab(const Slab& slab, const T* x, const float* mean, int64_t from, int64_t n,
                  Write write) {
  const Layout& layout = slab.layout;
  int64_t c = slab.first();
  for (; !layout.channels_last && c < slab.last(); c++)
    write(c, find_in_planes(layout, x, mean[c], c, from, from + n));
  const T* rows = x + from * layout.channels;
  for (; c + LANES <= slab.last(); c += LANES) {
    ChunkExtremes<LANES> e;
    e.take(rows + c, load<LANES>(mean + c), n, layout.channels,
           int32_t(from) + Positions<LANES>{}, 1);
    for (int i = 0; i < LANES; i++)
      write(c + i, ChunkExtremes<1>{e.high[i], e.low[i], e.high_at[i], e.low_at[i]});
  }
  for (; c < slab.last(); c++) {
    ChunkExtremes<1> e;
    e.take(rows + c, mean[c], n, layout.channels, int32_t(from), 1);
    write(c, e);
  }
}

template <class T>
void range_forward(const Layout& layout, const Settings& settings, const Forward<T>& to,
                   int64_t chunks, int64_t* positions, float* signs, double* squares) {
  const int64_t count = layout.count(), k = 2 * chunks;
  std::vector<float> sizes(layout.channels * k);
  const auto begin = [&](int64_t i) { return count / chunks * i + std::min(i, count % chunks); };
  in_slabs(layout, [&](const Slab& slab) {
    float* mean = to.channels.mean;
    write_means(slab, to.arrays.x, mean);
    const int64_t grain = ELEMENTS_A_PART * chunks / (count * slab.width()) + 1;
    at::parallel_for(0, chunks, grain, [&](int64_t i, int64_t last) {
      for (; i < last; i++)
        find_in_slab(slab, to.arrays.x, mean, begin(i), begin(i + 1) - begin(i),
                     [&](int64_t c, const ChunkExtremes<1>& e) {
          const int64_t high = c * k + i, low = high + chunks;
          positions[high] = e.high_at, positions[low] = e.low_at;
          sizes[high] = e.high, sizes[low] = -e.low;
          signs[high] = 1.f, signs[low] = -1.f;
        });
    });
    for (int64_t c = slab.first(); c < slab.last(); c++) {
      double total = 0;
      for (int64_t i = 0; i < k; i++) total += sizes[c * k + i];
      write_channel(settings, to.channels, to.weight, to.variance, count, c, total / double(k));
    }
    layout.repeat(to.channels.gain);
    with_fused(to.fused, [&](auto fused) { apply_affine<fused>(slab, to.arrays, squares); });
  });
}

#define INSTANTIATE(T)                                                                          \
  template void range_forward(const Layout&, const Settings&, const Forward<T>&, int64_t,       \
                              int64_t*, float*, double*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace nmlightning
