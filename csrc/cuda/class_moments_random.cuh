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
// element 8·q + 2j + b, as load_matrices delivers it. All loads come first: if each store waited
// for its own load, the movers would be the last at the barrier by far.
template <class T, bool CHANNELS_LAST>
__device__ __forceinline__ void move_to_rows(const T* tile, const uint16_t* positions, T* rows) {
  constexpr int PITCH = Stage<T, CHANNELS_LAST>::PITCH;
  constexpr int STEPS = 8;  // 16 bytes each
  const int lane = threadIdx.x;
  if constexpr (sizeof(T) == 2) {
    // of pixels 8·i + lane / 4
    const auto to = load_vector(reinterpret_cast<const unsigned*>(positions + lane / 4 * 8));
    Vector<unsigned> pairs[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      if constexpr (CHANNELS_LAST)
        load_matrices<false>(pairs[i].elements, tile + (8 * i + lane % 8) * PITCH + lane / 8 * 8);
      else
        load_matrices<true>(pairs[i].elements, tile + lane * PITCH + 8 * i);
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const unsigned two = to.elements[i / 2], row = i % 2 ? two >> 16 : two & 0xffff;
      if (row != NO_ROW)
        store_vector(reinterpret_cast<unsigned*>(rows + row + lane % 4 * 8), pairs[i]);
    }
  } else {
    const unsigned row = positions[lane];
    if (row == NO_ROW) return;
    const auto channel = [&](int i) { return (i + lane) % 8 * 4; };  // lanes use different banks
    Vector<float> values[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      if constexpr (CHANNELS_LAST) {
        values[i] = load_vector(tile + lane * PITCH + channel(i));
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) values[i].elements[k] = tile[(channel(i) + k) * PITCH + lane];
      }
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) store_vector(rows + row + channel(i), values[i]);
  }
}

// The totals of a window. Half of the warp adds the even rows of a run, the other half the odd
// ones; a lane has two channels.
template <class T, int STATISTICS>
struct KeySums {
  static constexpr int LANES = CHANNELS / 2;  // of a row
  // Pairs of rows that are loaded at once. Those after the run's last row are not added.
  static constexpr int STEP = sizeof(T) == 2 ? 4 : 2;
  static constexpr bool DIRECT = sizeof(T) == 4;  // residuals are Σ (f − a), not Σ f − n·a
  static constexpr bool ADDS_FEATURES = STATISTICS & SUMS || (STATISTICS & RESIDUALS && !DIRECT);
  struct alignas(2 * sizeof(T)) Pair {
    T channels[2];
  };
  struct Loaded {
    Pair rows[STEP];
    float2 anchor;
  };
  const int lane = threadIdx.x, part = lane / LANES;
  float sums[WINDOW_KEYS][2], residuals[WINDOW_KEYS][2], sqdists[WINDOW_KEYS];

  // The channel of a block that this lane has alone when halves are added. An anchor is at 2·(lane
  // mod 16) + part.
  __device__ __forceinline__ int channel() const {
    const int pair = lane % LANES;
    return (sizeof(T) == 2 ? pair % 4 * 8 + pair / 4 * 2 : 2 * pair) + part;
  }
  __device__ __forceinline__ int place() const { return 2 * (lane % LANES) + part; }

  // Sets totals to zero, and copies the anchors of the window's keys to shared memory.
  __device__ __forceinline__ void start(const Input<T>& input, int first_key, int keys, int block,
                                        float* anchors) {
    if constexpr (STATISTICS & SQDISTS) {
      const int64_t of_block = block * CHANNELS + channel(), dim = input.view.dim;
      int row = first_key % input.num_classes;  // the keys may be of each image
#pragma unroll 4
      for (int i = 0; i < keys; ++i) {
        const float anchor = __ldg(input.anchors + row * dim + min(of_block, dim - 1));
        anchors[i * CHANNELS + place()] = of_block < dim ? anchor : 0;
        if (++row == input.num_classes) row = 0;
      }
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < WINDOW_KEYS; ++i)
      sums[i][0] = sums[i][1] = residuals[i][0] = residuals[i][1] = sqdists[i] = 0;
  }

