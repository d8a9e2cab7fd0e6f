// The loss of a pixel, from c = -log p of its class and u = the sum of v_k * -log p_k over all
// classes: L = m * (a * c + u), m = max(1 - e^-c, 2^-24)^gamma; 0 where c < min_loss. p is a
// function that returns {e^-c, 1 - e^-c}, and is called where m is needed.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "softmax_exponentials.h"
#include "softmax_moments.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

// A loss without its rounding error below 0; NaN remains NaN.
template <class Value>
ALWAYS_INLINE Value not_below_0(Value x) {
  return x < 0 ? Value{} : x;
}

// The probability of the true class and that of the others together.
template <class Stat>
struct Probabilities {
  VecOf<Stat> true_class, others;
};

// For c >= 0.
template <class Stat>
ALWAYS_INLINE Probabilities<Stat> probabilities_of(VecOf<Stat> c) {
  using Vec = VecOf<Stat>;
  const Vec power = exp<Stat>(-c);
  Vec x;
  if constexpr (std::is_same_v<Stat, double>) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = -std::expm1(-c[i]);
    return {power, x};
  } else {
    Vec p = c * -0.001121631f + 0.008187382f;  // relative error 7e-9, up to 0.5
    p = p * c - 0.041629087f;
    p = p * c + 0.16666225f;
    p = p * c - 0.49999982f;
    p = p * c + 1.0f;
    x = c < 0.5f ? c * p : 1 - power;
    return {power, x};
  }
}

// x^exponent for normal numbers x > 0.
template <class Stat>
ALWAYS_INLINE VecOf<Stat> power_of(VecOf<Stat> x, Stat exponent) {
  if (exponent == 0) return VecOf<Stat>{} + 1;
  if (exponent == 1) return x;
  if (exponent == 2) return x * x;
  if constexpr (std::is_same_v<Stat, double>) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = std::pow(x[i], exponent);
    return x;
  } else {
    return exp<float>(log(x) * exponent);
  }
}

// The losses of one vector of pixels and their slopes, for an image. Classes are -1 where there is
// no label.
template <class Stat>
struct LossesOfImage {
  using Vec = VecOf<Stat>;
  const LossOptions<Stat>& options;
  const Stat *true_weights, *all_weights;  // a and v [K]; null: 1 and 0
  Stat total;                              // the sum of v

  ALWAYS_INLINE LossesOfImage(const LossOptions<Stat>& options, int64_t image)
      : options(options), true_weights(nullptr), all_weights(nullptr), total(0) {
    if (!options.true_weights) return;
    true_weights = options.true_weights + image * options.stride_b;
    all_weights = options.all_weights_of(image);
    total = options.sums_of_all_weights[options.stride_b ? image : 0];
  }

  // Other pixels add nothing. NaN is used.
  ALWAYS_INLINE auto is_used(Vec c) const { return ~(c < options.min_loss); }

  // Whether the slopes depend on c.
  ALWAYS_INLINE bool needs_c() const {
    return options.focal_gamma > 0 || options.min_loss > -__builtin_inf();
  }

  template <class P>
  ALWAYS_INLINE Vec loss(Indices<Stat> classes, Vec c, Vec u, P p) const {
    const Vec loss = mixed(true_weight(classes), c, u);
    return is_used(c) ? (options.focal_gamma > 0 ? modulation(c, p()).factor * loss : loss) : Vec{};
  }

  // What a pixel adds to a sum. c: -log p of its class; weight: 1 without pixel weights.
  ALWAYS_INLINE Vec share_of_pixel(int sum, Vec c, Vec loss, Vec weight) const {
    return sum == USED ? (is_used(c) ? weight : Vec{}) : weighted(weight, loss);
  }

  // alpha and beta: the slopes of the loss in c, and in each -log p_k, divided by v_k.
  template <class P>
  ALWAYS_INLINE void slopes_of_losses(Indices<Stat> classes, Vec c, Vec u, P p, Vec& alpha,
                                      Vec& beta) const {
    alpha = true_weight(classes);
    beta = Vec{} + 1;
    if (options.focal_gamma > 0) {
      const Modulation m = modulation(c, p());
      const Vec by_factor = m.slope * mixed(alpha, c, u);
      alpha = m.factor * alpha + (c - c == 0 ? by_factor : Vec{});
      beta = m.factor;
    }
    alpha = is_used(c) ? alpha : Vec{};
    beta = is_used(c) ? beta : Vec{};
  }

 private:
  struct Modulation {
    Vec factor, slope;  // m and its derivative
  };

  static ALWAYS_INLINE Vec weighted(Vec weight, Vec loss) {
    return weight == 0 ? Vec{} : weight * loss;
  }
  ALWAYS_INLINE Vec true_weight(Indices<Stat> classes) const {
    return true_weights ? pick(true_weights, classes) : Vec{} + 1;
  }
  ALWAYS_INLINE Vec mixed(Vec weight, Vec c, Vec u) const {
    return true_weights ? (weight == 0 ? Vec{} : weight * c) + u : c;
  }
  ALWAYS_INLINE Modulation modulation(Vec c, Probabilities<Stat> p) const {
    // c is rounded to multiples of about this, and powers of smaller numbers have derivatives that
    // are too large
    const Vec smallest = Vec{} + Stat(0x1p-24), x = maximum(smallest, p.others);
    const Vec lower = power_of<Stat>(x, options.focal_gamma - 1), one = Vec{} + 1;
    const Vec slope = options.focal_gamma * lower * p.true_class;
    // if c is not finite, the factor is 1
    return {c - c == 0 ? lower * x : one, p.others <= smallest ? Vec{} : slope};
  }
};

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET
