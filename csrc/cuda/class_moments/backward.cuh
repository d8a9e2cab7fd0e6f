// What the backward kernels of class moments have in common.
#pragma once

#include <cstdint>

#include "../tensors.cuh"

namespace anchorops::cuda {

// The inputs of the backward pass, and its output. The rows of the tables are contiguous.
template <class T>
struct Gradient {
  const T* features;      // [B, D, P] by strides
  const int32_t* keys;    // int32 [B, P], −1 where ignored
  const float* anchors;   // float32 [num_classes, D]
  const float* dsums;     // float32 [num_keys, D]
  const float* dsqdists;  // float32 [num_keys]
  T* dfeatures;           // by strides
  Pixels view, out;       // of features, of dfeatures
  unsigned num_keys, num_classes, groups;

  // From keys to rows of anchors; the keys of ignored pixels may be any valid ones.
  template <int COUNT>
  __device__ __forceinline__ void to_anchors(unsigned (&rows)[COUNT]) const {
    if (num_keys == num_classes) return;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) rows[i] = rows[i] / groups % num_classes;
  }
};

// One instruction; with a 64-bit index it would be three.
template <class Element>
__device__ __forceinline__ const Element* row_of(const Element* table, unsigned row,
                                                 unsigned row_bytes) {
  return reinterpret_cast<const Element*>(reinterpret_cast<const char*>(table) +
                                          static_cast<uint64_t>(row) * row_bytes);
}

// 16 bytes of a row at a time, or one element.
template <class Element, int COUNT>
__device__ __forceinline__ void load_row(const Element* row, Element (&values)[COUNT]) {
  constexpr int SIZE = Vector<Element>::SIZE;
  if constexpr (COUNT == 1) {
    values[0] = *row;
  } else {
#pragma unroll
    for (int c = 0; c < COUNT; c += SIZE) {
      const Vector<Element> vector = load_vector(row + c);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) values[c + i] = vector.elements[i];
    }
  }
}

}  // namespace anchorops::cuda
