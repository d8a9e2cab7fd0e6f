// Pixels that are not finite, or too large, are added one by one: in a product they could make the
// sums of other slots infinite or NaN, because 0 times such a number is NaN.
#pragma once

#include "slots.cuh"
#include "tiles.cuh"

namespace anchorops::cuda {

// The square of a pixel's difference from its anchor, or of its value, must be smaller.
constexpr float LARGEST_SQUARE = 0x1p100f;

template <class T, int STATISTICS, int LAYOUT>
struct SpecialPixels {
  using Tile = TileLayout<T, LAYOUT>;

  // Adds all special pixels of a tile. Afterwards their features are 0 and they have no slot and no
  // key.
  static __device__ __forceinline__ void take_out(Slots<STATISTICS>& slots, T* tile, int* keys) {
    const int lane = slots.lane;
#pragma unroll 1
    for (int pixel = 0; pixel < TILE_PIXELS<T>; ++pixel) {
      const int slot = slots.code(pixel) / static_cast<int>(slot_code(1));
      T* const element = tile + Tile::offset(lane, pixel);
      const auto value = static_cast<float>(*element);
      float difference = value;
      if constexpr (STATISTICS & SQDISTS) difference -= slots.anchor(slot);
      if (__ballot_sync(FULL_WARP, difference * difference < LARGEST_SQUARE) == FULL_WARP) continue;
      if (slot != NO_SLOT)
        add_to_slot(slots, tile, pixel, slot);
      else if (keys[pixel] >= 0)
        slots.add_to_partials(keys[pixel], value);
      __syncwarp();
      *element = T(0.f);
      if (lane == 0) {
        slots.code(pixel) = slot_code(NO_SLOT);
        keys[pixel] = -1;
      }
    }
  }

 private:
  static __device__ __forceinline__ void add_to_slot(Slots<STATISTICS>& slots, const T* tile,
                                                     int pixel, int slot) {
    if (slot % 8 != slots.lane / 4) return;
    auto& totals = slots.totals;
    const int first_channel = thread_again() % 4 * 2;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      const int m = i / 16, h = i / 8 % 2, j = i / 2 % 4, b = i % 2;
      if (slot / 8 != i / 8) continue;
      const int channel = first_channel + channel_of_lane(i % 8);
      const auto value = static_cast<float>(tile[Tile::offset(channel, pixel)]);
      if constexpr (STATISTICS & SUMS) totals.at(totals.sums, m, h, 2 * j + b) += value;
      if constexpr (STATISTICS & SQDISTS) {
        const float difference = value - slots.anchors[slot * ANCHOR_PITCH + channel % 8 * 4 + j];
        totals.sqdists[m][h] = fmaf(difference, difference, totals.sqdists[m][h]);
      }
    }
  }
};

}  // namespace anchorops::cuda
