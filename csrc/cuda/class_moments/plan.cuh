// How class moments divide the pixels: into tiles, and these into chunks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../tensors.cuh"
#include "arguments.cuh"
#include "policy.cuh"
#include "slots.cuh"
#include "tiles.cuh"

namespace anchorops::cuda {

constexpr int64_t PARTIALS_IN_CACHE = 16 << 20;

template <class T>
Tiling tiles_of(const Input<T>& input, int64_t wanted_chunks) {
  const Pixels& view = input.view;
  const int most_before = input.layout == SHIFTED_PLANES ? Vector<T>::SIZE - 1 : 0;
  Tiling tiling{};
  tiling.tiles_per_line = static_cast<int>(ceil_div(view.pixels + most_before, TILE_PIXELS<T>));
  tiling.last_tile =
      static_cast<int>(view.pixels - int64_t{tiling.tiles_per_line - 1} * TILE_PIXELS<T>);
  tiling.tiles = view.lines * tiling.tiles_per_line;
  tiling.blocks = blocks_of(view.dim, input.period);
  tiling.chunks = static_cast<int>(std::clamp<int64_t>(wanted_chunks, 1, tiling.tiles));
  tiling.tiles_per_chunk = tiling.tiles / tiling.chunks;
  tiling.longer = static_cast<int>(tiling.tiles % tiling.chunks);
  return tiling;
}

// For how many warps of class_moments_kernel a multiprocessor has registers and shared memory: in
// any layout, so that the plan does not depend on it.
template <class T>
int64_t resident_warps(int statistics, int64_t num_keys) {
  constexpr int64_t RING = std::max(Ring<T, PLANES>::BYTES, Ring<T, ROWS>::BYTES);
  const int major = hardware().major;
  const auto of = [&]<int STATISTICS>() {
    return std::min<int64_t>(policy_for<T, STATISTICS, PLANES>(major).warps,
                             blocks_in_shared(RING + Slots<STATISTICS>::bytes(num_keys)));
  };
  return statistics == SUMS      ? of.template operator()<SUMS>()
         : statistics == SQDISTS ? of.template operator()<SQDISTS>()
                                 : of.template operator()<SUMS | SQDISTS>();
}

// Columns of a partial of sums.
template <class T>
int64_t width_of(const Input<T>& input, int64_t blocks) {
  return input.period > 1 ? blocks * CHANNELS : input.view.dim;
}

// As many chunks as occupy the device once, or up to four times if the partials are then at most
// 1/64 of the features. Fewer chunks if the partials would be more than 1/4 of the features and
// more than PARTIALS_IN_CACHE bytes.
template <class T>
Tiling plan(const Input<T>& input, int statistics) {
  const Pixels& view = input.view;
  const int64_t blocks = blocks_of(view.dim, input.period), num_keys = input.num_keys;
  const int64_t width = width_of(input, blocks);
  const int64_t chunk_bytes =
      4 * num_keys * ((statistics & SUMS ? width : 0) + (statistics & SQDISTS ? blocks : 0));
  const int64_t feature_bytes =
      view.lines * view.pixels * view.dim * static_cast<int64_t>(sizeof(T));
  const int64_t once =
      std::max<int64_t>(multiprocessors() * resident_warps<T>(statistics, num_keys) / blocks, 1);
  const int64_t times = std::clamp<int64_t>(feature_bytes / 64 / (once * chunk_bytes), 1, 4);
  const int64_t most = std::max(feature_bytes / 4, PARTIALS_IN_CACHE) / chunk_bytes;
  return tiles_of(input, std::min(once * times, most));
}

// Lets tiles of contiguous pixels begin at multiples of 16 bytes where lines do not. Blocks have at
// least eight channels: with fewer, most of their products would be of zeros.
template <class T>
void shift_if_unaligned(Input<T>& input) {
  constexpr int64_t SIZE = Vector<T>::SIZE;
  const auto period = SIZE / std::gcd(input.view.stride_d, SIZE);
  if (input.vectors || input.view.stride_p != 1 || input.view.dim < 8 * period) return;
  input.period = static_cast<int>(period);
  input.row_stride *= period;
  input.layout = SHIFTED_PLANES;
}

}  // namespace anchorops::cuda
