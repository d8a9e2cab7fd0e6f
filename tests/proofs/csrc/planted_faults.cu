// Kernels with one fault each, which the sanitizers must find, and one kernel without a fault.
#include "planted_faults.h"

#include <stdexcept>

#include "../../../csrc/launch.cuh"

namespace anchorops {
namespace {

constexpr unsigned THREADS = 64;

enum class Fault {
  NONE,
  SHARED_OUT_OF_BOUNDS,
  GLOBAL_OUT_OF_BOUNDS,
  NO_BARRIER,
  NO_SYNCTHREADS,
  NO_SYNCWARP,
  COPY_NOT_WAITED_FOR,
  BLOCKS_RACE,
  MISALIGNED,
  BARRIER_FOR_SOME,
  TOO_MUCH_SHARED,
  TOO_MANY_ROWS_OF_BLOCKS,
};

// Rotates the numbers of each block by one position, through shared memory, in three ways.
template <Fault FAULT>
__global__ void rotate_kernel(const float* in_ptr, float* out_ptr) {
  if constexpr (FAULT == Fault::NO_BARRIER) {
    out_ptr[blockIdx.x * THREADS] = in_ptr[threadIdx.x];
    return;
  }
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned thread = threadIdx.x, next = (thread + 1) % THREADS, lane = thread % 32;
  const float* block_in = in_ptr + blockIdx.x * THREADS;
  float* block_out = out_ptr + blockIdx.x * THREADS;

  const unsigned to = FAULT == Fault::SHARED_OUT_OF_BOUNDS ? thread + 1 : thread;
  shared[to] = block_in[thread + (FAULT == Fault::GLOBAL_OUT_OF_BOUNDS ? THREADS * gridDim.x : 0)];
  if (FAULT != Fault::NO_SYNCTHREADS && (FAULT != Fault::BARRIER_FOR_SOME || lane < 16))
    __syncthreads();
  if (FAULT == Fault::BARRIER_FOR_SOME) __syncwarp();
  float value = shared[next];
  __syncthreads();

  // The numbers of a warp, reversed and reversed again.
  shared[thread] = value;
  if (FAULT != Fault::NO_SYNCWARP) __syncwarp();
  value = shared[thread / 32 * 32 + 31 - lane];
  __syncwarp();
  shared[thread] = value;
  __syncwarp();
  value = shared[thread / 32 * 32 + 31 - lane];
  __syncthreads();

  block_out[thread] = value;
  __syncthreads();
  if (thread < THREADS / 4) {
    const unsigned offset = FAULT == Fault::MISALIGNED && thread == 3 ? 1 : 0;
    copy_async(shared + 4 * thread + offset, block_out + 4 * thread, 16);
    commit_copies();
    if (FAULT != Fault::COPY_NOT_WAITED_FOR) wait_for_copies<0>();
    for (unsigned i = 4 * thread; i < 4 * thread + 4; ++i) block_out[i] = shared[i];
  }
  if (FAULT == Fault::BLOCKS_RACE && thread == 0) out_ptr[0] = value;
}

template <Fault FAULT>
void launch_rotation(const float* in_ptr, float* out_ptr, unsigned blocks) {
  constexpr size_t SHARED_BYTES =
      FAULT == Fault::TOO_MUCH_SHARED ? MAX_SHARED_BYTES + 4 : THREADS * sizeof(float);
  const dim3 grid(blocks, FAULT == Fault::TOO_MANY_ROWS_OF_BLOCKS ? 65536 : 1);
  launch("rotate_kernel", rotate_kernel<FAULT>, grid, THREADS, SHARED_BYTES, nullptr, in_ptr,
         out_ptr);
}

}  // namespace

std::vector<float> rotate(const std::string& fault, const std::vector<float>& numbers) {
  std::vector<float> rotated(numbers.size());
  const auto plant = [&](auto kernel) {
    kernel(numbers.data(), rotated.data(), static_cast<unsigned>(numbers.size() / THREADS));
    return rotated;
  };
#define PLANT(FAULT) \
  if (fault == #FAULT) return plant(launch_rotation<Fault::FAULT>)
  PLANT(NONE);
  PLANT(SHARED_OUT_OF_BOUNDS);
  PLANT(GLOBAL_OUT_OF_BOUNDS);
  PLANT(NO_BARRIER);
  PLANT(NO_SYNCTHREADS);
  PLANT(NO_SYNCWARP);
  PLANT(COPY_NOT_WAITED_FOR);
  PLANT(BLOCKS_RACE);
  PLANT(MISALIGNED);
  PLANT(BARRIER_FOR_SOME);
  PLANT(TOO_MUCH_SHARED);
  PLANT(TOO_MANY_ROWS_OF_BLOCKS);
#undef PLANT
  throw std::invalid_argument("rotate: fault: no kernel has " + fault);
}

}  // namespace anchorops
