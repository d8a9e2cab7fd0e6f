// A thread's cell: where its pixels are, their labels, and e^z by geometric sequences.
#pragma once

#include "../labels/pixel_labels.cuh"
#include "stage.cuh"

namespace anchorops::cuda {

// The bit of a cell's pixel in a set of its pixels.
__device__ constexpr unsigned bit_of(int i, int j) { return 1u << (i * TILE + j); }

// Calls function(i, j) for all pixels of a tile, where i and j are constants.
template <class Function>
__device__ __forceinline__ void for_tile(Function function) {
#pragma unroll
  for (int i = 0; i < TILE; ++i) {
#pragma unroll
    for (int j = 0; j < TILE; ++j) function(i, j);
  }
}

// Calls function(i, j) for the pixels of a set, which are different ones in each lane.
template <class Function>
__device__ __forceinline__ void for_each_of(unsigned pixels, Function function) {
  for (; pixels; pixels &= pixels - 1) {
    const int pixel = __ffs(static_cast<int>(pixels)) - 1;
    function(pixel / TILE, pixel % TILE);
  }
}

// e^z of a cell's pixels: first·x^j·y^i·xy^(ij), times 2^SCALE.
struct Powers {
  float first, x, y, xy;
};

// A thread's cell, and its part of the cell, up to TILE × TILE pixels.
struct Cell {
  int image, row, column;
  bool inside;                                   // whether the cell exists
  int end_y, end_x;                              // behind its pixels
  int part = 0, y, x, ny, nx;                    // the selected part and its pixels
  float fraction_y, fraction_x, step_y, step_x;  // of the part's first pixel; to the next one
  const float *a, *b, *c, *d;                    // staged logits at its four corners
  unsigned regular;  // bit 2i + j: geometric sequences can be used for pixels that read i rows and
                     // j columns in addition to the first ones

  // The cell of the thread's lane in these columns.
  __device__ Cell(const Cells& cells, int row, const Columns& columns, int part)
      : image(columns.image(threadIdx.x % 32)),
        row(row),
        column(columns.column(threadIdx.x % 32)),
        regular(0) {
    inside = image < cells.logits.batch && column < cells.logits.width && row < cells.logits.height;
    image = min(image, cells.logits.batch - 1);
    y = cells.rows.first_pixel(row);
    x = cells.columns.first_pixel(column);
    end_y = inside ? cells.rows.first_pixel(row + 1) : 0;
    end_x = inside ? cells.columns.first_pixel(column + 1) : 0;
    // before the first and after the last row both corners are the same
    step_y = row < 0 || row >= cells.logits.height - 1 ? 0 : cells.rows.ratio;
    step_x = column < 0 || column >= cells.logits.width - 1 ? 0 : cells.columns.ratio;
    select(cells, part);
  }
  __device__ explicit Cell(const Cells& cells)
      : Cell(cells, cells.row_of(threadIdx.x / 32), cells.columns_of(threadIdx.x / 32),
             cells.block_part()) {}

  __device__ void select(const Cells& cells, int next) {
    y += (next / cells.parts_x - part / cells.parts_x) * TILE;
    x += (next % cells.parts_x - part % cells.parts_x) * TILE;
    part = next;
    ny = min(end_y - y, TILE);
    nx = min(end_x - x, TILE);
    fraction_y = cells.rows.fraction(row, y);
    fraction_x = cells.columns.fraction(column, x);
  }

  // A corner that no regular pixel reads is replaced by one that is read; otherwise the ratios of
  // the others might not be finite.
  template <int CLASSES>
  __device__ void set_corners(const Cells& cells, const LogitsStage<CLASSES>& stage) {
    a = b = c = d = stage.tile;
    if (!cells.geometric) return;
    const Shift sa = cells.shift(image, row, column), sb = cells.shift(image, row, column + 1);
    const Shift sc = cells.shift(image, row + 1, column);
    const Shift sd = cells.shift(image, row + 1, column + 1);
    const auto finite = [](const Shift& s) { return s.largest == s.largest; };
    // The bits of the directions in which different positions are read.
    const unsigned reads = (step_x == 0 ? 0 : RIGHT) | (step_y == 0 ? 0 : DOWN);
    const bool first = inside & finite(sa);
    const bool right = first & finite(sb) & !(sa.steep & reads & RIGHT);
    const bool down = first & finite(sc) & !(sa.steep & reads & DOWN);
    const bool both = right & down & finite(sd) & !((sc.steep & RIGHT | sb.steep & DOWN) & reads);
    regular = first | right << 1 | down << 2 | both << 3;
    a = stage.tile + threadIdx.x / 32 * LogitsStage<CLASSES>::ROW + threadIdx.x % 32;
    b = right ? a + 1 : a;
    c = down ? a + LogitsStage<CLASSES>::ROW : a;
    d = both ? a + LogitsStage<CLASSES>::ROW + 1 : right ? b : c;
  }

  __device__ __forceinline__ Powers powers(int at) const {
    const float down = c[at] - a[at], down_right = d[at] - b[at];
    const float left = fmaf(fraction_y, down, a[at]);
    const float across = fmaf(fraction_y, down_right, b[at]) - left;
    const float cross = down_right - down;
    return {exp2_approximate(fmaf(fraction_x, across, left)), exp2_approximate(step_x * across),
            exp2_approximate(step_y * fmaf(fraction_x, cross, down)),
            exp2_approximate(step_x * step_y * cross)};
  }

  __device__ __forceinline__ bool holds(int i, int j) const { return i < ny && j < nx; }
  // The index of pixel (i, j) in a contiguous map [B, H, W].
  __device__ int64_t pixel(const Cells& cells, int i, int j) const {
    return (int64_t{image} * cells.rows.pixels + y + i) * cells.columns.pixels + x + j;
  }
  __device__ PixelLogits logits(const Cells& cells, int i, int j) const {
    return {cells.logits, cells.rows, cells.columns, image, y + i, x + j};
  }
};

// The interpolation weights of a cell's pixels.
struct CellWeights {
  // Of the second row and column. Before the first position and after the last one both are the
  // same: ½. A weight is 0 at the first pixel of a cell, if anywhere.
  float y[TILE], x[TILE];

  __device__ CellWeights(const Cells& cells, const Cell& cell) {
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
      const float weight_y = cells.rows.fraction(cell.row, cell.y + i);
      const float weight_x = cells.columns.fraction(cell.column, cell.x + i);
      y[i] = cell.step_y == 0 ? 0.5f : weight_y;
      x[i] = cell.step_x == 0 ? 0.5f : weight_x;
    }
  }
  __device__ __forceinline__ bool reads_below(int i) const { return i > 0 || y[0] != 0; }
  __device__ __forceinline__ bool reads_right(int j) const { return j > 0 || x[0] != 0; }
  // Whether geometric sequences can be used for the pixel.
  __device__ __forceinline__ bool is_regular(const Cell& cell, int i, int j) const {
    return cell.regular >> (reads_below(i) * 2 + reads_right(j)) & 1;
  }
  // Calls function(i, j, value) with the interpolated value for each pixel. A pixel does not read
  // a corner of weight 0, because it may be NaN.
  template <class Function>
  __device__ __forceinline__ void for_pixels(const Corners& corners, Function function) const {
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
      float left = fmaf(y[i], corners.bottom_left, (1 - y[i]) * corners.top_left);
      float right = fmaf(y[i], corners.bottom_right, (1 - y[i]) * corners.top_right);
      if (!reads_below(i)) left = corners.top_left, right = corners.top_right;
#pragma unroll
      for (int j = 0; j < TILE; ++j) {
        const float value = fmaf(x[j], right, (1 - x[j]) * left);
        function(i, j, reads_right(j) ? value : left);
      }
    }
  }
};

// Logits at the corners of a cell, from memory.
struct CellLogits {
  const Logits& logits;
  int64_t offset, right, down;

