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

#include "softmax_pixels.h"

constexpr int WIDTH = 4, PIXELS = WIDTH * LANES<float>;  // PIXELS: in a row of a block
constexpr int HEIGHT = VECTOR_BYTES == 64 ? 4 : 2;       // their sums fit into the registers
constexpr float FAR = -40.0f, STEEP = 0x1p-40f, LOG_STEEP = -27.7258872f, LARGE = 16.0f;

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
  ALWAYS_INLINE bool any_beyond(float bound) const {
    const auto beyond = [bound](Floats x) INLINE_LAMBDA { return (x > bound) | (x < -bound); };
    return any(beyond(a) | beyond(b) | beyond(c) | beyond(d));
  }
  ALWAYS_INLINE Floats at(Floats down, Floats right) const {
    return blend(blend(a, c, down), blend(b, d, down), right);
  }
  // The same, if all logits are finite.
  ALWAYS_INLINE Floats at_finite(float down, Floats right) const {
    const Floats left = a + down * (c - a);
    return left + right * ((b + down * (d - b)) - left);
  }
};

// z of one class in the cells of a block. start: z at the upper logits, at the first column of
// labels. down, right: the change of z over a whole cell. twist: the change of `right`, going down.
struct Slopes {
  Floats start, down, right, twist;

  ALWAYS_INLINE Slopes(const Corners& z, Floats at_right) {
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
    const Slopes slopes(z, at_right);
    first = slopes.power(at_down);
    right = slopes.ratio_right(at_down, step_right);
    down = slopes.ratio_down(step_down);
    twist = slopes.ratio_twist(step_right, step_down);
  }
  ALWAYS_INLINE void next_row() {
    first *= down;
    right *= twist;
  }
};

// The classes of a block's pixels [rows][WIDTH][lanes], -1 where there is none.
struct BlockClasses {
  int32_t classes[ROWS * PIXELS];
  Ints cell_classes;                             // the largest of each cell, mostly the only one
  int32_t others[ROWS * PIXELS + LANES<float>];  // the pixels that are of another class
  int64_t count;                                 // number of the others

