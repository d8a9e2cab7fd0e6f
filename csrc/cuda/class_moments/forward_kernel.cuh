// The pass over the features. A warp sums 32 channels of a chunk, tile after tile.
#pragma once

#include "mixed_tile.cuh"
#include "policy.cuh"
#include "slots.cuh"
#include "tiles.cuh"
#include "uniform_run.cuh"

namespace anchorops::cuda {

template <class T, int STATISTICS, int LAYOUT>
struct ChunkSums {
  Slots<STATISTICS> slots;
  UniformRun<T, STATISTICS, LAYOUT> run;

  __device__ __forceinline__ void add(T* tile, int* keys) {
    // Keys of the lane's two pixels. In float32, lanes 16 to 31 have the pixels of lanes 0 to 15.
    constexpr int PAIRS = TILE_PIXELS<T> / 2;
    const int lane = slots.lane;
    int* const lane_keys = keys + 2 * (lane % PAIRS);
    if constexpr (STATISTICS & SQDISTS) {  // uniform tiles: ignored ones, and those with a slot
      const int first = keys[0];
      if (__ballot_sync(FULL_WARP, lane_keys[0] != first || lane_keys[1] != first) == 0) {
        const int slot = slots.slot_of_key[first];
        if (slot == NO_SLOT) return;
        if (slot < SLOTS) return run.add(slots, tile, slot);
      }
    }
#pragma unroll 1
    for (;;) {
      const int2 pixel_slots = slots.find(lane_keys[0], lane_keys[1]);
      slots.place(pixel_slots);
      if (slots.used == SLOTS) {  // pixels with a slot are added below
        __syncwarp();             // all lanes have read the keys
        if (lane < PAIRS) {
          if (pixel_slots.x != NO_SLOT) lane_keys[0] = -1;
          if (pixel_slots.y != NO_SLOT) lane_keys[1] = -1;
        }
      }
      MixedTile<T, STATISTICS, LAYOUT>{slots, tile, keys}.add(pixel_slots);
      if (slots.used < SLOTS) return;
      if (__ballot_sync(FULL_WARP, max(lane_keys[0], lane_keys[1]) >= 0) == 0) return;
      run.end(slots);
      slots.evict();
    }
  }

  __device__ __forceinline__ void finish() {
    run.end(slots);
    slots.finish();
  }
};

// Reads the features and the keys of its tiles once. Writes the statistics of a key each time that
// its slot is freed: once, if the chunk has no more keys than there are slots.
template <class T, int STATISTICS, int LAYOUT>
__global__ void __launch_bounds__(CHANNELS, policy_for<T, STATISTICS, LAYOUT>().warps)
    class_moments_kernel(const Input<T> input, const Tiling tiling, const Partials partials) {
  // Neighbouring blocks read neighbouring channels.
  const int block = blockIdx.x % tiling.blocks, chunk = blockIdx.x / tiling.blocks;
  Ring<T, LAYOUT> ring(input, tiling, block, chunk);
  ChunkSums<T, STATISTICS, LAYOUT> sums{{partials, tiling, input, block, chunk, ring.end()}};

#pragma unroll 1
  for (int tile = 1 - ring.STAGES; tile < ring.tiles; ++tile) {
    ring.advance(tile);
    if (tile >= 0) sums.add(ring.stage(tile), ring.keys(tile));
  }
  sums.finish();
}

}  // namespace anchorops::cuda
