// The blocks of a row of cells: their logits, their pixels, and sums over classes.
#pragma once

#include "softmax_cells.h"

// The classes of a block's pixels [rows][WIDTH][lanes], -1 where there is none.
struct BlockClasses {
  int32_t classes[ROWS * PIXELS];
  Ints cell_classes;                             // the largest of each cell, mostly the only one
  int32_t others[ROWS * PIXELS + LANES<float>];  // the pixels that are of another class
  int64_t count;                                 // number of the others

  Ints pixel_classes(int64_t n) const { return load_ints(classes + n * LANES<float>); }
};

// A block of a row of cells. columns: of its pixels in the tile [WIDTH][lanes], -1 where there is
// none. weights: of the right logits there.
struct Block {
  static constexpr int L = LANES<float>;

  const CellRow& row;
  int64_t column;  // of its first cell, in the row
  const int32_t* columns;
  const float *weights, *starts;
  int64_t first_factor;

  ALWAYS_INLINE Block(const CellRow& row, int64_t index)
      : row(row),
        column(index % row.blocks * L),
        columns(row.workspace.cells.columns + index * PIXELS),
        weights(row.workspace.cells.weights + index * PIXELS),
        starts(row.workspace.cells.starts + index * L),
        first_factor(index * PIXELS) {}

  ALWAYS_INLINE Floats down(int64_t j) const { return Floats{} + row.down[j]; }
  ALWAYS_INLINE Floats right(int64_t i) const { return Simd<float>::load(weights + i * L); }
  ALWAYS_INLINE Floats right_start() const { return Simd<float>::load(starts); }
  ALWAYS_INLINE float* factors(int which, int64_t j, int64_t i) const {
    return row.workspace.cells.factors[which] + j * row.workspace.cells.lanes + first_factor +
           i * L;
  }

  ALWAYS_INLINE Corners corners(int64_t k) const {
    return {row.upper_row(k) + column, row.lower_row(k) + column};
  }
  ALWAYS_INLINE Series series(const Corners& z) const {
    return {z, right_start(), row.problem.column_cells.step, row.at_down,
            row.problem.row_cells.step};
  }
  ALWAYS_INLINE Corners shifts() const {
    const int64_t at = row.first_column + column;
    return {row.workspace.packed.shifts[row.upper] + at,
            row.workspace.packed.shifts[row.lower] + at};
  }
  // The logit of class k at pixel t.
  ALWAYS_INLINE float logit(int64_t t, int64_t k) const {
    const float* above = row.upper_row(k) + column + t % L;
    const float* below = row.lower_row(k) + column + t % L;
    const float weight_down = row.down[t / PIXELS];
    return blend(blend(above[0], below[0], weight_down), blend(above[1], below[1], weight_down),
                 weights[t % PIXELS]);
  }
  // Prefetches one class of the logits in the row below. The rows of different classes are far
  // apart in memory, so the processor does not prefetch them itself.
  ALWAYS_INLINE void fetch_logits(int64_t k) const {
    const Logits<float>& logits = row.problem.logits;
    const int64_t channel = std::max<int64_t>(k - (logits.num_classes - logits.layout.dim), 0);
    const int64_t at = channel * logits.layout.stride_d + column * logits.layout.stride_w;
    __builtin_prefetch(row.next_logits + logits.bytes * at, 0, 2);
  }

  // Whether the pixels are neighbours: all cells have WIDTH labels.
  ALWAYS_INLINE bool is_whole() const {
    return row.passes == 1 && columns[0] >= 0 && columns[PIXELS - 1] == columns[0] + PIXELS - 1;
  }
  // Loads a row of the pixels from a line over the tile's labels; `other` where there is no pixel.
  template <class Element, class Vec>
  ALWAYS_INLINE void load_pixels(const Element* line, Element other, Vec* pixels) const {
    if (is_whole()) {
      Floats neighbours[WIDTH];
      std::memcpy(neighbours, line + columns[0], sizeof neighbours);
      Simd<float>::deinterleave<WIDTH>(neighbours);
      std::memcpy(pixels, neighbours, sizeof neighbours);
      return;
    }
    for (int i = 0; i < WIDTH; ++i) pixels[i] = gather(line, load_ints(columns + i * L), other);
  }
  // Loads a row of the pixels from a map; 0 if there is no map.
  ALWAYS_INLINE void load_map(int64_t j, const Map<float>& map, Floats* pixels) const {
    for (int i = 0; i < WIDTH; ++i) pixels[i] = Floats{};
    if (!map.data) return;
    const Tile& tile = row.tile;
    const float* line = map.data + tile.image * map.stride_b + (row.y + j) * map.stride_h +
                        tile.label_columns.begin * map.stride_w;
    if (map.stride_w == 1) return load_pixels(line, 0.0f, pixels);
    for (int t = 0; t < PIXELS; ++t)
      if (columns[t] >= 0) pixels[t / L][t % L] = line[columns[t] * map.stride_w];
  }
  // Writes a row of the pixels to a contiguous map [B, H, W], if there is one.
  ALWAYS_INLINE void store_map(int64_t j, float* map, const Floats* pixels) const {
    if (!map) return;
    float* line = map + row.problem.pixel(row.tile, row.y + j, row.tile.label_columns.begin);
    if (is_whole()) {
      Floats neighbours[WIDTH];
      std::memcpy(neighbours, pixels, sizeof neighbours);
      Simd<float>::interleave<WIDTH>(neighbours);
      std::memcpy(line + columns[0], neighbours, sizeof neighbours);
      return;
    }
    for (int i = 0; i < WIDTH; ++i) scatter(line, load_ints(columns + i * L), pixels[i]);
  }

