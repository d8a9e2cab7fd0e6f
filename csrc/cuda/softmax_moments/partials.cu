// Sums the partials of the blocks, for the statistics of softmax moments. One launch.
#include <cstdint>

#include "statistics.cuh"

namespace anchorops::cuda {
namespace {

constexpr int SUM_WARPS = 32;

// A block sums 32 classes of one image and one statistic.
__global__ void __launch_bounds__(SUM_WARPS * 32)
    sum_partials_kernel(const float* partials,  // [statistics, images, rows, K]
                        Statistics out, int64_t rows, int num_classes,
                        bool add) {  // to `out`
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned across = ceil_div(num_classes, 32), statistic = blockIdx.y;
  const int k = blockIdx.x % across * 32 + lane;
  const int64_t images = gridDim.x / across, image = blockIdx.x / across;
  auto* sums = reinterpret_cast<double*>(shared_memory());  // [SUM_WARPS, 32]
  double sum = 0;
  if (k < num_classes) {
    partials += (statistic * images + image) * rows * num_classes + k;
#pragma unroll 8
    for (int64_t row = warp; row < rows; row += SUM_WARPS) sum += partials[row * num_classes];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || k >= num_classes) return;
  for (int w = 1; w < SUM_WARPS; ++w) sum += sums[w * 32 + lane];
  const int64_t at = image * num_classes + k;
  if (out.counts && statistic + 1 == gridDim.y) {
    out.counts[at] = static_cast<int64_t>(sum) + (add ? out.counts[at] : 0);
  } else {
    float& total = (statistic == 0 ? out.sums[0] : out.sums[1])[at];
    total = static_cast<float>(add ? total + sum : sum);
  }
}

}  // namespace

void sum_partials(const float* partials, const Statistics& statistics, const Cells& cells, bool add,
                  Stream stream) {
  const int64_t images = cells.images, rows = cells.blocks() / images;
  const int num_classes = cells.logits.num_classes;
  dim3 grid = grid_of("sum_partials_kernel", images * ceil_div(num_classes, 32));
  grid.y = statistics.number();
  launch("sum_partials_kernel", sum_partials_kernel, grid, SUM_WARPS * 32,
         SUM_WARPS * 32 * sizeof(double), stream, partials, statistics, rows, num_classes, add);
}

}  // namespace anchorops::cuda
