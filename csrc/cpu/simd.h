// Vectors of one instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "instruction_set.h"
#include "types.h"

BEGIN_TARGET
namespace anchorops::cpu::INSTRUCTION_SET {

#define INLINE_LAMBDA __attribute__((always_inline))
#define ALWAYS_INLINE inline INLINE_LAMBDA

template <class Element, int LANES>
using Vector __attribute__((vector_size(sizeof(Element) * LANES))) = Element;

template <class T>
struct Simd {
  using Stat = StatOf<T>;
  static constexpr int LANES = VECTOR_BYTES / sizeof(Stat);
  using Vec = Vector<Stat, LANES>;
  using Bits = Vector<uint32_t, LANES>;

  static ALWAYS_INLINE Vec load(const T* source) {
    if constexpr (std::is_same_v<T, Stat>) {
      Vec v;
      std::memcpy(&v, source, sizeof v);
      return v;
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      Vector<uint16_t, LANES> half;
      std::memcpy(&half, source, sizeof half);
      return Vec(__builtin_convertvector(half, Bits) << 16);  // the same bits
    } else {
#if VECTOR_BYTES == 64
      return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif VECTOR_BYTES == 32
      return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#else
      Vec v;
      for (int i = 0; i < LANES; ++i) v[i] = static_cast<float>(source[i]);
      return v;
#endif
    }
  }

  static ALWAYS_INLINE void store(T* target, Vec v) {
    if constexpr (std::is_same_v<T, Stat>) {
      std::memcpy(target, &v, sizeof v);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      // Round to nearest even; a NaN remains NaN.
      const Bits bits = Bits(v);
      const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      const Bits quiet = rounded * 0 + 0x7fc0;
      const auto half = __builtin_convertvector(v == v ? rounded : quiet, Vector<uint16_t, LANES>);
      std::memcpy(target, &half, sizeof half);
    } else {
#if VECTOR_BYTES == 64
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                          _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif VECTOR_BYTES == 32
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                       _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#else
      for (int i = 0; i < LANES; ++i) target[i] = static_cast<Half>(v[i]);
#endif
    }
  }

  // The first `count` lanes; the others are zero.
  static ALWAYS_INLINE Vec load(const T* source, int64_t count) {
    if (count == LANES) return load(source);
#if VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, float>)
      return Vec(_mm512_maskz_loadu_ps((1u << count) - 1, source));
#endif
    T buffer[LANES] = {};
    std::memcpy(buffer, source, count * sizeof(T));
    return load(buffer);
  }

  static ALWAYS_INLINE void store(T* target, Vec v, int64_t count) {
    if (count == LANES) return store(target, v);
#if VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, float>)
      return _mm512_mask_storeu_ps(target, (1u << count) - 1, __m512(v));
#endif
    T buffer[LANES];
    store(buffer, v);
    std::memcpy(target, buffer, count * sizeof(T));
  }

  // Transpose of a square of LANES vectors, by exchanging smaller and smaller off-diagonal blocks.
  template <int BLOCK = LANES / 2>
  static ALWAYS_INLINE void transpose(Vec* rows) {
    if constexpr (BLOCK > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        if (!(i & BLOCK)) exchange<BLOCK>(rows[i], rows[i + BLOCK], Lanes{});
      transpose<BLOCK / 2>(rows);
    }
  }

  // For COUNT vectors of consecutive numbers: afterwards vector i contains every COUNT-th number,
  // beginning with number i. `interleave` is the inverse. COUNT is a power of two.
  template <int COUNT>
  static ALWAYS_INLINE void deinterleave(Vec* v) {
    if constexpr (COUNT > 1) {
      Vec even[COUNT / 2], odd[COUNT / 2];
#pragma GCC unroll 8
      for (int i = 0; i < COUNT / 2; ++i) {
        even[i] = every_other<0>(v[2 * i], v[2 * i + 1], Lanes{});
        odd[i] = every_other<1>(v[2 * i], v[2 * i + 1], Lanes{});
      }
      deinterleave<COUNT / 2>(even);
      deinterleave<COUNT / 2>(odd);
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) v[i] = i % 2 ? odd[i / 2] : even[i / 2];
    }
  }
  template <int COUNT>
  static ALWAYS_INLINE void interleave(Vec* v) {
    if constexpr (COUNT > 1) {
      Vec even[COUNT / 2], odd[COUNT / 2];
#pragma GCC unroll 8
      for (int i = 0; i < COUNT / 2; ++i) even[i] = v[2 * i], odd[i] = v[2 * i + 1];
      interleave<COUNT / 2>(even);
      interleave<COUNT / 2>(odd);
#pragma GCC unroll 8
      for (int i = 0; i < COUNT / 2; ++i) {
        v[2 * i] = by_turns<0>(even[i], odd[i], Lanes{});
        v[2 * i + 1] = by_turns<LANES / 2>(even[i], odd[i], Lanes{});
      }
    }
  }

