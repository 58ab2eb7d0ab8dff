// L∞ and Top(k): ŝ = constant · mean of the k largest |x − μ|, whose slope is ±1/k at those.
//
// The k largest are not below the k-th largest maximum of a block, and the maximum of |x − μ| in a
// block is that of max x − μ and μ − min x. So one pass gives sums and extremes, before μ is known,
// and only the blocks with a large maximum are searched.
#include "gradients.h"

namespace nmlightning {

constexpr int64_t SHORTEST_BLOCK = 32, LONGEST_BLOCK = 256;

// The elements of a channel in blocks: each LANES-th of a stretch of a long plane; else what is at
// one place in the runs of a few samples that follow each other.
struct Blocks {
  Slab slab;
  bool by_place;
  int64_t length, samples, groups, in_run;

  Blocks(const Slab& slab, int64_t k) : slab(slab), by_place(slab.by_place()) {
    const double balanced = std::sqrt(double(slab.layout.count()) / double(k));
    length = std::clamp(int64_t(balanced), SHORTEST_BLOCK, LONGEST_BLOCK);
    samples = by_place ? length : 1;
    groups = (slab.samples() + samples - 1) / samples;
    const int64_t stretch = LANES * length;
    in_run = by_place ? slab.run_length() : (slab.layout.size + stretch - 1) / stretch * LANES;
  }

  bool rows() const { return slab.layout.channels_last; }

  // How many there are of all channels, and of one; where the b-th of channel c is.
  int64_t in_group() const { return in_run * slab.runs_of_sample(); }
  int64_t all() const { return groups * in_group(); }
  int64_t count() const { return groups * (rows() ? slab.layout.repeats : in_run); }
  int64_t at(int64_t b, int64_t c) const {
    if (rows()) return b * slab.layout.channels + c;
    return b / in_run * in_group() + (c - slab.first()) * in_run + b % in_run;
  }

