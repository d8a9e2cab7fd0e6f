// What a thread reads and writes for the pixels of its cell: their labels, and maps [B, H, W].
#pragma once

#include <cstdint>
#include <type_traits>

#include "../labels/pixel_labels.cuh"
#include "cell.cuh"
#include "part.cuh"

namespace anchorops::cuda {

// Offsets of a cell's pixels in a map [B, H, W] by strides. A pixel that the cell does not hold has
// that of another pixel, so that loads need no conditions and none waits for another one.
struct PixelOffsets {
  int64_t first, rows[PART], columns[PART];

  __device__ PixelOffsets(const Cell& cell, int64_t stride_b, int64_t stride_h, int64_t stride_w) {
    const int y = min(cell.y, cell.cells.rows.pixels - 1);
    const int x = min(cell.x, cell.cells.columns.pixels - 1);
    first = cell.image * stride_b + y * stride_h + x * stride_w;
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      rows[i] = max(min(i, cell.ny - 1), 0) * stride_h;
      columns[i] = max(min(i, cell.nx - 1), 0) * stride_w;
    }
  }
  // Of the lines that contain the pixels, at least if they are consecutive.
  __device__ __forceinline__ void prefetch_rows(const void* map, int itemsize) const {
#pragma unroll
    for (int i = 0; i < PART; ++i)
      prefetch(static_cast<const char*>(map) + (first + rows[i]) * itemsize);
  }
  template <class T>
  __device__ __forceinline__ void load(const T* map, T (&values)[PART][PART]) const {
    for_each_pixel([&](int i, int j) { values[i][j] = map[first + rows[i] + columns[j]]; });
  }
};

__device__ __forceinline__ PixelOffsets offsets_of(const Cell& cell, const PixelLabels& labels) {
  return {cell, labels.stride_b, labels.stride_h, labels.stride_w};
}

// Of a contiguous map.
__device__ __forceinline__ PixelOffsets offsets_of(const Cell& cell) {
  const int64_t height = cell.cells.rows.pixels, width = cell.cells.columns.pixels;
  return {cell, height * width, width, 1};
}

// Numbers of a contiguous map, 0 where a pixel is not one of `pixels`.
__device__ __forceinline__ void load_map(const Cell& cell, unsigned pixels, const float* map,
                                         PixelValues& values) {
  offsets_of(cell).load(map, values);
  for_each_pixel([&](int i, int j) { values[i][j] = pixels & bit_of(i, j) ? values[i][j] : 0; });
}

// Writes the numbers of all pixels to a contiguous map.
__device__ __forceinline__ void store_map(const Cell& cell, const PixelValues& values, float* map) {
  float* first = map + cell.pixel(0, 0);
  for_each_pixel([&](int i, int j) {
    if (cell.holds(i, j)) first[int64_t{i} * cell.cells.columns.pixels + j] = values[i][j];
  });
}

// The classes of a cell's pixels.
struct CellLabels {
  unsigned pairs[PART][PART / 2];  // two in each, NO_CLASS if ignored

  __device__ void load(const PixelLabels& labels, const Cell& cell) {
    const PixelOffsets offsets = offsets_of(cell, labels);
    labels.for_type([&](const auto* all) {
      std::remove_cvref_t<decltype(*all)> loaded[PART][PART];
      offsets.load(all, loaded);
      for_each_pixel([&](int i, int j) {
        const unsigned loaded_label = labels.class_of(loaded[i][j]);
        const unsigned label = cell.holds(i, j) ? loaded_label : NO_CLASS;
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
    for_each_pixel([&](int i, int j) { pixels |= at(i, j) != NO_CLASS ? bit_of(i, j) : 0; });
    return pixels;
  }
  // The pixels of a class.
  __device__ __forceinline__ unsigned pixels_with_class(unsigned k) const {
    unsigned pixels = 0;
    for_each_pixel([&](int i, int j) { pixels |= at(i, j) == k ? bit_of(i, j) : 0; });
    return pixels;
  }
  // The class of a pixel that is not known when the code is compiled.
  __device__ unsigned dynamic_at(int i, int j) const {
    unsigned label = 0;
    for_each_pixel([&](int y, int x) {
      const unsigned each = at(y, x);
      label |= y == i && x == j ? each : 0;
    });
    return label;
  }
  // The smallest class of the warp's pixels that is at least `least`, or NO_CLASS. All lanes must
  // call it.
  __device__ __forceinline__ unsigned next(unsigned least) const {
    unsigned next = NO_CLASS;
    for_each_pixel([&](int i, int j) { next = at(i, j) >= least ? min(next, at(i, j)) : next; });
    return __reduce_min_sync(FULL_WARP, next);
  }
};

}  // namespace anchorops::cuda
