// How (N, C, *spatial) is walked through: in runs, by threads, a slab of channels at a time.
//
// A run is a contiguous stretch of elements. In NCHW it is a plane, whose elements have one
// channel; in NHWC it is a row, whose i-th element has channel i, or a few rows where they are short;
// then arrays of channels repeat themselves along a run. A slab is what an algorithm makes
// all its passes over before the next slab: all of NHWC, or a few channels of NCHW, which stay in
// the cache. They are several where planes are short: then memory is read in longer stretches, and
// planes a power of two apart do not push each other out of the cache.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "vectors.h"

namespace nmlightning {

struct Layout {
  int64_t samples, channels, size;
  bool channels_last;
  int64_t repeats = 1;  // rows a run

  int64_t count() const { return samples * size; }

  // How long the arrays of channels are.
  int64_t length() const { return channels * repeats; }

  // Repeats the first values of an array of channels, which have been written.
  void repeat(float* values) const {
    for (int64_t i = channels; i < length(); i++) values[i] = values[i - channels];
  }

  // Where in memory the element of channel c is whose position along (N, *spatial) is given.
  int64_t offset(int64_t position, int64_t c) const {
    return channels_last ? position * channels + c
                         : (position / size * channels + c) * size + position % size;
  }
};

// What loops make of an array with a value for each channel: that of one channel; those of all; those
// of G · W from the first on, in registers, which compilers would not dare where a loop writes.
struct OneChannel {
  int64_t channel;
  Same operator()(const float* values) const { return {values[channel]}; }
};

struct EachChannel {
  const float* operator()(const float* values) const { return values; }
};

template <int W, int G>
struct SomeChannels {
  int64_t first;
  Each<W, G> operator()(const float* values) const {
    Each<W, G> each;
    for (int g = 0; g < G; g++) each.values[g] = load<W>(values + first + g * W);
    return each;
  }
};

constexpr int AT_ONCE = LANES == 16 ? 8 : 4;  // vectors for which there are registers
constexpr int64_t ELEMENTS_A_BLOCK = 8192;  // whose sums are in float; over the blocks, in double
constexpr int64_t ROWS_A_BLOCK = 128;       // the same of NHWC
constexpr int64_t LONGEST_SHORT_PLANE = 1024;
constexpr int64_t ELEMENTS_A_STRETCH = 1024;  // of the channels of a slab in a sample, at least
constexpr int64_t ELEMENTS_A_SLAB = 65536;    // at most, where a channel has not more itself
constexpr int64_t ELEMENTS_A_THREAD = 16384, ELEMENTS_A_PART = 16384, RUNS_A_PART = 256, PARTS = 64;
constexpr int64_t PLANES_AT_ONCE = 4;

// What is summed up.
template <class F, int K>
struct Terms {
  static constexpr int number = K;
  F of[K];
};

template <class F, class... Rest>
Terms(F, Rest...) -> Terms<F, 1 + sizeof...(Rest)>;

template <int W>
inline void add_to(double* totals, Floats<W> values) {
  float each[W];
  std::memcpy(each, &values, sizeof each);
  for (int i = 0; i < W; i++) totals[i] += each[i];
}

// A run, how many there are before it in memory, and elements.
struct Run {
  int64_t index, offset;
};

struct Slab {
  Layout layout;
  int64_t channel, channels;

  int64_t first() const { return channel; }
  int64_t width() const { return channels; }
  int64_t last() const { return channel + channels; }
  int64_t runs_of_sample() const { return layout.channels_last ? 1 : channels; }
  int64_t samples() const {
    return layout.channels_last ? layout.count() / layout.repeats : layout.samples;
  }
  int64_t run_length() const {
    return layout.channels_last ? layout.length() : layout.size;
  }
  // Whether there are registers for the values of all places of a run of NHWC.
  bool is_row_in_registers() const {
    return layout.channels_last && layout.length() == AT_ONCE * LANES;
  }

  // The j-th run of a sample.
  Run place(int64_t sample, int64_t j) const {
    const int64_t index = layout.channels_last ? sample : sample * layout.channels + channel + j;
    return {index, index * run_length()};
  }

  // How many parts all passes are made in, which does not depend on how many threads there are.
  int64_t parts() const {
    const int64_t useful = layout.count() * channels / ELEMENTS_A_PART;
    const int64_t most = layout.channels_last ? samples() / RUNS_A_PART : samples();
    return std::max<int64_t>(1, std::min({useful, most, PARTS}));
  }

  // Calls part(begin, end, index) with the samples of each part; but for the last, a multiple of
  // align. In NHWC a run counts as a sample.
  template <class Part>
  void in_parallel(int64_t align, Part part) const {
    const int64_t groups = (samples() + align - 1) / align, all = parts();
    at::parallel_for(0, all, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i++)
        part(groups * i / all * align, std::min(groups * (i + 1) / all * align, samples()), i);
    });
  }

  // Calls what part(at)(run) returns with each place of the runs of samples, where at(array) has the
  // values of its places.
  template <class Part>
  void each_place_of(int64_t begin, int64_t end, Part part) const {
    if (is_row_in_registers()) {
      const auto of_run = part(SomeChannels<LANES, AT_ONCE>{0});
      for (int64_t row = begin; row < end; row++) {
        const auto of_place = of_run(place(row, 0));
#pragma GCC unroll 8
        for (int g = 0; g < AT_ONCE; g++) of_place(Place<LANES>{g * LANES, g});
      }
    } else if (layout.channels_last) {
      const auto of_run = part(EachChannel{});
      for (int64_t row = begin; row < end; row++)
        each_place(0, layout.length(), of_run(place(row, 0)));
    } else {
      for (int64_t sample = begin; sample < end; sample++)
        for (int64_t j = 0; j < channels; j++)
          each_place(0, layout.size, part(OneChannel{channel + j})(place(sample, j)));
    }
  }

  template <class Part>
  void each_place_in_parallel(Part part) const {
    in_parallel(1, [&](int64_t begin, int64_t end, int64_t) { each_place_of(begin, end, part); });
  }

  // Whether extremes are held apart for each place in a run: in NHWC, and in short planes, which
  // hardly fill a loop of vectors.
  bool by_place() const { return layout.channels_last || layout.size <= LONGEST_SHORT_PLANE; }

  // Adds what terms_of(at)(run) returns for each place of the runs of samples to (K, width) totals.
  template <class TermsOf>
  void add(int64_t begin, int64_t end, TermsOf terms_of, double* totals) const {
    if (layout.channels_last)
      add_rows(begin, end, terms_of, totals);
    else
      add_planes(begin, end, terms_of, totals);
  }

  // Returns the same over all runs.
  template <class TermsOf>
  std::vector<double> sums(TermsOf terms_of) const {
    const int64_t length = number_of<TermsOf>() * width();
    std::vector<double> totals(parts() * length);
    in_parallel(1, [&](int64_t begin, int64_t end, int64_t part) {
      add(begin, end, terms_of, &totals[part * length]);
    });
    return fold(std::move(totals), length);
  }

  // Returns the totals of all parts added up.
  std::vector<double> fold(std::vector<double> totals, size_t length) const {
    for (size_t from = length; from < totals.size(); from += length)
      for (size_t i = 0; i < length; i++) totals[i] += totals[from + i];
    totals.resize(length);
    return totals;
  }

  template <class TermsOf>
  static constexpr int number_of() {
    return decltype(std::declval<TermsOf>()(OneChannel{})(Run{})(Place<1>{}))::number;
  }

  template <class TermsOf>
  void add_rows(int64_t begin, int64_t end, TermsOf terms_of, double* totals) const {
    constexpr int K = number_of<TermsOf>();
    std::vector<Floats<LANES>> held(K * run_length() / LANES + 1);  // which is aligned
    float* sums = reinterpret_cast<float*>(held.data());
    for (int64_t from = begin; from < end; from += ROWS_A_BLOCK) {
      const int64_t to = std::min(end, from + ROWS_A_BLOCK);
      if (is_row_in_registers())
        add_in_registers(from, to, terms_of, sums);
      else
        add_together(from, to, terms_of(EachChannel{}), sums);
      for (int64_t row = 0; row < K * layout.repeats; row++)
        for (int64_t c = 0; c < channels; c++)
          totals[row / layout.repeats * channels + c] +=
              std::exchange(sums[row * channels + c], 0.f);
    }
  }

  template <class TermsOf>
  void add_in_registers(int64_t begin, int64_t end, TermsOf terms_of, float* sums) const {
    constexpr int K = number_of<TermsOf>(), G = AT_ONCE;
    const auto terms_of_run = terms_of(SomeChannels<LANES, G>{0});
    Floats<LANES> own[K][G] = {};
    for (int64_t row = begin; row < end; row++) {
      const auto terms = terms_of_run(place(row, 0));
#pragma GCC unroll 8
      for (int g = 0; g < G; g++) {
        const auto values = terms(Place<LANES>{g * LANES, g});
        for (int k = 0; k < K; k++) own[k][g] += values.of[k];
      }
    }
    for (int k = 0; k < K; k++)
      for (int g = 0; g < G; g++) Place<LANES>{(k * G + g) * LANES}.add(sums, own[k][g]);
  }

  // Adds the terms of four rows together, which are far from each other, so that memory is read in
  // its order.
  template <class TermsOfRun>
  void add_together(int64_t begin, int64_t end, TermsOfRun terms_of_run, float* sums) const {
    constexpr int K = decltype(terms_of_run(Run{})(Place<1>{}))::number;
    const int64_t n = run_length(), step = (end - begin) / 4;
    const auto terms_of = [&](int64_t row) { return terms_of_run(place(row, 0)); };
    for (int64_t row = begin; row < begin + step; row++)
      each_place(0, n, [&, a = terms_of(row), b = terms_of(row + step),
                        c = terms_of(row + 2 * step), d = terms_of(row + 3 * step)](auto in) {
        const auto p = a(in), q = b(in), r = c(in), s = d(in);
        for (int k = 0; k < K; k++)
          in.plus(k * n).add(sums, (p.of[k] + q.of[k]) + (r.of[k] + s.of[k]));
      });
    for (int64_t row = begin + 4 * step; row < end; row++)
      each_place(0, n, [&, a = terms_of(row)](auto in) {
        const auto p = a(in);
        for (int k = 0; k < K; k++) in.plus(k * n).add(sums, p.of[k]);
      });
  }

  template <class TermsOf>
  void add_planes(int64_t begin, int64_t end, TermsOf terms_of, double* totals) const {
    constexpr int K = number_of<TermsOf>();
    std::vector<float> sums(channels * K * LANES);
    const int64_t block = std::max<int64_t>(1, ELEMENTS_A_BLOCK / std::max<int64_t>(layout.size, 1));
    for (int64_t from = begin, to; from < end; from = to) {
      to = std::min(end, from + block);
      for (int64_t sample = from; sample < to; sample += PLANES_AT_ONCE)
        for (int64_t j = 0; j < channels; j++)
          for (int64_t i = 0; i < layout.size; i += ELEMENTS_A_BLOCK)
            add_stretches(sample, std::min(to, sample + PLANES_AT_ONCE), j, i, terms_of,
                          &sums[j * K * LANES]);
      for (int64_t j = 0; j < channels; j++)
        for (int64_t k = 0; k < K; k++)
          for (int64_t i = 0; i < LANES; i++)
            totals[k * channels + j] += std::exchange(sums[(j * K + k) * LANES + i], 0.f);
    }
  }

  // Adds the terms of a stretch of planes to K times LANES sums.
  template <class TermsOf>
  void add_stretches(int64_t begin, int64_t end, int64_t j, int64_t from, TermsOf terms_of,
                     float* sums) const {
    constexpr int K = number_of<TermsOf>(), G = 4;
    const int64_t to = std::min(layout.size, from + ELEMENTS_A_BLOCK);
    const auto terms_of_run = terms_of(OneChannel{channel + j});
    Floats<LANES> own[K][G] = {};
    Floats<FEW> few[K] = {};
    for (int64_t sample = begin; sample < end; sample++) {
      const auto terms = terms_of_run(place(sample, j));
      int64_t i = from;
      for (; i + G * LANES <= to; i += G * LANES)
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
          const auto values = terms(Place<LANES>{i + g * LANES});
          for (int k = 0; k < K; k++) own[k][g] += values.of[k];
        }
      each_place(i, to, [&]<int W>(Place<W> in) {
        const auto values = terms(in);
        for (int k = 0; k < K; k++)
          if constexpr (W == LANES)
            own[k][0] += values.of[k];
          else if constexpr (W == FEW)
            few[k] += values.of[k];
          else
            few[k][0] += values.of[k];
      });
    }
    for (int k = 0; k < K; k++) {
      Place<LANES>{k * LANES}.add(sums, (own[k][0] + own[k][1]) + (own[k][2] + own[k][3]));
      Place<FEW>{k * LANES}.add(sums, few[k]);
    }
  }
};

// Calls part(slab) for all slabs. Threads divide the channels of NCHW, or the planes of each where
// there are fewer channels than threads, and the rows of NHWC.
template <class Part>
void in_slabs(const Layout& layout, Part part) {
  if (layout.channels_last) return part(Slab{layout, 0, layout.channels});
  const int64_t wanted = ELEMENTS_A_STRETCH / std::max<int64_t>(layout.size, 1);
  const int64_t fitting = ELEMENTS_A_SLAB / std::max<int64_t>(layout.count(), 1);
  const int64_t width = std::max<int64_t>(1, std::min(wanted, fitting));
  const int64_t slabs = (layout.channels + width - 1) / width, threads = at::get_num_threads();
  const auto all = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      part(Slab{layout, i * width, std::min(width, layout.channels - i * width)});
  };
  if (slabs < threads) return all(0, slabs);
  const int64_t elements = std::max<int64_t>(1, layout.count() * width);
  at::parallel_for(0, slabs, std::max<int64_t>(1, ELEMENTS_A_PART / elements), all);
}

}  // namespace nmlightning
