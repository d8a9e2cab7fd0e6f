// The pass over the features in raster order. A warp sums 32 channels of a chunk, tile after tile.
// The sums of a tile for each slot are a product on tensor cores: the one-hot matrix of the pixels'
// slots, times the features. The squared distance of each pixel to its own anchor is first added
// over the channels, and then for each slot by the same kind of product.
#pragma once

#include "class_moments_factors.cuh"
#include "class_moments_slots.cuh"

namespace anchorops::cuda {

// The sums of successive tiles in which all pixels have the key of this slot. Lane 4n + q has
// channel 8·q + n of the sums, and a part of the squared distance.
struct Run {
  int slot = NO_SLOT;
  float sum = 0, sqdist = 0;
};

template <class T, int STATISTICS, bool CHANNELS_LAST>
struct Accumulator {
  using Layout = Stage<T, CHANNELS_LAST>;
  using Fragment = Features<T, CHANNELS_LAST>;
  static constexpr int GROUPS = TILE<T> / 32;
  // There are too few registers for the features and the products of squares at the same time, so
  // the features are read twice.
  static constexpr bool RELOADS =
      STATISTICS == (SUMS | SQDISTS) && (sizeof(T) == 4 || CHANNELS_LAST);
  // Whether products without pixels are skipped, where there are enough registers for it.
  static constexpr bool SKIPS_LOWER = sizeof(T) == 4 || STATISTICS == SUMS;
  static constexpr bool SKIPS_UPPER = SKIPS_LOWER || STATISTICS == SQDISTS || RELOADS;
  // A pixel with a larger squared difference is added alone. In a product it could make the sums of
  // other slots infinite or NaN.
  static constexpr float LARGEST = 0x1p100f;

  Slots<STATISTICS> slots;
  Run run;
  const int lane = threadIdx.x;

  __device__ __forceinline__ void consume(T* tile, int* keys) {
    // Keys of the lane's two pixels. In float32, lanes 16 to 31 have the pixels of lanes 0 to 15.
    int* const own = keys + 2 * (lane % (TILE<T> / 2));
    if constexpr (STATISTICS & SQDISTS) {  // uniform tiles: ignored ones, and those with a slot
      const int first = keys[0];
      if (__ballot_sync(FULL_WARP, own[0] != first || own[1] != first) == 0) {
        const int slot = slots.of_key[first];
        if (slot == NO_SLOT) return;
        if (slot < SLOTS) return add_uniform(tile, slot);
      }
    }
#pragma unroll 1
    for (;;) {
      const int2 found = slots.find(own[0], own[1]);
      slots.place(found);
      if (slots.used == SLOTS) {  // pixels with a slot are added below
        __syncwarp();             // all lanes have read the keys
        if (lane < TILE<T> / 2) {
          if (found.x != NO_SLOT) own[0] = -1;
          if (found.y != NO_SLOT) own[1] = -1;
        }
      }
      add(tile, keys, halves_of(found));
      if (slots.used < SLOTS) return;
      if (__ballot_sync(FULL_WARP, max(own[0], own[1]) >= 0) == 0) return;
      end_run();
      slots.evict();
    }
  }

  __device__ __forceinline__ void finish() {
    end_run();
    slots.finish();
  }

  // Adds a tile in which all pixels have the key of this slot. Its anchor is loaded once.
  __device__ __forceinline__ void add_uniform(const T* tile, int slot) {
    if (slot != run.slot) end_run();
    run.slot = slot;
    const float* const anchors = slots.anchors + slot * PITCH + lane / 4 * 4;
    const Vector<float> anchor = load_vector(anchors);
    float sums[4] = {}, squares[4] = {};
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const Fragment x(tile + Layout::offset(0, 32 * g));
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
    run.sqdist += (squares[0] + squares[1]) + (squares[2] + squares[3]);
    if constexpr (STATISTICS & SUMS) run.sum += over_columns(sums);
  }

