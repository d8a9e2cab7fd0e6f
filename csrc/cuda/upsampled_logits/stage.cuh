// The logits around a block's cells in shared memory: those of 33 × (WARPS + 1) positions and
// CLASSES classes at a time, shifted, as float32. The code that reads them does not depend on
// types, strides or layout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../tensors.cuh"
#include "cells.cuh"
#include "logits.cuh"

namespace anchorops::cuda {

// The logits of CLASSES classes at the positions around a block's cells, in shared memory; with the
// shift subtracted if SHIFTED.
template <int CLASSES, bool SHIFTED = true>
struct LogitsStage {
  static constexpr int ROW = CLASSES * COLUMNS;
  static constexpr __host__ __device__ size_t bytes(int warps) {
    return (warps + 1) * (COLUMNS * (sizeof(int64_t) + sizeof(float)) + ROW * sizeof(float));
  }

  const Cells& cells;
  int positions, first_row;
  int64_t* offsets;  // [rows, COLUMNS], in the logits
  float* shifts;     // [rows, COLUMNS], in units of log2
  float* logits;     // [rows, CLASSES, COLUMNS]

  // The positions begin at the first one of these columns.
  __device__ LogitsStage(const Cells& cells, int first_row, const Columns& columns)
      : cells(cells),
        positions((static_cast<int>(blockDim.x) / 32 + 1) * COLUMNS),
        first_row(first_row) {
    offsets = reinterpret_cast<int64_t*>(shared_memory());
    logits = reinterpret_cast<float*>(offsets + positions);
    shifts = logits + positions * CLASSES;
    for (int i = threadIdx.x; i < positions; i += blockDim.x) {
      const int image = min(columns.image(i % COLUMNS), cells.logits.batch - 1);
      const int row = cells.inside_rows(first_row + i / COLUMNS);
      const int column = cells.inside_columns(columns.column(i % COLUMNS));
      offsets[i] = cells.logits.offset(image, row, column);
      if (SHIFTED) shifts[i] = SCALE - cells.shift(image, row, column).largest;
    }
    __syncthreads();
  }

  // The stage for the block's cells.
  __device__ explicit LogitsStage(const Cells& cells)
      : LogitsStage(cells, cells.row_of(0), cells.columns_of_block()) {}

  // The logits of the first class at the top left corner of the thread's cell.
  __device__ const float* corner() const {
    return logits + threadIdx.x / 32 * ROW + threadIdx.x % 32;
  }

  // The shifts at the corners of the thread's cell.
  __device__ Corners shifts_of_cell() const {
    const float* top = shifts + threadIdx.x / 32 * COLUMNS + threadIdx.x % 32;
    return {top[0], top[1], top[COLUMNS], top[COLUMNS + 1]};
  }

  // The end of the stage in shared memory.
  __device__ float* end() const { return shifts + positions; }

  // The shifted logit, which is always finite: -inf (p = 0) and NaN (no pixel uses it here) become
  // NO_LOGIT.
  __device__ __forceinline__ float shifted(float x, int position) const {
    if constexpr (!SHIFTED) return x;
    return fmaxf(fmaf(x, LOG2E, shifts[position]), NO_LOGIT);
  }

  // Calls function(first_class, count) for CLASSES classes at a time, after staging them.
  template <class Function>
  __device__ __forceinline__ void for_classes(Function function) {
    const int num_classes = cells.logits.num_classes;
    for (int first = 0; first < num_classes; first += CLASSES) {
      const int count = min(CLASSES, num_classes - first);
      if (first > 0) __syncthreads();
      load(first, count);
      __syncthreads();
      prefetch_classes(first + CLASSES, num_classes);
      function(first, count);
    }
  }

  // Prefetches the first position of each row, for CLASSES classes before `end`: a row of the stage
  // is one line of memory, or two. In channels last, a line contains several classes, and nothing
  // is prefetched.
  __device__ void prefetch_classes(int first_class, int end) const {
    if (cells.logits.stride_k < cells.logits.stride_w) return;
    const int itemsize = cells.logits.element == Element::FLOAT ? 4 : 2;
    const auto* x = static_cast<const char*>(cells.logits.data);
    for (int i = threadIdx.x; i < positions / COLUMNS * CLASSES; i += blockDim.x) {
      const int64_t k = first_class + i % CLASSES;
      if (k < end)
        prefetch(x + (offsets[i / CLASSES * COLUMNS] + k * cells.logits.stride_k) * itemsize);
    }
  }

  // Stages the classes from first_class to first_class + count - 1.
  __device__ void load(int first_class, int count) {
    for_element(cells.logits.element, [&](auto element) {
      using T = decltype(element);
      const T* x = static_cast<const T*>(cells.logits.data) + first_class * cells.logits.stride_k;
      if (cells.logits.stride_k < cells.logits.stride_w)
        channels_last(x, count);
      else
        planes(x, count);
    });
  }

  // A warp loads 32 columns of every row in a plane, three rows of some planes at a time; the last
  // column is loaded separately.
  template <class T>
  __device__ __forceinline__ void planes(const T* x, int count) {
    constexpr int ROWS = 3, PLANES = CLASSES / WARPS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int64_t stride = cells.logits.stride_k;
    for (int k = warp; k < count; k += PLANES * warps) {
      const T* plane = x + k * stride;
      float* to = logits + k * COLUMNS + lane;
#pragma unroll 1
      for (int position = lane; position < positions; position += ROWS * COLUMNS) {
        float values[ROWS][PLANES];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const T* from = plane + offsets[min(position + r * COLUMNS, positions - 1)];
#pragma unroll
          for (int i = 0; i < PLANES; ++i, from += warps * stride)
            values[r][i] = k + i * warps < count ? static_cast<float>(*from) : 0;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          if (position + r * COLUMNS >= positions) break;
#pragma unroll
          for (int i = 0; i < PLANES; ++i)
            if (k + i * warps < count)
              to[i * warps * COLUMNS] = shifted(values[r][i], position + r * COLUMNS);
          to += ROW;
        }
      }
    }
    for (int i = threadIdx.x; i < positions / COLUMNS * CLASSES; i += blockDim.x) {
      const int k = i % CLASSES, position = i / CLASSES * COLUMNS + 32;
      if (k < count)
        logits[i * COLUMNS + 32] =
            shifted(static_cast<float>(x[offsets[position] + k * stride]), position);
    }
  }

  // CLASSES lanes load the classes of a position.
  template <class T>
  __device__ __forceinline__ void channels_last(const T* x, int count) {
    const int k = threadIdx.x % CLASSES, step = blockDim.x / CLASSES;
    if (k >= count) return;
    x += k * cells.logits.stride_k;
#pragma unroll 4
    for (int i = threadIdx.x / CLASSES; i < positions; i += step)
      logits[i / COLUMNS * (ROW - COLUMNS) + k * COLUMNS + i] =
          shifted(static_cast<float>(x[offsets[i]]), i);
  }
};

// Launches cells.blocks() blocks of cells.warps warps. Shared memory: a LogitsStage, then
// extra_bytes.
template <class Staged, class... Parameters, class... Arguments>
void launch_cells(const char* name, void (*kernel)(Cells, Parameters...), const Cells& cells,
                  size_t extra_bytes, Stream stream, const Arguments&... arguments) {
  launch(name, kernel, grid_of(name, cells.blocks()), cells.warps * 32,
         Staged::bytes(cells.warps) + extra_bytes, stream, cells, arguments...);
}

}  // namespace anchorops::cuda