  Ints pixel_classes(int64_t n) const { return load_ints(classes + n * LANES<float>); }
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
    at_down = down_start(0);
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
  int64_t column_of(int64_t block) const { return block % blocks * L; }
  const int32_t* columns_of(int64_t block) const {
    return workspace.cells.columns + block * PIXELS;
  }
  Floats right(int64_t block, int64_t i) const {
    return Simd<float>::load(workspace.cells.weights + block * PIXELS + i * L);
  }
  Floats right_start(int64_t block) const {
    return Simd<float>::load(workspace.cells.starts + block * L);
  }
  float down_start(int64_t row) const {
    return start(problem.rows.weight, y + row, y + rows, problem.row_cells.step);
  }
  float* factors(int which, int64_t block, int64_t j, int64_t i) const {
    return workspace.cells.factors[which] + j * workspace.cells.lanes + block * PIXELS + i * L;
  }
  // The logit of class k at pixel t of the block.
  ALWAYS_INLINE float logit(int64_t block, int64_t t, int64_t k) const {
    const int64_t column = column_of(block) + t % L;
    const float *above = upper_row(k) + column, *below = lower_row(k) + column;
    const float weight_down = down[t / PIXELS];
    return blend(blend(above[0], below[0], weight_down), blend(above[1], below[1], weight_down),
                 workspace.cells.weights[block * PIXELS + t % PIXELS]);
  }
  // Whether the pixels of a block are neighbours: all its cells have WIDTH labels.
  ALWAYS_INLINE bool is_whole(int64_t block) const {
    const int32_t* columns = columns_of(block);
    return passes == 1 && columns[0] >= 0 && columns[PIXELS - 1] == columns[0] + PIXELS - 1;
  }
  // Loads a row of a block's pixels from a line over the tile's labels; `other` where there is no
  // pixel.
  template <class Element, class Vec>
  ALWAYS_INLINE void load_pixels(int64_t block, const Element* line, Element other,
                                 Vec* pixels) const {
    const int32_t* columns = columns_of(block);
    if (is_whole(block)) {
      Floats neighbours[WIDTH];
      std::memcpy(neighbours, line + columns[0], sizeof neighbours);
      Simd<float>::deinterleave<WIDTH>(neighbours);
      std::memcpy(pixels, neighbours, sizeof neighbours);
      return;
    }
    for (int i = 0; i < WIDTH; ++i) pixels[i] = gather(line, load_ints(columns + i * L), other);
  }
  ALWAYS_INLINE void store_pixels(int64_t block, float* line, const Floats* pixels) const {
    const int32_t* columns = columns_of(block);
    if (is_whole(block)) {
      Floats neighbours[WIDTH];
      std::memcpy(neighbours, pixels, sizeof neighbours);
      Simd<float>::interleave<WIDTH>(neighbours);
      std::memcpy(line + columns[0], neighbours, sizeof neighbours);
      return;
    }
    for (int i = 0; i < WIDTH; ++i) scatter(line, load_ints(columns + i * L), pixels[i]);
  }
  // Writes a row of a block's pixels to a contiguous map [B, H, W], if there is one.
  ALWAYS_INLINE void store_map(int64_t block, int64_t j, float* map, const Floats* pixels) const {
    if (map) store_pixels(block, line_of(map, j), pixels);
  }
  ALWAYS_INLINE float* line_of(float* map, int64_t j) const {
    return map + (tile.image * problem.rows.size + y + j) * problem.columns.size +
           tile.label_columns.begin;
  }
  Map<float> lse_map(const float* lse) const {
    return {lse, problem.rows.size * problem.columns.size, problem.columns.size, 1};
  }
  // Loads a row of a block's pixels from a map; 0 if there is no map.
  ALWAYS_INLINE void load_map(int64_t block, int64_t j, const Map<float>& map,
                              Floats* pixels) const {
    for (int i = 0; i < WIDTH; ++i) pixels[i] = Floats{};
    if (!map.data) return;
    const float* line = map.data + tile.image * map.stride_b + (y + j) * map.stride_h +
                        tile.label_columns.begin * map.stride_w;
    if (map.stride_w == 1) return load_pixels(block, line, 0.0f, pixels);
    const int32_t* columns = columns_of(block);
    for (int t = 0; t < PIXELS; ++t)
      if (columns[t] >= 0) pixels[t / L][t % L] = line[columns[t] * map.stride_w];
  }
  ALWAYS_INLINE Corners corners(int64_t k, int64_t block) const {
    return {upper_row(k) + column_of(block), lower_row(k) + column_of(block)};
  }
  ALWAYS_INLINE Series series(const Corners& z, int64_t block) const {
    return {z, right_start(block), problem.column_cells.step, at_down, problem.row_cells.step};
  }
  ALWAYS_INLINE Corners shifts(int64_t block) const {
    const int64_t column = first_column + column_of(block);
    return {workspace.packed.shifts[upper] + column, workspace.packed.shifts[lower] + column};
  }
  // Prefetches one class of a block's logits in the row below. The rows of different classes are
  // far apart in memory, so the processor does not prefetch them itself.
  ALWAYS_INLINE void fetch_logits(int64_t block, int64_t k) const {
    const Layout& layout = problem.logits.layout;
    const int64_t channel = std::max<int64_t>(k - (problem.logits.num_classes - layout.dim), 0);
    const int64_t at = channel * layout.stride_d + column_of(block) * layout.stride_w;
    __builtin_prefetch(next_logits + problem.logits.bytes * at, 0, 2);
  }
  ALWAYS_INLINE void find_classes(int64_t block, BlockClasses& classes) const {
    classes.cell_classes = Ints{} - 1;
    for (int64_t j = 0; j < rows; ++j) {
      Ints k[WIDTH];
      load_pixels(block, workspace.classes + j * workspace.label_stride, -1, k);
      std::memcpy(classes.classes + j * PIXELS, k, sizeof k);
      for (int i = 0; i < WIDTH; ++i)
        classes.cell_classes = k[i] > classes.cell_classes ? k[i] : classes.cell_classes;
    }
    classes.count = 0;
    for (int64_t n = 0; n < rows * WIDTH; ++n) {
      const Ints k = load_ints(classes.classes + n * L);
      classes.count +=
          put_lanes((k >= 0) & (k != classes.cell_classes), n * L, classes.others + classes.count);
    }
  }
  // The logits around the cells of their true classes; any numbers if a cell has no true class.
  ALWAYS_INLINE Corners label_corners(int64_t block, Ints classes) const {
    Ints at = {};
    for (int lane = 0; lane < L; ++lane) at[lane] = lane;
    at += (classes >= 0 ? classes : Ints{}) * static_cast<int32_t>(workspace.packed.stride);
    const float* above = upper_row(0) + column_of(block);
    const float* below = lower_row(0) + column_of(block);
    return {gather(above, at, 0.0f), gather(above + 1, at, 0.0f), gather(below, at, 0.0f),
            gather(below + 1, at, 0.0f)};
  }

