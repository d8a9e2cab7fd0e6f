// Device code that several kernels share: 16 bytes of elements, asynchronous copies, numbers.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace anchorops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr unsigned FULL_WARP = 0xffffffff;

// The sum over all lanes of a warp; every lane gets it.
template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
  for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(FULL_WARP, value, lanes);
  return value;
}

// The elements of one access of 16 bytes.
template <class T>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T elements[SIZE];
};

// Features are read once and their gradient is written once, so neither should stay in a cache. The
// address is a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ Vector<T> load_streaming(const T* address) {
  Vector<T> vector;
  *reinterpret_cast<uint4*>(&vector) = __ldcs(reinterpret_cast<const uint4*>(address));
  return vector;
}

template <class T>
__device__ __forceinline__ void store_streaming(T* address, const Vector<T>& vector) {
  __stcs(reinterpret_cast<uint4*>(address), *reinterpret_cast<const uint4*>(&vector));
}

// Tables that stay in cache, read 16 bytes at a time.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T>*>(address);
}

// Rounds to nearest even, two at a time if the hardware can.
template <class T>
__device__ __forceinline__ Vector<T> round_to(const float (&values)[Vector<T>::SIZE]) {
  Vector<T> vector;
  [[maybe_unused]] auto* pairs = reinterpret_cast<uint32_t*>(&vector);
#pragma unroll
  for (int i = 0; i < Vector<T>::SIZE; ++i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (i % 2)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
            : "=r"(pairs[i / 2])
            : "f"(values[i]), "f"(values[i - 1]));
    } else if constexpr (std::is_same_v<T, Half>) {
      if (i % 2)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;"
            : "=r"(pairs[i / 2])
            : "f"(values[i]), "f"(values[i - 1]));
    } else {
      vector.elements[i] = values[i];
    }
  }
  return vector;
}

// The lower or the upper number of a register with two of 16 bits.
template <class T>
__device__ __forceinline__ float half_to_float(unsigned pair, bool upper) {
  if constexpr (std::is_same_v<T, BFloat16>)  // one instruction
    return __uint_as_float(upper ? pair & 0xffff0000 : pair << 16);
  T number;
  const auto bits = static_cast<uint16_t>(upper ? pair >> 16 : pair);
  memcpy(&number, &bits, sizeof number);
  return static_cast<float>(number);
}

template <class T>
__device__ __forceinline__ float to_float(const Vector<T>& vector, int i) {
  if constexpr (sizeof(T) == 4) {
    return vector.elements[i];
  } else {
    unsigned pair;
    memcpy(&pair, &vector.elements[i / 2 * 2], sizeof pair);
    return half_to_float<T>(pair, i % 2);
  }
}

// Asynchronous copy of `bytes` (0 to 16) to 16 bytes of shared memory; the remaining bytes become
// zero. Both addresses are multiples of 16. The thread may read its copy after it has waited for
// it, other threads after a barrier that follows this wait.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
}

// Asynchronous copy of 4 bytes.
__device__ __forceinline__ void copy_word_async(void* shared, const void* global) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
}

// Ends a sequence of this thread's copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all sequences of this thread's copies except the last PENDING ones.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace anchorops
