// Softmax moments of logits that are upsampled at least twice along both axes.
//
// In a cell, between four neighbouring logits, z is bilinear, so e^z is a geometric series along
// rows and columns: four exponentials for each cell and class, then a product for each label.
// Lanes are neighbouring cells of one row. A block is one vector of cells with up to WIDTH labels
// in each row of a cell; if cells have more labels, further passes process the rest. Pixels of a
// block are [rows][WIDTH][lanes]. The sums over classes stay in registers, HEIGHT rows of labels at
// a time.
//
// After subtracting their shift, logits are at most 0. If a logit of a class is below FAR in the
// block, its exponentials are computed directly, because its series would underflow. If the sum of
// a pixel falls below STEEP, because neighbouring logits differ widely, its block is processed
// pixel by pixel, forward and backward. The same holds for a row of cells with a NaN or +inf.
#pragma once

#include <algorithm>
#include <cstdint>

#include "softmax_pixels.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

constexpr int WIDTH = 4, PIXELS = WIDTH * LANES<float>;  // PIXELS: in a row of a block
constexpr int HEIGHT = VECTOR_BYTES == 64 ? 4 : 2;       // their sums fit into the registers
constexpr float FAR = -40.0f, STEEP = 0x1p-40f;

// The four logits of one class around the cells of a block.
struct Corners {
  Floats a, b, c, d;  // upper left and right, lower left and right

  ALWAYS_INLINE Corners(Floats a, Floats b, Floats c, Floats d) : a(a), b(b), c(c), d(d) {}
  ALWAYS_INLINE Corners(const float* upper, const float* lower)
      : a(Simd<float>::load(upper)),
        b(Simd<float>::load(upper + 1)),
        c(Simd<float>::load(lower)),
        d(Simd<float>::load(lower + 1)) {}

  ALWAYS_INLINE bool all_above(float bound) const {
    Floats smallest = a < b ? a : b;
    smallest = c < smallest ? c : smallest;
    smallest = d < smallest ? d : smallest;
    return !any(smallest < bound);
  }
  ALWAYS_INLINE Floats at(Floats down, Floats right) const {
    return between(between(a, c, down), between(b, d, down), right);
  }
};

// z of one class in the cells of a block. start: z at the upper logits, at the first column of
// labels. down, right: the change of z over a whole cell. twist: the change of `right`, going down.
struct Exponents {
  Floats start, down, right, twist;

  ALWAYS_INLINE Exponents(const Corners& z, Floats at_right) {
    right = z.b - z.a;
    twist = (z.d - z.c) - right;
    start = z.a + at_right * right;
    down = (z.c - z.a) + at_right * twist;
  }
  // e^z at the first column, in the row whose lower logits have the weight at_down.
  ALWAYS_INLINE Floats power(float at_down) const {
    return power_of_two((start + at_down * down) * LOG2_E);
  }
  // The factors of e^z from one label to the next: along that row, down the first column, and of
  // the former down.
  ALWAYS_INLINE Floats ratio_right(float at_down, float step) const {
    return power_of_two((right + at_down * twist) * (step * LOG2_E));
  }
  ALWAYS_INLINE Floats ratio_down(float step) const { return power_of_two(down * (step * LOG2_E)); }
  ALWAYS_INLINE Floats ratio_twist(float step_right, float step_down) const {
    return power_of_two(twist * (step_right * step_down * LOG2_E));
  }
};

// Powers of e at the first label of each cell, their ratios along the row and along the column, and
// the ratio of the rows' ratios along the column. right, down: weights of the first label; steps:
// from one label to the next.
struct Series {
  Floats first, right, down, twist;

  ALWAYS_INLINE Series(const Corners& z, Floats at_right, float step_right, float at_down,
                       float step_down) {
    const Exponents exponents(z, at_right);
    first = exponents.power(at_down);
    right = exponents.ratio_right(at_down, step_right);
    down = exponents.ratio_down(step_down);
    twist = exponents.ratio_twist(step_right, step_down);
  }
  ALWAYS_INLINE void next_row() {
    first *= down;
    right *= twist;
  }
};

// A row of cells of a tile, with at most ROWS rows of its labels at a time.
struct CellRow {
  static constexpr int L = LANES<float>;

  const Problem<float>& problem;
  const Tile& tile;
  const Workspace<float>& workspace;
  int64_t blocks, passes;
  int64_t first_column;              // the first cell's column in packed rows
  int64_t cell, upper, lower;        // the row of cells, and its two rows of logits
  int64_t y = 0, end = 0, rows = 0;  // rows of labels: first, end in this cell, number at a time
  int64_t labels_out_of_range = 0;   // of the labels so far: neither a class nor ignored
  float down[ROWS];                  // weight of the lower logits in each row of labels
  float at_down;                     // the same in the first row, rounded as the mean
  float down_starts[ROWS];           // in every HEIGHT-th row, that of HEIGHT rows
  const char* next_logits;           // the row of logits below
  PackedRows<float> packed;

