// Products of float32 numbers on tensor cores, for the kernels of centroid InfoNCE. No shared
// memory is needed: a warp loads its operands in the order of the products (matrices.cuh).
//
// Each number is split into three bfloat16 numbers, each at most 2^-8 of the one before. Of
// the nine products of these, the six largest are added; the others are below 2^-23 of the product
// of the two numbers. Sums of 16 products are added in float32, because tensor cores truncate.
#pragma once

#include "../matrices.cuh"
#include "rows.cuh"

namespace anchorops::cuda {

constexpr int STEP = 16;  // terms of a product
constexpr int THREADS = 256, WARPS = THREADS / 32;
// Blocks of a multiprocessor. Except for sm_90, nvcc needs more than the 128 registers of two
// blocks.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int BLOCKS = 2;
#else
constexpr int BLOCKS = 1;
#endif

// Of a lane: A of 16 outputs, and B of 8 outputs, of STEP terms.
struct SplitA {
  unsigned terms[3][4];

  // Of output n + 8·half, two numbers: terms 2q and 2q + 1, or (pair 1) those 8 terms further on.
  __device__ __forceinline__ void set(int half, int pair, float first, float second) {
    unsigned of_pair[3];
    split_rounded(first, second, of_pair);
#pragma unroll
    for (int i = 0; i < 3; ++i) terms[i][2 * pair + half] = of_pair[i];
  }
};
struct SplitB {
  unsigned terms[3][2];

  __device__ __forceinline__ void set(int pair, float first, float second) {
    unsigned of_pair[3];
    split_rounded(first, second, of_pair);
#pragma unroll
    for (int i = 0; i < 3; ++i) terms[i][pair] = of_pair[i];
  }
};

// totals + A·B. The products of the largest terms have a sum of their own, which is nearly exact.
__device__ __forceinline__ void add_products(float (&totals)[4], const SplitA& a, const SplitB& b) {
  float largest[4] = {}, others[4] = {};
#pragma unroll
  for (int size = 2; size > 0; --size)
#pragma unroll
    for (int i = 0; i <= size; ++i) multiply_add<BFloat16>(others, a.terms[i], b.terms[size - i]);
  multiply_add<BFloat16>(largest, a.terms[0], b.terms[0]);
#pragma unroll
  for (int i = 0; i < 4; ++i) totals[i] += largest[i] + others[i];
}

// Sums of a warp: 16·M rows of A times 16 rows of B. The sum of rows 16·m + 8·h + n and
// 8·j + 2q + i is totals[m][j][2h + i] of lane 4n + q.
template <int M>
struct RowProducts {
  static constexpr int TERMS = 2 * STEP;  // of a call of add
  float totals[M][2][4] = {};

  // Terms d to d + 31 of rows 8·i + n of A and B. Lane 4n + q loads eight neighbouring elements:
  // any order of the terms is right if it is the same in A and B. in_a, in_b: whether the lane's
  // row is selected, that of A from 16·M lanes, that of B from 16 lanes; other rows are zero.
  __device__ __forceinline__ void add(const Rows& a, const Rows& b,
                                      const uint8_t* const (&rows_of_a)[2 * M],
                                      const uint8_t* const (&rows_of_b)[2], int d, uint8_t in_a,
                                      uint8_t in_b) {
    const int n = threadIdx.x % 32 / 4;
    const int of_lane = d + threadIdx.x % 4 * 8;
    Eight loaded_a[2 * M], loaded_b[2];
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) loaded_a[i] = load_eight(a, rows_of_a[i], of_lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) loaded_b[i] = load_eight(b, rows_of_b[i], of_lane);
    const unsigned selected_a = __ballot_sync(FULL_WARP, in_a) >> n;
    const unsigned selected_b = __ballot_sync(FULL_WARP, in_b) >> n;
    SplitB split_b[2][2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const EightFloats row = to_float(loaded_b[j], b.dtype, selected_b >> 8 * j & 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) split_b[i / 2][j].set(i % 2, row[2 * i], row[2 * i + 1]);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      SplitA split_a[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const EightFloats row =
            to_float(loaded_a[2 * m + half], a.dtype, selected_a >> (16 * m + 8 * half) & 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) split_a[i / 2].set(half, i % 2, row[2 * i], row[2 * i + 1]);
      }
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int j = 0; j < 2; ++j) add_products(totals[m][j], split_a[step], split_b[step][j]);
    }
  }
};

// Sums of a warp: 16 outputs by 64 channels. of_outputs[h] are the factors of output n + 8·h of
// terms 4q to 4q + 3.
struct ChannelProducts {
  static constexpr int CHANNELS = 64;
  float totals[8][4] = {};  // of tile j: channels j, 8 + j, …

  // rows: channels 8n to 8n + 7 of the same terms.
  __device__ __forceinline__ void add(const float (&of_outputs)[2][4],
                                      const EightFloats (&rows)[4]) {
    SplitA a;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a.set(half, 0, of_outputs[half][0], of_outputs[half][1]);
      a.set(half, 1, of_outputs[half][2], of_outputs[half][3]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      SplitB b;
      b.set(0, rows[0][j], rows[1][j]);
      b.set(1, rows[2][j], rows[3][j]);
      add_products(totals[j], a, b);
    }
  }

  // Of output n + 8·half: channels 16q + 8·part to 16q + 8·part + 7.
  __device__ __forceinline__ EightFloats eight(int half, int part) const {
    EightFloats floats;
#pragma unroll
    for (int j = 0; j < 8; ++j) floats[j] = totals[j][2 * half + part];
    return floats;
  }
};

}  // namespace anchorops::cuda
