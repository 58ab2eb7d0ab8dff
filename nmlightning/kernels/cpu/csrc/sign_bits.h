// One bit an element, whether x > μ, in words of 32 that are written and read a vector at a time:
// bit q of word j belongs to the j-th element of the q-th of 32 stretches.
//
// NHWC: a stretch is a run, of C · repeats elements: word (r / 32) · C + c has bit r % 32 of the r-th
// run, if it has one row. NCHW: G samples share words, and each of their planes is cut into P = 32 / G
// stretches of W elements, so element s of the plane of sample n has bit (n % G) · P + s / W of word
// ((n / G) · C + c) · W + s % W.
#pragma once

#include "layout.h"

namespace nmlightning {

constexpr int64_t WORD = 32;
constexpr int64_t SHORTEST_STRETCH = 64;  // a few vectors, so that starting a loop costs little

struct SignBits {
  Layout layout;
  int64_t group, parts, stretch;

  explicit SignBits(const Layout& of) : layout(of) {
    group = of.channels_last ? WORD : 1;
    if (!of.channels_last)
      while (group < WORD && group * 2 <= of.samples &&
             of.size * group < SHORTEST_STRETCH * WORD)
        group *= 2;
    parts = WORD / group;
    stretch = of.channels_last ? of.length() : (of.size + parts - 1) / parts;
  }

  int64_t words() const {
    const int64_t runs = layout.channels_last ? layout.count() / layout.repeats : layout.samples;
    const int64_t groups = (runs + group - 1) / group;
    return groups * stretch * (layout.channels_last ? 1 : layout.channels);
  }

  // Calls part(begin, length, words, bit) for each stretch of a run, begin within the run.
  template <class Words, class Part>
  void each_stretch(const Slab& slab, int64_t run, Words words, Part part) const {
    const int64_t planes = layout.channels_last ? 1 : layout.channels;
    const int64_t plane = layout.channels_last ? 0 : slab.run_channel(run);
    const int64_t sample = run / slab.runs_of_sample();
    Words own = words + (sample / group * planes + plane) * stretch;
    for (int64_t p = 0; p * stretch < slab.run_length(); p++)
      part(p * stretch, std::min(stretch, slab.run_length() - p * stretch), own,
           int(sample % group * parts + p));
  }
};

}  // namespace nmlightning