  CellRow(const Problem<float>& problem, const Tile& tile, const Workspace<float>& workspace)
      : problem(problem), tile(tile), workspace(workspace) {
    const Range& cells = tile.column_cells;
    blocks = (cells.end - cells.begin + L - 1) / L;
    passes = (problem.column_cells.most + WIDTH - 1) / WIDTH;
    cell = tile.row_cells.begin - 1;
    first_column = cells.begin - tile.columns.begin + 1;
    for (int64_t block = 0; block < passes * blocks; ++block)
      for (int64_t lane = 0; lane < L; ++lane) {
        const int64_t column_cell = cells.begin + block % blocks * L + lane;
        const int32_t* begin = problem.column_cells.begin + column_cell + 1;
        const int64_t first = column_cell < cells.end ? begin[0] + block / blocks * WIDTH : 0;
        const int64_t end =
            column_cell < cells.end ? std::min<int64_t>(begin[1], first + WIDTH) : 0;
        for (int64_t i = 0; i < WIDTH; ++i) {
          const int64_t at = block * PIXELS + i * L + lane;
          const bool valid = first + i < end;
          workspace.cells.columns[at] =
              static_cast<int32_t>(valid ? first + i - tile.label_columns.begin : -1);
          workspace.cells.weights[at] = valid ? problem.columns.weight[first + i] : 0;
        }
        workspace.cells.starts[block * L + lane] =
            start(problem.columns.weight, first, end, problem.column_cells.step);
      }
  }

  // The weight of the first label. All weights are rounded, so their mean is used.
  static float start(const float* weights, int64_t first, int64_t end, float step) {
    float sum = 0;
    for (int64_t i = first; i < end; ++i) sum += weights[i] - (i - first) * step;
    return first < end ? sum / (end - first) : 0;
  }

  // Goes to the next rows of labels, at most `height` of them, of one row of cells. Returns false
  // after the last row.
  bool next(int64_t height) {
    y += rows;
    rows = 0;
    while (y >= end) {
      if (++cell >= tile.row_cells.end) return false;
      y = problem.row_cells.begin[cell + 1];
      end = problem.row_cells.begin[cell + 2];
      if (y == end) continue;
      upper = std::max<int64_t>(cell, 0);
      lower = std::min(cell + 1, problem.logits.layout.height - 1);
      packed.need(problem, tile, upper, workspace.packed);
      packed.need(problem, tile, lower, workspace.packed);
    }
    rows = std::min(height, end - y);
    for (int64_t j = 0; j < rows; ++j) {
      down[j] = problem.rows.weight[y + j];
      if (problem.labels.read)
        labels_out_of_range +=
            problem.labels.read(problem.labels, tile.image, y + j, tile.label_columns,
                                workspace.classes + j * workspace.label_stride);
    }
    at_down = down_start(0, rows);
    for (int64_t j = 0; j < rows; j += HEIGHT)
      down_starts[j] = down_start(j, std::min<int64_t>(j + HEIGHT, rows));
    next_logits = static_cast<const char*>(problem.logits.data) +
                  problem.logits.bytes * (tile.image * problem.logits.layout.stride_b +
                                          (lower + 1) * problem.logits.layout.stride_h +
                                          tile.columns.begin * problem.logits.layout.stride_w);
    return true;
  }
  bool ordinary() const { return packed.ordinary[upper] && packed.ordinary[lower]; }

  const float* upper_row(int64_t k) const {
    return workspace.packed.rows[upper] + k * workspace.packed.stride + first_column;
  }
  const float* lower_row(int64_t k) const {
    return workspace.packed.rows[lower] + k * workspace.packed.stride + first_column;
  }
  float down_start(int64_t first, int64_t last) const {
    return start(problem.rows.weight, y + first, y + last, problem.row_cells.step);
  }

  Map<float> totals_map(const float* totals) const {
    return {totals, problem.rows.size * problem.columns.size, problem.columns.size, 1};
  }

  // Calls visit(group) for the pixels of a row of labels in these columns of the tile.
  template <class Visit>
  void for_pixels(int64_t j, const Range& columns, Visit visit) const {
    for_groups_of_row(problem, tile, workspace, y + j,
                      workspace.classes + j * workspace.label_stride, columns, visit);
  }
  // The same for all pixels of the rows.
  template <class Visit>
  void for_pixels(Visit visit) const {
    for (int64_t j = 0; j < rows; ++j)
      for_pixels(j, {0, tile.label_columns.end - tile.label_columns.begin}, visit);
  }
};

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET
