// Softmax of upsampled logits, a cell of 4×4 pixels in each thread.
//
// Inside a cell z is bilinear, so e^z is geometric along rows and columns: four exponentials and
// multiplications replace one exponential for each pixel. The largest logit of a position is
// subtracted from its logits; upsampled, it is at least the largest logit of each pixel.
//
// A block processes WARPS rows of 32 cells, a warp one row. It copies logits to shared memory
// (softmax_stage.cuh); a thread computes the pixels of its cell from there (softmax_pixels.cuh).
//
// Geometric sequences are inaccurate if logits differ widely. Pixels are computed one by one from
// the logits if neighbours differ by more than `Cells::steepest`, if their sum falls below 2^-40,
// if they read a logit that is not finite, and always if the ratio of sizes is below 2.
#pragma once

#include "logits.cuh"

namespace anchorops::cuda {

constexpr int WARPS = 8, TILE = 4, COLUMNS = 33;
constexpr float SCALE = 30;  // shifted logits end there: 2^-126 is then 2^-156 of the largest
constexpr float SMALLEST_SUM = -40;  // log2
constexpr float NO_LOGIT = -1000;    // instead of -inf: 2^-1000 is 0

// The shift of a position of the logits.
struct alignas(8) Shift {
  float largest;   // log2(e)·max_k x_k; NaN if it is too large or not finite
  unsigned steep;  // RIGHT, DOWN: it differs widely from its neighbour there
};
constexpr unsigned RIGHT = 1, DOWN = 2;

// Consecutive columns of cells, where all images are side by side.
struct Columns {
  int first_image;
  unsigned first, pitch;

  __device__ Columns(int64_t first, int pitch)
      : first_image(static_cast<int>(first / pitch)),
        first(static_cast<unsigned>(first % pitch)),
        pitch(pitch) {}
  __device__ int image(int i) const { return first_image + (first + i) / pitch; }
  __device__ int column(int i) const { return static_cast<int>((first + i) % pitch) - 1; }
};

// A number for each corner of a cell.
struct Corners {
  float top_left = 0, top_right = 0, bottom_left = 0, bottom_right = 0;
};

struct Cells {
  Logits logits;
  Axis rows, columns;
  const Shift* shifts;  // [B, h, w]
  int pitch;            // columns of cells of one image, w + 2 or more; images are side by side
  int first_row, row_count;  // rows of cells that contain pixels
  int parts_y, parts_x;      // parts of TILE pixels of a cell, along each axis
  bool geometric;            // otherwise pixels are computed one by one

  Cells(const Logits& logits, const Axis& rows, const Axis& columns)
      : logits(logits), rows(rows), columns(columns), shifts(nullptr) {
    pitch = logits.width + 2;  // cells -1 to w - 1, and one empty cell
    first_row = rows.cell_of(0);
    row_count = rows.cell_of(rows.pixels - 1) - first_row + 1;
    parts_y = std::max(1, ceil_div(rows.pixels_per_cell(), TILE));
    parts_x = std::max(1, ceil_div(columns.pixels_per_cell(), TILE));
    // with a single class p is exactly 1
    geometric = rows.ratio <= 0.5f && columns.ratio <= 0.5f && logits.num_classes > 1;
  }

  __host__ __device__ int parts() const { return parts_y * parts_x; }
  // A block has one warp for each row of cells. All blocks are along x, because a grid may have
  // 2^31 there: first the parts of 32 columns, then all columns, then the next rows.
  int warps() const { return std::min(WARPS, row_count); }
  __host__ __device__ unsigned blocks_across() const {
    return static_cast<unsigned>((int64_t{logits.batch} * pitch + 31) / 32 * parts());
  }
  int64_t blocks() const { return ceil_div(row_count, warps()) * int64_t{blocks_across()}; }
  __device__ int block_row() const {
    return first_row + blockIdx.x / blocks_across() * (blockDim.x / 32);
  }
  __device__ Columns block_columns() const {
    return {blockIdx.x % blocks_across() / parts() * int64_t{32}, pitch};
  }
  __device__ int block_part() const { return blockIdx.x % blocks_across() % parts(); }
  // The blocks in another order: all rows of a column, then the next column. Those of an image are
  // consecutive if its columns fill whole blocks.
  __device__ int64_t block_by_columns() const {
    return blockIdx.x % blocks_across() * int64_t{gridDim.x / blocks_across()} +
           blockIdx.x / blocks_across();
  }

  // The largest difference of neighbours, in units of x, for which a sequence is accurate. Powers
  // of the ratios do not overflow, even for pixels beyond the end of a cell. No sequence that
  // starts below 2^-126 has terms that matter.
  float steepest() const {
    const float y = rows.ratio, x = columns.ratio;
    return LN2 * std::min(26.0f, 50 / (std::max(x, y) + 6 * x * y + 1e-6f));
  }

  __device__ int inside_rows(int row) const { return min(max(row, 0), logits.height - 1); }
  __device__ int inside_columns(int column) const { return min(max(column, 0), logits.width - 1); }
  __device__ const Shift& shift(int image, int row, int column) const {
    return shifts[(int64_t{image} * logits.height + inside_rows(row)) * logits.width +
                  inside_columns(column)];
  }
};

// The shift of each position: softmax_cells.cu.
Tensor new_shifts(const Tensor& logits, Cells& cells, Stream stream);

}  // namespace anchorops::cuda
