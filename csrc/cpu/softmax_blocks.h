// The blocks of a row of cells: their logits, their pixels, and sums over classes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "softmax_cells.h"

BEGIN_TARGET
namespace anchorops::cpu::softmax::INSTRUCTION_SET {

// A bit for each of some classes. Classes that differ by 64 * CLASS_WORDS have the same bit.
ALWAYS_INLINE bool may_have_class(const uint64_t* bits, uint64_t k) {
  return bits[k / 64 % CLASS_WORDS] >> k % 64 & 1;
}

// The classes of a block's pixels [rows][WIDTH][lanes], -1 where there is none.
struct BlockClasses {
  int32_t classes[ROWS * PIXELS];
  uint64_t bits[CLASS_WORDS] = {};  // of all classes

  Ints pixel_classes(int64_t n) const { return load_ints(classes + n * LANES<float>); }
  bool any() const {
    return std::any_of(bits, bits + CLASS_WORDS, [](uint64_t word) { return word != 0; });
  }
  // Adds the bits of some pixels' classes, of which mostly a few are different.
  ALWAYS_INLINE void add(Ints k) {
    for (uint32_t rest = lanes_of(k >= 0); rest != 0;) {
      const int32_t next = k[__builtin_ctz(rest)];
      bits[next / 64u % CLASS_WORDS] |= uint64_t{1} << next % 64u;
      rest &= lanes_of(k != next);
    }
  }
  // Calls visit(k) for the classes, and sometimes for one that no pixel has.
  template <class Visit>
  ALWAYS_INLINE void for_classes(int64_t num_classes, Visit visit) const {
    for (int64_t first = 0; first < num_classes; first += 64)
      for (uint64_t rest = bits[first / 64 % CLASS_WORDS]; rest != 0; rest &= rest - 1)
        if (const int64_t k = first + __builtin_ctzll(rest); k < num_classes) visit(k);
  }
  // Writes the values of vector n of the pixels where they have class k.
  ALWAYS_INLINE void put(int64_t k, int64_t n, Floats values, float* target) const {
    float* const at = target + n * LANES<float>;
    const Ints of_class = pixel_classes(n) == static_cast<int32_t>(k);
    Simd<float>::store(at, of_class ? values : Simd<float>::load(at));
  }
};

// A block of a row of cells. columns: of its pixels in the tile [WIDTH][lanes], -1 where there is
// none. weights: of the right logits there.
struct Block {
  static constexpr int L = LANES<float>;

  const CellRow& row;
  int64_t column;  // of its first cell, in the row
  const int32_t* columns;
  const float *weights, *starts;
  int64_t first_factor, index;

  ALWAYS_INLINE Block(const CellRow& row, int64_t index)
      : row(row),
        column(index % row.blocks * L),
        columns(row.workspace.cells.columns + index * PIXELS),
        weights(row.workspace.cells.weights + index * PIXELS),
        starts(row.workspace.cells.starts + index * L),
        first_factor(index * PIXELS),
        index(index) {}

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
  // at_down: the weight of the lower logits in the first row.
  ALWAYS_INLINE Series series(const Corners& z, float at_down) const {
    return {z, right_start(), row.problem.column_cells.step, at_down, row.problem.row_cells.step};
  }
  ALWAYS_INLINE int32_t* pixel_classes(int64_t j, int64_t i) const {
    return row.workspace.cells.classes + j * row.workspace.cells.lanes + first_factor + i * L;
  }
  ALWAYS_INLINE uint64_t* class_bits() const {
    return row.workspace.cells.class_bits + index * CLASS_WORDS;
  }

  // The logit of class k at pixel t.
  ALWAYS_INLINE float logit(int64_t t, int64_t k) const {
    const float* above = row.upper_row(k) + column + t % L;
    const float* below = row.lower_row(k) + column + t % L;
    const float weight_down = row.down[t / PIXELS];
    return between(between(above[0], below[0], weight_down),
                   between(above[1], below[1], weight_down), weights[t % PIXELS]);
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
    const int64_t labels = row.tile.label_columns.end - row.tile.label_columns.begin;
    if (columns[L - 1] < 0 || columns[L - 1] + WIDTH > labels) {
      for (int i = 0; i < WIDTH; ++i) pixels[i] = gather(line, load_ints(columns + i * L), other);
      return;
    }
    static_assert(WIDTH == 4);
    Floats cells[WIDTH];  // WIDTH neighbours of each cell
    if (is_whole())
      std::memcpy(cells, line + columns[0], sizeof cells);
    else
      for (int i = 0; i < WIDTH; ++i) cells[i] = load_fours(line, columns + i * L / WIDTH);
    Simd<float>::deinterleave<WIDTH>(cells);
    for (int i = 0; i < WIDTH; ++i)
      pixels[i] = load_ints(columns + i * L) >= 0 ? Vec(cells[i]) : Vec{} + other;
  }
  // Loads a row of the pixels from a map; 0 if there is no map.
  ALWAYS_INLINE void load_map(int64_t j, const Map<float>& map, Floats* pixels) const {
    for (int i = 0; i < WIDTH; ++i) pixels[i] = Floats{};
    if (!map.data) return;
    const Tile& tile = row.tile;
    const float* line = map.data + tile.image * map.stride_b + (row.y + j) * map.stride_h +
                        tile.label_columns.begin * map.stride_w;
    if (map.stride_w == 1) {
      for (int lane = 0; lane < L; lane += 2)  // the same pixels of the next row of cells
        __builtin_prefetch(line + row.rows * map.stride_h + columns[lane]);
      return load_pixels(line, 0.0f, pixels);
    }
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
    Ints lowest = Ints{} + std::numeric_limits<int32_t>::max(), highest = Ints{} - 1;  // of a cell
    for (int64_t j = 0; j < row.rows; ++j) {
      Ints k[WIDTH];
      load_pixels(row.workspace.classes + j * row.workspace.label_stride, -1, k);
      std::memcpy(classes.classes + j * PIXELS, k, sizeof k);
      for (int i = 0; i < WIDTH; ++i) {
        lowest = (k[i] >= 0) & (k[i] < lowest) ? k[i] : lowest;
        highest = k[i] > highest ? k[i] : highest;
      }
    }
    // rows are processed HEIGHT at a time
    for (int64_t n = row.rows * WIDTH; n % (HEIGHT * WIDTH) != 0; ++n)
      std::memset(classes.classes + n * L, -1, sizeof(Ints));
    // mostly a cell has no others
    classes.add(highest);
    classes.add(lowest < highest ? lowest : Ints{} - 1);
    for (int64_t n = 0; n < row.rows * WIDTH; ++n) {
      const Ints k = classes.pixel_classes(n);
      classes.add((k > lowest) & (k < highest) ? k : Ints{} - 1);
    }
  }
  // -log p of the true classes of vector n of the pixels, from their e^z and its sum over all
  // classes; 0 where there is no class.
  ALWAYS_INLINE Floats label_losses(const BlockClasses& classes, int64_t n, Floats power,
                                    Floats total) const {
    const Ints k = classes.pixel_classes(n), far = (k >= 0) & (power < 1e-30f);
    Floats c = log(total / (far ? Floats{} + 1 : power));
    for (int lane = 0; any(far) && lane < L; ++lane)
      if (far[lane]) c[lane] -= logit(n * L + lane, k[lane]);
    return k >= 0 ? not_below_0(c) : Floats{};
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

// e^z of one class and the pixels in HEIGHT rows from `first` on. It is not inlined, so that what
// for_powers adds up stays in registers.
__attribute__((noinline)) void powers_directly(const Block& block, const Corners& z, int64_t first,
                                               Floats* powers) {
  const CellRow& row = block.row;
  for (int j = 0; j < HEIGHT; ++j)
    for (int i = 0; i < WIDTH; ++i) {
      const float down = row.down[std::min<int64_t>(first + j, row.rows - 1)];
      powers[j * WIDTH + i] = exp<float>(z.at(Floats{} + down, block.right(i)));
    }
}

// Calls visit(j, i, e^z) for one class and the pixels in HEIGHT rows from `first` on.
template <class Visit>
ALWAYS_INLINE void for_powers(const Block& block, const Corners& z, int64_t first, Visit visit) {
  const CellRow& row = block.row;
  if (z.all_above(FAR)) {
    Series e = block.series(z, row.down_starts[first]);
#pragma GCC unroll 8
    for (int j = 0; j < HEIGHT; ++j) {
      Floats v = e.first;
#pragma GCC unroll 8
      for (int i = 0; i < WIDTH; ++i) {
        visit(j, i, v);
        if (i < WIDTH - 1) v *= e.right;
      }
      if (j < HEIGHT - 1) e.next_row();
    }
    return;
  }
  Floats powers[HEIGHT * WIDTH];
  powers_directly(block, z, first, powers);
#pragma GCC unroll 16
  for (int n = 0; n < HEIGHT * WIDTH; ++n) visit(n / WIDTH, n % WIDTH, powers[n]);
}

// Sums over classes for a block's pixels in HEIGHT rows: visit(k, z, some) adds those of a class.
template <class Visit>
ALWAYS_INLINE void sum_classes(const Block& block, Floats* sums, Visit visit) {
  const int64_t num_classes = block.row.problem.logits.num_classes;
  const int64_t stride = block.row.workspace.packed.stride;
  const float* upper = block.row.upper_row(0) + block.column;
  const float* lower = block.row.lower_row(0) + block.column;
  for (int64_t start = 0; start < num_classes; start += 128) {
    Floats some[HEIGHT * WIDTH] = {};  // sums of few terms, to keep rounding errors small
    const int64_t end = std::min<int64_t>(start + 128, num_classes);
    for (int64_t k = start; k < end; ++k) {
      block.fetch_logits(k);
      visit(k, Corners(upper + k * stride, lower + k * stride), some);
    }
#pragma GCC unroll 16
    for (int n = 0; n < HEIGHT * WIDTH; ++n) sums[n] = start == 0 ? some[n] : sums[n] + some[n];
  }
}

// The sums of e^z. label_powers: e^z of the true classes [HEIGHT][WIDTH][lanes], 1 where there is
// none.
void sum_powers(const Block& block, const BlockClasses& classes, Floats* sums,
                float* __restrict__ label_powers) {
  std::fill(label_powers, label_powers + HEIGHT * PIXELS, 1.0f);
  sum_classes(block, sums, [&](int64_t k, const Corners& z, Floats* some) INLINE_LAMBDA {
    if (may_have_class(classes.bits, k)) [[unlikely]]
      return for_powers(block, z, 0, [&](int j, int i, Floats v) INLINE_LAMBDA {
        some[j * WIDTH + i] += v;
        classes.put(k, j * WIDTH + i, v, label_powers);
      });
    for_powers(block, z, 0,
               [&](int j, int i, Floats v) INLINE_LAMBDA { some[j * WIDTH + i] += v; });
  });
}

// The sums of w_k * e^z, or of w_k * (e^z)^2, with w_k = scale * weights[k].
template <bool SQUARE>
void sum_weighted(const Block& block, int64_t first, const float* weights, float scale,
                  Floats* sums) {
  sum_classes(block, sums, [&](int64_t k, const Corners& z, Floats* some) INLINE_LAMBDA {
    const float weight = scale * weights[k];
    for_powers(block, z, first, [&](int j, int i, Floats v) INLINE_LAMBDA {
      some[j * WIDTH + i] += (SQUARE ? v * v : v) * weight;
    });
  });
}

// e^z of the true classes of the pixels [rows][WIDTH][lanes], 1 where there is none. It is not
// inlined: a pixel at the smallest loss must be used in both passes, or in none.
__attribute__((noinline)) void find_label_powers(const Block& block, const BlockClasses& classes,
                                                 float* powers) {
  const CellRow& row = block.row;
  std::fill(powers, powers + row.rows * PIXELS, 1.0f);
  classes.for_classes(row.problem.logits.num_classes, [&](int64_t k) INLINE_LAMBDA {
    for (int64_t first = 0; first < row.rows; first += HEIGHT)
      for_powers(block, block.corners(k), first, [&](int j, int i, Floats v) INLINE_LAMBDA {
        classes.put(k, (first + j) * WIDTH + i, v, powers);
      });
  });
}

}  // namespace anchorops::cpu::softmax::INSTRUCTION_SET
END_TARGET
