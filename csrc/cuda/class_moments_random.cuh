// The pass over the features where neighbouring pixels have different keys, as with random labels.
//
// A block sorts the pixels of its chunk by key, once, and then sums several blocks of 32 channels.
// The keys are divided into twelve windows of at most 16 consecutive keys. Some warps, the movers,
// copy tiles; twelve others add the pixels, each those of its own window. A round is twelve tiles.
// In each round,
// 1. a mover waits for its tiles, moves each of their pixels to a row of shared memory, and starts
//    to copy other tiles. The rows of a key are contiguous;
// 2. after a barrier, a warp that adds goes through the rows of its keys, while the movers move the
//    next round. Its totals are in registers until the chunk ends.
//
// The order of the additions depends only on the keys. A row is added to its own key and no other,
// so features that are not finite need no other way.
#pragma once

#include "class_moments_random_sort.cuh"
#include "class_moments_sample.cuh"

namespace anchorops::cuda {

// Moves the pixels of the warp's tile to their rows. In 16 bits, channel 8·j + 2q + b becomes
// element 8·q + 2j + b, as load_matrices delivers it.
template <class T, bool CHANNELS_LAST>
__device__ __forceinline__ void move_to_rows(const T* tile, const uint16_t* positions, T* rows) {
  constexpr int PITCH = Stage<T, CHANNELS_LAST, false>::PITCH;
  const int lane = threadIdx.x;
  if constexpr (sizeof(T) == 2) {
    const auto to = load_vector(positions + lane / 4 * 8);
#pragma unroll
    for (int i = 0; i < TILE<T> / 8; ++i) {
      Vector<unsigned> pairs;  // of pixel 8·i + lane / 4
      if constexpr (CHANNELS_LAST)
        load_matrices<false>(pairs.elements, tile + (8 * i + lane % 8) * PITCH + lane / 8 * 8);
      else
        load_matrices<true>(pairs.elements, tile + lane * PITCH + 8 * i);
      const unsigned row = to.elements[i];
      if (row != NO_ROW)
        store_vector(reinterpret_cast<unsigned*>(rows + row * CHANNELS + lane % 4 * 8), pairs);
    }
  } else {
    const unsigned row = positions[lane];
#pragma unroll
    for (int i = 0; i < CHANNELS / 4; ++i) {
      const int c = (i + lane) % 8 * 4;  // lanes store to different banks
      Vector<float> values;
      if constexpr (CHANNELS_LAST) {
        values = load_vector(tile + lane * PITCH + c);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) values.elements[k] = tile[(c + k) * PITCH + lane];
      }
      if (row != NO_ROW) store_vector(rows + row * CHANNELS + c, values);
    }
  }
}

// The totals of a window. In 16 bits, half a warp has a key, and a lane two channels.
template <class T, int STATISTICS>
struct KeySums {
  static constexpr int WIDTH = 4 / sizeof(T);        // channels of a lane
  static constexpr int COUNT = WINDOW_KEYS / WIDTH;  // keys of a lane: WIDTH·i + part
  static constexpr int LANES = 32 / WIDTH;
  // Rows that are loaded at once. Those after the key's last row are not added.
  static constexpr int STEP = sizeof(T) == 2 ? 8 : 4;
  const int lane = threadIdx.x, part = lane / LANES;
  float sums[COUNT][WIDTH] = {}, residuals[COUNT][WIDTH] = {}, sqdists[COUNT] = {};
  float anchors[COUNT][WIDTH];

  // The lane's first channel.
  __device__ __forceinline__ int channel() const {
    const int word = lane % LANES;
    return sizeof(T) == 2 ? word % 4 * 8 + word / 4 * 2 : word;
  }

