// The statistics of softmax moments over the cells of a tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "softmax_cells_argmax.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

// probability_sums[k] += the sum over pixels of p = factors * e^z; squares[k] += the sum of p^2, if
// requested. Sums of one block are float: where p is the same everywhere, each addition to a long
// sum would have the same rounding error.
void add_probability_sums(const CellRow& row, double* probability_sums, double* squares) {
  using V = Simd<float>;
  for (int64_t k = 0; k < row.problem.logits.num_classes; ++k) {
    Vector<double, VECTOR_BYTES / sizeof(double)> probability_sum = {}, square = {};
    for (int64_t n = 0; n < row.passes * row.blocks; ++n) {
      const Block block(row, n);
      Floats probability_sum_of_block = {}, square_of_block = {};
      const auto add = [&](Floats p) INLINE_LAMBDA {
        probability_sum_of_block += p;
        if (squares) square_of_block += p * p;
      };
      const Corners z = block.corners(k);
      if (z.all_above(FAR)) {
        Series e = block.series(z, row.at_down);
        for (int64_t j = 0; j < row.rows; ++j) {
          Floats v = e.first;
#pragma GCC unroll 8
          for (int i = 0; i < WIDTH; ++i) {
            add(v * V::load(block.factors(0, j, i)));
            v *= e.right;
          }
          e.next_row();
        }
      } else {
        for (int64_t j = 0; j < row.rows; ++j)
          for (int i = 0; i < WIDTH; ++i) {
            const Floats factor = V::load(block.factors(0, j, i));
            const Floats v = exp<float>(z.at(block.down(j), block.right(i)));
            add(factor == 0 ? Floats{} : v * factor);
          }
      }
      probability_sum += widen(fold(probability_sum_of_block));
      if (squares) square += widen(fold(square_of_block));
    }
    if (probability_sums) probability_sums[k] += sum_of_lanes(probability_sum);
    if (squares) squares[k] += sum_of_lanes(square);
  }
}

// Adds the values of a block's pixels [rows][WIDTH][lanes] to the sums of their classes.
void add_by_class(const CellRow& row, const BlockClasses& classes, const float* values,
                  double* sums) {
  classes.for_classes(row.problem.logits.num_classes, [&](int64_t k) INLINE_LAMBDA {
    Floats sum = {};
    for (int64_t n = 0; n < row.rows * WIDTH; ++n)
      sum += classes.pixel_classes(n) == static_cast<int32_t>(k)
                 ? Simd<float>::load(values + n * LANES<float>)
                 : Floats{};
    sums[k] += sum_of_lanes(widen(fold(sum)));
  });
}

