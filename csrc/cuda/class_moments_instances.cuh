// The launches of class_moments_launch.cuh.
#pragma once

#include "class_moments_kernel.cuh"
#include "class_moments_launch.cuh"

namespace anchorops::cuda {

// Calls function with the statistics, and whether channels are contiguous, as constants.
template <class Function>
void for_statistics(int statistics, const Pixels& view, Function function) {
  const auto with = [&]<int STATISTICS>() {
    if (view.stride_d == 1 && view.stride_p != 1)
      function.template operator()<STATISTICS, true>();
    else
      function.template operator()<STATISTICS, false>();
  };
  switch (statistics) {
    case SUMS:
      return with.template operator()<SUMS>();
    case SQDISTS:
      return with.template operator()<SQDISTS>();
    default:
      return with.template operator()<SUMS | SQDISTS>();
  }
}

inline dim3 grid_of(const Tiling& tiling) {
  return dim3(static_cast<unsigned>(int64_t{tiling.chunks} * tiling.blocks));
}

template <class T>
void launch_moments(int statistics, const Input<T>& input, const Tiling& tiling,
                    const Partials& partials, Stream stream) {
  for_statistics(statistics, input.view, [&]<int STATISTICS, bool CHANNELS_LAST>() {
    const auto with = [&]<bool SHIFTED>() {
      using TileRing = Ring<T, CHANNELS_LAST, SHIFTED>;
      launch("class_moments_kernel", class_moments_kernel<T, STATISTICS, CHANNELS_LAST, SHIFTED>,
             grid_of(tiling), CHANNELS, TileRing::BYTES + Slots<STATISTICS>::bytes(input.num_keys),
             stream, input, tiling, partials);
    };
    if constexpr (!CHANNELS_LAST)
      if (input.shifted) return with.template operator()<true>();
    with.template operator()<false>();
  });
}

}  // namespace anchorops::cuda
