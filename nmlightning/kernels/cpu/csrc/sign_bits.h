// One bit an element: of each run, in memory's order, LANES in a word.
#pragma once

#include "layout.h"

namespace nmlightning {

struct SignBits {
  Layout layout;

  // How many words of 32 bits there are.
  int64_t words() const {
    const int64_t length = layout.channels_last ? layout.length() : layout.size;
    const int64_t runs = length ? layout.count() * layout.channels / length : 0;
    return (runs * bits_of_run(length) * sizeof(Bits) + 3) / 4;
  }
};

inline Bits* bits_of(Bits* all, Run run, int64_t length) {
  return all + run.index * bits_of_run(length);
}

}  // namespace nmlightning