  // Calls part(position, memory offset) for each element of channel c in its b-th block.
  template <class Part>
  void each_element(int64_t b, int64_t c, Part part) const {
    const Layout& layout = slab.layout;
    const int64_t in_sample = rows() ? layout.repeats : in_run;  // blocks of the channel
    const int64_t group = b / in_sample, place = b % in_sample, lane = by_place ? 0 : place % LANES;
    const int64_t before = by_place ? group * samples * in_sample : group * layout.size;
    const int64_t from = before + (by_place ? place : (place - lane) * length + lane);
    const int64_t end = by_place ? std::min(before + samples * in_sample, layout.count())
                                 : std::min(from - lane + LANES * length, before + layout.size);
    const int64_t step = by_place ? in_sample : LANES;
    const int64_t apart = step * (by_place ? layout.channels : 1);
    for (int64_t i = from, at = layout.offset(from, c); i < end; i += step, at += apart) part(i, at);
  }
};

// The extremes of x in each block, (blocks, width), and Σ(x − first) of each channel.
struct Extremes {
  std::vector<float> highest, lowest;
  std::vector<double> totals;
};

template <class F>
inline F higher(F a, F b) {
  return a > b ? a : b;
}

template <class F>
inline F lower(F a, F b) {
  return a < b ? a : b;
}

// Finds the extremes in each block of a plane.
template <class T>
void find_in_plane(const Blocks& blocks, const T* plane, float first, float* highest,
                   float* lowest, double* total) {
  const int64_t stretch = LANES * blocks.length, size = blocks.slab.layout.size;
  for (int64_t b = 0, i = 0; i < size; b += LANES) {
    const int64_t end = std::min(i + stretch, size);
    Floats<LANES> sum{}, high = sum - INFINITY, low = sum + INFINITY;
    for (; i + LANES <= end; i += LANES) {
      const auto values = load<LANES>(plane + i);
      sum += values - first;
      high = higher(values, high);
      low = lower(values, low);
    }
    for (int lane = 0; i < end; i++, lane++) {
      const float value = load(plane[i]);
      sum[lane] += value - first;
      high[lane] = higher(value, high[lane]);
      low[lane] = lower(value, low[lane]);
    }
    store<LANES>(highest + b, high);
    store<LANES>(lowest + b, low);
    for (int lane = 0; lane < LANES; lane++) *total += sum[lane];
  }
}

// Takes samples from one on, each a step from the next, into the extremes and sums at G places of
// their j-th runs.
template <int G, int W, class T>
void find_in_runs(const Slab& slab, const T* x, auto first, int64_t from, int64_t end, int64_t step,
                  int64_t j, Place<W> at, float* highest, float* lowest, float* sums) {
  Floats<W> sum[G], high[G], low[G];
  for (int g = 0; g < G; g++) {
    const Place<W> in = at.plus(g * W);
    sum[g] = in(sums), high[g] = in(highest), low[g] = in(lowest);
  }
  for (int64_t sample = from; sample < end; sample += step) {
    const T* run = x + slab.place(sample, j).offset;
#pragma GCC unroll 8
    for (int g = 0; g < G; g++) {
      const Place<W> in{at.i + g * W, g};
      sum[g] += in(run) - in(first);
      high[g] = higher(in(run), high[g]);
      low[g] = lower(in(run), low[g]);
    }
  }
  for (int g = 0; g < G; g++) {
    const Place<W> in = at.plus(g * W);
    in.write(sums, sum[g]);
    in.write(highest, high[g]);
    in.write(lowest, low[g]);
  }
}

// Finds the extremes at each place of the j-th runs of a group of samples, and adds to their sums.
template <class T>
void find_in_group(const Blocks& blocks, const T* x, const float* first, int64_t group, int64_t j,
                   float* highest, float* lowest, float* sums) {
  const Slab& slab = blocks.slab;
  const int64_t from = group * blocks.samples, to = std::min(from + blocks.samples, slab.samples());
  if (slab.is_row_in_registers())
    return find_in_runs<AT_ONCE>(slab, x, SomeChannels<LANES, AT_ONCE>{0}(first), from, to, 1, j,
                                 Place<LANES>{0}, highest, lowest, sums);
  // A few together, of rows far from each other: see Slab::add_together.
  const int64_t together = blocks.rows() ? 4 : 16, step = (to - from) / together;
  const int64_t rest = from + together * step;
  const auto find = [&](auto values) {
    const auto take = [&](int64_t sample, int64_t end, int64_t by) {
      each_place(0, blocks.in_run, [&](auto in) {
        find_in_runs<1>(slab, x, values, sample, end, by, j, in, highest, lowest, sums);
      });
    };
    for (int64_t sample = from; sample < from + step; sample++) take(sample, rest, step);
    if (rest < to) take(rest, to, 1);
  };
  if (blocks.rows())
    find(first);
  else
    find(Same{first[slab.first() + j]});
}

template <class T>
Extremes find_extremes(const Blocks& blocks, const T* x, const float* first) {
  const Slab& slab = blocks.slab;
  Extremes to{std::vector<float>(blocks.all(), -INFINITY),
              std::vector<float>(blocks.all(), INFINITY),
              std::vector<double>(slab.parts() * slab.width())};
  slab.in_parallel(blocks.samples, [&](int64_t begin, int64_t end, int64_t part) {
    double* totals = &to.totals[part * slab.width()];
    std::vector<float> sums(blocks.in_run);
    for (int64_t group = begin / blocks.samples; group * blocks.samples < end; group++)
      for (int64_t j = 0; j < slab.runs_of_sample(); j++) {
        const int64_t at = group * blocks.in_group() + j * blocks.in_run;
        float *highest = &to.highest[at], *lowest = &to.lowest[at];
        if (blocks.by_place)
          find_in_group(blocks, x, first, group, j, highest, lowest, sums.data());
        else
          find_in_plane(blocks, x + slab.place(group, j).offset, first[slab.first() + j], highest,
                        lowest, totals + j);
        for (int64_t i = 0, c = j; i < int64_t(sums.size()); i++, c += blocks.rows()) {
          if (c == slab.width()) c = 0;
          totals[c] += std::exchange(sums[i], 0.f);
        }
      }
  });
  to.totals = slab.fold(std::move(to.totals), slab.width());
  return to;
}

struct Candidate {
  float deviation;
  int64_t position;
};

// Returns what k of n values reach, to 7 bits of the most that they do, or 0 where there are fewer.
inline float reached_by(int64_t k, const float* values, int64_t n) {
  uint32_t least = 0;
  for (uint32_t bit = 1u << 30; bit >> 16; bit >>= 1) {
    const float tried = same_bits<float>(least | bit);
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; i++) count += values[i] >= tried;
    if (count >= k) least |= bit;
  }
  return same_bits<float>(least);
}

// Finds the k largest |x − mean| of a channel: the first among equals, 0 at position 0 where there
// are fewer elements, and no position but 0 where the mean is not finite. `sizes` are its blocks'.
template <class T>
void select(const Blocks& blocks, const float* sizes, const T* x, float mean, int64_t c, int64_t k,
            std::vector<Candidate>& found, int64_t* positions, float* deviations) {
  const bool finite = std::isfinite(mean);
  std::fill(positions, positions + k, 0);
  std::fill(deviations, deviations + k, finite ? 0.f : mean);
  if (!finite) return;
  const float least = reached_by(k, sizes, blocks.count());
  size_t count = 0;
  for (int64_t b = 0; b < blocks.count(); b++) {
    if (!(sizes[b] >= least)) continue;
    found.resize(std::max(found.size(), count + blocks.length + 1));
    // Without a branch, so that the processor asks for the next before it has the last.
    blocks.each_element(b, c, [&](int64_t position, int64_t offset) {
      found[count] = {load(x[offset]) - mean, position};
      count += std::fabs(found[count].deviation) >= least;
    });
  }
  const int64_t kept = std::min<int64_t>(k, count);
  std::partial_sort(found.begin(), found.begin() + kept, found.begin() + count, [](auto a, auto b) {
    const float own = std::fabs(a.deviation), other = std::fabs(b.deviation);
    return own != other ? own > other : a.position < b.position;
  });
  for (int64_t i = 0; i < kept; i++) {
    positions[i] = found[i].position;
    deviations[i] = found[i].deviation;
  }
}