  // The lanes of v moved up by one; the last lane of before comes first.
  static ALWAYS_INLINE Vec shift_up(Vec before, Vec v) { return shift_up(before, v, Lanes{}); }

 private:
  using Lanes = std::make_integer_sequence<int, LANES>;

  template <int... LANE>
  static ALWAYS_INLINE Vec shift_up(Vec before, Vec v, std::integer_sequence<int, LANE...>) {
    return select<(LANE + LANES - 1)...>(before, v);
  }

  template <int FIRST, int... LANE>
  static ALWAYS_INLINE Vec every_other(Vec a, Vec b, std::integer_sequence<int, LANE...>) {
    return select<(2 * LANE + FIRST)...>(a, b);
  }

  template <int FIRST, int... LANE>
  static ALWAYS_INLINE Vec by_turns(Vec a, Vec b, std::integer_sequence<int, LANE...>) {
    return select<(FIRST + LANE / 2 + LANE % 2 * LANES)...>(a, b);
  }

  template <int BLOCK, int... LANE>
  static ALWAYS_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, LANE...>) {
    const Vec low = select<(LANE & BLOCK ? LANE - BLOCK + LANES : LANE)...>(a, b);
    b = select<(LANE & BLOCK ? LANE + LANES : LANE + BLOCK)...>(a, b);
    a = low;
  }

  // Lanes of the pair (a, b).
  template <int... LANE>
  static ALWAYS_INLINE Vec select(Vec a, Vec b) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, LANE...);
#else  // GCC 11
    using Index = std::conditional_t<sizeof(Stat) == sizeof(int64_t), int64_t, int32_t>;
    return __builtin_shuffle(a, b, Vector<Index, LANES>{LANE...});
#endif
  }
};

// A vector with as many lanes as a vector of doubles. For floats, the upper half is added to the
// lower half.
template <class Vec>
ALWAYS_INLINE auto fold(Vec v) {
  using Stat = std::remove_cvref_t<decltype(v[0])>;
  if constexpr (sizeof(Stat) == sizeof(double)) {
    return v;
  } else {
    Vector<Stat, VECTOR_BYTES / sizeof(double)> halves[2];
    std::memcpy(halves, &v, sizeof v);
    return halves[0] + halves[1];
  }
}

// With as many lanes as a vector of doubles.
template <class Part>
ALWAYS_INLINE auto widen(Part part) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof part == 32) return Vector<double, 8>(_mm512_cvtps_pd(__m256(part)));
#elif VECTOR_BYTES == 32
  if constexpr (sizeof part == 16) return Vector<double, 4>(_mm256_cvtps_pd(__m128(part)));
#endif
  return __builtin_convertvector(part, Vector<double, VECTOR_BYTES / sizeof(double)>);
}

ALWAYS_INLINE double sum_of_lanes(Vector<double, VECTOR_BYTES / sizeof(double)> v) {
  double total = 0;
  for (size_t lane = 0; lane < sizeof v / sizeof(double); ++lane) total += v[lane];
  return total;
}

// target += v, in double.
template <class Vec>
ALWAYS_INLINE void accumulate(double* target, Vec v) {
  using Stat = std::remove_cvref_t<decltype(v[0])>;
  constexpr int LANES = VECTOR_BYTES / sizeof(double);
  Vector<Stat, LANES> parts[sizeof(Vec) / sizeof(Stat) / LANES];
  std::memcpy(parts, &v, sizeof v);
  for (const auto& part : parts) {
    Vector<double, LANES> total;
    std::memcpy(&total, target, sizeof total);
    total += widen(part);
    std::memcpy(target, &total, sizeof total);
    target += LANES;
  }
}

}  // namespace anchorops::cpu::INSTRUCTION_SET
END_TARGET
