// Tiles whose pixels all have the same key are added without products.
#pragma once

#include "factors.cuh"
#include "slots.cuh"
#include "tiles.cuh"

namespace anchorops::cuda {

// The sums of successive tiles in which all pixels have the key of this slot. Lane 4n + q has
// channel 8·q + n of the sums, and a part of the squared distance.
template <class T, int STATISTICS, int LAYOUT>
struct UniformRun {
  int slot = NO_SLOT;
  float sum = 0, sqdist = 0;

  // Adds a tile in which all pixels have the key of this slot. Its anchor is loaded once.
  __device__ __forceinline__ void add(Slots<STATISTICS>& slots, const T* tile, int new_slot) {
    if (new_slot != slot) end(slots);
    slot = new_slot;
    const float* const anchors = slots.anchors + slot * ANCHOR_PITCH + slots.lane / 4 * 4;
    const Vector<float> anchor = load_vector(anchors);
    float sums[4] = {}, squares[4] = {};
#pragma unroll
    for (int pixel = 0; pixel < TILE_PIXELS<T>; pixel += 32) {
      const Features<T, LAYOUT> x(tile + TileLayout<T, LAYOUT>::offset(0, pixel));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float value = x.at(j, i), difference = value - anchor.elements[j];
          squares[j] = fmaf(difference, difference, squares[j]);
          if constexpr (STATISTICS & SUMS) sums[j] += value;
        }
      }
    }
    sqdist += (squares[0] + squares[1]) + (squares[2] + squares[3]);
    if constexpr (STATISTICS & SUMS) sum += over_columns(slots.lane, sums);
  }

  // Adds the sums of the run to the totals of its slot.
  __device__ __forceinline__ void end(Slots<STATISTICS>& slots) {
    if (slot == NO_SLOT) return;
    auto& totals = slots.totals;
    const int lane = slots.lane;
    float total = sqdist;
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) total += __shfl_xor_sync(FULL_WARP, total, lanes);
    const auto add_to_slot = [&](auto add) {
#pragma unroll
      for (int i = 0; i < SLOTS / 8; ++i)
        if (8 * i + lane / 4 == slot) add(i / 2, i % 2);
    };
    add_to_slot([&](int m, int h) { totals.sqdists[m][h] += total; });
    if constexpr (STATISTICS & SUMS) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int owner = (lane % 4 * 2 + i % 2) * 4 + i / 2;  // has channel_of_lane(i)
        const float value = __shfl_sync(FULL_WARP, sum, owner);
        add_to_slot([&](int m, int h) { totals.at(totals.sums, m, h, i) += value; });
      }
    }
    *this = {};
  }

 private:
  // Adds over lanes 4n to 4n + 3. Lane 4n + q returns the sum of values[q].
  static __device__ __forceinline__ float over_columns(int lane, const float (&values)[4]) {
    const bool upper = lane & 2, odd = lane & 1;
    float pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float kept = upper ? values[i + 2] : values[i],
                  sent = upper ? values[i] : values[i + 2];
      pair[i] = kept + __shfl_xor_sync(FULL_WARP, sent, 2);
    }
    return (odd ? pair[1] : pair[0]) + __shfl_xor_sync(FULL_WARP, odd ? pair[0] : pair[1], 1);
  }
};

}  // namespace anchorops::cuda