  __device__ CellLogits(const Cells& cells, const Cell& cell) : logits(cells.logits) {
    const int row = cells.inside_rows(cell.row), column = cells.inside_columns(cell.column);
    offset = logits.offset(cell.image, row, column);
    right = (cells.inside_columns(cell.column + 1) - column) * logits.stride_w;
    down = (cells.inside_rows(cell.row + 1) - row) * logits.stride_h;
  }
  __device__ __forceinline__ Corners of_class(unsigned k) const {
    Corners corners;
    for_element(logits.element, [&](auto element) {
      const auto* x =
          static_cast<const decltype(element)*>(logits.data) + offset + k * logits.stride_k;
      corners = {static_cast<float>(x[0]), static_cast<float>(x[right]),
                 static_cast<float>(x[down]), static_cast<float>(x[right + down])};
    });
    return corners;
  }
};

// Offsets of a cell's pixels in a map [B, H, W] by strides. A pixel that the cell does not hold has
// that of another pixel, so that loads need no conditions and none waits for another one.
struct PixelOffsets {
  int64_t first, rows[TILE], columns[TILE];

  __device__ PixelOffsets(const Cells& cells, const Cell& cell, int64_t stride_b, int64_t stride_h,
                          int64_t stride_w) {
    const int y = min(cell.y, cells.rows.pixels - 1), x = min(cell.x, cells.columns.pixels - 1);
    first = cell.image * stride_b + y * stride_h + x * stride_w;
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
      rows[i] = max(min(i, cell.ny - 1), 0) * stride_h;
      columns[i] = max(min(i, cell.nx - 1), 0) * stride_w;
    }
  }
  // Of the lines that contain the pixels, at least if they are consecutive.
  __device__ __forceinline__ void prefetch_rows(const void* map, int itemsize) const {
#pragma unroll
    for (int i = 0; i < TILE; ++i)
      prefetch(static_cast<const char*>(map) + (first + rows[i]) * itemsize);
  }
  template <class T>
  __device__ __forceinline__ void load(const T* map, T (&values)[TILE][TILE]) const {
    for_tile([&](int i, int j) { values[i][j] = map[first + rows[i] + columns[j]]; });
  }
};

__device__ __forceinline__ PixelOffsets offsets_of(const Cells& cells, const Cell& cell,
                                                   const PixelLabels& labels) {
  return {cells, cell, labels.stride_b, labels.stride_h, labels.stride_w};
}

// Of a contiguous map.
__device__ __forceinline__ PixelOffsets offsets_of(const Cells& cells, const Cell& cell) {
  const int64_t height = cells.rows.pixels, width = cells.columns.pixels;
  return {cells, cell, height * width, width, 1};
}

// The classes of a cell's pixels.
struct CellLabels {
  unsigned pairs[TILE][TILE / 2];  // two in each, NO_CLASS if ignored

  __device__ void load(const PixelLabels& labels, const Cells& cells, const Cell& cell) {
    const PixelOffsets offsets = offsets_of(cells, cell, labels);
    labels.for_type([&](const auto* all) {
      std::remove_cvref_t<decltype(*all)> loaded[TILE][TILE];
      offsets.load(all, loaded);
      for_tile([&](int i, int j) {
        const unsigned of_label = labels.class_of(loaded[i][j]);
        const unsigned label = cell.holds(i, j) ? of_label : NO_CLASS;
        pairs[i][j / 2] = j % 2 ? pairs[i][j / 2] | label << 16 : label;
      });
    });
  }
  __device__ __forceinline__ unsigned at(int i, int j) const {
    return pairs[i][j / 2] >> j % 2 * 16 & NO_CLASS;
  }
  // The pixels that are not ignored.
  __device__ __forceinline__ unsigned valid() const {
    unsigned pixels = 0;
    for_tile([&](int i, int j) { pixels |= at(i, j) != NO_CLASS ? bit_of(i, j) : 0; });
    return pixels;
  }
  // The pixels of a class.
  __device__ __forceinline__ unsigned of_class(unsigned k) const {
    unsigned pixels = 0;
    for_tile([&](int i, int j) { pixels |= at(i, j) == k ? bit_of(i, j) : 0; });
    return pixels;
  }
  // The same for a pixel that is not known when the code is compiled.
  __device__ unsigned of_pixel(int i, int j) const {
    unsigned found = 0;
    for_tile([&](int y, int x) {
      const unsigned each = at(y, x);
      found |= y == i && x == j ? each : 0;
    });
    return found;
  }
  // The smallest class of the warp's pixels that is at least `least`, or NO_CLASS. All lanes must
  // call it.
  __device__ __forceinline__ unsigned next(unsigned least) const {
    unsigned next = NO_CLASS;
    for_tile([&](int i, int j) { next = at(i, j) >= least ? min(next, at(i, j)) : next; });
    return __reduce_min_sync(FULL_WARP, next);
  }
};

