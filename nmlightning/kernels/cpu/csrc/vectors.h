// Loops over float32 or bfloat16, W elements at once; all arithmetic is in float.
//
// The vectors are the compiler's own, so that any machine has them. Intrinsics are only where
// compilers do not find an instruction: rounding to bfloat16, bytes, and one bit an element.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define NMLIGHTNING_MASKS
#endif

namespace nmlightning {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int FEW = 4;  // at the end of a loop, before one at a time

template <class E, int W>
struct VectorOf {
  typedef E Type __attribute__((vector_size(W * sizeof(E))));
};
template <class E>
struct VectorOf<E, 1> {
  using Type = E;
};
template <int W>
using Floats = typename VectorOf<float, W>::Type;
template <int W>
using Words = typename VectorOf<uint32_t, W>::Type;

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class To, class From>
inline To convert(From from) {
  if constexpr (std::is_scalar_v<From>)
    return To(from);
  else
    return __builtin_convertvector(from, To);
}

template <int W>
inline Floats<W> load(const float* from) {
  Floats<W> values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

template <int W>
inline Floats<W> load(const BFloat16* from) {
  typename VectorOf<uint16_t, W>::Type halves;
  std::memcpy(&halves, from, sizeof halves);
#ifdef NMLIGHTNING_MASKS
  if constexpr (W == 16)
    return same_bits<Floats<W>>(_mm512_cvtepu16_epi32(same_bits<__m256i>(halves)) << 16);
#endif
  return same_bits<Floats<W>>(convert<Words<W>>(halves) << 16);
}

template <class T>
inline float load(T value) {
  return load<1>(&value);
}

template <int W>
inline void store(float* to, Floats<W> values) {
  std::memcpy(to, &values, sizeof values);
}

// Rounds to nearest, ties to even. A NaN stays one, whatever its bits. The instruction makes 0 of
// what is below the smallest normal number.
template <int W>
inline void store(BFloat16* to, Floats<W> values) {
#if defined(NMLIGHTNING_MASKS) && defined(__AVX512BF16__)
  if constexpr (W == 16) {
    constexpr int SUBNORMAL = 0x20;
    if (__builtin_expect(!_mm512_fpclass_ps_mask(same_bits<__m512>(values), SUBNORMAL), 1)) {
      const auto rounded = _mm512_cvtneps_pbh(same_bits<__m512>(values));
      std::memcpy(to, &rounded, sizeof rounded);
      return;
    }
  }
#endif
  const auto wide = same_bits<Words<W>>(values);
  const Words<W> rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  const auto halves = convert<typename VectorOf<uint16_t, W>::Type>(
      values == values ? rounded : Words<W>{} + 0x7fc0);
  std::memcpy(to, &halves, sizeof halves);
}

template <class T>
inline void store(T* to, float value) {
  store<1>(to, value);
}

template <int W>
inline Floats<W> load(const uint8_t* from) {
  typename VectorOf<uint8_t, W>::Type bytes;
  std::memcpy(&bytes, from, sizeof bytes);
#ifdef NMLIGHTNING_MASKS
  if constexpr (W == 16)
    return same_bits<Floats<W>>(
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(same_bits<__m128i>(bytes))));
#endif
  return convert<Floats<W>>(convert<typename VectorOf<int32_t, W>::Type>(bytes));
}

// Whole numbers of −128 … 255, as uint8 or, which are the same bits, as int8.
template <int W>
inline void store(uint8_t* to, Floats<W> values) {
#ifdef NMLIGHTNING_MASKS
  if constexpr (W == 16) {
    const __m512i whole = _mm512_cvttps_epi32(same_bits<__m512>(values));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(whole));
    return;
  }
#endif
  const auto bytes = convert<typename VectorOf<uint8_t, W>::Type>(
      convert<typename VectorOf<int32_t, W>::Type>(values));
  std::memcpy(to, &bytes, sizeof bytes);
}

template <class F>
inline F magnitude(F values) {
  return same_bits<F>(same_bits<Words<sizeof(F) / sizeof(float)>>(values) & 0x7fffffff);
}

// One bit an element, in a word for LANES of a run; the last word of a run may have fewer.
using Bits = std::conditional_t<LANES == 16, uint16_t, uint8_t>;

inline int64_t bits_of_run(int64_t length) { return (length + LANES - 1) / LANES; }

// A value of the one channel of a run, or those of G · W channels.
struct Same {
  float value;
};

template <int W, int G>
struct Each {
  Floats<W> values[G];
};

// W elements of a run from the i-th on, the g-th W of those that are looped over at once.
template <int W>
struct Place {
  int64_t i;
  int g = 0;

  template <class T>
  Floats<W> operator()(const T* from) const {
    return load<W>(from + i);
  }
  Floats<W> operator()(Same same) const { return same.value - Floats<W>{}; }
  template <int G>
  Floats<W> operator()(const Each<W, G>& each) const { return each.values[g]; }

  Place plus(int64_t distance) const { return {i + distance}; }

  template <class T>
  void write(T* to, Floats<W> values) const {
    store<W>(to + i, values);
  }

  void add(float* to, Floats<W> values) const { write(to, (*this)(to) + values); }

  // Marks the elements where a > b.
  void mark(Bits* bits, Floats<W> a, Floats<W> b) const {
    uint32_t found = 0;
    if constexpr (W == 1) {
      found = a > b;
    } else {
#ifdef NMLIGHTNING_MASKS
      if constexpr (W == 16) {
        bits[i / LANES] = _mm512_cmp_ps_mask(same_bits<__m512>(a), same_bits<__m512>(b), _CMP_GT_OQ);
        return;
      }
#endif
      const auto above = a > b;
      for (int lane = 0; lane < W; lane++) found |= (above[lane] & 1u) << lane;
    }
    bits[i / LANES] = Bits((i % LANES ? bits[i / LANES] : 0) | found << i % LANES);
  }

  // Returns values of `yes` where the bits are set, else of `no`.
  Floats<W> choose(const Bits* bits, Floats<W> yes, Floats<W> no) const {
    const uint32_t found = uint32_t(bits[i / LANES]) >> i % LANES;
    if constexpr (W == 1) {
      return found & 1 ? yes : no;
    } else {
#ifdef NMLIGHTNING_MASKS
      if constexpr (W == 16) return same_bits<Floats<W>>(_mm512_mask_blend_ps(
          found, same_bits<__m512>(no), same_bits<__m512>(yes)));
#endif
      Words<W> lanes;
      for (int lane = 0; lane < W; lane++) lanes[lane] = 1u << lane;
      return ((found - Words<W>{}) & lanes) != 0 ? yes : no;
    }
  }
};

// Calls part(place) for all places of a run from `from` on.
template <class Part>
inline void each_place(int64_t from, int64_t length, Part part) {
  int64_t i = from;
  for (; i + LANES <= length; i += LANES) part(Place<LANES>{i});
  for (; i + FEW <= length; i += FEW) part(Place<FEW>{i});
  for (; i < length; i++) part(Place<1>{i});
}

}  // namespace nmlightning
