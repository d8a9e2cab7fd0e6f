// Functions on vectors for the kernels of softmax moments: of floats masks, gathering and
// scattering.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

using namespace cpu::INSTRUCTION_SET;

template <class Stat>
using VecOf = typename Simd<Stat>::Vec;

template <class Stat>
constexpr int LANES = Simd<Stat>::LANES;

template <class Stat>
using Indices = Vector<int32_t, LANES<Stat>>;

template <class Vec>
ALWAYS_INLINE Vec maximum(Vec a, Vec b) {  // keeps a NaN in a, ignores a NaN in b
  return b > a ? b : a;
}

using Floats = VecOf<float>;
using Ints = Vector<int32_t, LANES<float>>;

// A bit for each lane of a mask.
ALWAYS_INLINE uint32_t lanes_of(Ints mask) {
#if VECTOR_BYTES == 64
  return _mm512_movepi32_mask(__m512i(mask));
#elif VECTOR_BYTES == 32
  return _mm256_movemask_ps(__m256(mask));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < LANES<float>; ++i) lanes |= (mask[i] & 1) << i;
  return lanes;
#endif
}

ALWAYS_INLINE bool any(Ints mask) { return lanes_of(mask) != 0; }

// table[index]; `other` where index is negative.
template <class Element>
ALWAYS_INLINE Vector<Element, LANES<float>> gather(const Element* table, Ints index,
                                                   Element other) {
  static_assert(sizeof(Element) == 4);
  using Vec = Vector<Element, LANES<float>>;
  const Vec others = Vec{} + other;
#if VECTOR_BYTES == 64
  const __mmask16 valid = ~_mm512_movepi32_mask(__m512i(index));
  return Vec(_mm512_mask_i32gather_epi32(__m512i(others), valid, __m512i(index), table, 4));
#elif VECTOR_BYTES == 32
  return Vec(_mm256_mask_i32gather_epi32(__m256i(others), reinterpret_cast<const int*>(table),
                                         __m256i(index), __m256i(index >= 0), 4));
#else
  Vec result = others;
  for (int i = 0; i < LANES<float>; ++i)
    if (index[i] >= 0) result[i] = table[index[i]];
  return result;
#endif
}

// The bits of four neighbours in the table at each of some indices, or at 0 for a negative one.
template <class Element>
ALWAYS_INLINE Floats load_fours(const Element* table, const int32_t* index) {
  static_assert(sizeof(Element) == 4);
  const auto at = [&](int i) INLINE_LAMBDA { return table + std::max(index[i], 0); };
#if VECTOR_BYTES == 64
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at(0))));
  v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(1))), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(2))), 2);
  return Floats(_mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(3))), 3));
#else
  Floats v;
  for (int i = 0; i < LANES<float> / 4; ++i)
    std::memcpy(reinterpret_cast<char*>(&v) + 16 * i, at(i), 16);
  return v;
#endif
}

// table[index] = values; nothing is written where index is negative.
ALWAYS_INLINE void scatter(float* table, Ints index, Floats values) {
#if VECTOR_BYTES == 64
  const __mmask16 valid = ~_mm512_movepi32_mask(__m512i(index));
  _mm512_mask_i32scatter_ps(table, valid, __m512i(index), __m512(values), 4);
#else
  for (int i = 0; i < LANES<float>; ++i)
    if (index[i] >= 0) table[index[i]] = values[i];
#endif
}

template <class Index>
ALWAYS_INLINE bool all_equal(Index index) {
  if constexpr (std::is_same_v<Index, Ints>) return !any(index != index[0]);
  bool equal = true;
  for (size_t i = 1; i < sizeof index / sizeof index[0]; ++i) equal &= index[i] == index[0];
  return equal;
}

// table[index]; 0 where index is negative. Mostly all are equal.
template <class Stat>
ALWAYS_INLINE VecOf<Stat> pick(const Stat* table, Indices<Stat> index) {
  if (all_equal(index)) return VecOf<Stat>{} + (index[0] < 0 ? Stat(0) : table[index[0]]);
  if constexpr (std::is_same_v<Stat, float>) return gather(table, index, 0.0f);
  VecOf<Stat> result = {};
  for (int i = 0; i < LANES<Stat>; ++i)
    if (index[i] >= 0) result[i] = table[index[i]];
  return result;
}

ALWAYS_INLINE Ints load_ints(const int32_t* source) {
  Ints v;
  std::memcpy(&v, source, sizeof v);
  return v;
}

// line[lower[i]] of each lane; 0 where lower[i] is -1. NEAR: all are in one vector, none is -1.
template <bool NEAR, class Stat>
ALWAYS_INLINE VecOf<Stat> look_up(const Stat* line, const int32_t* lower) {
  if constexpr (std::is_same_v<Stat, float>) {
    if constexpr (!NEAR) return gather(line, load_ints(lower), 0.0f);
#if VECTOR_BYTES == 64
    const __m512i index = _mm512_sub_epi32(_mm512_loadu_si512(lower), _mm512_set1_epi32(lower[0]));
    return VecOf<float>(_mm512_permutexvar_ps(index, _mm512_loadu_ps(line + lower[0])));
#elif VECTOR_BYTES == 32
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower));
    const __m256i index = _mm256_sub_epi32(at, _mm256_set1_epi32(lower[0]));
    return VecOf<float>(_mm256_permutevar8x32_ps(_mm256_loadu_ps(line + lower[0]), index));
#endif
  }
  VecOf<Stat> values;
  for (int i = 0; i < LANES<Stat>; ++i) values[i] = lower[i] < 0 ? Stat(0) : line[lower[i]];
  return values;
}

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET
