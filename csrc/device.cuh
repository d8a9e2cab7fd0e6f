// The device interface, the only code through which the CUDA sources use the GPU: instructions. The
// other parts are launch.cuh and matrices.cuh.
//
// nvcc compiles it to CUDA. Other compilers use the emulator, tests/proofs/csrc/device_on_host.h,
// instead of the CUDA runtime. The same kernel sources then run on the CPU, with address and thread
// sanitizers. Kernels use CUDA's own names for indices, barriers, shuffles, votes and integer
// atomics, and the functions below for everything else.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "device_on_host.h"
#endif

namespace anchorops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr unsigned FULL_WARP = 0xffffffff;

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
#ifdef __CUDACC__
  *reinterpret_cast<uint4*>(&vector) = __ldcs(reinterpret_cast<const uint4*>(address));
#else
  on_host::check_alignment(address, 16);
  for (int i = 0; i < Vector<T>::SIZE; ++i) vector.elements[i] = address[i];
#endif
  return vector;
}

template <class T>
__device__ __forceinline__ void store_streaming(T* address, const Vector<T>& vector) {
#ifdef __CUDACC__
  __stcs(reinterpret_cast<uint4*>(address), *reinterpret_cast<const uint4*>(&vector));
#else
  on_host::check_alignment(address, 16);
  for (int i = 0; i < Vector<T>::SIZE; ++i) address[i] = vector.elements[i];
#endif
}

// Tables that stay in cache, read 16 bytes at a time.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
#ifdef __CUDACC__
  return *reinterpret_cast<const Vector<T>*>(address);
#else
  on_host::check_alignment(address, 16);
  Vector<T> vector;
  for (int i = 0; i < Vector<T>::SIZE; ++i) vector.elements[i] = address[i];
  return vector;
#endif
}

// threadIdx.x, read again. Values computed from it then need no registers during a loop.
__device__ __forceinline__ int thread_again() {
#ifdef __CUDACC__
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return threadIdx.x;
#endif
}

// Rounds to nearest even, two at a time if the hardware can.
template <class T>
__device__ __forceinline__ Vector<T> round_to(const float (&values)[Vector<T>::SIZE]) {
  Vector<T> vector;
#ifdef __CUDACC__
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
#else
  for (int i = 0; i < Vector<T>::SIZE; ++i) vector.elements[i] = static_cast<T>(values[i]);
#endif
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

// The bits of `vector` at the positions that are set in `mask`; all other bits are 0.
template <class T>
__device__ __forceinline__ Vector<T> keep(const Vector<T>& vector, const unsigned (&mask)[4]) {
  unsigned bits[4];
  memcpy(bits, &vector, sizeof bits);
  for (int i = 0; i < 4; ++i) bits[i] &= mask[i];
  Vector<T> kept;
  memcpy(&kept, bits, sizeof bits);
  return kept;
}

// a·b, rounded. It is never fused with an addition.
__host__ __device__ inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  volatile float rounded = a * b;
  return rounded;
#endif
}

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#else
  return on_host::shared_memory();
#endif
}

// Asynchronous copy of `bytes` (0 to 16) to 16 bytes of shared memory; the remaining bytes become
// zero. Both addresses are multiples of 16. The thread may read its copy after it has waited for
// it, other threads after a barrier that follows this wait.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
#else
  on_host::copy_async(shared, global, bytes, 16);
#endif
}

// The same for all 16 bytes, which needs fewer instructions.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
  on_host::copy_async(shared, global, 16, 16);
#endif
}

// The same for 4 bytes.
__device__ __forceinline__ void copy_word_async(void* shared, const void* global) {
#ifdef __CUDACC__
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
#else
  on_host::copy_async(shared, global, 4, 4);
#endif
}

// Ends a sequence of this thread's copies.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  on_host::commit_copies();
#endif
}

// Waits for all sequences of this thread's copies except the last PENDING ones.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  on_host::wait_for_copies(PENDING);
#endif
}

}  // namespace anchorops