// Adds a block to the sums and writes its maps. totals: the sums of e^z over the classes. powers:
// e^z of the true classes.
void add_block(const Block& block, const BlockClasses& classes,
               const LossesOfImage<float>& image_losses, const Floats* totals, float* powers,
               const Sums& sums, const Maps<float>& maps) {
  using V = Simd<float>;
  constexpr int L = LANES<float>, SIZE = HEIGHT * PIXELS;
  const CellRow& row = block.row;
  const int64_t count = row.rows * WIDTH;
  float c[SIZE], shaped[SIZE], values[SIZE];
  if (image_losses.options.min_loss > -__builtin_inff()) find_label_powers(block, classes, powers);
  for (int64_t n = 0; n < count; ++n)
    V::store(c + n * L, block.label_losses(classes, n, V::load(powers + n * L), totals[n]));
  for (int64_t j = 0; j < row.rows; ++j) block.store_map(j, maps.totals, totals + j * WIDTH);
  classes.for_classes(row.problem.logits.num_classes, [&](int64_t k) INLINE_LAMBDA {
    Ints counts = {};
    for (int64_t n = 0; n < count; ++n)
      counts -= classes.pixel_classes(n) == static_cast<int32_t>(k);
    for (int lane = 0; lane < L; ++lane) sums.counts[k] += counts[lane];
  });
  if (sums.intersections) {
    for (int64_t n = 0; n < count; ++n)
      V::store(values + n * L, V::load(powers + n * L) / totals[n]);
    add_by_class(row, classes, values, sums.intersections);
  }
  const float* losses = c;
  if (!image_losses.options.plain) {
    losses = shaped;
    for (int64_t n = 0; n < count; ++n) {
      const Ints k = classes.pixel_classes(n);
      const Floats u =
          block.losses_of_all_classes(image_losses, n / WIDTH, n % WIDTH, log(totals[n]));
      const auto p = [&]() INLINE_LAMBDA {
        const Floats power = V::load(powers + n * L);
        return Probabilities<float>{power / totals[n], (totals[n] - power) / totals[n]};
      };
      const Floats loss = image_losses.loss(k, V::load(c + n * L), u, p);
      V::store(shaped + n * L, k >= 0 ? loss : Floats{});
    }
  }
  const Map<float>& map = image_losses.options.pixel_weights;
  float weights[SIZE];
  for (int64_t j = 0; j < row.rows && map.data; ++j) {
    Floats line[WIDTH];
    block.load_map(j, map, line);
    for (int i = 0; i < WIDTH; ++i) V::store(weights + (j * WIDTH + i) * L, line[i]);
  }
  for (int s = 0; s < LOSS_SUMS; ++s) {
    if (!sums.loss_sums[s]) continue;
    for (int64_t n = 0; n < count; ++n) {
      const Floats weight = map.data ? V::load(weights + n * L) : Floats{} + 1;
      const Floats loss = V::load(losses + n * L);
      V::store(values + n * L, image_losses.share_of_pixel(s, V::load(c + n * L), loss, weight));
    }
    add_by_class(row, classes, values, sums.loss_sums[s]);
  }
  if (!maps.pixel_losses) return;
  for (int64_t j = 0; j < row.rows; ++j) {
    Floats row_losses[WIDTH];
    std::memcpy(row_losses, losses + j * PIXELS, sizeof row_losses);
    block.store_map(j, maps.pixel_losses, row_losses);
  }
}

void forward_cells(const Problem<float>& problem, const Tile& tile,
                   const Workspace<float>& workspace, const Sums& sums, const Maps<float>& maps) {
  using V = Simd<float>;
  CellRow row(problem, tile, workspace);
  const LossesOfImage<float> losses(problem.loss_options, tile.image);
  const bool with_probabilities = sums.probability_sums || sums.squares;
  Sums without_correct = sums;
  without_correct.correct = nullptr;
  while (row.next(HEIGHT)) {
    if (!row.ordinary()) {
      row.for_pixels([&](const Group<float>& group) {
        forward_group(problem, tile, workspace, group, sums, maps);
      });
      continue;
    }
    for (int64_t at = 0; at < row.passes * row.blocks; ++at) {
      const Block block(row, at);
      int32_t predicted[HEIGHT * PIXELS];
      Floats totals[HEIGHT * WIDTH];
      BlockClasses classes;
      block.find_classes(classes);
      const bool any_valid = classes.any();
      float powers[HEIGHT * PIXELS];
      if (any_valid) {
        sum_powers(block, classes, totals, powers);
      } else {
        std::memset(totals, 0, sizeof totals);
        std::memset(powers, 0, sizeof powers);
      }
      Ints steep = {};
      for (int64_t n = 0; n < row.rows * WIDTH; ++n)
        steep |= (classes.pixel_classes(n) >= 0) & ~((totals[n] >= STEEP) & (totals[n] <= 1e38f));
      const bool by_cells = !any(steep);
      if (with_probabilities)
        for (int64_t n = 0; n < row.rows * WIDTH; ++n) {
          const Ints counts = (classes.pixel_classes(n) >= 0) & (Ints{} - by_cells);
          V::store(block.factors(0, n / WIDTH, n % WIDTH), counts != 0 ? 1 / totals[n] : Floats{});
        }
      if (sums.correct && any_valid) {
        largest_of_block(block, predicted);
        for (int64_t t = 0; t < row.rows * PIXELS; ++t)
          if (const int32_t k = classes.classes[t]; k >= 0) sums.correct[k] += k == predicted[t];
      }
      if (by_cells)
        add_block(block, classes, losses, totals, powers, sums, maps);
      else
        block.for_pixels([&](const Group<float>& group) {
          forward_group(problem, tile, workspace, group, without_correct, maps);
        });
    }
    if (with_probabilities) add_probability_sums(row, sums.probability_sums, sums.squares);
  }
  *sums.labels_out_of_range += row.labels_out_of_range;
}

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET
