// The order of the pixels of a chunk for class_moments_random_kernel, in shared memory.
//
// A round is as many tiles as there are warps that add: WINDOWS. In each round, the pixels are
// sorted by key; pixels of the same key remain in the order of tiles and pixels.
#pragma once

#include "../matrices.cuh"
#include "class_moments_tiles.cuh"

namespace anchorops::cuda {

constexpr int WINDOWS = 12;              // warps that add, each the pixels of consecutive keys
constexpr int WINDOW_KEYS = 16;          // of a warp, at most
constexpr int MOVERS = 4;                // warps that copy tiles and move their pixels
constexpr int MOVED = WINDOWS / MOVERS;  // tiles of a mover in a round
constexpr int CHUNK_PIXELS = WINDOWS * 1024;
constexpr int CHANNEL_BLOCKS = 4;  // of 32 channels, that a block sums one after the other
constexpr unsigned NO_ROW = 0xffff;

template <class T, bool CHANNELS_LAST>
struct RandomMemory {
  using Layout = Stage<T, CHANNELS_LAST>;
  static constexpr int PIXELS = WINDOWS * TILE<T>, ROUNDS = CHUNK_PIXELS / PIXELS;
  static constexpr int ROWS_AT = WINDOWS * Layout::BYTES;
  static constexpr int ROWS_BYTES = (PIXELS + 8) * CHANNELS * int{sizeof(T)};  // 8: see KeySums
  static constexpr int POSITIONS_AT = ROWS_AT + 2 * ROWS_BYTES;
  static constexpr int ANCHORS_AT = POSITIONS_AT + CHUNK_PIXELS * int{sizeof(uint16_t)};
  static constexpr int STARTS_AT = ANCHORS_AT + WINDOWS * WINDOW_KEYS * CHANNELS * 4;
  static constexpr size_t bytes(int64_t num_keys) {
    return STARTS_AT + (size_t{ROUNDS} * (num_keys + 1) + 1) * sizeof(uint16_t);
  }

  // Of a tile in a round.
  static __device__ __forceinline__ T* stage(int tile) {
    return reinterpret_cast<T*>(shared_memory() + tile * Layout::BYTES);
  }
  // The pixels' features, in the order of their keys. While one round is added, the next one is
  // moved to the other rows.
  static __device__ __forceinline__ T* rows(int round) {
    return reinterpret_cast<T*>(shared_memory() + ROWS_AT + round % 2 * ROWS_BYTES);
  }
  // Where the row of each pixel of a tile begins, in elements, NO_ROW if the pixel is ignored. In
  // 16 bits, pixel 8·i + n is at 8·n + i.
  static __device__ __forceinline__ uint16_t* positions(int round, int tile) {
    return reinterpret_cast<uint16_t*>(shared_memory() + POSITIONS_AT) +
           (round * WINDOWS + tile) * TILE<T>;
  }
  // Of each key of a window, for a block of 32 channels, which are in the order of a row.
  static __device__ __forceinline__ float* anchors(int window) {
    return reinterpret_cast<float*>(shared_memory() + ANCHORS_AT) + window * WINDOW_KEYS * CHANNELS;
  }
  // Where the rows of each key begin, and the number of rows. KeySums reads one number more.
  static __device__ __forceinline__ uint16_t* starts(int round, int num_keys) {
    return reinterpret_cast<uint16_t*>(shared_memory() + STARTS_AT) + round * (num_keys + 1);
  }
  // While pixels are sorted, instead of stages: how many pixels of each key each tile has
  // (uint8 [num_keys, 16]), and the pixels of each window.
  static __device__ __forceinline__ uint8_t* counts(int key) { return shared_memory() + key * 16; }
  static __device__ __forceinline__ int* window_pixels() {
    return reinterpret_cast<int*>(shared_memory() + 4 * WINDOWS * WINDOW_KEYS * 16);
  }
};

// The tiles of a chunk. Each mover has consecutive tiles, and moves some of them in each round.
struct RandomChunk {
  int64_t first, end;
  int per_mover, rounds;
};

// The sum of the first `bytes` bytes of twelve, each less than 128.
__device__ __forceinline__ int sum_of_bytes(const Vector<unsigned>& words, int bytes) {
  unsigned pairs = 0;
#pragma unroll
  for (int i = 0; i < WINDOWS / 4; ++i) {
    const int bits = 8 * bytes - 32 * i;
    const unsigned word = words.elements[i] & (bits <= 0    ? 0
                                               : bits >= 32 ? FULL_WARP
                                                            : (1u << bits) - 1);
    pairs += (word & 0x00ff00ff) + (word >> 8 & 0x00ff00ff);
  }
  return static_cast<int>((pairs & 0xffff) + (pairs >> 16));
}

// The sum of the values of the lanes before; at most 16 lanes have one.
__device__ __forceinline__ int before_lanes(int value) {
  int sum = value;
#pragma unroll
  for (int lanes = 1; lanes < 16; lanes *= 2) {
    const int left = __shfl_up_sync(FULL_WARP, sum, lanes);
    if (threadIdx.x >= lanes) sum += left;
  }
  return sum - value;
}

// Sorts the pixels of all rounds, of several rounds at a time: counts the pixels of each key in
// each tile, adds the counts, and so finds the row of each pixel. Called by the whole block.
template <class T, bool CHANNELS_LAST>
__device__ __forceinline__ void sort_pixels(const Input<T>& input, const Tiling& tiling,
                                            const RandomChunk& chunk, int keys_of_window,
                                            int warp) {
  using Memory = RandomMemory<T, CHANNELS_LAST>;
  constexpr int PER_LANE = TILE<T> / 32, TOGETHER = 4;
  const int lane = threadIdx.x, num_keys = input.num_keys, thread = warp * 32 + lane;
  const unsigned before_lane = (1u << lane) - 1;
#pragma unroll 1
  for (int first_round = 0; first_round < chunk.rounds; first_round += TOGETHER) {
    for (int i = thread; i < TOGETHER * num_keys; i += (WINDOWS + MOVERS) * 32)
      store_vector(reinterpret_cast<unsigned*>(Memory::counts(i)), Vector<unsigned>{});
    int key[TOGETHER][PER_LANE], rank[TOGETHER][PER_LANE];
#pragma unroll
    for (int r = 0; r < TOGETHER; ++r) {
      const int of_mover = (first_round + r) * MOVED + warp % MOVED;
      const int64_t tile = chunk.first + int64_t{warp / MOVED} * chunk.per_mover + of_mover;
      const int64_t line = tile / tiling.tiles_per_line;
      const int in_line = static_cast<int>(tile - line * tiling.tiles_per_line);
      const int pixels = warp >= WINDOWS || of_mover >= chunk.per_mover || tile >= chunk.end ? 0
                         : in_line == tiling.tiles_per_line - 1 ? tiling.last_tile
                                                                : TILE<T>;
      const int32_t* const keys = input.keys + line * input.view.pixels + in_line * TILE<T>;
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i)
        key[r][i] = lane + 32 * i < pixels ? keys[lane + 32 * i] : -1;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      unsigned same[TOGETHER];
      int before[TOGETHER];
#pragma unroll
      for (int r = 0; r < TOGETHER; ++r) {
        same[r] = __match_any_sync(FULL_WARP, key[r][i]);
        before[r] = key[r][i] < 0 ? 0 : Memory::counts(r * num_keys + key[r][i])[warp];
        rank[r][i] = before[r] + __popc(same[r] & before_lane);
      }
      __syncwarp();
#pragma unroll
      for (int r = 0; r < TOGETHER; ++r)
        if (key[r][i] >= 0 && (same[r] & before_lane) == 0)
          Memory::counts(r * num_keys + key[r][i])[warp] =
              static_cast<uint8_t>(before[r] + __popc(same[r]));
      __syncwarp();
    }
    __syncthreads();
    const int own = warp * keys_of_window + lane;  // a key of the window
    const bool has_key = warp < WINDOWS && lane < keys_of_window && own < num_keys;
    int count[TOGETHER], begin[TOGETHER];
#pragma unroll
    for (int r = 0; r < TOGETHER; ++r) {
      count[r] = has_key ? sum_of_bytes(load_vector(reinterpret_cast<const unsigned*>(
                                            Memory::counts(r * num_keys + own))),
                                        WINDOWS)
                         : 0;
      begin[r] = before_lanes(count[r]);
      if (lane == WINDOW_KEYS - 1 && warp < WINDOWS)
        Memory::window_pixels()[r * WINDOWS + warp] = begin[r] + count[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < TOGETHER; ++r) {
      const int of_window = lane < WINDOWS ? Memory::window_pixels()[r * WINDOWS + lane] : 0;
      begin[r] += __shfl_sync(FULL_WARP, before_lanes(of_window), warp);
      if (!has_key || first_round + r >= chunk.rounds) continue;
      uint16_t* const starts = Memory::starts(first_round + r, num_keys);
      starts[own] = static_cast<uint16_t>(begin[r]);
      if (own == num_keys - 1) starts[num_keys] = static_cast<uint16_t>(begin[r] + count[r]);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < TOGETHER; ++r) {
      if (warp >= WINDOWS || first_round + r >= chunk.rounds) continue;
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) {
        unsigned position = NO_ROW;
        if (key[r][i] >= 0) {
          const int row = Memory::starts(first_round + r, num_keys)[key[r][i]] + rank[r][i] +
                          sum_of_bytes(load_vector(reinterpret_cast<const unsigned*>(
                                           Memory::counts(r * num_keys + key[r][i]))),
                                       warp);
          position = row * CHANNELS;
        }
        const int pixel = lane + 32 * i;
        Memory::positions(first_round + r,
                          warp)[sizeof(T) == 2 ? pixel % 8 * 8 + pixel / 8 : pixel] =
            static_cast<uint16_t>(position);
      }
    }
    __syncthreads();
  }
}

}  // namespace anchorops::cuda