  // runs: of the window's keys. keys: the number of these.
  __device__ __forceinline__ void add(const T* rows, const unsigned* runs, int keys) {
    const unsigned* const words = reinterpret_cast<const unsigned*>(rows) + lane % LANES;
    unsigned run[COUNT], next[STEP];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) run[i] = WIDTH * i + part < keys ? runs[WIDTH * i + part] : 0;
    load(words, run[0], next);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (WIDTH * i >= keys) break;
      unsigned loaded[STEP];
#pragma unroll
      for (int p = 0; p < STEP; ++p) loaded[p] = next[p];
      if (i + 1 < COUNT) load(words, run[i + 1], next);  // while the present rows are added
      Part of_run;
      int left = (run[i] >> 16) - (run[i] & 0xffff);
      add_rows(loaded, left, anchors[i], of_run);
      if (left > STEP) {
#pragma unroll 1
        for (unsigned first = run[i] + STEP; left > STEP; first += STEP) {
          left -= STEP;
          load(words, first, loaded);
          add_rows(loaded, left, anchors[i], of_run);
        }
      }
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) {
        if constexpr (STATISTICS & SUMS) sums[i][c] += of_run.sum[c];
        if constexpr (STATISTICS & SQDISTS) sqdists[i] += of_run.sqdist[c];
        if constexpr (STATISTICS & RESIDUALS) residuals[i][c] += of_run.residual[c];
      }
    }
  }
  struct Part {
    float sum[WIDTH] = {}, residual[WIDTH] = {}, sqdist[WIDTH] = {};
  };
  static __device__ __forceinline__ void load(const unsigned* words, unsigned run,
                                              unsigned (&loaded)[STEP]) {
#pragma unroll
    for (int p = 0; p < STEP; ++p) loaded[p] = words[((run & 0xffff) + p) * LANES];
  }
  static __device__ __forceinline__ void add_rows(const unsigned (&loaded)[STEP], int left,
                                                  const float (&anchor)[WIDTH], Part& to) {
#pragma unroll
    for (int p = 0; p < STEP; ++p) {
      const bool inside = p < left;
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) {
        const float value = element(loaded[p], c), difference = value - anchor[c];
        if constexpr (STATISTICS & SUMS) add_if(inside, to.sum[c], value);
        if constexpr (STATISTICS & SQDISTS) add_square_if(inside, to.sqdist[c], difference);
        if constexpr (STATISTICS & RESIDUALS) add_if(inside, to.residual[c], difference);
      }
    }
  }
  static __device__ __forceinline__ float element(unsigned word, int c) {
    if constexpr (sizeof(T) == 4) return __uint_as_float(word);
    if constexpr (std::is_same_v<T, BFloat16>)
      return __uint_as_float(c ? word & 0xffff0000 : word << 16);
    T half;
    const auto bits = static_cast<uint16_t>(c ? word >> 16 : word);
    memcpy(&half, &bits, sizeof half);
    return static_cast<float>(half);
  }

  __device__ __forceinline__ void start(const Input<T>& input, int first_key, int keys, int block) {
    const int of_block = block * CHANNELS + channel();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int key = WIDTH * i + part;
      sqdists[i] = 0;
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) {
        sums[i][c] = residuals[i][c] = anchors[i][c] = 0;
        if constexpr (STATISTICS & SQDISTS)
          if (key < keys && of_block + c < input.view.dim) {
            const int row = (first_key + key) % input.num_classes;  // the keys may be of each image
            anchors[i][c] = __ldg(input.anchors + row * input.view.dim + of_block + c);
          }
      }
    }
  }

  __device__ __forceinline__ void write(const Partials& partials, int64_t row, int first_key,
                                        int keys, int block, int64_t row_of_sqdists, int dim) {
    const int of_block = block * CHANNELS + channel();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int key = WIDTH * i + part;
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) {
        if (key >= keys || of_block + c >= dim) continue;
        const int64_t at = (row + first_key + key) * dim + of_block + c;
        if constexpr (STATISTICS & SUMS) partials.sums[at] = sums[i][c];
        if constexpr (STATISTICS & RESIDUALS) partials.residuals[at] = residuals[i][c];
      }
      if constexpr (STATISTICS & SQDISTS) {
        float total = sqdists[i];
#pragma unroll
        for (int lanes = 1; lanes < LANES; lanes *= 2)
          total += __shfl_xor_sync(FULL_WARP, total, lanes);
        if (key < keys && lane % LANES == 0)
          partials.sqdists[row_of_sqdists + first_key + key] = total;
      }
    }
  }
};