  // starts: where the rows of each of the window's keys begin, and those of the next key. The
  // branches are the same for all lanes.
  __device__ __forceinline__ void add(const T* rows, const uint16_t* starts, const float* anchors,
                                      int keys) {
    if (keys <= 0) return;
    int first = starts[0], end = starts[1];
    Loaded next;
    load(rows, first, next);
    load_anchor(anchors, next);
#pragma unroll
    for (int i = 0; i < WINDOW_KEYS; ++i) {
      if (i >= keys) break;
      Loaded loaded = next;
      const int after = starts[i + 2];
      if (i + 1 < WINDOW_KEYS) {  // while the present rows are added
        load(rows, end, next);
        load_anchor(anchors + (i + 1) * CHANNELS, next);
      }
      int left = end - first;
      Run run;
      float (&sum)[2] = DIRECT ? run.sum : sums[i];
      add_rows<0, STEP / 2>(sum, run, loaded, left);
      if (left > STEP) {
        add_rows<STEP / 2, STEP>(sum, run, loaded, left);
#pragma unroll 1
        while (left > 2 * STEP) {
          left -= 2 * STEP;
          load(rows, end - left, loaded);
          add_rows<0, STEP>(sum, run, loaded, left);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if constexpr (ADDS_FEATURES && DIRECT) sums[i][c] += run.sum[c];
        if constexpr (STATISTICS & RESIDUALS && DIRECT) residuals[i][c] += run.residual[c];
      }
      if constexpr (STATISTICS & SQDISTS) sqdists[i] += run.sqdist;
      first = end, end = after;
    }
  }
  __device__ __forceinline__ void load(const T* rows, int row, Loaded& to) const {
    const auto* const pairs = reinterpret_cast<const Pair*>(rows + row * CHANNELS + lane * 2);
#pragma unroll
    for (int p = 0; p < STEP; ++p) to.rows[p] = pairs[p * 2 * LANES];
  }
  __device__ __forceinline__ void load_anchor(const float* anchors, Loaded& to) const {
    if constexpr (STATISTICS & SQDISTS)
      to.anchor = reinterpret_cast<const float2*>(anchors)[lane % LANES];
  }
  // The sums of a run. Thousands of rows added to one total would lose its last bits: squares of
  // 16-bit values end in the same bits, so all of them are rounded in the same direction. Sums of
  // 16-bit values have few bits and need no sums of runs.
  struct Run {
    float sum[2] = {}, residual[2] = {}, sqdist = 0;
  };
  // left: rows from the first pair on. Adds pairs FIRST to END − 1.
  template <int FIRST, int END>
  __device__ __forceinline__ void add_rows(float (&sum)[2], Run& run, const Loaded& loaded,
                                           int left) {
#pragma unroll
    for (int p = FIRST; p < END; ++p) {
      const bool inside = left - part > 2 * p;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float value = element(loaded.rows[p], c);
        if constexpr (ADDS_FEATURES) add_if(inside, sum[c], value);
        if constexpr (STATISTICS & SQDISTS) {
          const float difference = value - (c ? loaded.anchor.y : loaded.anchor.x);
          add_square_if(inside, run.sqdist, difference);
          if constexpr (STATISTICS & RESIDUALS && DIRECT)
            add_if(inside, run.residual[c], difference);
        }
      }
    }
  }
  static __device__ __forceinline__ float element(const Pair& pair, int c) {
    if constexpr (std::is_same_v<T, BFloat16>) {  // one instruction
      unsigned word;
      memcpy(&word, &pair, sizeof word);
      return __uint_as_float(c ? word & 0xffff0000 : word << 16);
    } else {
      return static_cast<float>(pair.channels[c]);
    }
  }

