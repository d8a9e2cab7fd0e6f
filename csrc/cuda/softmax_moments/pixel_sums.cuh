// Sums over the pixels of a part of a cell: of e^z, and of e^z times the interpolation weights.
#pragma once

#include "../upsampled_logits/cell.cuh"
#include "../upsampled_logits/cells.cuh"
#include "../upsampled_logits/part.cuh"
#include "../upsampled_logits/sequences.cuh"

namespace anchorops::cuda {

// Σ f, Σ i·f, Σ j·f and Σ i·j·f over the pixels of a part.
struct PixelSums {
  float sum = 0, sum_i = 0, sum_j = 0, sum_ij = 0;

  // The sums of f times the pixels' interpolation weights.
  __device__ __forceinline__ Corners to_corners(const Cell& cell) const {
    const float right = fmaf(cell.fraction_x, sum, cell.step_x * sum_j);
    const float right_i = fmaf(cell.fraction_x, sum_i, cell.step_x * sum_ij);
    const float bottom = fmaf(cell.fraction_y, sum, cell.step_y * sum_i);
    const float both = fmaf(cell.fraction_y, right, cell.step_y * right_i);
    return {sum - bottom - (right - both), right - both, bottom - both, both};
  }
};

// Of any f, which are added in the order of the pixels.
struct PixelSumsInOrder : PixelSums {
  float row = 0, row_j = 0;

  __device__ __forceinline__ void add(int i, int j, float f) {
    row = j ? row + f : f;
    row_j = j ? fmaf(j, f, row_j) : 0;
    if (j < PART - 1) return;
    sum += row;
    sum_i = fmaf(i, row, sum_i);
    sum_j += row_j;
    sum_ij = fmaf(i, row_j, sum_ij);
  }
};

// Of f = factors·e^z·2^SCALE, by Horner's rule.
__device__ __forceinline__ PixelSums sum_over_pixels(const Powers& powers,
                                                     const PixelValues& factors) {
  float x[PART] = {powers.x};
#pragma unroll
  for (int i = 1; i < PART; ++i) x[i] = x[i - 1] * powers.xy;
  float sum = 0, sum_i = 0, sum_j = 0, sum_ij = 0;  // sum_i and sum_ij without a factor y
#pragma unroll
  for (int i = PART - 1; i >= 0; --i) {
    float row = factors[i][PART - 1], row_j = row;
#pragma unroll
    for (int j = PART - 2; j >= 0; --j) {
      row = fmaf(row, x[i], factors[i][j]);
      if (j > 0) row_j = fmaf(row_j, x[i], row);
    }
    row_j *= x[i];
    if (i == PART - 1) {
      sum = row, sum_j = row_j;
    } else {
      sum_i = i == PART - 2 ? sum : fmaf(sum_i, powers.y, sum);
      sum_ij = i == PART - 2 ? sum_j : fmaf(sum_ij, powers.y, sum_j);
      sum = fmaf(sum, powers.y, row);
      sum_j = fmaf(sum_j, powers.y, row_j);
    }
  }
  const float second = powers.first * powers.y;
  return {powers.first * sum, second * sum_i, powers.first * sum_j, second * sum_ij};
}

}  // namespace anchorops::cuda
