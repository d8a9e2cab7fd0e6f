// Sums of p and p² of each class: another pass over the logits, with lse.
#include "statistics.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CLASSES = 32;

// Σ factors·e^z·2^SCALE over the pixels of a cell, by Horner's rule.
__device__ __forceinline__ float sum_over_pixels(const Powers& powers,
                                                 const float (&factors)[TILE][TILE]) {
  float x[TILE] = {powers.x}, sum = 0;
#pragma unroll
  for (int i = 1; i < TILE; ++i) x[i] = x[i - 1] * powers.xy;
#pragma unroll
  for (int i = TILE - 1; i >= 0; --i) {
    float row = factors[i][TILE - 1];
#pragma unroll
    for (int j = TILE - 2; j >= 0; --j) row = fmaf(row, x[i], factors[i][j]);
    sum = i == TILE - 1 ? row : fmaf(sum, powers.y, row);
  }
  return powers.first * sum;
}

// Sums of p and p² of one class, over a cell, a warp or a block.
template <bool SQUARES>
struct Masses {
  float mass = 0, square = 0;

  // inverse: 2^-SCALE/Σ e^z of each pixel.
  __device__ __forceinline__ void add(const Powers& powers, const float (&inverse)[TILE][TILE]) {
    if constexpr (SQUARES) {
      for_pixels(powers, [&](int i, int j, float e) {
        const float p = e * inverse[i][j];
        mass += p;
        square = fmaf(p, p, square);
      });
    } else {
      mass = sum_over_pixels(powers, inverse);
    }
  }
  // Pixels that are computed one by one, without a geometric sequence.
  __device__ void add_apart(const Cells& cells, const Cell& cell, unsigned pixels, int k,
                            const float* lse) {
    for_each_of(pixels, [&](int i, int j) {
      const float log_p = cell.logits(cells, i, j).z(k) - lse[cell.pixel(cells, i, j)];
      const float p = exp2_approximate(log_p * LOG2E);
      mass += p;
      square += p * p;
    });
  }
  __device__ __forceinline__ void sum_over_warp() {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      mass += __shfl_xor_sync(FULL_WARP, mass, lanes);
      if constexpr (SQUARES) square += __shfl_xor_sync(FULL_WARP, square, lanes);
    }
  }
};

template <bool SQUARES>
__global__ void __launch_bounds__(WARPS * 32, 2)
    softmax_masses_kernel(Cells cells, PixelLabels labels,
                          const float* lse,   // [B, H, W]
                          float* partials) {  // [1 + SQUARES, blocks, K]
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_classes = cells.logits.num_classes;
  Cell cell(cells);
  LogitsStage<CLASSES> stage(cells);
  cell.set_corners(cells, stage);
  float* sums = stage.end();  // [1 + SQUARES, warps, CLASSES]
  float inverse[TILE][TILE];
  const unsigned apart =
      load_inverse_sums(cells, cell, stage.shifts_of_cell(), labels, lse, inverse);

  stage.for_classes([&](int first, int count) {
    for (int k = 0; k < count; ++k) {
      Masses<SQUARES> masses;
      if (cells.geometric) masses.add(cell.powers(k * COLUMNS), inverse);
      if (apart) masses.add_apart(cells, cell, apart, first + k, lse);
      masses.sum_over_warp();
      if (lane == 0) {
        sums[warp * CLASSES + k] = masses.mass;
        if constexpr (SQUARES) sums[(warps + warp) * CLASSES + k] = masses.square;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (1 + SQUARES) * CLASSES; i += blockDim.x) {
      const int statistic = i / CLASSES, k = i % CLASSES;
      if (k >= count) continue;
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += sums[(statistic * warps + w) * CLASSES + k];
      partials[(int64_t{gridDim.x} * statistic + cells.block_by_columns()) * num_classes + first +
               k] = sum;
    }
  });
}

}  // namespace

void write_masses(const Tensor& logits, const Cells& cells, const PixelLabels& labels,
                  const float* lse, const Statistics& statistics, Stream stream) {
  const bool squares = statistics.sums[1];
  const auto kernel = squares ? softmax_masses_kernel<true> : softmax_masses_kernel<false>;
  const size_t bytes = (1 + squares) * cells.warps * CLASSES * sizeof(float);
  sum_launches(logits, cells, statistics, stream, [&](const Cells& some, float* partials) {
    launch_cells<LogitsStage<CLASSES>>("softmax_masses_kernel", kernel, some, bytes, stream, labels,
                                       lse, partials);
  });
}

}  // namespace anchorops::cuda
