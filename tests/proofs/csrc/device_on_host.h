// The emulator: the CUDA functions of kernels, for kernels that run on the CPU (see
// csrc/device.cuh).
//
// Every CUDA thread is a fiber with its own stack. Two blocks run at the same time, each on a
// thread of the system, and each with a different order of its CUDA threads, which a test can
// change. A fiber runs until it waits: at __syncthreads() for its block, at a shuffle, vote or
// __syncwarp() for the given lanes.
// For ThreadSanitizer only barriers order the fibers, as in CUDA: a shuffle or a vote does not.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct int2 {
  int x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace anchorops::on_host {

struct Place {
  dim3 thread, block, block_size, grid_size;
};
Place place();

void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& kernel);
// Remembers a launched kernel by its address in its library, which is then in launched_kernels():
// those since the last call.
void note_launch(const void* kernel);
std::set<uintptr_t> launched_kernels();
unsigned char* shared_memory();
// Those of an H200, or what a test has set: multiprocessors, and the shared memory of each.
int multiprocessors();
size_t shared_kilobytes();
void set_hardware(int multiprocessors, int shared_kilobytes);
// The order in which threads run: a seed, or 0 for the usual one.
void set_order(unsigned seed);
void check_alignment(const void* address, size_t alignment);

// Waits for the lanes of `mask`; then slot i contains the value of lane i.
struct Slot {
  unsigned char bytes[24];
};
const Slot* exchange(unsigned mask, const Slot& brought);
void block_barrier();
void warp_barrier(unsigned mask);
unsigned lane();

// Copies are done when the kernel waits for them. Reading earlier gives the NaN from before.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, size;  // the bytes after the first ones become 0
};
void copy_async(void* to, const void* from, int bytes, int size);
void commit_copies();
bool next_copy(int pending_groups, Copy* copy);

inline void wait_for_copies(int pending_groups) {
  for (Copy copy; next_copy(pending_groups, &copy);)
    for (int i = 0; i < copy.size; ++i) copy.to[i] = i < copy.bytes ? copy.from[i] : 0;
}

void fill_zero(void* memory, size_t bytes);

template <class T>
const Slot* exchange_values(unsigned mask, const T& value) {
  Slot slot = {};
  std::memcpy(&slot, &value, sizeof value);
  return exchange(mask, slot);
}

template <class T>
T from_lane(unsigned mask, T value, unsigned source) {
  const Slot* slots = exchange_values(mask, value);
  std::memcpy(&value, &slots[source % 32], sizeof value);
  return value;
}

// Those of csrc/matrices.cuh. The elements are of float16 or bfloat16.
void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool is_float16);

template <bool TRANSPOSED>
void load_matrices(unsigned (&registers)[4], const void* row) {
  check_alignment(row, 16);
  const uint16_t* rows[32];
  const Slot* slots = exchange_values(0xffffffff, row);
  for (int i = 0; i < 32; ++i) std::memcpy(&rows[i], &slots[i], sizeof rows[i]);
  const unsigned n = lane() / 4, q = lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned first = TRANSPOSED ? rows[8 * i + 2 * q][n] : rows[8 * i + n][2 * q];
    const unsigned second = TRANSPOSED ? rows[8 * i + 2 * q + 1][n] : rows[8 * i + n][2 * q + 1];
    registers[i] = first | second << 16;
  }
}

}  // namespace anchorops::on_host

#define threadIdx (anchorops::on_host::place().thread)
#define blockIdx (anchorops::on_host::place().block)
#define blockDim (anchorops::on_host::place().block_size)
#define gridDim (anchorops::on_host::place().grid_size)

inline void __syncthreads() { anchorops::on_host::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffff) { anchorops::on_host::warp_barrier(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return anchorops::on_host::from_lane(mask, value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return anchorops::on_host::from_lane(mask, value, anchorops::on_host::lane() ^ lanes);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned lane = anchorops::on_host::lane();
  return anchorops::on_host::from_lane(mask, value, lane >= lanes ? lane - lanes : lane);
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  const auto* slots = anchorops::on_host::exchange_values(mask, vote);
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) {
    std::memcpy(&vote, &slots[i], sizeof vote);
    if ((mask >> i & 1) && vote) ballot |= 1u << i;
  }
  return ballot;
}

inline unsigned __match_any_sync(unsigned mask, int value) {
  const auto* slots = anchorops::on_host::exchange_values(mask, value);
  unsigned same = 0;
  for (unsigned i = 0; i < 32; ++i)
    if ((mask >> i & 1) && std::memcmp(&slots[i], &value, sizeof value) == 0) same |= 1u << i;
  return same;
}

template <class T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}

template <class T>
T atomicExch(T* address, T value) {
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

using std::max;
using std::min;