  ALWAYS_INLINE void find_classes(BlockClasses& classes) const {
    classes.cell_classes = Ints{} - 1;
    for (int64_t j = 0; j < row.rows; ++j) {
      Ints k[WIDTH];
      load_pixels(row.workspace.classes + j * row.workspace.label_stride, -1, k);
      std::memcpy(classes.classes + j * PIXELS, k, sizeof k);
      for (int i = 0; i < WIDTH; ++i)
        classes.cell_classes = k[i] > classes.cell_classes ? k[i] : classes.cell_classes;
    }
    classes.count = 0;
    for (int64_t n = 0; n < row.rows * WIDTH; ++n) {
      const Ints k = load_ints(classes.classes + n * L);
      classes.count +=
          put_lanes((k >= 0) & (k != classes.cell_classes), n * L, classes.others + classes.count);
    }
  }
  // The logits around the cells of their true classes; any numbers if a cell has no true class.
  ALWAYS_INLINE Corners label_corners(Ints classes) const {
    Ints at = {};
    for (int lane = 0; lane < L; ++lane) at[lane] = lane;
    at += (classes >= 0 ? classes : Ints{}) * static_cast<int32_t>(row.workspace.packed.stride);
    const float* above = row.upper_row(0) + column;
    const float* below = row.lower_row(0) + column;
    return {gather(above, at, 0.0f), gather(above + 1, at, 0.0f), gather(below, at, 0.0f),
            gather(below + 1, at, 0.0f)};
  }
  // The logits of the true classes of the pixels [rows][WIDTH][lanes]; any numbers where there is
  // no class.
  ALWAYS_INLINE void label_logits(const BlockClasses& classes, float* logits) const {
    const Corners z = label_corners(classes.cell_classes);
    const bool finite = z.all_above(-3e38f);
    for (int64_t j = 0; j < row.rows; ++j)
      for (int i = 0; i < WIDTH; ++i)
        Simd<float>::store(logits + j * PIXELS + i * L,
                           finite ? z.at_finite(row.down[j], right(i)) : z.at(down(j), right(i)));
    for (int64_t n = 0; n < classes.count; ++n) {
      const int32_t t = classes.others[n];
      logits[t] = logit(t, classes.classes[t]);
    }
  }
  // The sum of v_k * -log p_k for a vector of pixels. log_total: log of the sum of e^z.
  ALWAYS_INLINE Floats losses_of_all_classes(const LossesOfImage<float>& losses, int64_t j,
                                             int64_t i, Floats log_total) const {
    if (!losses.all_weights) return Floats{};
    const Corners z = corners(row.problem.logits.num_classes);
    return losses.total * log_total - z.at(down(j), right(i));
  }

  // Calls visit(group) for the pixels.
  template <class Visit>
  void for_pixels(Visit visit) const {
    for (int64_t j = 0; j < row.rows; ++j) {
      int64_t begin = 0, end = 0;  // neighbours
      for (int t = 0; t < PIXELS; ++t) {
        const int32_t at = columns[t % WIDTH * L + t / WIDTH];
        if (at < 0) continue;
        if (at != end) {
          row.for_pixels(j, {begin, end}, visit);
          begin = at;
        }
        end = at + 1;
      }
      row.for_pixels(j, {begin, end}, visit);
    }
  }
};

enum class Term { POWER, WEIGHTED, SQUARE };

// Sums over classes for a block's pixels: of e^z, of e^z * weights[k] or of (e^z)^2 * weights[k].
template <Term TERM>
void sum_block(const Block& block, int64_t first_row, const float* weights, Floats* sums) {
  const CellRow& row = block.row;
  const int64_t num_classes = row.problem.logits.num_classes;
  const int64_t stride = row.workspace.packed.stride;
  const float* upper = row.upper_row(0) + block.column;
  const float* lower = row.lower_row(0) + block.column;
  const Floats at_right = block.right_start();
  const float at_down = row.down_start(first_row);
  const float step_right = row.problem.column_cells.step, step_down = row.problem.row_cells.step;
  const auto term = [weights](Floats v, int64_t k) INLINE_LAMBDA {
    if constexpr (TERM == Term::POWER) return v;
    if constexpr (TERM == Term::WEIGHTED) return v * weights[k];
    if constexpr (TERM == Term::SQUARE) return v * v * weights[k];
  };
  for (int n = 0; n < HEIGHT * WIDTH; ++n) sums[n] = Floats{};
  for (int64_t start = 0; start < num_classes; start += 128) {
    Floats some[HEIGHT * WIDTH] = {};  // sums of few terms, to keep rounding errors small
    const int64_t end = std::min<int64_t>(start + 128, num_classes);
    for (int64_t k = start; k < end; ++k) {
      const Corners z(upper + k * stride, lower + k * stride);
      block.fetch_logits(k);
      if (z.all_above(FAR)) {
        Series e(z, at_right, step_right, at_down, step_down);
#pragma GCC unroll 8
        for (int j = 0; j < HEIGHT; ++j) {
          Floats v = e.first;
#pragma GCC unroll 8
          for (int i = 0; i < WIDTH; ++i) {
            some[j * WIDTH + i] += term(v, k);
            if (i < WIDTH - 1) v *= e.right;
          }
          if (j < HEIGHT - 1) e.next_row();
        }
      } else {
        for (int j = 0; j < HEIGHT; ++j)
          for (int i = 0; i < WIDTH; ++i) {
            const float down = row.down[std::min<int64_t>(first_row + j, row.rows - 1)];
            const Floats v = exp<float>(z.at(Floats{} + down, block.right(i)));
            some[j * WIDTH + i] += term(v, k);
          }
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < HEIGHT * WIDTH; ++n) sums[n] += some[n];
  }
}
