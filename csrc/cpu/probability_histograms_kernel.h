// Histograms of the errors of softmax probabilities, and the gradient of a loss that is a function
// of the errors.
//
// The error of a pixel for a class is 1 - p if it is of the class, and p if it is not. p is
// computed pixel by pixel, from the upsampled logits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "softmax_pixels.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

// Replaces workspace.group.upsampled by scale * p of the group's pixels, 0 where a pixel is
// ignored.
template <class Stat>
ALWAYS_INLINE void probabilities_of_group(const Problem<Stat>& problem, const Tile& tile,
                                          const Workspace<Stat>& workspace,
                                          const Group<Stat>& group, Stat scale) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  logits_of_group(problem, tile, workspace, group);
  for (int64_t t = 0; t < group.count; t += LANES<Stat>) {
    Stat* const z = workspace.group.upsampled + t;
    const Vec total =
        sum_of_powers<Stat, true>(z, problem.logits.num_classes, workspace.group.size, nullptr)
            .total;
    const MaskOf<Stat> is_valid = group.is_valid(t);
    for (int64_t k = 0; k < problem.logits.num_classes; ++k) {
      Stat* const p = z + k * workspace.group.size;
      V::store(p, is_valid ? V::load(p) * (scale / total) : Vec{});
    }
  }
}

// A bit for each number of a vector that is at least 1.
template <class Stat>
ALWAYS_INLINE uint32_t at_least_1(VecOf<Stat> x) {
  if constexpr (std::is_same_v<Stat, float>) return lanes_of(x >= 1);
  uint32_t lanes = 0;
  for (int i = 0; i < LANES<Stat>; ++i) lanes |= uint32_t{x[i] >= 1} << i;
  return lanes;
}

// The bin of a number in units of bins; NaN is in the last one.
template <class Stat>
ALWAYS_INLINE int64_t bin_of(Stat x, int64_t bins) {
  return x < static_cast<Stat>(bins) ? static_cast<int64_t>(std::max(x, Stat(0))) : bins - 1;
}

// Adds a group to the histograms, without the pixels of other classes in bin 0: these are the rest.
template <class Stat>
void count_group(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                 const Histograms& histograms, const Group<Stat>& group) {
  const int64_t bins = histograms.bins;
  probabilities_of_group(problem, tile, workspace, group, static_cast<Stat>(bins));
  for (int64_t k = 0; k < problem.logits.num_classes; ++k) {
    int32_t* const others = histograms.counts + (2 * k + 1) * bins;
    const Stat* const p = workspace.group.upsampled + k * workspace.group.size;
    for (int64_t t = 0; t < group.count; t += LANES<Stat>) {
      uint32_t pixels = at_least_1<Stat>(Simd<Stat>::load(p + t));
      for (; pixels; pixels &= pixels - 1) ++others[bin_of(p[t + __builtin_ctz(pixels)], bins)];
    }
  }
  for (int64_t t = 0; t < group.count; ++t) {
    const int64_t k = group.classes[t];
    if (k < 0) continue;
    const Stat p = workspace.group.upsampled[k * workspace.group.size + t];
    if (p >= 1) --histograms.counts[(2 * k + 1) * bins + bin_of(p, bins)];
    ++histograms.counts[2 * k * bins + bin_of(static_cast<Stat>(bins) - p, bins)];
  }
}

// Replaces workspace.group.upsampled by dz = p * (u - sum of p * u), where u is the slope of a
// class's error, with a minus for the pixel's class.
template <class Stat>
void error_gradients_of_group(const Problem<Stat>& problem, const Tile& tile,
                              const Workspace<Stat>& workspace, const ErrorSlopes<Stat>& slopes,
                              const Group<Stat>& group) {
  using V = Simd<Stat>;
  using Vec = VecOf<Stat>;
  const int64_t bins = slopes.bins, num_classes = problem.logits.num_classes,
                stride = workspace.group.size;
  const Stat scale = static_cast<Stat>(bins);
  probabilities_of_group(problem, tile, workspace, group, Stat(1));
  const auto slopes_of_others = [&](int64_t k, Vec p) INLINE_LAMBDA {
    const Stat* const table = slopes.data + (2 * k + 1) * bins;
    const Vec place = p * scale;
    if (!at_least_1<Stat>(place)) return Vec{} + table[0];
    const auto bin =
        __builtin_convertvector(place < scale - 1 ? place : Vec{} + (scale - 1), Indices<Stat>);
    return look_up<false>(table, reinterpret_cast<const int32_t*>(&bin));
  };
  for (int64_t t = 0; t < group.count; t += LANES<Stat>) {
    Stat* const p = workspace.group.upsampled + t;
    Stat* const u = workspace.group.slopes + t;
    Vec sum = {};
    for (int64_t k = 0; k < num_classes; ++k) {
      const Vec p_k = V::load(p + k * stride), u_k = slopes_of_others(k, p_k);
      V::store(u + k * stride, u_k);
      sum += p_k * u_k;
    }
    for (int64_t i = 0; i < std::min<int64_t>(LANES<Stat>, group.count - t); ++i) {
      const int64_t k = group.classes[t + i];
      if (k < 0) continue;
      const Stat label_p = p[k * stride + i], other_slope = u[k * stride + i];
      const Stat label_slope = -slopes.data[2 * k * bins + bin_of(scale - scale * label_p, bins)];
      sum[i] += label_p * (label_slope - other_slope);
      u[k * stride + i] = label_slope;
    }
    for (int64_t k = 0; k < num_classes; ++k)
      V::store(p + k * stride, V::load(p + k * stride) * (V::load(u + k * stride) - sum));
  }
}

template <class Stat>
void count_errors(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                  const Histograms& histograms) {
  for_groups(
      problem, tile, workspace, [](int64_t) {},
      [&](const auto& group) { count_group(problem, tile, workspace, histograms, group); });
}

template <class Stat>
void error_gradients(const Problem<Stat>& problem, const Tile& tile,
                     const Workspace<Stat>& workspace, const ErrorSlopes<Stat>& slopes,
                     const Output<Stat>& output) {
  for_rows_of_gradients(problem, tile, workspace, output, [&](const auto& finish_until) {
    for_groups(problem, tile, workspace, finish_until, [&](const auto& group) {
      error_gradients_of_group(problem, tile, workspace, slopes, group);
      write_gradients_of_group(problem, tile, workspace, output, group);
    });
  });
}

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET
