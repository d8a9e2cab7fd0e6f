// Class moments, the third stage: the partials of the chunks are added, in a fixed order.
#pragma once

#include <cstdint>

#include "sums.cuh"

namespace anchorops::cuda {

constexpr int REDUCTION_THREADS = 256;

// A thread adds one result of every slices-th chunk, in float64; a squared distance, of all blocks
// of channels too.
__global__ void __launch_bounds__(REDUCTION_THREADS)
    class_moments_reduction_kernel(const Partials partials, const Tiling tiling, int num_keys,
                                   int dim, int period, bool in_rows, int slices,
                                   float* sums,       // float32 [num_keys, dim], or null
                                   float* sqdists) {  // float32 [num_keys], or null
  const int threads = REDUCTION_THREADS / slices, slice = threadIdx.x / threads;
  const int64_t blocks = tiling.blocks, width = sums ? blocks * CHANNELS : 0;
  const int64_t columns = width + (sqdists ? 1 : 0);
  const int64_t i = int64_t{blockIdx.x} * threads + threadIdx.x % threads, key = i / columns;
  const int column = static_cast<int>(i % columns), c = column % CHANNELS;
  const bool of_sums = column < width;
  const float* const from =
      of_sums ? reinterpret_cast<const float*>(partials.sums) + c : partials.sqdists;
  const int step = of_sums ? CHANNELS : 1, first = of_sums ? column / CHANNELS : 0;
  const int last = of_sums ? first : tiling.blocks - 1;
  double total = 0;
#pragma unroll 4
  for (int64_t chunk = slice; key < num_keys && chunk < tiling.chunks; chunk += slices)
    for (int block = first; block <= last; ++block)
      if (partials.met[(chunk * period + block % period) * num_keys + key])
        total += from[((chunk * num_keys + key) * blocks + block) * step];
  __shared__ double totals[REDUCTION_THREADS];
  totals[threadIdx.x] = total;
  for (int half = slices / 2; half > 0; half /= 2) {
    __syncthreads();
    if (slice < half) totals[threadIdx.x] = total += totals[threadIdx.x + half * threads];
  }
  if (slice > 0 || key >= num_keys) return;
  const int channel = channel_of(first, period, c / 2, c % 2, in_rows);
  if (!of_sums)
    sqdists[key] = static_cast<float>(total);
  else if (channel < dim)
    sums[key * dim + channel] = static_cast<float>(total);
}

}  // namespace anchorops::cuda
