// Softmax of upsampled logits, a cell of 4×4 pixels in each thread.
//
// Inside a cell z is bilinear, so e^z is geometric along rows and columns: four exponentials and
// multiplications replace one exponential for each pixel. The largest logit of a position is
// subtracted from its logits; upsampled, it is at least the largest logit of each pixel.
//
// A block processes a patch: WARPS rows of 32 cells, a warp one row. It copies logits to shared
// memory (stage.cuh); a thread computes the pixels of its cell (cell.cuh) from there
// (sequences.cuh), in parts of 4×4 pixels if the cell has more.
//
// Geometric sequences are inaccurate if logits differ widely. Irregular pixels are computed one by
// one from the logits: where neighbours differ by more than `Cells::steepest`, where the sum falls
// below 2^-40, and where a logit that is read is not finite.
//
// The labels have at least twice the logits' size along each axis. Fewer pixels of a cell are not
// worth a sequence: such calls are for the backend triton.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../tensors.cuh"
#include "logits.cuh"
#include "part.cuh"

namespace anchorops::cuda {

constexpr int WARPS = 8, COLUMNS = 33;
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
  int first_row, row_count;   // rows of cells that contain pixels
  int parts_y, parts_x;       // parts of PART pixels of a cell, along each axis
  int warps;                  // of a block
  int images;                 // with statistics of their own: all if per_image, otherwise 1
  int first_part = 0, parts;  // of a launch, as first_row and row_count
  unsigned blocks_across;     // of a launch: blocks of the same rows

  // per_image: the cells of a patch are all of one image.
  Cells(const Logits& logits, const Axis& rows, const Axis& columns, bool per_image = false)
      : logits(logits), rows(rows), columns(columns), shifts(nullptr) {
    pitch = logits.width + 2;  // cells -1 to w - 1, and one empty cell
    first_row = rows.cell_of(0);
    row_count = rows.cell_of(rows.pixels - 1) - first_row + 1;
    parts_y = std::max(1, ceil_div(rows.pixels_per_cell(), PART));
    parts_x = std::max(1, ceil_div(columns.pixels_per_cell(), PART));
    images = per_image ? logits.batch : 1;
    warps = std::min(WARPS, row_count);
    if (per_image) pitch = ceil_div(pitch, 32) * 32;
    set_parts(0, parts_y * parts_x);
  }

  void set_parts(int first, int count) {
    first_part = first;
    parts = count;
    blocks_across = static_cast<unsigned>(columns_of_patches() * parts);
  }
  int64_t columns_of_patches() const { return ceil_div(int64_t{logits.batch} * pitch, 32); }
  int64_t rows_of_patches() const { return ceil_div(row_count, warps); }
  // All blocks are along x, because a grid may have 2^31 there: first the parts of a patch, then
  // all columns, then the next rows.
  int64_t blocks() const { return rows_of_patches() * blocks_across; }
  // The row of a warp's cells, and the columns of a block's.
  __device__ int row_of(int warp) const {
    return first_row + blockIdx.x / blocks_across * (blockDim.x / 32) + warp;
  }
  __device__ Columns columns_of_block() const {
    return {blockIdx.x % blocks_across / parts * int64_t{32}, pitch};
  }
  __device__ int block_part() const { return first_part + blockIdx.x % blocks_across % parts; }
  // The blocks in another order: all rows of a column, then the next column. Those of an image are
  // consecutive if its columns fill whole blocks.
  __device__ int64_t block_by_columns() const {
    return blockIdx.x % blocks_across * int64_t{gridDim.x / blocks_across} +
           blockIdx.x / blocks_across;
  }

  // Calls function(cells) for launches of at most this many blocks, but at least one for each
  // column of patches: with some rows of patches each, or with some parts of one row.
  template <class Function>
  void for_launches(int64_t most_blocks, Function function) const {
    const int64_t columns = columns_of_patches(), down = rows_of_patches();
    const int64_t rows_at_once = std::clamp<int64_t>(most_blocks / columns / parts, 1, down);
    const int64_t parts_at_once =
        std::clamp<int64_t>(most_blocks / columns / rows_at_once, 1, parts);
    for (int64_t row = 0; row < down; row += rows_at_once) {
      for (int64_t part = 0; part < parts; part += parts_at_once) {
        Cells some = *this;
        some.first_row += static_cast<int>(row * warps);
        some.row_count = static_cast<int>(std::min(row_count - row * warps, rows_at_once * warps));
        some.set_parts(static_cast<int>(part),
                       static_cast<int>(std::min(parts - part, parts_at_once)));
        function(some);
      }
    }
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

inline Cells cells_of(const char* operation, const Tensor& logits, int64_t height, int64_t width,
                      bool align_corners, bool per_image = false) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.numel() > 0, operation,
                  ": logits: expected (B, K, h, w) that is not empty, got shape ",
                  text_of(logits.sizes()));
  const int64_t fewer = align_corners ? 1 : 0;  // ratios are those of sizes - 1
  STD_TORCH_CHECK(2 * logits.size(2) - fewer <= height && 2 * logits.size(3) - fewer <= width,
                  operation, ": expected to upsample at least twice along each axis, got logits ",
                  text_of(logits.sizes()), " and ", height, "x", width,
                  " pixels: use the backend triton");
  return {logits_of(operation, logits), Axis(height, logits.size(2), align_corners),
          Axis(width, logits.size(3), align_corners), per_image};
}

// The shift of each position: shifts.cu.
Tensor new_shifts(const Tensor& logits, Cells& cells, Stream stream);

}  // namespace anchorops::cuda
