// The gradient in any layout, one element at a time.
#pragma once

#include <cstdint>

#include "../tensors.cuh"
#include "backward.cuh"

namespace anchorops::cuda {

constexpr int ELEMENTS_THREADS = 128;

// A thread processes every LANES-th channel of one pixel: 32 lanes share a pixel if the channels of
// dfeatures are contiguous.
template <class T, int LANES, bool HAS_DSUMS, bool HAS_DSQDISTS>
__global__ void __launch_bounds__(ELEMENTS_THREADS, 4)
    class_moments_backward_elements_kernel(const Gradient<T> in, unsigned pixel_blocks,
                                           int channels_per_block) {
  constexpr int STEP = LANES > 1 ? 8 : 16;
  const Pixels &view = in.view, &out = in.out;
  const int64_t thread =
      static_cast<int64_t>(blockIdx.x % pixel_blocks) * ELEMENTS_THREADS + threadIdx.x;
  const int64_t index = thread / LANES;
  if (index >= out.lines * out.pixels) return;
  const int64_t line = index / out.pixels, pixel = index % out.pixels;
  const int32_t stored_key = in.keys[index];
  const unsigned key = max(stored_key, 0);
  unsigned anchor_row[1] = {key};
  float scale = 0;
  if constexpr (HAS_DSQDISTS) {
    in.to_anchors(anchor_row);
    scale = 2 * in.dsqdists[key];
  }

  const int64_t first = blockIdx.x / pixel_blocks * static_cast<int64_t>(channels_per_block);
  const int64_t d = first + thread % LANES;
  const T* features = in.features + view.offset(line, d, pixel);
  T* dfeatures = in.dfeatures + out.offset(line, d, pixel);
  const float* anchor = in.anchors + anchor_row[0] * out.dim + d;
  const float* dsums = in.dsums + key * out.dim + d;
  const auto write = [&]<int CHANNELS>() {
    float values[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      if constexpr (HAS_DSQDISTS)
        values[c] = static_cast<float>(features[c * LANES * view.stride_d]);
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float s = HAS_DSUMS ? dsums[c * LANES] : 0;
      const float value = HAS_DSQDISTS ? fmaf(values[c] - anchor[c * LANES], scale, s) : s;
      dfeatures[c * LANES * out.stride_d] = static_cast<T>(stored_key < 0 ? 0 : value);
    }
    features += CHANNELS * LANES * view.stride_d;
    dfeatures += CHANNELS * LANES * out.stride_d;
    anchor += CHANNELS * LANES;
    dsums += CHANNELS * LANES;
  };
  const int64_t end = min(first + channels_per_block, out.dim);
  int channels = static_cast<int>(ceil_div(end - d, LANES));
  for (; channels >= STEP; channels -= STEP) write.template operator()<STEP>();
  for (; channels > 0; --channels) write.template operator()<1>();
}

}  // namespace anchorops::cuda
