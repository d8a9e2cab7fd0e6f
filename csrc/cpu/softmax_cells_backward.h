// The gradient of softmax moments over the cells of a tile.
#pragma once

#include "softmax_blocks.h"

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
  const Slopes slopes(z, at_right);
  Floats r = slopes.ratio_right(row.at_down, step_right);
  const Floats twist = slopes.ratio_twist(step_right, step_down);
  const Floats up = slopes.ratio_down(-step_down);
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
    if (j == 3 && row.rows > 4) r = slopes.ratio_right(row.at_down + 4 * step_down, step_right);
  }
  const Floats scale = slopes.power(last);
  const Floats below = last * all - (step_down * up) * all_rows;
  const Floats along_below = last * along - (step_down * up) * along_rows;
  return {scale * all, scale * (at_right * all + step_right * along), scale * below,
          scale * (at_right * below + step_right * along_below)};
}

// The weighted sums of dz = gradient(e^z, j, i), pixel by pixel.
template <class Gradient>
ALWAYS_INLINE WeightedSums sums_by_pixels(const Block& block, const Corners& z, Gradient gradient) {
  const CellRow& row = block.row;
  WeightedSums sums;
  const bool far = !z.all_above(FAR);
  Series e = block.series(z);  // not used if far
  for (int64_t j = 0; j < row.rows; ++j) {
    Floats all = {}, right_sum = {}, power = e.first;
    for (int i = 0; i < WIDTH; ++i) {
      const Floats right = block.right(i);
      const Floats v = far ? exp<float>(z.at(block.down(j), right)) : power;
      const Floats dz = v == v ? gradient(v, j, i) : Floats{};
      all += dz;
      right_sum += dz * right;
      power *= e.right;
    }
    sums.add_row(all, right_sum, row.down[j]);
    e.next_row();
  }
  return sums;
}

// The weighted sums of factors[2].
WeightedSums sums_of_values(const Block& block) {
  const CellRow& row = block.row;
  WeightedSums sums;
  for (int64_t j = 0; j < row.rows; ++j) {
    Floats all = {}, right_sum = {};
    for (int i = 0; i < WIDTH; ++i) {
      const Floats dz = Simd<float>::load(block.factors(2, j, i));
      all += dz;
      right_sum += dz * block.right(i);
    }
    sums.add_row(all, right_sum, row.down[j]);
  }
  return sums;
}

// gradients += the sum over pixels of weight * dz, with
// dz = e^z * (factors[0] + factors[1] * (dprobability_sums + 2 * p * dsquares)) and p = factors[1]
// * e^z. TERMS is 3 with dsquares, otherwise 2 with dprobability_sums, otherwise 1. With all
// weights, the gradient of the sum of v_k z_k is added, too: dz = factors[2].
template <int TERMS>
void add_gradients(const CellRow& row, const float* dprobability_sums, const float* dsquares,
                   bool with_all_weights) {
  using V = Simd<float>;
  constexpr int L = LANES<float>;
  const Workspace<float>& workspace = row.workspace;
  const int64_t num_classes = row.problem.logits.num_classes;
  for (int64_t k = 0; k < num_classes + with_all_weights; ++k) {
    float* above = workspace.gradients[row.upper] + k * workspace.packed.stride + row.first_column;
    float* below = workspace.gradients[row.lower] + k * workspace.packed.stride + row.first_column;
    const bool is_class = k < num_classes;
    const float dprobability_sum = is_class && dprobability_sums ? dprobability_sums[k] : 0;
    const float dsquare = is_class && dsquares ? 2 * dsquares[k] : 0;
    Floats last_above = {}, last_below = {};
    for (int64_t n = 0; n < row.passes * row.blocks; ++n) {
      const Block block(row, n);
      const auto factor = [&](int64_t j, int i) INLINE_LAMBDA {
        const Floats base = V::load(block.factors(0, j, i));
        return TERMS > 1 ? base + V::load(block.factors(1, j, i)) * dprobability_sum : base;
      };
      const auto gradient = [&](Floats v, int64_t j, int i) INLINE_LAMBDA {
        if constexpr (TERMS < 3) return v * factor(j, i);
        const Floats p = v * V::load(block.factors(1, j, i));
        return v * factor(j, i) + p * p * dsquare;
      };
      WeightedSums sums;
      if (is_class) {
        const Corners z = block.corners(k);
        block.fetch_logits(k);
        sums = TERMS < 3 && z.all_above(FAR) ? sums_by_series(block, z, factor)
                                             : sums_by_pixels(block, z, gradient);
      } else {
        sums = sums_of_values(block);
      }
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

// Subtracts the additional terms of the pixels' true classes: values [rows][WIDTH][lanes], 0 if
// there is no class.
void subtract_label_terms(const Block& block, const BlockClasses& classes, const float* values) {
  const CellRow& row = block.row;
  constexpr int L = LANES<float>;
  const Workspace<float>& workspace = row.workspace;
  const int64_t column = row.first_column + block.column;
  float* const above = workspace.gradients[row.upper] + column;
  float* const below = workspace.gradients[row.lower] + column;
  const auto subtract = [&](int32_t k, int64_t lane, float left, float right, float left_below,
                            float right_below) INLINE_LAMBDA {
    const int64_t at = k * workspace.packed.stride + lane;
    above[at] -= left - left_below;
    above[at + 1] -= right - right_below;
    below[at] -= left_below;
    below[at + 1] -= right_below;
  };
  Floats left = {}, right = {}, left_below = {}, right_below = {};
  for (int64_t j = 0; j < row.rows; ++j) {
    Floats all = {}, right_sum = {};
    for (int i = 0; i < WIDTH; ++i) {
      const int64_t n = j * WIDTH + i;
      const Floats value = Simd<float>::load(values + n * L);
      const Floats cell_value = classes.pixel_classes(n) == classes.cell_classes ? value : Floats{};
      all += cell_value;
      right_sum += cell_value * block.right(i);
    }
    left += all - right_sum;
    right += right_sum;
    left_below += row.down[j] * (all - right_sum);
    right_below += row.down[j] * right_sum;
  }
  for (int lane = 0; lane < L; ++lane)
    if (classes.cell_classes[lane] >= 0)
      subtract(classes.cell_classes[lane], lane, left[lane], right[lane], left_below[lane],
               right_below[lane]);
  for (int64_t n = 0; n < classes.count; ++n) {
    const int32_t t = classes.others[n];
    const float down = row.down[t / PIXELS];
    const float r = values[t] * block.weights[t % PIXELS];
    const float l = values[t] - r;
    subtract(classes.classes[t], t % L, l, r, l * down, r * down);
  }
}

// Writes the factors of a block's pixels and the additional terms of their true classes. Returns
// false if the block must be processed pixel by pixel. If logits are large, the rounding of lse
// would be an error of all p. Then the sums are computed again.
bool factors_of_block(const Block& block, const BlockClasses& classes,
                      const LossesOfImage<float>& losses, const Gradients<float>& gradients,
                      const float* dprobability_sums, const float* dsquares, float* label_terms) {
  const CellRow& row = block.row;
  using V = Simd<float>;
  constexpr int L = LANES<float>;
  const int64_t image_offset = row.tile.image * gradients.stride_b;
  const auto class_values = [&](const float* by_class, Ints k) INLINE_LAMBDA {
    return by_class ? pick(by_class + image_offset, k) : Floats{};
  };
  const bool any_valid = any(classes.cell_classes >= 0);
  const Corners shifts = block.shifts();
  const bool large = shifts.any_beyond(LARGE);
  const bool plain = losses.options.plain;
  const bool needs_loss = gradients.dintersections || losses.needs_c();
  if (needs_loss) block.label_logits(classes, label_terms);
  Floats powers[HEIGHT * WIDTH] = {}, totals[HEIGHT * WIDTH] = {}, squares[HEIGHT * WIDTH] = {};
  Ints steep = {};
  for (int64_t j = 0; j < row.rows; ++j) {
    if (any_valid && j % HEIGHT == 0) {
      if (large) sum_block<Term::POWER>(block, j, nullptr, powers);
      if (dprobability_sums) sum_block<Term::WEIGHTED>(block, j, dprobability_sums, totals);
      if (dsquares) sum_block<Term::SQUARE>(block, j, dsquares, squares);
    }
    Floats lse[WIDTH], weights[WIDTH], dpixel_losses[WIDTH];
    block.load_map(j, row.lse_map(gradients.lse), lse);
    block.load_map(j, losses.options.pixel_weights, weights);
    block.load_map(j, gradients.dpixel_losses, dpixel_losses);
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH; ++i) {
      const Ints k = classes.pixel_classes(j * WIDTH + i), valid = k >= 0;
      const int64_t n = j % HEIGHT * WIDTH + i;
      const Floats log_total =
          large ? log(powers[n]) : lse[i] - shifts.at_finite(row.down[j], block.right(i));
      steep |= valid & ~((log_total >= LOG_STEEP) & (log_total <= 80.0f));
      const Floats q = exp<float>(-log_total);
      Floats label_term = class_values(gradients.dlosses, k), smoothing_term = {};
      if (losses.options.pixel_weights.data) label_term *= weights[i];
      label_term += dpixel_losses[i];
      Floats c = {};
      if (needs_loss) c = not_below_0(log_total - V::load(label_terms + (j * WIDTH + i) * L));
      if (!plain) {
        Floats alpha, beta;
        const auto p = [c]() INLINE_LAMBDA { return probabilities_of<float>(c); };
        losses.derivatives(k, c, block.losses_of_all_classes(losses, j, i, log_total), p, alpha,
                           beta);
        smoothing_term = label_term * beta;
        label_term *= alpha;
      }
      Floats rest = label_term + losses.total * smoothing_term;
      rest -= (totals[n] + 2 * q * squares[n]) * q;
      if (gradients.dintersections) {
        const Floats intersection_term = exp<float>(-c) * class_values(gradients.dintersections, k);
        rest -= intersection_term;
        label_term -= intersection_term;
      }
      V::store(block.factors(0, j, i), valid ? rest * q : Floats{});
      if (dprobability_sums || dsquares) V::store(block.factors(1, j, i), valid ? q : Floats{});
      if (losses.all_weights) V::store(block.factors(2, j, i), valid ? -smoothing_term : Floats{});
      V::store(label_terms + (j * WIDTH + i) * L, valid ? label_term : Floats{});
    }
  }
  return !any(steep);
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
      float label_terms[ROWS * PIXELS];
      block.find_classes(classes);
      if (factors_of_block(block, classes, losses, gradients, dprobability_sums, dsquares,
                           label_terms)) {
        subtract_label_terms(block, classes, label_terms);
        continue;
      }
      for (int64_t j = 0; j < row.rows; ++j)
        for (int i = 0; i < WIDTH; ++i) {
          V::store(block.factors(0, j, i), Floats{});
          V::store(block.factors(1, j, i), Floats{});
          V::store(block.factors(2, j, i), Floats{});
        }
      block.for_pixels(backward_pixels);
    }
    const auto add = dsquares            ? add_gradients<3>
                     : dprobability_sums ? add_gradients<2>
                                         : add_gradients<1>;
    add(row, dprobability_sums, dsquares, losses.all_weights != nullptr);
  }
}
