// The gradient of softmax moments over the cells of a tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "softmax_blocks.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

// What the backward pass keeps of each pixel: numbers of a vector of pixels in Block::factors.
enum Factor {
  OF_CLASSES,  // dz_k / e^z of the other classes, without dp_k: the slope in p_k
  OF_LABEL,    // the same of the true class, without the derivative of its -log p
  LABEL_LOSS,  // that derivative / TOTAL
  TOTAL,       // the sum of e^z
  OF_DP,       // p / e^z = 1 / TOTAL
  OF_WEIGHTS   // dz of the sum of v_k z_k
};

// Writes the factors of a block's pixels. Returns false if the block must be processed pixel by
// pixel.
bool factors_of_block(const Block& block, const BlockClasses& classes,
                      const LossesOfImage<float>& losses, const Gradients<float>& gradients,
                      const float* dprobability_sums, const float* dsquares) {
  const CellRow& row = block.row;
  using V = Simd<float>;
  constexpr int L = LANES<float>;
  const int64_t image_offset = row.tile.image * gradients.stride_b;
  const auto class_values = [&](const float* by_class, Ints k) INLINE_LAMBDA {
    return by_class ? pick(by_class + image_offset, k) : Floats{};
  };
  const bool with_probability_sums = classes.any() && dprobability_sums;
  const bool with_squares = classes.any() && dsquares;
  const float scale = gradients.dp_scale;
  const bool needs_power = gradients.dintersections || losses.needs_c();
  float powers[ROWS * PIXELS];
  if (needs_power) find_label_powers(block, classes, powers);
  Floats probability_sums[HEIGHT * WIDTH], squares[HEIGHT * WIDTH];
  Ints steep = {};
  for (int64_t j = 0; j < row.rows; ++j) {
    if (j % HEIGHT == 0) {
      if (with_probability_sums)
        sum_weighted<false>(block, j, dprobability_sums, scale, probability_sums);
      if (with_squares) sum_weighted<true>(block, j, dsquares, scale, squares);
    }
    Floats totals[WIDTH], weights[WIDTH], dpixel_losses[WIDTH];
    block.load_map(j, row.totals_map(gradients.totals), totals);
    block.load_map(j, losses.options.pixel_weights, weights);
    block.load_map(j, gradients.dpixel_losses, dpixel_losses);
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH; ++i) {
      const int64_t n = j * WIDTH + i, in_sums = j % HEIGHT * WIDTH + i;
      const Ints k = classes.pixel_classes(n), valid = k >= 0;
      const Floats total = totals[i], power = needs_power ? V::load(powers + n * L) : Floats{};
      steep |= valid & ~((total >= STEEP) & (total <= 1e38f));
      const Floats q = 1 / total;
      Floats label_term = class_values(gradients.dlosses, k), smoothing_term = {};
      if (losses.options.pixel_weights.data) label_term *= weights[i];
      label_term += dpixel_losses[i];
      if (!losses.options.plain) {
        Floats c = {}, alpha, beta;
        if (losses.needs_c()) c = block.label_losses(classes, n, power, total);
        const auto p = [&]() INLINE_LAMBDA {
          return Probabilities<float>{power * q, (total - power) * q};
        };
        losses.slopes_of_losses(k, c, block.losses_of_all_classes(losses, j, i, log(total)), p,
                                alpha, beta);
        smoothing_term = label_term * beta;
        label_term *= alpha;
      }
      Floats rest = losses.total * smoothing_term;
      if (with_probability_sums) rest -= probability_sums[in_sums] * q / scale;
      if (with_squares) rest -= 2 * q * squares[in_sums] * q / scale;
      Floats of_label = {};
      if (gradients.dintersections) {
        of_label = class_values(gradients.dintersections, k);
        rest -= power * q * of_label;
      }
      const auto store = [&](Factor factor, Floats value) INLINE_LAMBDA {
        V::store(block.factors(factor, j, i), valid ? value : Floats{});
      };
      store(OF_CLASSES, (label_term + rest) * q);
      store(OF_LABEL, (of_label + rest) * q);
      store(LABEL_LOSS, label_term * q);
      store(TOTAL, total);
      if (dprobability_sums || dsquares) store(OF_DP, q);
      if (losses.all_weights) store(OF_WEIGHTS, -smoothing_term);
      std::memcpy(block.pixel_classes(j, i), &k, sizeof k);
    }
  }
  std::memcpy(block.class_bits(), classes.bits, sizeof classes.bits);
  return !any(steep);
}

// Sums of dz over the pixels of each cell of a block: unweighted, and with the weights of the right
// logits, of the lower logits, and of both.
struct WeightedSums {
  Floats all = {}, right = {}, below = {}, right_below = {};

  ALWAYS_INLINE void add_row(Floats row_sum, Floats right_sum, float down) {
    all += row_sum;
    right += right_sum;
    below += down * row_sum;
    right_below += down * right_sum;
  }
};