  // Adds over lanes 4n to 4n + 3. Lane 4n + q returns the sum of values[q].
  __device__ __forceinline__ float over_columns(const float (&values)[4]) const {
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

  // Adds the sums of the run to the totals of its slot.
  __device__ __forceinline__ void end_run() {
    if (run.slot == NO_SLOT) return;
    auto& totals = slots.totals;
    float sqdist = run.sqdist;
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) sqdist += __shfl_xor_sync(FULL_WARP, sqdist, lanes);
    const auto add_to_slot = [&](auto add) {
#pragma unroll
      for (int i = 0; i < SLOTS / 8; ++i)
        if (8 * i + lane / 4 == run.slot) add(i / 2, i % 2);
    };
    add_to_slot([&](int m, int h) { totals.sqdists[m][h] += sqdist; });
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int owner = (lane % 4 * 2 + i % 2) * 4 + i / 2;  // the lane that has channel_of_lane(i)
      if constexpr (STATISTICS & SUMS) {
        const float value = __shfl_sync(FULL_WARP, run.sum, owner);
        add_to_slot([&](int m, int h) { totals.at(totals.sums, m, h, i) += value; });
      }
    }
    run = {};
  }

  // The halves of the slots that the tile's pixels have. Most products of the other half are
  // skipped.
  struct Halves {
    bool lower, upper;
  };
  __device__ __forceinline__ Halves halves_of(int2 found) const {
    if (!SKIPS_UPPER || slots.used <= ROWS) return {true, slots.used > ROWS};
    return {!SKIPS_LOWER || __ballot_sync(FULL_WARP, found.x < ROWS || found.y < ROWS) != 0,
            __ballot_sync(FULL_WARP, found.x / ROWS == 1 || found.y / ROWS == 1) != 0};
  }

