// The pixels that a thread holds in registers: a part of a cell, up to PART × PART pixels.
#pragma once

#include "../../device.cuh"

namespace anchorops::cuda {

constexpr int PART = 4;  // pixels along each axis

// A number for each pixel of a part.
using PixelValues = float[PART][PART];

// The bit of a pixel in a set of the part's pixels.
__device__ constexpr unsigned bit_of(int i, int j) { return 1u << (i * PART + j); }

// Calls function(i, j) for all pixels of a part, where i and j are constants.
template <class Function>
__device__ __forceinline__ void for_each_pixel(Function function) {
#pragma unroll
  for (int i = 0; i < PART; ++i) {
#pragma unroll
    for (int j = 0; j < PART; ++j) function(i, j);
  }
}

// Calls function(i, j) for the pixels of a set, which are different ones in each lane.
template <class Function>
__device__ __forceinline__ void for_each_in(unsigned pixels, Function function) {
  for (; pixels; pixels &= pixels - 1) {
    const int pixel = __ffs(static_cast<int>(pixels)) - 1;
    function(pixel / PART, pixel % PART);
  }
}

// Adds to the number of one pixel, which is not known when the code is compiled.
__device__ __forceinline__ void add_to_pixel(int i, int j, float value, PixelValues& values) {
  for_each_pixel([&](int y, int x) { values[y][x] += y == i && x == j ? value : 0; });
}

}  // namespace anchorops::cuda