// The weighted sums of dz = factor(j, i) * e^z. In row j the powers of e are first * r^i. Therefore
// the sum of dz is a polynomial in r, and the sum of i * dz is r times its derivative. Horner's
// rule computes both without a power for each pixel. The same holds for the sum over the rows: it
// is a polynomial in 1 / (ratio down), beginning with the last row.
template <class Factor>
ALWAYS_INLINE WeightedSums sums_by_series(const Block& block, const Corners& z, Factor factor) {
  const CellRow& row = block.row;
  const float step_right = row.problem.column_cells.step, step_down = row.problem.row_cells.step;
  const float last = row.at_down + (row.rows - 1) * step_down;
  const Floats at_right = block.right_start();
  const Exponents exponents(z, at_right);
  Floats r = exponents.ratio_right(row.at_down, step_right);
  const Floats twist = exponents.ratio_twist(step_right, step_down);
  const Floats up = exponents.ratio_down(-step_down);
  Floats all = {}, all_rows = {}, along = {}, along_rows = {};  // _rows: times last row - j
  for (int64_t j = 0; j < row.rows; ++j) {
    Floats sum = factor(j, WIDTH - 1), derivative = sum;
#pragma GCC unroll 8
    for (int i = WIDTH - 2; i >= 0; --i) {
      sum = sum * r + factor(j, i);
      if (i > 0) derivative = derivative * r + sum;
    }
    all_rows = all_rows * up + all;
    along_rows = along_rows * up + along;
    all = all * up + sum;
    along = along * up + derivative * r;
    r *= twist;
    // each product adds the rounding error of twist, and r has up to three powers
    if (j == 3 && row.rows > 4) r = exponents.ratio_right(row.at_down + 4 * step_down, step_right);
  }
  const Floats scale = exponents.power(last);
  const Floats below = last * all - (step_down * up) * all_rows;
  const Floats along_below = last * along - (step_down * up) * along_rows;
  return {scale * all, scale * (at_right * all + step_right * along), scale * below,
          scale * (at_right * below + step_right * along_below)};
}

// The weighted sums of dz = gradient(e^z, j, i), pixel by pixel. e^z is that of the forward pass.
template <class Gradient>
ALWAYS_INLINE WeightedSums sums_by_pixels(const Block& block, const Corners& z, Gradient gradient) {
  const CellRow& row = block.row;
  WeightedSums sums;
  const bool far = !z.all_above(FAR);
  Series e = block.series(z, row.down_starts[0]);  // not used if far
  for (int64_t j = 0; j < row.rows; ++j) {
    if (j > 0 && j % HEIGHT == 0) e = block.series(z, row.down_starts[j]);
    Floats powers[WIDTH] = {e.first};
    for (int i = 1; i < WIDTH; ++i) powers[i] = powers[i - 1] * e.right;
    e.next_row();
    for (int i = 0; far && i < WIDTH; ++i) {
      const Floats v = exp<float>(z.at(block.down(j), block.right(i)));
      powers[i] = v == v ? v : Floats{};
    }
    Floats all = {}, right_sum = {};
    for (int i = 0; i < WIDTH; ++i) {
      const Floats dz = gradient(powers[i], j, i);
      all += dz;
      right_sum += dz * block.right(i);
    }
    sums.add_row(all, right_sum, row.down[j]);
  }
  return sums;
}

// The weighted sums of numbers of the pixels.
WeightedSums sums_of_factors(const Block& block, int factor) {
  const CellRow& row = block.row;
  WeightedSums sums;
  for (int64_t j = 0; j < row.rows; ++j) {
    Floats all = {}, right_sum = {};
    for (int i = 0; i < WIDTH; ++i) {
      const Floats dz = Simd<float>::load(block.factors(factor, j, i));
      all += dz;
      right_sum += dz * block.right(i);
    }
    sums.add_row(all, right_sum, row.down[j]);
  }
  return sums;
}