  // of_key: the lane's number of pixels of its key of the window, in the chunk.
  __device__ __forceinline__ void write(const Partials& partials, int64_t row, int keys, int block,
                                        int64_t row_of_sqdists, int dim, const float* anchors,
                                        int of_key) {
    const int of_block = block * CHANNELS + channel();
#pragma unroll
    for (int i = 0; i < WINDOW_KEYS; ++i) {
      const bool inside = i < keys && of_block < dim;
      const int64_t at = (row + i) * dim + of_block;
      const float sum = of_channel(sums[i]);
      if constexpr (STATISTICS & SUMS)
        if (inside) partials.sums[at] = sum;
      if constexpr (STATISTICS & RESIDUALS) {
        float residual = DIRECT ? of_channel(residuals[i]) : sum;
        // Each f has 8 bits (11 in float16). If a key has 100 pixels in a chunk, Σ f is exact in
        // float32 unless the sizes of the pixels differ by more than about 2^9 (2^6); with 1,000
        // pixels, 2^6 (2^3).
        const int pixels = __shfl_sync(FULL_WARP, of_key, i);
        if (!DIRECT && pixels > 0)
          residual = fmaf(-static_cast<float>(pixels), anchors[i * CHANNELS + place()], sum);
        if (inside) partials.residuals[at] = residual;
      }
    }
    if constexpr (STATISTICS & SQDISTS) {
      // Adds over the warp; each step halves the keys of a lane. Lane 2·i then has key i.
#pragma unroll
      for (int step = 3; step >= 0; --step) {
        const int count = 1 << step;
        const bool upper = lane & 2 * count;
#pragma unroll
        for (int i = 0; i < WINDOW_KEYS / 2; ++i) {
          if (i >= count) break;
          const float first = sqdists[i], second = sqdists[i + count];
          sqdists[i] = (upper ? second : first) +
                       __shfl_xor_sync(FULL_WARP, upper ? first : second, 2 * count);
        }
      }
      const float sqdist = sqdists[0] + __shfl_xor_sync(FULL_WARP, sqdists[0], 1);
      if (lane % 2 == 0 && lane / 2 < keys) partials.sqdists[row_of_sqdists + lane / 2] = sqdist;
    }
    __syncwarp();  // all lanes have read the anchors
  }
  // Adds both halves of the warp.
  __device__ __forceinline__ float of_channel(const float (&values)[2]) const {
    const float even = values[0], odd = values[1];
    return (part ? odd : even) + __shfl_xor_sync(FULL_WARP, part ? even : odd, LANES);
  }
};

// Launched before class_moments_kernel, which returns if this kernel sums the pixels.
template <class T, int STATISTICS, bool CHANNELS_LAST>
__global__ void __launch_bounds__(CHANNELS*(WINDOWS + MOVERS), 1)
    class_moments_random_kernel(const Input<T> input, const Tiling tiling,
                                const Partials partials) {
  using Memory = RandomMemory<T, CHANNELS_LAST>;
  permit_next_kernel();
  if (!keys_are_random(input.keys, input.view.lines * input.view.pixels)) return;
  const int lane = threadIdx.x, num_keys = input.num_keys;
  // Read from a lane, so that the compiler knows that the warp has the same branches and addresses.
  const int warp = __shfl_sync(FULL_WARP, static_cast<int>(threadIdx.y), 0);
  const int groups = ceil_div(tiling.blocks, CHANNEL_BLOCKS);
  const int group = blockIdx.x % groups, chunk = blockIdx.x / groups;
  const int keys_of_window = ceil_div(num_keys, WINDOWS);

  RandomChunk range;
  range.first = tiling.first_tile(chunk);
  range.end = tiling.first_tile(chunk + 1);
  range.per_mover = static_cast<int>(ceil_div(range.end - range.first, int64_t{MOVERS}));
  range.rounds = ceil_div(range.per_mover, MOVED);
  sort_pixels<T, CHANNELS_LAST>(input, tiling, range, keys_of_window, warp);

  const int first_block = group * CHANNEL_BLOCKS;
  const int last_block = min(first_block + CHANNEL_BLOCKS, tiling.blocks);
  int total = 0;  // rounds of all blocks of channels
  if (warp < WINDOWS) {
    const int first_key = warp * keys_of_window;
    const int keys = min(keys_of_window, num_keys - first_key);
    float* const anchors = Memory::anchors(warp);
    int of_key = 0;
    if (STATISTICS & RESIDUALS && lane < keys)
      for (int round = 0; round < range.rounds; ++round) {
        const uint16_t* const start = Memory::starts(round, num_keys) + first_key + lane;
        of_key += start[1] - start[0];
      }
    KeySums<T, STATISTICS> sums;
#pragma unroll 1
    for (int block = first_block; block < last_block; ++block) {
      sums.start(input, first_key, keys, block, anchors);
#pragma unroll 1
      for (int round = 0; round < range.rounds; ++round, ++total) {
        barrier_of_block();  // all pixels of the round are in their rows
        sums.add(Memory::rows(total), Memory::starts(round, num_keys) + first_key, anchors, keys);
      }
      sums.write(partials, int64_t{chunk} * num_keys + first_key, keys, block,
                 (int64_t{chunk} * tiling.blocks + block) * num_keys + first_key,
                 static_cast<int>(input.view.dim), anchors, of_key);
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
      Cursor<T, CHANNELS_LAST> cursor(input, tiling, block * CHANNELS, min(own, tiling.tiles - 1));
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
          fill_stage<false>(stage, nullptr, cursor);
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
