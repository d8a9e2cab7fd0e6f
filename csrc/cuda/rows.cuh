// K×D tensors as rows of any dtype and strides, which are read eight elements at a time.
#pragma once

#include "tensors.cuh"

namespace anchorops::cuda {

__device__ inline int64_t row_offset(int r, int groups, int64_t stride_k, int64_t stride_g) {
  if (groups == 1) return r * stride_k;
  if (stride_k == groups * stride_g) return r * stride_g;  // no division
  return r / groups * stride_k + r % groups * stride_g;
}

// Rows of a tensor [K, D] or [K, G, D] by strides, r = k·G + g, of any dtype. The dtype is checked
// when a row is read. This takes little time compared with the product, and one kernel replaces
// nine.
struct Rows {
  const void* data;
  ScalarType dtype;
  bool vectors;  // whether 8 elements, beginning at a multiple of 8, can be read as 16-byte vectors
  int count, groups, dim;
  int64_t stride_k, stride_g, stride_d;

  // Row r; the last one, if there are fewer.
  __device__ __forceinline__ const uint8_t* row(int r) const {
    return bytes_at(row_offset(min(r, count - 1), groups, stride_k, stride_g));
  }
  // Four neighbouring rows. Most tensors have rows at equal distances.
  __device__ __forceinline__ void four_rows(int r, const uint8_t* (&rows)[4]) const {
    if (groups == 1 || stride_k == groups * stride_g) {
      const int64_t distance = groups == 1 ? stride_k : stride_g;
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i] = bytes_at(min(r + i, count - 1) * distance);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i] = row(r + i);
    }
  }
  __device__ __forceinline__ const uint8_t* bytes_at(int64_t offset) const {
    return static_cast<const uint8_t*>(data) + offset * (dtype == ScalarType::Float ? 4 : 2);
  }
};

// Query G − 1 − g of each class in place of query g.
inline Rows mirrored_rows(Rows rows) {
  const int64_t itemsize = rows.dtype == ScalarType::Float ? 4 : 2;
  rows.data = static_cast<const uint8_t*>(rows.data) + (rows.groups - 1) * rows.stride_g * itemsize;
  rows.stride_g = -rows.stride_g;
  return rows;
}

inline Rows rows_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() != ScalarType::Double,
                  "centroid_info_nce.cuda: queries: expected float32, bfloat16 or float16");
  const bool grouped = tensor.dim() == 3;
  const int64_t groups = grouped ? tensor.size(1) : 1, stride_k = tensor.stride(0);
  const int64_t stride_g = grouped ? tensor.stride(1) : 0, stride_d = tensor.stride(-1);
  const void* data = tensor.const_data_ptr();
  return {.data = data,
          .dtype = tensor.scalar_type(),
          .vectors =
              stride_d == 1 && vectors_aligned(data, {stride_k, stride_g}, tensor.element_size()),
          .count = static_cast<int>(tensor.size(0) * groups),
          .groups = static_cast<int>(groups),
          .dim = static_cast<int>(tensor.size(-1)),
          .stride_k = stride_k,
          .stride_g = stride_g,
          .stride_d = stride_d};
}

// Eight elements of a row as in memory: 2-byte elements in `bits[0]`, 4-byte elements in both.
struct Eight {
  Vector<uint32_t> bits[2];
};

// Elements d to d + 7 of a row; zeros from column `dim` on.
__device__ __forceinline__ Eight load_eight(const Rows& rows, const uint8_t* row, int d) {
  Eight eight{};
  const bool wide = rows.dtype == ScalarType::Float;
  if (rows.vectors && d + 8 <= rows.dim) {
    const auto* words = reinterpret_cast<const uint32_t*>(row + d * (wide ? 4u : 2u));
    eight.bits[0] = load_vector(words);
    if (wide) eight.bits[1] = load_vector(words + 4);
    return eight;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (d + i >= rows.dim) break;
    const int64_t element = (d + i) * rows.stride_d;
    if (wide)
      eight.bits[i / 4].elements[i % 4] = reinterpret_cast<const uint32_t*>(row)[element];
    else
      eight.bits[0].elements[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(row)[element]}
                                       << i % 2 * 16;
  }
  return eight;
}

struct EightFloats {
  Vector<float> part[2];

  __device__ float& operator[](int i) { return part[i / 4].elements[i % 4]; }
  __device__ float operator[](int i) const { return part[i / 4].elements[i % 4]; }
};

// Zeros if not selected, whatever memory contains.
__device__ inline EightFloats to_float(const Eight& eight, ScalarType dtype, bool selected = true) {
  EightFloats floats{};
  if (!selected) return floats;
  const auto convert = [&](auto value_of) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t pair = eight.bits[0].elements[i / 2];
      floats[i] = value_of(i, static_cast<uint16_t>(i % 2 ? pair >> 16 : pair));
    }
  };
  if (dtype == ScalarType::Float)
    convert([&](int i, uint16_t) { return __uint_as_float(eight.bits[i / 4].elements[i % 4]); });
  else if (dtype == ScalarType::BFloat16)
    convert([](int, uint16_t half) { return __uint_as_float(uint32_t{half} << 16); });
  else
    convert([](int, uint16_t half) { return static_cast<float>(Half(half, Half::from_bits())); });
  return floats;
}

}  // namespace anchorops::cuda
