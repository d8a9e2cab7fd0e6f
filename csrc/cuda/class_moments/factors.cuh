// The factors of the products on tensor cores: the features of a group of pixels, and the one-hot
// matrix of the pixels' slots. Float32 numbers are split exactly into three bfloat16 numbers each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../matrices.cuh"
#include "slots.cuh"
#include "tiles.cuh"

namespace anchorops::cuda {

// The features of a group, in the order of a matrix B (matrices.cuh). Lane 4n + q has channel
// 8·j + n at [j], and pixel 8·i + 2q + b of this channel at [2·i + b].
template <class T, int LAYOUT>
struct Features {
  using Tile = TileLayout<T, LAYOUT>;
  using Element = T;               // the type of the factors
  static constexpr int TERMS = 1;  // factors for each feature
  unsigned pairs[4][4];

  Features() = default;
  __device__ __forceinline__ explicit Features(const T* group) {
    const int matrix = threadIdx.x / 8 * 8, row = threadIdx.x % 8;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if constexpr (LAYOUT == ROWS)
        load_matrices<true>(pairs[j], group + (matrix + row) * Tile::PITCH + 8 * j);
      else
        load_matrices<false>(pairs[j], group + (8 * j + row) * Tile::PITCH + matrix);
  }
  __device__ __forceinline__ bool are_finite() const {
    unsigned zeros = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) zeros = add_zeros_of<T>(pairs[i / 4][i % 4], zeros);
    return (zeros & 0x7fff7fff) == 0;
  }
  __device__ __forceinline__ float at(int j, int pixel) const {
    return half_to_float<T>(pairs[j][pixel / 2], pixel % 2);
  }
  __device__ __forceinline__ void terms(int j, int pair, unsigned (&terms)[1]) const {
    terms[0] = pairs[j][pair];
  }
};

template <int LAYOUT>
struct Features<float, LAYOUT> {
  using Tile = TileLayout<float, LAYOUT>;
  using Element = BFloat16;
  static constexpr int TERMS = 3;
  float values[4][8];

  Features() = default;
  __device__ __forceinline__ explicit Features(const float* group) {
    const int column = threadIdx.x / 4, row = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int channel = 8 * j + column, pixel = row + i / 2 * 8 + i % 2;
        values[j][i] =
            group[LAYOUT == ROWS ? pixel * Tile::PITCH + channel : channel * Tile::PITCH + pixel];
      }
    }
  }
  __device__ __forceinline__ bool are_finite() const {
    float total = 0;  // it remains 0 if all features are finite
#pragma unroll
    for (int i = 0; i < 32; ++i) total = fmaf(values[i / 8][i % 8], 0.f, total);
    return total == 0;
  }
  __device__ __forceinline__ float at(int j, int pixel) const { return values[j][pixel]; }
  __device__ __forceinline__ void terms(int j, int pair, unsigned (&terms)[3]) const {
    split(values[j][2 * pair], values[j][2 * pair + 1], terms);
  }
};

// The one-hot matrix of the pixels of a tile, for 16 slots.
template <int GROUPS>
struct OneHot {
  unsigned ones[2 * GROUPS][4];

  __device__ __forceinline__ OneHot(const Vector<unsigned> (&pairs)[GROUPS], int first_slot) {
#pragma unroll
    for (int i = 0; i < 8 * GROUPS; ++i) {
      const unsigned slot = slot_code(first_slot + 8 * (i % 2) + threadIdx.x / 4);
      ones[i / 4][i % 4] = ones_where_equal(pairs[i / 8].elements[i / 2 % 4], slot * 0x10001);
    }
  }

  // For each slot: the sum of the first terms, and the sum of the other terms.
  template <class Element, int TERMS>
  __device__ __forceinline__ void multiply(const unsigned (&terms)[4 * GROUPS][TERMS],
                                           float (&first)[4], float (&rest)[4]) const {
    float sums[TERMS][4] = {};
#pragma unroll
    for (int term = 0; term < TERMS; ++term) {
#pragma unroll
      for (int s = 0; s < 2 * GROUPS; ++s) {
        const unsigned factor[2] = {terms[2 * s][term], terms[2 * s + 1][term]};
        unsigned step_ones[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)  // float16 has other bits for 1
          step_ones[i] = std::is_same_v<Element, Half> ? ones[s][i] & 0x3c003c00 : ones[s][i];
        multiply_add<Element>(sums[term], step_ones, factor);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      first[i] = sums[0][i];
      rest[i] = TERMS == 3 ? sums[TERMS - 1][i] + sums[TERMS / 2][i] : 0;
    }
  }
};

}  // namespace anchorops::cuda