// gradients += the sum over pixels of weight * dz, with
// dz = e^z * (OF_CLASSES + OF_DP * (dprobability_sums + 2 * p * dsquares)), p = OF_DP * e^z.
// For the true class OF_LABEL takes the place of OF_CLASSES, and LABEL_LOSS * (e^z - TOTAL) is
// added: p - 1 would be rounded where p is near 1. TERMS is 3 with dsquares, otherwise 2 with
// dprobability_sums, otherwise 1. With all weights, the gradient of the sum of v_k z_k is added,
// too.
template <int TERMS>
void add_gradients(const CellRow& row, const float* dprobability_sums, const float* dsquares,
                   bool with_all_weights) {
  using V = Simd<float>;
  constexpr int L = LANES<float>;
  const Workspace<float>& workspace = row.workspace;
  const int64_t num_classes = row.problem.logits.num_classes;
  const uint64_t* const class_bits = workspace.cells.class_bits;
  for (int64_t k = 0; k < num_classes + with_all_weights; ++k) {
    float* above = workspace.gradients[row.upper] + k * workspace.packed.stride + row.first_column;
    float* below = workspace.gradients[row.lower] + k * workspace.packed.stride + row.first_column;
    const bool is_class = k < num_classes;
    const float dprobability_sum = is_class && dprobability_sums ? dprobability_sums[k] : 0;
    const float dsquare = is_class && dsquares ? 2 * dsquares[k] : 0;
    Floats last_above = {}, last_below = {};
    for (int64_t n = 0; n < row.passes * row.blocks; ++n) {
      const Block block(row, n);
      const auto load = [&](Factor factor, int64_t j, int64_t i)
                            INLINE_LAMBDA { return V::load(block.factors(factor, j, i)); };
      const auto with_dp = [&](Floats base, Floats v, int64_t j, int i) INLINE_LAMBDA {
        if constexpr (TERMS > 1) base += load(OF_DP, j, i) * dprobability_sum;
        if constexpr (TERMS < 3) return v * base;
        const Floats p = v * load(OF_DP, j, i);
        return v * base + p * p * dsquare;
      };
      const Corners z = block.corners(k);
      WeightedSums sums;
      if (!is_class) {
        sums = sums_of_factors(block, OF_WEIGHTS);
      } else if (may_have_class(class_bits + n * CLASS_WORDS, k)) {
        sums = sums_by_pixels(block, z, [&](Floats v, int64_t j, int i) INLINE_LAMBDA {
          const Ints is_label = load_ints(block.pixel_classes(j, i)) == static_cast<int32_t>(k);
          const Floats others = load(TOTAL, j, i) - v;
          const Floats base = is_label ? load(OF_LABEL, j, i) : load(OF_CLASSES, j, i);
          const Floats loss = is_label & (others > 0) ? load(LABEL_LOSS, j, i) * others : Floats{};
          return with_dp(base, v, j, i) - loss;
        });
      } else if (TERMS < 3 && z.all_above(FAR)) {
        const Floats one = Floats{} + 1;
        sums = sums_by_series(block, z, [&](int64_t j, int i) INLINE_LAMBDA {
          return with_dp(load(OF_CLASSES, j, i), one, j, i);
        });
      } else {
        sums = sums_by_pixels(block, z, [&](Floats v, int64_t j, int i) INLINE_LAMBDA {
          return with_dp(load(OF_CLASSES, j, i), v, j, i);
        });
      }
      if (is_class) block.fetch_logits(k);
      const Floats left_below = sums.below - sums.right_below;
      const Floats left_above = sums.all - sums.right - left_below;
      const Floats right_above = sums.right - sums.right_below;
      const int64_t column = block.column;
      if (column == 0) last_above = last_below = Floats{};
      V::store(above + column,
               V::load(above + column) + left_above + V::shift_up(last_above, right_above));
      V::store(below + column,
               V::load(below + column) + left_below + V::shift_up(last_below, sums.right_below));
      last_above = right_above;
      last_below = sums.right_below;
      if (column + L == row.blocks * L) {
        above[column + L] += right_above[L - 1];
        below[column + L] += sums.right_below[L - 1];
      }
    }
  }
}

template <class Begin>
void backward_cells(const Problem<float>& problem, const Tile& tile,
                    const Workspace<float>& workspace, const Gradients<float>& gradients,
                    Begin finish_until) {
  using V = Simd<float>;
  CellRow row(problem, tile, workspace);
  const LossesOfImage<float> losses(problem.loss_options, tile.image);
  const int64_t image_offset = tile.image * gradients.stride_b;
  const float* dprobability_sums =
      gradients.dprobability_sums ? gradients.dprobability_sums + image_offset : nullptr;
  const float* dsquares = gradients.dsquares ? gradients.dsquares + image_offset : nullptr;
  while (row.next(ROWS)) {
    finish_until(row.upper);
    const auto backward_pixels = [&](const Group<float>& group) {
      gradients_of_group(problem, tile, workspace, gradients, group);
      add_gradients_of_group(problem, workspace, group);
    };
    if (!row.ordinary()) {
      row.for_pixels(backward_pixels);
      continue;
    }
    for (int64_t n = 0; n < row.passes * row.blocks; ++n) {
      const Block block(row, n);
      BlockClasses classes;
      block.find_classes(classes);
      if (factors_of_block(block, classes, losses, gradients, dprobability_sums, dsquares))
        continue;
      std::memset(block.class_bits(), 0, sizeof classes.bits);
      for (int64_t j = 0; j < row.rows; ++j)
        for (int i = 0; i < WIDTH; ++i)
          for (const Factor factor : {OF_CLASSES, OF_DP, OF_WEIGHTS})
            V::store(block.factors(factor, j, i), Floats{});
      block.for_pixels(backward_pixels);
    }
    const auto add = dsquares            ? add_gradients<3>
                     : dprobability_sums ? add_gradients<2>
                                         : add_gradients<1>;
    add(row, dprobability_sums, dsquares, losses.all_weights != nullptr);
  }
}

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET
