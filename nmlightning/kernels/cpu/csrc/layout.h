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
#include <type_traits>
#include <utility>
#include <vector>

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

// A value of the one channel of a run, indexed as the values of all channels are.
struct Same {
  float value;
  float operator[](int64_t) const { return value; }
};

// What a run makes of an array with a value for each channel.
struct OneChannel {
  int64_t channel;
  Same operator()(const float* values) const { return {values[channel]}; }
};

struct EachChannel {
  const float* operator()(const float* values) const { return values; }
};

constexpr int64_t RUNS_A_BLOCK = 256;       // summed in float, place by place, and then in double
constexpr int64_t ELEMENTS_A_BLOCK = 4096;  // of long runs, the same
constexpr int64_t LONGEST_SHORT_PLANE = 1024;
constexpr int64_t ELEMENTS_A_STRETCH = 1024;  // of the channels of a slab in a sample, at least
constexpr int64_t ELEMENTS_A_SLAB = 65536;    // at most, where a channel has not more itself
constexpr int64_t ELEMENTS_A_THREAD = 16384;

// What is summed up: up to three functions of an element's place in a run. The loops take each as an
// argument of its own, by value; else compilers read its pointers anew for each element.
struct Nothing {
  float operator()(int64_t) const { return 0.f; }
};

template <class A, class B = Nothing, class C = Nothing>
struct Terms {
  static constexpr int64_t number = std::is_same_v<B, Nothing> ? 1 : std::is_same_v<C, Nothing> ? 2 : 3;
  A a;
  B b = {};
  C c = {};
};

template <class A>
Terms(A) -> Terms<A>;
template <class A, class B>
Terms(A, B) -> Terms<A, B>;
template <class A, class B, class C>
Terms(A, B, C) -> Terms<A, B, C>;

template <class A, class B, class C>
inline void add_run(int64_t n, A a, B b, C c, double* totals, int64_t stride) {
  for (int64_t from = 0; from < n; from += ELEMENTS_A_BLOCK) {
    const int64_t to = std::min(n, from + ELEMENTS_A_BLOCK);
    float first = 0, second = 0, third = 0;
#pragma omp simd reduction(+ : first, second, third)
    for (int64_t i = from; i < to; i++) {
      first += a(i);
      second += b(i);
      third += c(i);
    }
    totals[0] += first;
    if constexpr (Terms<A, B, C>::number > 1) totals[stride] += second;
    if constexpr (Terms<A, B, C>::number > 2) totals[2 * stride] += third;
  }
}

// Adds the terms of n elements to the totals, which are a stride apart, each in float in a block.
template <class A, class B, class C>
inline void add_run(int64_t n, const Terms<A, B, C>& terms, double* totals, int64_t stride = 1) {
  add_run(n, terms.a, terms.b, terms.c, totals, stride);
}

// Adds the terms of the i-th elements of four rows to the i-th sums.
template <class A, class B, class C>
inline void add_four_rows(int64_t n, A a0, A a1, A a2, A a3, B b0, B b1, B b2, B b3, C c0, C c1,
                          C c2, C c3, float* sums) {
  constexpr int64_t K = Terms<A, B, C>::number;
  float *first = sums, *second = sums + n, *third = sums + 2 * n;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    first[i] += (a0(i) + a1(i)) + (a2(i) + a3(i));
    if constexpr (K > 1) second[i] += (b0(i) + b1(i)) + (b2(i) + b3(i));
    if constexpr (K > 2) third[i] += (c0(i) + c1(i)) + (c2(i) + c3(i));
  }
}

template <class A, class B, class C>
inline void add_row(int64_t n, A a, B b, C c, float* sums) {
  constexpr int64_t K = Terms<A, B, C>::number;
  float *first = sums, *second = sums + n, *third = sums + 2 * n;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    first[i] += a(i);
    if constexpr (K > 1) second[i] += b(i);
    if constexpr (K > 2) third[i] += c(i);
  }
}

struct Slab {
  Layout layout;
  int64_t channel, channels;
  int threads;

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
  int64_t run_channel(int64_t run) const { return channel + run % runs_of_sample(); }
  int64_t offset(int64_t run) const {
    if (layout.channels_last) return run * layout.length();
    return (run / channels * layout.channels + run_channel(run)) * layout.size;
  }