  // The logits of the true classes of a block's pixels [rows][WIDTH][lanes]; any numbers where
  // there is no class.
  ALWAYS_INLINE void label_logits(int64_t block, const BlockClasses& classes, float* logits) const {
    const Corners z = label_corners(block, classes.cell_classes);
    const bool finite = z.all_above(-3e38f);
    for (int64_t j = 0; j < rows; ++j)
      for (int i = 0; i < WIDTH; ++i)
        Simd<float>::store(logits + j * PIXELS + i * L,
                           finite ? z.at_finite(down[j], right(block, i))
                                  : z.at(Floats{} + down[j], right(block, i)));
    for (int64_t n = 0; n < classes.count; ++n) {
      const int32_t t = classes.others[n];
      logits[t] = logit(block, t, classes.classes[t]);
    }
  }
  // The sum of v_k * -log p_k for a vector of pixels. log_total: log of the sum of e^z.
  ALWAYS_INLINE Floats losses_of_all_classes(const LossesOfImage<float>& losses, int64_t block,
                                             int64_t j, int64_t i, Floats log_total) const {
    if (!losses.all_weights) return Floats{};
    const Corners z = corners(problem.logits.num_classes, block);
    return losses.total * log_total - z.at(Floats{} + down[j], right(block, i));
  }

  // Calls visit(group) for the rows' pixels in one block, or in all blocks (-1).
  template <class Visit>
  void for_pixels(int64_t block, Visit visit) const {
    for (int64_t j = 0; j < rows; ++j) {
      const auto visit_columns = [&](int64_t begin, int64_t end) {
        for_groups_of_row(problem, tile, workspace, y + j,
                          workspace.classes + j * workspace.label_stride, {begin, end}, visit);
      };
      if (block < 0) {
        visit_columns(0, tile.label_columns.end - tile.label_columns.begin);
        continue;
      }
      int64_t begin = 0, end = 0;  // neighbours
      for (int t = 0; t < PIXELS; ++t) {
        const int32_t column = columns_of(block)[t % WIDTH * L + t / WIDTH];
        if (column < 0) continue;
        if (column != end) {
          visit_columns(begin, end);
          begin = column;
        }
        end = column + 1;
      }
      visit_columns(begin, end);
    }
  }
};

enum class Term { POWER, WEIGHTED, SQUARE };

// Sums over classes for a block's pixels: of e^z, of e^z * weights[k] or of (e^z)^2 * weights[k].
template <Term TERM>
void sum_block(const CellRow& row, int64_t first_row, int64_t block, const float* weights,
               Floats* sums) {
  const int64_t num_classes = row.problem.logits.num_classes;
  const int64_t column = row.column_of(block), stride = row.workspace.packed.stride;
  const float* upper = row.upper_row(0) + column;
  const float* lower = row.lower_row(0) + column;
  const Floats at_right = row.right_start(block);
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
      row.fetch_logits(block, k);
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
            const Floats v = exp<float>(z.at(Floats{} + down, row.right(block, i)));
            some[j * WIDTH + i] += term(v, k);
          }
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < HEIGHT * WIDTH; ++n) sums[n] += some[n];
  }
}