// Launched before class_moments_kernel, which returns if this kernel sums the pixels.
template <class T, int STATISTICS, bool CHANNELS_LAST>
__global__ void __launch_bounds__(CHANNELS*(WINDOWS + MOVERS<T, STATISTICS>), 1)
    class_moments_random_kernel(const Input<T> input, const Tiling tiling,
                                const Partials partials) {
  using Memory = RandomMemory<T, CHANNELS_LAST>;
  constexpr int MOVED = WINDOWS / MOVERS<T, STATISTICS>;  // tiles of a mover in a round
  permit_next_kernel();
  if (!keys_are_random(input.keys, input.view.lines * input.view.pixels)) return;
  const int lane = threadIdx.x, warp = threadIdx.y, num_keys = input.num_keys;
  const int groups = ceil_div(tiling.blocks, CHANNEL_BLOCKS);
  const int group = blockIdx.x % groups, chunk = blockIdx.x / groups;
  const int keys_of_window = ceil_div(num_keys, WINDOWS);

  RandomChunk range;
  range.first = tiling.first_tile(chunk);
  range.end = tiling.first_tile(chunk + 1);
  range.per_mover =
      static_cast<int>(ceil_div(range.end - range.first, int64_t{MOVERS<T, STATISTICS>}));
  range.rounds = ceil_div(range.per_mover, MOVED);
  sort_pixels<T, CHANNELS_LAST, MOVERS<T, STATISTICS>>(input, tiling, range, keys_of_window);

  const int first_block = group * CHANNEL_BLOCKS;
  const int last_block = min(first_block + CHANNEL_BLOCKS, tiling.blocks);
  int total = 0;  // rounds of all blocks of channels
  if (warp < WINDOWS) {
    const int first_key = warp * keys_of_window;
    const int keys = min(keys_of_window, num_keys - first_key);
    KeySums<T, STATISTICS> sums;
#pragma unroll 1
    for (int block = first_block; block < last_block; ++block) {
      sums.start(input, first_key, keys, block);
#pragma unroll 1
      for (int round = 0; round < range.rounds; ++round, ++total) {
        barrier_of_block();  // all pixels of the round are in their rows
        sums.add(Memory::rows(total), Memory::runs() + round * num_keys + first_key, keys);
      }
      sums.write(partials, int64_t{chunk} * num_keys, first_key, keys, block,
                 (int64_t{chunk} * tiling.blocks + block) * num_keys,
                 static_cast<int>(input.view.dim));
    }
    if (group == 0)
      for (int row = chunk; row < partials.rows; row += tiling.chunks)
        for (int k = warp * CHANNELS + lane; k < num_keys; k += WINDOWS * CHANNELS)
          partials.met[int64_t{row} * num_keys + k] = row == chunk;
  } else {
    const int mover = warp - WINDOWS;
    const int64_t own = min(range.first + int64_t{mover} * range.per_mover, range.end);
    const int tiles = static_cast<int>(min(int64_t{range.per_mover}, range.end - own));
#pragma unroll 1
    for (int block = first_block; block < last_block; ++block) {
      Cursor<T, CHANNELS_LAST, false> cursor(input, tiling, block * CHANNELS,
                                             min(own, tiling.tiles - 1));
      int in_round = 0, round = 0;
#pragma unroll 1
      for (int tile = -MOVED; tile < range.rounds * MOVED; ++tile) {  // the first only start copies
        T* const stage = Memory::stage(mover * MOVED + in_round);
        if (tile >= 0) {
          wait_for_copies<MOVED - 1>();
          __syncwarp();
          if (tile < tiles)
            move_to_rows<T, CHANNELS_LAST>(
                stage, Memory::positions(round, mover * MOVED + in_round), Memory::rows(total));
          __syncwarp();  // all lanes have read the stage that is overwritten now
        }
        if (tile + MOVED < tiles) {
          fill_stage(stage,
                     reinterpret_cast<int*>(reinterpret_cast<unsigned char*>(stage) +
                                            Memory::Layout::BYTES),
                     cursor);
          cursor.next();
        }
        commit_copies();
        if (++in_round == MOVED) {
          in_round = 0;
          if (tile >= 0) {
            barrier_of_block();
            ++round, ++total;
          }
        }
      }
    }
  }
}

}  // namespace anchorops::cuda
