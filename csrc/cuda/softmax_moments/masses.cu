// Sums of p and p² of each class: another pass over the logits, with lse.
#include <cstddef>

#include "../warps.cuh"
#include "pixel_sums.cuh"
#include "statistics.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CLASSES = 32;

// Sums of p and p² of one class over a cell.
template <bool SQUARES>
struct Masses {
  float mass = 0, square = 0;

  // inverse: 2^-SCALE/Σ e^z of each pixel.
  __device__ __forceinline__ void add(const Powers& powers, const PixelValues& inverse) {
    if constexpr (SQUARES) {
      for_each_power(powers, [&](int i, int j, float e) {
        const float p = e * inverse[i][j];
        mass += p;
        square = fmaf(p, p, square);
      });
    } else {
      mass = sum_over_pixels(powers, inverse).sum;
    }
  }
  __device__ void add_irregular(const Cell& cell, unsigned pixels, int k, const float* lse) {
    for_each_in(pixels, [&](int i, int j) {
      const float p = probability(cell.logits(i, j).z(k), lse[cell.pixel(i, j)]);
      mass += p;
      square += p * p;
    });
  }
};

template <bool SQUARES>
__global__ void __launch_bounds__(WARPS * 32, 2)
    softmax_masses_kernel(Cells cells, PixelLabels labels,
                          const float* lse,   // [B, H, W]
                          float* partials) {  // [1 + SQUARES, blocks, K]
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Cell cell(cells);
  LogitsStage<CLASSES> stage(cells);
  const Sequences sequences(cell, stage);
  float* sums = stage.end();  // [1 + SQUARES, warps, CLASSES]
  PixelValues inverse;
  const unsigned irregular =
      sequences.load_inverse_sums(stage.shifts_of_cell(), labels, lse, inverse);

  stage.for_classes([&](int first, int count) {
    for (int k = 0; k < count; ++k) {
      Masses<SQUARES> masses;
      masses.add(sequences.powers(k), inverse);
      if (irregular) masses.add_irregular(cell, irregular, first + k, lse);
      masses.mass = sum_of_warp(masses.mass);
      if constexpr (SQUARES) masses.square = sum_of_warp(masses.square);
      if (lane == 0) {
        sums[warp * CLASSES + k] = masses.mass;
        if constexpr (SQUARES) sums[(warps + warp) * CLASSES + k] = masses.square;
      }
    }
    __syncthreads();
    add_warps<1 + SQUARES, CLASSES>(cells, sums, first, count, partials);
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
