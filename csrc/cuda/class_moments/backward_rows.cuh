// The gradient where the channels of a pixel are contiguous and aligned to 16 bytes.
#pragma once

#include <cstdint>

#include "../tensors.cuh"
#include "backward.cuh"

namespace anchorops::cuda {

constexpr int ROWS_THREADS = 256;
constexpr int ROWS_UNROLL = 4;

// How channels and pixels are divided.
struct RowSlices {
  int vectors;  // of a slice
  int rounds;   // of a block
  unsigned blocks_per_line;
};

// A block processes a slice of the channels of a line's pixels, a thread 16 bytes of them at a
// time. The slice is the slowest index of the grid, so its part of the tables stays in the L1
// cache.
template <class T, bool HAS_DSUMS, bool HAS_DSQDISTS>
__global__ void __launch_bounds__(ROWS_THREADS, 3)
    class_moments_backward_rows_kernel(const Gradient<T> in, const RowSlices slices) {
  constexpr int SIZE = Vector<T>::SIZE;
  const Pixels &view = in.view, &out = in.out;
  const unsigned lines = static_cast<unsigned>(out.lines);
  const unsigned block = blockIdx.x / slices.blocks_per_line;
  const int64_t line = block % lines;
  const int first = block / lines * slices.vectors;
  const int vectors = min(slices.vectors, static_cast<int>(out.dim / SIZE) - first);
  const int64_t vector_of_line = static_cast<int64_t>(blockIdx.x % slices.blocks_per_line) *
                                     slices.rounds * ROWS_UNROLL * ROWS_THREADS +
                                 threadIdx.x;
  int64_t pixel = vector_of_line / vectors;
  int vector = static_cast<int>(vector_of_line % vectors);
  const int step_pixel = ROWS_THREADS / vectors, step_vector = ROWS_THREADS % vectors;
  const unsigned row_bytes = static_cast<unsigned>(out.dim * sizeof(float));
  const T* features = in.features;
  if constexpr (HAS_DSQDISTS) features += view.offset(line, first * SIZE, 0);
  T* const dfeatures = in.dfeatures + out.offset(line, first * SIZE, 0);
  const int32_t* const keys = in.keys + line * out.pixels;
  const float *const anchors = in.anchors + first * SIZE, *const dsums = in.dsums + first * SIZE;

#pragma unroll 1
  for (int round = 0; round < slices.rounds; ++round) {
    Vector<T> x[ROWS_UNROLL];
    unsigned key[ROWS_UNROLL], anchor_row[ROWS_UNROLL], valid[ROWS_UNROLL];
    int channel[ROWS_UNROLL];
    T* address[ROWS_UNROLL];
    bool inside[ROWS_UNROLL];
#pragma unroll
    for (int u = 0; u < ROWS_UNROLL; ++u) {
      inside[u] = pixel < out.pixels;
      const int64_t p = min(pixel, out.pixels - 1);  // no branch around the loads
      channel[u] = vector * SIZE;
      address[u] = dfeatures + p * out.stride_p + channel[u];
      if constexpr (HAS_DSQDISTS) x[u] = load_streaming(features + p * view.stride_p + channel[u]);
      const int k = keys[p];
      valid[u] = k < 0 ? 0 : 0xffffffff;
      anchor_row[u] = key[u] = max(k, 0);
      pixel += step_pixel;
      vector += step_vector;
      if (vector >= vectors) vector -= vectors, ++pixel;
    }
    if constexpr (HAS_DSQDISTS) in.to_anchors(anchor_row);
#pragma unroll
    for (int u = 0; u < ROWS_UNROLL; ++u) {
      float values[SIZE], a[SIZE], s[SIZE] = {};
      float scale = 0;
      if constexpr (HAS_DSQDISTS) {
        load_row(row_of(anchors, anchor_row[u], row_bytes) + channel[u], a);
        scale = 2 * in.dsqdists[key[u]];
      }
      if constexpr (HAS_DSUMS) load_row(row_of(dsums, key[u], row_bytes) + channel[u], s);
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        values[i] = HAS_DSQDISTS ? fmaf(to_float(x[u], i) - a[i], scale, s[i]) : s[i];
      if (inside[u])
        store_streaming(address[u],
                        keep(round_to<T>(values), {valid[u], valid[u], valid[u], valid[u]}));
    }
  }
}

}  // namespace anchorops::cuda
