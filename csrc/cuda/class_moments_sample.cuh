// Decides on the device, without the host, which kernel sums the pixels:
// class_moments_random_kernel if the keys of neighbouring pixels differ, as with random labels, or
// class_moments_kernel. Both are launched. All blocks of both look at the same few pixels, and
// those of one return at once.
#pragma once

#include "class_moments_tiles.cuh"

namespace anchorops::cuda {

constexpr int SAMPLES = 8;       // groups of 32 neighbouring pixels
constexpr int RANDOM_KEYS = 16;  // of a group, on average, if labels are random

// Called by a whole warp.
__device__ __forceinline__ bool keys_are_random(const int32_t* keys, int64_t pixels) {
  const int lane = threadIdx.x;
  int sampled[SAMPLES], different = 0;
#pragma unroll
  for (int i = 0; i < SAMPLES; ++i) {
    const int64_t pixel = pixels / SAMPLES * i + lane;
    sampled[i] = pixel < pixels ? keys[pixel] : -1;
  }
#pragma unroll
  for (int i = 0; i < SAMPLES; ++i) {
    const unsigned same = __match_any_sync(FULL_WARP, sampled[i]);
    different += __popc(__ballot_sync(FULL_WARP, same >> lane == 1));  // the last lane of a key
  }
  return different >= SAMPLES * RANDOM_KEYS;
}

}  // namespace anchorops::cuda
