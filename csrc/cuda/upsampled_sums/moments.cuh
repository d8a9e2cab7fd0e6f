// Mean and variance of the pixels of each channel of a patch, and sums over its lanes.
#pragma once

#include "../../device.cuh"
#include "patch.cuh"

namespace anchorops::cuda {

// The number of pixels, and for each channel of a patch the mean and the sum of squared deviations,
// of pixels that come in parts (Chan et al.).
struct Moments {
  float count = 0, mean[CHANNELS] = {}, squares[CHANNELS] = {};

  __device__ void add(const Moments& more) {
    const float total = count + more.count;
    if (total == 0) return;
    const float part = more.count / total;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float shift = more.mean[c] - mean[c];
      mean[c] += shift * part;
      squares[c] += more.squares[c] + shift * shift * (count * part);
    }
    count = total;
  }

  __device__ void add(const float (&numbers)[CHANNELS][PIXELS], int pixels) {
    Moments more;
    more.count = static_cast<float>(pixels);
    const float factor = pixels > 0 ? 1 / more.count : 0;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      float total = 0;
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) total += numbers[c][p];
      more.mean[c] = total * factor;
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) {
        const float deviation = p < pixels ? numbers[c][p] - more.mean[c] : 0;
        more.squares[c] += deviation * deviation;
      }
    }
    add(more);
  }

  // Those of all lanes with the same channels, for the first one of them.
  __device__ void add_lanes() {
#pragma unroll 1
    for (int lanes = LANES / 2; lanes; lanes /= 2) {
      Moments more;
      more.count = __shfl_xor_sync(FULL_WARP, count, lanes);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        more.mean[c] = __shfl_xor_sync(FULL_WARP, mean[c], lanes);
        more.squares[c] = __shfl_xor_sync(FULL_WARP, squares[c], lanes);
      }
      add(more);
    }
  }
};

// Sums over the lanes with the same channels. Lane i gets the sum of channel i % LANES / 4.
__device__ __forceinline__ float sum_of_lanes(float (&totals)[CHANNELS]) {
  static_assert(LANES == 16 && CHANNELS == 4);
  const bool second = threadIdx.x & 8, odd = threadIdx.x & 4;
  float pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pair[i] = second ? totals[2 + i] : totals[i];
    pair[i] += __shfl_xor_sync(FULL_WARP, second ? totals[i] : totals[2 + i], 8);
  }
  float total = odd ? pair[1] : pair[0];
  total += __shfl_xor_sync(FULL_WARP, odd ? pair[0] : pair[1], 4);
  total += __shfl_xor_sync(FULL_WARP, total, 2);
  return total + __shfl_xor_sync(FULL_WARP, total, 1);
}

}  // namespace anchorops::cuda
