#include "reduction.cuh"

#include <algorithm>
#include <cstdint>

#include "../tensors.cuh"
#include "arguments.cuh"

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256;

// Reads each partial and writes each result once. Each thread adds every slices-th partial of a
// result; then half of the threads add the sums of the other half, and so on.
__global__ void __launch_bounds__(THREADS) add_partials_kernel(const Reductions all) {
  const Reduction reduction = blockIdx.y == 0 ? all.of[0] : all.of[1];
  if (reduction.count == 0) return;  // not wanted
  const int width = THREADS / reduction.slices, slice = threadIdx.x / width;
  const int64_t i = int64_t{blockIdx.x} * width + threadIdx.x % width;
  const int64_t size = all.num_keys * reduction.width;
  double* const totals = reinterpret_cast<double*>(shared_memory());
  double total = 0;
  const int64_t key = i / reduction.width;
  const int column = static_cast<int>(i % reduction.width), block = column / CHANNELS;
  if (i < size) {
    // Of sqdists, each block of a chunk has a partial; of sums, each has columns of a partial. The
    // number of blocks is a multiple of the period, and the period is a power of two.
    const auto is_met = [&](int c) {
      const int met_block = reduction.rows_per_chunk > 1 ? c : block;
      const int64_t row =
          int64_t{c / reduction.rows_per_chunk} * all.period + (met_block & (all.period - 1));
      return all.met[row * all.num_keys + key] != 0;
    };
#pragma unroll 8
    for (int c = slice; c < reduction.count; c += reduction.slices)
      if (is_met(c)) total += reduction.partials[c * size + i];
  }
  totals[threadIdx.x] = total;
  for (int half = reduction.slices / 2; half > 0; half /= 2) {
    __syncthreads();
    if (slice < half) totals[threadIdx.x] = total += totals[threadIdx.x + half * width];
  }
  const int channel = first_channel(block, all.period) + column % CHANNELS * all.period;
  if (slice == 0 && i < size && channel < reduction.columns)
    reduction.out[key * reduction.columns + channel] = static_cast<float>(total);
}

}  // namespace

void add_partials(Reductions all, Stream stream) {
  int64_t blocks = 0;
  for (Reduction& each : all.of) {
    each.slices = 1;
    while (each.slices < THREADS && each.slices * 8 < each.count) each.slices *= 2;
    blocks = std::max(blocks, ceil_div(all.num_keys * each.width, int64_t{THREADS} / each.slices));
  }
  launch("add_partials_kernel", add_partials_kernel, dim3(static_cast<unsigned>(blocks), 2),
         THREADS, THREADS * sizeof(double), stream, all);
}

}  // namespace anchorops::cuda