  // Calls part(begin, end, task) with the samples of each task; but for the last, a multiple of
  // align. In NHWC a run counts as a sample.
  template <class Part>
  void in_parallel(int64_t align, Part part) const {
    if (threads == 1) return part(int64_t(0), samples(), 0);
    const int64_t groups = (samples() + align - 1) / align;
    at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      for (int64_t task = from; task < to; task++) {
        const int64_t begin = groups * task / threads * align;
        const int64_t end = std::min(groups * (task + 1) / threads * align, samples());
        part(begin, end, int(task));
      }
    });
  }

  // Calls part(offset, at) for a run, where at(array) is indexed by the element's place in the run.
  template <class Part>
  void with_run(int64_t run, Part part) const {
    if (layout.channels_last)
      part(offset(run), EachChannel{});
    else
      part(offset(run), OneChannel{run_channel(run)});
  }

  template <class Part>
  void each_run(Part part) const {
    const int64_t runs = runs_of_sample();
    in_parallel(1, [&](int64_t begin, int64_t end, int) {
      for (int64_t run = begin * runs; run < end * runs; run++) with_run(run, part);
    });
  }

  // Whether sums are held apart for each place in a run, until they are added up: in NHWC, and in
  // short planes, which hardly fill a loop of vectors.
  bool by_place() const { return layout.channels_last || layout.size <= LONGEST_SHORT_PLANE; }

  // Adds the terms that terms_of(offset, at) returns for the runs of samples to (K, width) totals.
  template <class TermsOf>
  void add(int64_t begin, int64_t end, TermsOf terms_of, double* totals) const {
    if (layout.channels_last)
      return add_by_place(
          begin, end, [&](int64_t run) { return terms_of(offset(run), EachChannel{}); }, totals);
    const auto terms = [&](int64_t run) {
      return terms_of(offset(run), OneChannel{run_channel(run)});
    };
    if (by_place()) return add_by_place(begin, end, terms, totals);
    for (int64_t run = begin * channels; run < end * channels; run++)
      add_run(layout.size, terms(run), totals + run % channels, channels);
  }

  // Returns the same over all runs, each sum in float in a block and in double over the blocks.
  template <class TermsOf>
  std::vector<double> sums(TermsOf terms_of) const {
    const int64_t length = number_of<TermsOf>() * width();
    std::vector<double> totals(threads * length);
    in_parallel(1, [&](int64_t begin, int64_t end, int task) {
      add(begin, end, terms_of, &totals[task * length]);
    });
    return fold(std::move(totals), length);
  }

  // Returns the totals of all tasks added up.
  std::vector<double> fold(std::vector<double> totals, int64_t length) const {
    for (int task = 1; task < threads; task++)
      for (int64_t i = 0; i < length; i++) totals[i] += totals[task * length + i];
    totals.resize(length);
    return totals;
  }

 private:
  template <class TermsOf>
  static constexpr int64_t number_of() {
    return decltype(std::declval<TermsOf>()(int64_t(0), EachChannel{}))::number;
  }

  template <class TermsOfRun>
  void add_by_place(int64_t begin, int64_t end, TermsOfRun terms, double* totals) const {
    constexpr int64_t K = decltype(terms(int64_t(0)))::number;
    const int64_t n = run_length(), runs = runs_of_sample();
    std::vector<float> block(K * n * runs);
    for (int64_t from = begin; from < end; from += RUNS_A_BLOCK) {
      const int64_t to = std::min(end, from + RUNS_A_BLOCK);
      std::fill(block.begin(), block.end(), 0.f);
      int64_t sample = from;
      for (; sample + 4 <= to; sample += 4)
        for (int64_t j = 0; j < runs; j++) {
          const int64_t run = sample * runs + j;
          const auto t = terms(run), u = terms(run + runs), v = terms(run + 2 * runs);
          const auto w = terms(run + 3 * runs);
          add_four_rows(n, t.a, u.a, v.a, w.a, t.b, u.b, v.b, w.b, t.c, u.c, v.c, w.c,
                        &block[j * K * n]);
        }
      for (; sample < to; sample++)
        for (int64_t j = 0; j < runs; j++) {
          const auto t = terms(sample * runs + j);
          add_row(n, t.a, t.b, t.c, &block[j * K * n]);
        }
      for (int64_t j = 0; j < runs; j++)
        for (int64_t k = 0; k < K; k++)
          for (int64_t i = 0; i < n; i++)
            totals[k * channels + (layout.channels_last ? i % channels : j)] +=
                block[(j * K + k) * n + i];
    }
  }
};

// Calls part(slab) for all slabs. Threads divide the channels of NCHW, or the planes of each where
// there are fewer channels than threads, and the rows of NHWC.
template <class Part>
void in_slabs(const Layout& layout, Part part) {
  const int64_t elements = layout.count() * layout.channels;
  const int64_t useful = (elements + ELEMENTS_A_THREAD - 1) / ELEMENTS_A_THREAD;
  const int threads = int(std::clamp<int64_t>(useful, 1, at::get_num_threads()));
  if (layout.channels_last) return part(Slab{layout, 0, layout.channels, threads});
  if (layout.channels < threads) {
    for (int64_t channel = 0; channel < layout.channels; channel++)
      part(Slab{layout, channel, 1, threads});
    return;
  }
  const int64_t wanted = ELEMENTS_A_STRETCH / std::max<int64_t>(layout.size, 1);
  const int64_t fitting = ELEMENTS_A_SLAB / std::max<int64_t>(layout.count(), 1);
  const int64_t width = std::max<int64_t>(1, std::min(wanted, fitting));
  const int64_t grain = (layout.channels + threads - 1) / threads;
  at::parallel_for(0, layout.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; channel += width)
      part(Slab{layout, channel, std::min(width, end - channel), 1});
  });
}

}  // namespace nmlightning
