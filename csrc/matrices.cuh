// Products of small matrices, by a warp.
//
// A register contains two 16-bit elements, the first in its low half. Lane 4·n + q contains
// - of a matrix A of 16 rows and 16 columns: a[0] of row n, a[1] of row n + 8, columns 2q and
//   2q + 1; a[2] and a[3] the same 8 columns further on;
// - of a matrix B of 16 rows and 8 columns: b[0] of column n, rows 2q and 2q + 1; b[1] the same 8
//   rows further down;
// - of a product C of 16 rows and 8 columns: c[0] and c[1] of row n, columns 2q and 2q + 1; c[2]
//   and c[3] of row n + 8, the same columns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.cuh"

namespace anchorops {

// C + A·B. The float32 sums are truncated, not rounded, so few products should be added to one C.
// An element of A that is not finite makes its row of C infinite or NaN; an element of B, its
// column.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four matrices of 8 rows of 16 bytes; lane 8·i + r has the address of row r of matrix i.
// Register i of lane 4·n + q then contains elements 2q and 2q + 1 of row n of matrix i. If
// TRANSPOSED, it contains rows 2q and 2q + 1 of column n.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&registers)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
}

// Compares the halves of two registers, which are finite bfloat16 numbers. Each half of the result
// is the bfloat16 number 1 if the two are equal, and 0 otherwise.
__device__ __forceinline__ unsigned ones_where_equal(unsigned a, unsigned b) {
  const __nv_bfloat162 ones = __heq2(reinterpret_cast<const __nv_bfloat162&>(a),
                                     reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const unsigned&>(ones);
}

// The upper halves of two float32 numbers: that of `first` is the low half of the result. The upper
// half of a float32 number is this number truncated to bfloat16.
__device__ __forceinline__ unsigned upper_halves(float first, float second) {
  return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
}

// Splits each of two numbers into three bfloat16 numbers, from the largest to the smallest:
// exactly, except for bits below 2^-133, the smallest bfloat16.
__device__ __forceinline__ void split(float first, float second, unsigned (&terms)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    terms[i] = upper_halves(first, second);
    first -= __uint_as_float(__float_as_uint(first) & 0xffff0000);
    second -= __uint_as_float(__float_as_uint(second) & 0xffff0000);
  }
}

// sum + 0·pair, for each half. It remains 0 if all pairs are finite.
template <class T>
__device__ __forceinline__ unsigned add_zeros_of(unsigned pair, unsigned sum) {
  if constexpr (std::is_same_v<T, Half>)
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
  return sum;
}

}  // namespace anchorops
