// Exponentials and logarithms of vectors.
#pragma once

#include <cmath>
#include <cstddef>
#include <type_traits>

#include "softmax_vectors.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

constexpr float LOG2_E = 1.44269504f;

// e^x, for every x, also if it is not finite; infinite from 88.37 on.
template <class Stat>
ALWAYS_INLINE VecOf<Stat> exp(VecOf<Stat> x) {
  using Vec = VecOf<Stat>;
  if constexpr (std::is_same_v<Stat, double>) {
    Vec result;
    for (int i = 0; i < LANES<double>; ++i) result[i] = std::exp(x[i]);
    return result;
  } else {
    using Bits = typename Simd<float>::Bits;
    // x = n ln 2 + f; adding 3 * 2^22 rounds to an integer, which is then in the low bits
    const Vec shifted = x * LOG2_E + 0x1.8p23f;
    const Vec n = shifted - 0x1.8p23f;
    const Vec f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec p = f * 0.00138368418f + 0.00837481579f;  // relative error 2e-9
    p = p * f + 0.0416682256f;
    p = p * f + 0.166664202f;
    p = p * f + 0.499999921f;
    p = p * f + 1.00000004f;
    p = p * f + 1.0f;
    p *= Vec((Bits(shifted) + 127) << 23);
    p = x < -87.3f ? Vec{} : p;
    return x > 88.37f ? Vec{} + __builtin_inff() : p;
  }
}

// 2^x for x in [-126, 126].
ALWAYS_INLINE Floats power_of_two(Floats x) {
  using Bits = typename Simd<float>::Bits;
  const Floats shifted = x + 0x1.8p23f;
  const Floats f = x - (shifted - 0x1.8p23f);
  Floats p = f * 0.000153458074f + 0.00133999312f;  // relative error 2e-9
  p = p * f + 0.00961848897f;
  p = p * f + 0.0555032878f;
  p = p * f + 0.240226469f;
  p = p * f + 0.693147206f;
  p = p * f + 1.0f;
  return Floats(Bits(p) + (Bits(shifted) << 23));
}

// log(1 + f) for 1 + f in [sqrt(0.5), sqrt(2)).
ALWAYS_INLINE Floats log_near_1(Floats f) {
  Floats p = f * -0.0762101864f + 0.129046082f;  // relative error 4e-9
  p = p * f - 0.132434762f;
  p = p * f + 0.141818448f;
  p = p * f - 0.166090121f;
  p = p * f + 0.20001968f;
  p = p * f - 0.250015866f;
  p = p * f + 0.33333326f;
  p = p * f - 0.499999883f;
  p = p * f + 0.999999999f;
  return f * p;
}

// log x for normal numbers x > 0.
ALWAYS_INLINE Floats log(Floats x) {
  using Bits = typename Simd<float>::Bits;
  // x = 2^n (1 + f)
  const Ints n = Ints(Bits(x) - 0x3f3504f3) >> 23;
  const Floats f = Floats(Bits(x) - (Bits(n) << 23)) - 1.0f;
  return __builtin_convertvector(n, Floats) * 0.693147181f + log_near_1(f);
}

// log(1 + x) for x in [0, 1], also if 1 + x would be rounded to 1.
ALWAYS_INLINE Floats log_of_1_plus(Floats x) {
  const auto large = x > 0.414213562f;  // 1 + x = 2 (1 + (x - 1) / 2)
  const Floats result = log_near_1(large ? 0.5f * x - 0.5f : x);
  return large ? result + 0.693147181f : result;
}

// log x for x of at least 0, also if x is not finite.
template <class Vec>
ALWAYS_INLINE Vec log_of_sum(Vec x) {
  if constexpr (std::is_same_v<Vec, VecOf<float>>)
    if (!any(~((x >= 1e-37f) & (x <= 3e38f)))) return log(x);
  for (size_t lane = 0; lane < sizeof x / sizeof x[0]; ++lane) x[lane] = std::log(x[lane]);
  return x;
}

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET
