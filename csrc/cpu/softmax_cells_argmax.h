// The class of the largest logit of each pixel, over the cells of a tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "softmax_blocks.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

// l + w (r - l), but (1 - w) l + w r if both are infinite.
ALWAYS_INLINE Floats towards(Floats l, Floats r, Floats w) {
  Floats z = l + w * (r - l);
  z = z == z ? z : (1 - w) * l + w * r;
  return w == 0 ? l : z;
}

// The class of the largest z of a block's pixels, the first of equal ones. It is not inlined, so
// its products are always fused in the same way, and `correct` is the diagonal of the confusion
// matrix.
__attribute__((noinline)) void largest_of_block(const Block& block, int32_t* classes) {
  const CellRow& row = block.row;
  constexpr int H = HEIGHT / 2;
  for (int64_t first = 0; first < row.rows; first += H) {
    Floats largest[H * WIDTH];
    Ints index[H * WIDTH] = {};
    for (auto& z : largest) z = Floats{} - __builtin_inff();
    for (int64_t k = 0; k < row.problem.logits.num_classes; ++k) {
      const Corners z = block.corners(k);
      const bool finite = z.all_above(-3e38f);
      const Floats right_down = z.d - z.b, left_down = z.c - z.a;
#pragma GCC unroll 8
      for (int j = 0; j < H; ++j) {
        const Floats down = Floats{} + row.down[std::min<int64_t>(first + j, row.rows - 1)];
        const Floats l = finite ? z.a + down * left_down : towards(z.a, z.c, down);
        const Floats r = finite ? z.b + down * right_down : towards(z.b, z.d, down);
        const Floats change = r - l;
#pragma GCC unroll 8
        for (int i = 0; i < WIDTH; ++i) {
          const Floats w = block.right(i);
          const Floats value = finite ? l + w * change : towards(l, r, w);
          Floats& best = largest[j * WIDTH + i];
          Ints& best_class = index[j * WIDTH + i];
          const Ints larger = value > best;
          best = larger ? value : best;
          best_class = larger ? Ints{} + static_cast<int32_t>(k) : best_class;
        }
      }
    }
    const int64_t height = std::min<int64_t>(H, row.rows - first);
    std::memcpy(classes + first * PIXELS, index, height * PIXELS * sizeof(int32_t));
  }
}

void argmax_cells(const Problem<float>& problem, const Tile& tile,
                  const Workspace<float>& workspace, const Predictions& predictions) {
  CellRow row(problem, tile, workspace);
  while (row.next(HEIGHT)) {
    if (!row.ordinary()) {
      row.for_pixels([&](const Group<float>& group) {
        argmax_group(problem, tile, workspace, group, predictions);
      });
      continue;
    }
    int32_t classes[HEIGHT * PIXELS];
    for (int64_t n = 0; n < row.passes * row.blocks; ++n) {
      const Block block(row, n);
      largest_of_block(block, classes);
      const int32_t* columns = block.columns;
      for (int64_t j = 0; j < row.rows; ++j)
        predictions.at(problem.pixel(tile, row.y + j, tile.label_columns.begin), [&](auto* out) {
          for (int t = 0; t < PIXELS; ++t)
            if (columns[t] >= 0) out[columns[t]] = classes[j * PIXELS + t];
        });
    }
  }
}

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET
