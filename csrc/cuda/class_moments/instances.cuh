// launch_moments of arguments.cuh: an instance of the kernel for each choice of statistics and each
// layout.
#pragma once

#include <cstdint>

#include "arguments.cuh"
#include "forward_kernel.cuh"
#include "slots.cuh"
#include "tiles.cuh"

namespace anchorops::cuda {

template <class T>
void launch_moments(int statistics, const Input<T>& input, const Tiling& tiling,
                    const Partials& partials, Stream stream) {
  const dim3 grid(static_cast<unsigned>(int64_t{tiling.chunks} * tiling.blocks));
  const auto with = [&]<int STATISTICS, int LAYOUT>() {
    launch("class_moments_kernel", class_moments_kernel<T, STATISTICS, LAYOUT>, grid, CHANNELS,
           Ring<T, LAYOUT>::BYTES + Slots<STATISTICS>::bytes(input.num_keys), stream, input, tiling,
           partials);
  };
  const auto in_layout = [&]<int LAYOUT>() {
    switch (statistics) {
      case SUMS:
        return with.template operator()<SUMS, LAYOUT>();
      case SQDISTS:
        return with.template operator()<SQDISTS, LAYOUT>();
      default:
        return with.template operator()<SUMS | SQDISTS, LAYOUT>();
    }
  };
  switch (input.layout) {
    case ROWS:
      return in_layout.template operator()<ROWS>();
    case SHIFTED_PLANES:
      return in_layout.template operator()<SHIFTED_PLANES>();
    default:
      return in_layout.template operator()<PLANES>();
  }
}

}  // namespace anchorops::cuda
