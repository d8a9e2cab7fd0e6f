// Choices that follow from how many registers nvcc needs: which instances have room for what.
#pragma once

#include "arguments.cuh"

namespace anchorops::cuda {

#ifdef __CUDA_ARCH__
constexpr int MAJOR = __CUDA_ARCH__ / 100;  // of the compute capability
#else
constexpr int MAJOR = 9;
#endif

struct Policy {
  // Of which a multiprocessor has the registers: three for each scheduler, or two.
  int warps;
  // Features are read from shared memory again after the products of squared distances: there are
  // too few registers for both at the same time.
  bool reloads_features;
  // Products with slots 0 to 15, with slots 16 to 31, are skipped if no pixel of the tile has such
  // a slot.
  bool skips_lower_slots, skips_upper_slots;
};

template <class T, int STATISTICS, int LAYOUT>
constexpr Policy policy_for(int major = MAJOR) {
  constexpr bool BOTH = STATISTICS == (SUMS | SQDISTS);
  if constexpr (sizeof(T) == 4 && BOTH) return {major >= 10 ? 8 : 12, true, true, true};
  if constexpr (sizeof(T) == 4 || STATISTICS == SUMS) return {12, false, true, true};
  if constexpr (BOTH && LAYOUT != ROWS) return {12, false, false, false};
  return {12, BOTH, false, true};
}

}  // namespace anchorops::cuda
