// Elements in memory, float32 or bfloat16; all arithmetic is in float.
#pragma once

#include <cstdint>
#include <cstring>

namespace nmlightning {

struct BFloat16 {
  uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(BFloat16 value) {
  const uint32_t wide = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

inline void store(float* to, float value) { *to = value; }

// Rounds to nearest, ties to even. A NaN stays one, whatever its bits.
inline void store(BFloat16* to, float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  to->bits = uint16_t(value == value ? rounded : 0x7fc0);
}

// NaN stays NaN, as in torch.
inline float relu(float value) { return 0.f > value ? 0.f : value; }

}  // namespace nmlightning