template <class T>
void find_largest(const Blocks& blocks, const Extremes& extremes, const T* x, const float* mean,
                  int64_t k, int64_t* positions, float* deviations) {
  const Slab& slab = blocks.slab;
  const int64_t count = blocks.count(), together = blocks.rows() ? 1 : blocks.in_run;
  // Of LANES channels at once, since the extremes of these lie beside each other in NHWC.
  const auto find = [&](int64_t from, int64_t to, std::vector<float>& sizes, auto& found) {
    for (int64_t b = 0; b < count; b += together)
      for (int64_t c = from; c < to; c++)
        for (int64_t i = 0, at = blocks.at(b, c); i < together; i++)
          sizes[(c - from) * count + b + i] = std::max(extremes.highest[at + i] - mean[c],
                                                       mean[c] - extremes.lowest[at + i]);
    for (int64_t c = from; c < to; c++)
      select(blocks, &sizes[(c - from) * count], x, mean[c], c, k, found, positions + c * k,
             deviations + c * k);
  };
  at::parallel_for(slab.first(), slab.last(), slab.width() / slab.parts() + 1, [&](auto c, auto end) {
    std::vector<float> sizes(LANES * count);
    std::vector<Candidate> found;
    for (; c < end; c += LANES) find(c, std::min<int64_t>(end, c + LANES), sizes, found);
  });
}

template <class T>
void largest_forward(const Layout& layout, const Settings& settings, const Forward<T>& to,
                     int64_t k, int64_t* positions, float* deviations, double* squares) {
  const T* x = to.arrays.x;
  const int64_t count = layout.count();
  in_slabs(layout, [&](const Slab& slab) {
    const Blocks blocks(slab, k);
    float* mean = to.channels.mean;
    for (int64_t c = slab.first(); c < slab.last(); c++) mean[c] = load(x[layout.offset(0, c)]);
    layout.repeat(mean);
    const Extremes extremes = find_extremes(blocks, x, mean);
    for (int64_t c = slab.first(), i = 0; c < slab.last(); c++, i++)
      mean[c] = float(mean[c] + extremes.totals[i] / double(count));
    layout.repeat(mean);
    find_largest(blocks, extremes, x, mean, k, positions, deviations);
    for (int64_t c = slab.first(); c < slab.last(); c++) {
      double total = 0;
      for (int64_t i = 0; i < k; i++) total += std::fabs(deviations[c * k + i]);
      write_channel(settings, to.channels, to.weight, to.variance, count, c, total / double(k));
    }
    layout.repeat(to.channels.gain);
    with_fused(to.fused, [&](auto fused) { apply_affine<fused>(slab, to.arrays, squares); });
  });
}

template <class T>
void largest_backward(const Layout& layout, const Backward<T>& to, int64_t k,
                      const int64_t* positions, const float* deviations) {
  const BackwardBits bits(layout, nullptr, false, fused_of(to) == RELU);
  std::vector<float> offset(layout.length());
  in_slabs(layout, [&](const Slab& slab) {
    write_gradients_of_learned(slab, to, bits);
    const auto slope = [&](int64_t at) { return (deviations[at] > 0.f ? 1. : -1.) / double(k); };
    const auto pull = [&](int64_t c) {
      return double(to.channels.gain[c]) * to.channels.pull[c] * to.grad_weight[c];
    };
    for (int64_t c = slab.first(); c < slab.last(); c++) {
      double slopes = 0;
      for (int64_t i = 0; i < k; i++) slopes += slope(c * k + i);
      const double all = pull(c) * slopes - double(to.channels.gain[c]) * to.grad_bias[c];
      offset[c] = float(all / double(layout.count()));
    }
    layout.repeat(offset.data());
    write_gradient(slab, to, bits, nullptr, offset.data());
    for (int64_t c = slab.first(); c < slab.last(); c++)
      for (int64_t i = 0; i < k; i++) {
        const int64_t at = layout.offset(positions[c * k + i], c);
        const float grad = to.y ? given(load(to.grad[at]), load(to.y[at])) : load(to.grad[at]);
        const double rest = offset[c] - pull(c) * slope(c * k + i);
        store(to.grad_x + at, float(double(grad) * to.channels.gain[c] + rest));
      }
  });
}

template <class T>
void largest(const Layout& layout, const T* x, const float* mean, int64_t k, int64_t* positions,
             float* deviations) {
  in_slabs(layout, [&](const Slab& slab) {
    const Blocks blocks(slab, k);
    const Extremes extremes = find_extremes(blocks, x, mean);
    find_largest(blocks, extremes, x, mean, k, positions, deviations);
  });
}

#define INSTANTIATE(T)                                                                         \
  template void largest_forward(const Layout&, const Settings&, const Forward<T>&, int64_t,    \
                                int64_t*, float*, double*);                                    \
  template void largest_backward(const Layout&, const Backward<T>&, int64_t, const int64_t*,   \
                                 const float*);                                                \
  template void largest(const Layout&, const T*, const float*, int64_t, int64_t*, float*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace nmlightning