  // Adds the pixels that have a slot.
  __device__ __forceinline__ void add(T* tile, int* keys, Halves halves) {
    Fragment x[GROUPS];
    Vector<unsigned> pairs[GROUPS];
    float squares[GROUPS][8];
#pragma unroll 1
    for (bool all_finite = false;; all_finite = true) {
      __syncwarp();
      bool finite = true;
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        pairs[g] = slots.pairs(g);
        x[g] = Fragment(tile + Layout::offset(0, 32 * g));
        if constexpr (STATISTICS & SQDISTS)
          finite &= square(x[g], pairs[g], squares[g]) < LARGEST;
        else
          finite &= x[g].are_finite();
      }
      if (all_finite || __ballot_sync(FULL_WARP, finite) == FULL_WARP) break;
      take_out(tile, keys);
    }
    const OneHot<GROUPS> one_hot(pairs, 0);
    if constexpr (STATISTICS & SQDISTS) {
      unsigned terms[4 * GROUPS][3];
#pragma unroll
      for (int i = 0; i < 4 * GROUPS; ++i)
        split(squares[i / 4][i % 4 * 2], squares[i / 4][i % 4 * 2 + 1], terms[i]);
      add_squares<0>(one_hot, terms);  // without a branch they overlap with what is before
      if (halves.upper) add_squares<1>(upper_half(), terms);
    }
    if constexpr (STATISTICS & SUMS) {
      if (halves.lower) {
        if constexpr (RELOADS) load(tile, x);
        add_features<0>(one_hot, x);
      }
      if (halves.upper) {
        load(tile, x);
        add_features<1>(upper_half(), x);
      }
    }
  }

  // Slots and features are read again from shared memory, because there are too few registers to
  // keep them.
  __device__ __forceinline__ OneHot<GROUPS> upper_half() const {
    __syncwarp();
    Vector<unsigned> pairs[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) pairs[g] = slots.pairs(g);
    return {pairs, ROWS};
  }
  __device__ __forceinline__ void load(const T* tile, Fragment (&x)[GROUPS]) const {
    __syncwarp();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) x[g] = Fragment(tile + Layout::offset(0, 32 * g));
  }

  // The squared distances of the lane's pixels, added over the lane's channels. Returns the sum of
  // all of them.
  __device__ __forceinline__ float square(const Fragment& x, const Vector<unsigned>& pairs,
                                          float (&squares)[8]) const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned pair = pairs.elements[i / 2];
      const unsigned code = i % 2 ? pair >> 16 : pair & 0xffff;
      const Vector<float> anchor = load_vector(reinterpret_cast<const float*>(
          reinterpret_cast<const unsigned char*>(slots.anchors + lane / 4 * 4) + code));
      squares[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float difference = x.at(j, i) - anchor.elements[j];
        squares[i] = fmaf(difference, difference, squares[i]);
      }
      total += squares[i];
    }
    return total;
  }

  // Adds squared distances to the totals of slots 16·M to 16·M + 15.
  template <int M>
  __device__ __forceinline__ void add_squares(const OneHot<GROUPS>& one_hot,
                                              const unsigned (&terms)[4 * GROUPS][3]) {
    float sums[4], rest[4];
    one_hot.template multiply<BFloat16>(terms, sums, rest);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      slots.totals.sqdists[M][h] +=
          (sums[2 * h] + rest[2 * h]) + (sums[2 * h + 1] + rest[2 * h + 1]);
  }

  // Adds features to the totals of the same slots.
  template <int M>
  __device__ __forceinline__ void add_features(const OneHot<GROUPS>& one_hot,
                                               const Fragment (&x)[GROUPS]) {
    auto& totals = slots.totals;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      unsigned terms[4 * GROUPS][Fragment::TERMS];
      float sums[4], rest[4];
#pragma unroll
      for (int i = 0; i < 4 * GROUPS; ++i) x[i / 4].terms(j, i % 4, terms[i]);
      one_hot.template multiply<typename Fragment::Element>(terms, sums, rest);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        totals.sums[j][M][i] += Fragment::TERMS > 1 ? sums[i] + rest[i] : sums[i];
    }
  }

  // Adds pixels that are not finite or too large, one by one. Afterwards their features are 0 and
  // they have no slot and no key.
  __device__ __forceinline__ void take_out(T* tile, int* keys) {
#pragma unroll 1
    for (int pixel = 0; pixel < TILE<T>; ++pixel) {
      const int slot = slots.code(pixel) / static_cast<int>(slot_code(1));
      T* const own = tile + Layout::offset(lane, pixel);
      const auto value = static_cast<float>(*own);
      float difference = value;
      if constexpr (STATISTICS & SQDISTS) difference -= slots.anchor(slot);
      if (__ballot_sync(FULL_WARP, difference * difference < LARGEST) == FULL_WARP) continue;
      if (slot != NO_SLOT)
        add_alone(tile, pixel, slot);
      else if (keys[pixel] >= 0)
        slots.add_to_partials(keys[pixel], value);
      __syncwarp();
      *own = T(0.f);
      if (lane == 0) {
        slots.code(pixel) = slot_code(NO_SLOT);
        keys[pixel] = -1;
      }
    }
  }

  __device__ __forceinline__ void add_alone(const T* tile, int pixel, int slot) {
    if (slot % 8 != lane / 4) return;
    auto& totals = slots.totals;
    const int first_channel = thread_again() % 4 * 2;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      const int m = i / 16, h = i / 8 % 2, j = i / 2 % 4, b = i % 2;
      if (slot / 8 != i / 8) continue;
      const int channel = first_channel + channel_of_lane(i % 8);
      const auto value = static_cast<float>(tile[Layout::offset(channel, pixel)]);
      if constexpr (STATISTICS & SUMS) totals.at(totals.sums, m, h, 2 * j + b) += value;
      if constexpr (STATISTICS & SQDISTS) {
        const float difference = value - slots.anchors[slot * PITCH + channel % 8 * 4 + j];
        totals.sqdists[m][h] = fmaf(difference, difference, totals.sqdists[m][h]);
      }
    }
  }
};

// Reads the features and the keys of its tiles once. Writes the statistics of a key each time that
// its slot is freed: once, if the chunk has no more keys than there are slots.
template <class T, int STATISTICS, bool CHANNELS_LAST, bool SHIFTED>
__global__ void __launch_bounds__(CHANNELS, warps_of<T>(STATISTICS))
    class_moments_kernel(const Input<T> input, const Tiling tiling, const Partials partials) {
  permit_next_kernel();
  // Neighbouring blocks read neighbouring channels.
  const int block = blockIdx.x % tiling.blocks, chunk = blockIdx.x / tiling.blocks;
  Ring<T, CHANNELS_LAST, SHIFTED> ring(input, tiling, block, chunk);
  Accumulator<T, STATISTICS, CHANNELS_LAST> accumulator{
      {partials, tiling, input, block, chunk, ring.end()}};

#pragma unroll 1
  for (int tile = 1 - STAGES; tile < ring.tiles; ++tile) {
    ring.advance(tile);
    if (tile >= 0) accumulator.consume(ring.stage(tile), ring.keys(tile));
  }
  accumulator.finish();
}

}  // namespace anchorops::cuda
