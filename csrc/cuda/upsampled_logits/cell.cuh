// A thread's cell: where its pixels are, and their interpolation from the four corners of the cell.
#pragma once

#include <cstdint>

#include "cells.cuh"
#include "logits.cuh"
#include "part.cuh"

namespace anchorops::cuda {

// A thread's cell, and the part of it that is selected.
struct Cell {
  const Cells& cells;
  int image, row, column;
  bool inside;                                   // whether the cell exists
  int end_y, end_x;                              // behind its pixels
  int part = 0, y, x, ny, nx;                    // the selected part and its pixels
  float fraction_y, fraction_x, step_y, step_x;  // of the part's first pixel; to the next one

  // The cell of the thread's lane in these columns.
  __device__ Cell(const Cells& cells, int row, const Columns& columns, int part)
      : cells(cells),
        image(columns.image(threadIdx.x % 32)),
        row(row),
        column(columns.column(threadIdx.x % 32)) {
    inside = image < cells.logits.batch && column < cells.logits.width && row < cells.logits.height;
    image = min(image, cells.logits.batch - 1);
    y = cells.rows.first_pixel(row);
    x = cells.columns.first_pixel(column);
    end_y = inside ? cells.rows.first_pixel(row + 1) : 0;
    end_x = inside ? cells.columns.first_pixel(column + 1) : 0;
    // before the first and after the last row both corners are the same
    step_y = row < 0 || row >= cells.logits.height - 1 ? 0 : cells.rows.ratio;
    step_x = column < 0 || column >= cells.logits.width - 1 ? 0 : cells.columns.ratio;
    select(part);
  }
  __device__ explicit Cell(const Cells& cells)
      : Cell(cells, cells.row_of(threadIdx.x / 32), cells.columns_of_block(), cells.block_part()) {}

  __device__ void select(int next) {
    y += (next / cells.parts_x - part / cells.parts_x) * PART;
    x += (next % cells.parts_x - part % cells.parts_x) * PART;
    part = next;
    ny = min(end_y - y, PART);
    nx = min(end_x - x, PART);
    fraction_y = cells.rows.fraction(row, y);
    fraction_x = cells.columns.fraction(column, x);
  }

  __device__ __forceinline__ bool holds(int i, int j) const { return i < ny && j < nx; }
  // The index of pixel (i, j) in a contiguous map [B, H, W].
  __device__ int64_t pixel(int i, int j) const {
    return (int64_t{image} * cells.rows.pixels + y + i) * cells.columns.pixels + x + j;
  }
  __device__ PixelLogits logits(int i, int j) const {
    return {cells.logits, cells.rows, cells.columns, image, y + i, x + j};
  }
};

// The interpolation weights of a part's pixels.
struct CellWeights {
  // Of the second row and column. Before the first position and after the last one both are the
  // same: ½. A weight is 0 at the first pixel of a cell, if anywhere.
  float y[PART], x[PART];

  __device__ explicit CellWeights(const Cell& cell) {
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      const float weight_y = cell.cells.rows.fraction(cell.row, cell.y + i);
      const float weight_x = cell.cells.columns.fraction(cell.column, cell.x + i);
      y[i] = cell.step_y == 0 ? 0.5f : weight_y;
      x[i] = cell.step_x == 0 ? 0.5f : weight_x;
    }
  }
  __device__ __forceinline__ bool reads_below(int i) const { return i > 0 || y[0] != 0; }
  __device__ __forceinline__ bool reads_right(int j) const { return j > 0 || x[0] != 0; }
  // Calls function(i, j, value) with the interpolated value for each pixel. A pixel does not read
  // a corner of weight 0, because it may be NaN.
  template <class Function>
  __device__ __forceinline__ void interpolate(const Corners& corners, Function function) const {
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      float left = fmaf(y[i], corners.bottom_left, (1 - y[i]) * corners.top_left);
      float right = fmaf(y[i], corners.bottom_right, (1 - y[i]) * corners.top_right);
      if (!reads_below(i)) left = corners.top_left, right = corners.top_right;
#pragma unroll
      for (int j = 0; j < PART; ++j) {
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

  __device__ explicit CellLogits(const Cell& cell) : logits(cell.cells.logits) {
    const Cells& cells = cell.cells;
    const int row = cells.inside_rows(cell.row), column = cells.inside_columns(cell.column);
    offset = logits.offset(cell.image, row, column);
    right = (cells.inside_columns(cell.column + 1) - column) * logits.stride_w;
    down = (cells.inside_rows(cell.row + 1) - row) * logits.stride_h;
  }
  __device__ __forceinline__ Corners corners(unsigned k) const {
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

}  // namespace anchorops::cuda
