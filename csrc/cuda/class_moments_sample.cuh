// Decides on the device, without the host, which kernel sums the pixels:
// class_moments_random_kernel if neighbouring pixels have different keys, as with random labels, or
// class_moments_kernel. Both are launched. All blocks of both look at the same few pixels, and
// those of one return at once.
#pragma once

#include "class_moments_tiles.cuh"

namespace anchorops::cuda {

// Only GPUs with 227 KB of shared memory for a block can run class_moments_random_kernel. In code
// for other GPUs labels are never random, so that kernel is empty, and class_moments_kernel runs.
// The tests compile the sources for the CPU in both ways.
#if defined(WITHOUT_RANDOM_KERNEL) || \
    (defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200))
constexpr bool HAS_RANDOM_KERNEL = false;
#else
constexpr bool HAS_RANDOM_KERNEL = true;
#endif

// Whether the key of a pixel is not that of the pixel before, for most of 32 neighbouring pixels,
// at each of four places. Called by a whole warp. The keys of fewer pixels are not random.
__device__ __forceinline__ bool keys_are_random(const int32_t* keys, int64_t pixels) {
  if constexpr (!HAS_RANDOM_KERNEL) return false;
  constexpr int PLACES = 4;
  const int64_t step = pixels / PLACES;
  const int32_t* pixel = keys + (threadIdx.x < step ? threadIdx.x : 0);
  int sampled[PLACES];
#pragma unroll
  for (int& key : sampled) {
    key = *pixel;
    pixel += step;
  }
  bool differ = true;
#pragma unroll
  for (int key : sampled) differ &= key != __shfl_up_sync(FULL_WARP, key, 1);
  return __popc(__ballot_sync(FULL_WARP, differ)) > 16;
}

}  // namespace anchorops::cuda
