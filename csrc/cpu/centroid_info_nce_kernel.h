// The vector kernel of centroid InfoNCE: the loss of a row and its slopes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "centroid_info_nce.h"
#include "softmax_exponentials.h"

BEGIN_TARGET
namespace anchorops::cpu::INSTRUCTION_SET {

template <class Stat>
Stat loss_of_row(Stat* x, const Stat* counted, int64_t num_classes, int64_t own_key, Stat own,
                 Stat temperature) {
  using V = Simd<Stat>;
  using Vec = typename V::Vec;
  const auto for_vectors = [&](auto visit) INLINE_LAMBDA {
    for (int64_t k = 0; k < num_classes; k += V::LANES)
      visit(x + k, counted + k, std::min<int64_t>(V::LANES, num_classes - k));
  };
  x[own_key] = -std::numeric_limits<Stat>::infinity();
  Vec most = Vec{} + x[own_key];
  for_vectors([&](Stat* at, const Stat* used, int64_t size) INLINE_LAMBDA {
    const Vec product = V::load(at, size);
    most = (V::load(used, size) != 0) & (product > most) ? product : most;
  });
  Stat shift = own;
  for (int i = 0; i < V::LANES; ++i) shift = std::max(shift, most[i] / temperature);
  Vec sums = {};
  for_vectors([&](Stat* at, const Stat* used, int64_t size) INLINE_LAMBDA {
    const Vec power = softmax::INSTRUCTION_SET::exp<Stat>(V::load(at, size) / temperature - shift);
    const Vec term = V::load(used, size) != 0 ? power : Vec{};
    sums += term;
    V::store(at, term, size);
  });
  double others = 0;
  for (int i = 0; i < V::LANES; ++i) others += sums[i];
  const double sum = others + std::exp(own - shift);
  const Stat factor = static_cast<Stat>(1 / sum);
  for_vectors([&](Stat* at, const Stat*, int64_t size)
                  INLINE_LAMBDA { V::store(at, V::load(at, size) * factor, size); });
  x[own_key] = static_cast<Stat>(-others / sum);
  return static_cast<Stat>(shift - own + std::log(sum));
}

template float loss_of_row(float*, const float*, int64_t, int64_t, float, float);
template double loss_of_row(double*, const double*, int64_t, int64_t, double, double);

}  // namespace anchorops::cpu::INSTRUCTION_SET
END_TARGET