// Numbers of a contiguous map [B, H, W], 0 where a pixel is not one of `pixels`.
__device__ __forceinline__ void load_map(const Cells& cells, const Cell& cell, unsigned pixels,
                                         const float* map, float (&values)[TILE][TILE]) {
  offsets_of(cells, cell).load(map, values);
  for_tile([&](int i, int j) { values[i][j] = pixels & bit_of(i, j) ? values[i][j] : 0; });
}

// Writes the numbers of all pixels to a contiguous map [B, H, W].
__device__ __forceinline__ void store_map(const Cells& cells, const Cell& cell,
                                          const float (&values)[TILE][TILE], float* map) {
  float* first = map + cell.pixel(cells, 0, 0);
  for_tile([&](int i, int j) {
    if (cell.holds(i, j)) first[int64_t{i} * cells.columns.pixels + j] = values[i][j];
  });
}

// Adds to the number of one pixel, which is not known when the code is compiled.
__device__ __forceinline__ void add_to_pixel(int i, int j, float value,
                                             float (&values)[TILE][TILE]) {
  for_tile([&](int y, int x) { values[y][x] += y == i && x == j ? value : 0; });
}

// Replaces the lse of these pixels by 2^-SCALE/Σ e^z, in units of the pixel's largest logit, and by
// 0 where no geometric sequence can be used, and elsewhere. Returns the pixels without a sequence.
// shifts: of the corners, as in LogitsStage.
__device__ __forceinline__ unsigned to_inverse_sums(const Cells& cells, const Cell& cell,
                                                    const Corners& shifts, unsigned pixels,
                                                    float (&lse)[TILE][TILE]) {
  const CellWeights weights(cells, cell);
  unsigned apart = 0;
  weights.for_pixels(shifts, [&](int i, int j, float shift) {
    const float exponent = fmaf(-lse[i][j], LOG2E, -shift);
    const bool serves = weights.is_regular(cell, i, j) && exponent <= -SCALE - SMALLEST_SUM;
    lse[i][j] = serves && pixels & bit_of(i, j) ? exp2_approximate(exponent) : 0;
    if (!serves) apart |= pixels & bit_of(i, j);
  });
  return apart;
}

// The same for the valid pixels, from their labels and the map of lse.
__device__ __forceinline__ unsigned load_inverse_sums(const Cells& cells, const Cell& cell,
                                                      const Corners& shifts,
                                                      const PixelLabels& labels, const float* lse,
                                                      float (&inverse)[TILE][TILE]) {
  CellLabels of_cell;
  of_cell.load(labels, cells, cell);
  load_map(cells, cell, of_cell.valid(), lse, inverse);
  return to_inverse_sums(cells, cell, shifts, of_cell.valid(), inverse);
}

// Calls function(i, j, e^z·2^SCALE) for all pixels of the cell.
template <class Function>
__device__ __forceinline__ void for_pixels(const Powers& powers, Function function) {
  float first = powers.first, x = powers.x;
#pragma unroll
  for (int i = 0; i < TILE; ++i) {
    float e = first;
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
      function(i, j, e);
      e *= x;
    }
    first *= powers.y;
    x *= powers.xy;
  }
}

}  // namespace anchorops::cuda
