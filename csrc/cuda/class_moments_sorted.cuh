// The pass over the features of pixels that are sorted by key. A warp sums 32 channels, one for
// each lane, tile after tile, in groups of 32 pixels. The pixels of the current key are added in
// registers. When another key comes, the sums of the current key in this chunk are complete.
#pragma once

#include "class_moments_tiles.cuh"
#include "warps.cuh"

namespace anchorops::cuda {

// The sums over pixels of a key.
struct Sums {
  float sum = 0, sqdist = 0, residual = 0;
};

// The same in registers, while pixels are added: in four parts that do not wait for each other.
template <int STATISTICS>
struct Totals {
  Sums parts[4];

  __device__ __forceinline__ void add(int i, float x, float anchor) {
    Sums& part = parts[i % 4];
    if constexpr (STATISTICS & SUMS) part.sum += x;
    if constexpr (STATISTICS & SQDISTS) {
      const float residual = x - anchor;
      part.sqdist = fmaf(residual, residual, part.sqdist);
      if constexpr (STATISTICS & RESIDUALS) part.residual += residual;
    }
  }
  __device__ __forceinline__ Sums total() const {
    const auto of = [&](float Sums::* which) {
      return (parts[0].*which + parts[1].*which) + (parts[2].*which + parts[3].*which);
    };
    return {of(&Sums::sum), of(&Sums::sqdist), of(&Sums::residual)};
  }
};

template <int STATISTICS>
struct SumsWriter {
  using Output = SortedSums;

  const SortedSums out;
  const int chunk, block, blocks, num_keys, dim, lane = threadIdx.x;
  const int channel = block * CHANNELS + lane;
  bool first = true;  // whether no key of the chunk has been stored

  template <class T>
  __device__ SumsWriter(const SortedSums& out, const Tiling& tiling, const Input<T>& input,
                        int block, int chunk)
      : out(out),
        chunk(chunk),
        block(block),
        blocks(tiling.blocks),
        num_keys(input.num_keys),
        dim(static_cast<int>(input.view.dim)) {}

  __device__ __forceinline__ void add(int key, const Sums& sums) {
    store(key, sums, first, !first);
    first = false;
  }
  __device__ void finish(int key, const Sums& sums) const { store(key, sums, true, !first); }

  // Stores the sums of the chunk's first key (which = 0) or last key (1) as an end of the chunk,
  // and those of other keys as results.
  __device__ __forceinline__ void store(int key, const Sums& sums, bool end, int which) const {
    if (key < 0) return;
    const int64_t edge = int64_t{2} * chunk + which, at = (end ? edge : key) * dim + channel;
    if (channel < dim) {
      if constexpr (STATISTICS & SUMS) (end ? out.sums_ends : out.sums)[at] = sums.sum;
      if constexpr (STATISTICS & RESIDUALS)
        (end ? out.residuals_ends : out.residuals)[at] = sums.residual;
    }
    if constexpr (STATISTICS & SQDISTS) {
      const float total = sum_of_warp(sums.sqdist);
      if (lane > 0) return;
      if (end)
        out.sqdists_ends[edge * blocks + block] = total;
      else
        out.sqdists[int64_t{block} * num_keys + key] = total;
    }
  }
};

// The keys of a tile's groups of 32 pixels. Bit g of `uniform`: all pixels of group g have the same
// key as the pixel before the group. Bit g of `two`: they have this key and one other key. In lane
// g, `own` has the pixels of group g with the key of the pixel before, and `other` is the first
// other key.
template <class T>
struct Keys {
  static constexpr int GROUPS = TILE<T> / 32;
  static constexpr unsigned ALL = (1u << GROUPS) - 1;
  unsigned uniform = ALL, two = 0;
  unsigned own = 0;
  int other = 0;

  __device__ __forceinline__ Keys(const int* keys, int key_before) {
    const int lane = threadIdx.x;
    int key[GROUPS], first[GROUPS];
    unsigned same[GROUPS];
    bool all_same = true;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      key[g] = keys[g * 32 + lane];
      all_same &= key[g] == key_before;
    }
    if (__ballot_sync(FULL_WARP, all_same) == FULL_WARP) return;
    uniform = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) first[g] = g ? keys[g * 32 - 1] : key_before;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      same[g] = __ballot_sync(FULL_WARP, key[g] == first[g]);
      if (same[g] == FULL_WARP) uniform |= 1u << g;
      first[g] = keys[g * 32 + ((__ffs(static_cast<int>(~same[g])) - 1) & 31)];
    }
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const unsigned others = __ballot_sync(FULL_WARP, key[g] == first[g]);
      if ((same[g] | others) == FULL_WARP) two |= 1u << g;
      if (lane == g) own = same[g], other = first[g];
    }
  }
};

// Sums the pixels of the current key until another key comes.
template <class T, int STATISTICS, bool CHANNELS_LAST>
struct SortedAccumulator {
  using Layout = Stage<T, CHANNELS_LAST, true>;
  // If this number of pixels have the same key, they are added without a selection. A whole group
  // is not tested again.
  static constexpr int TESTED = STATISTICS == SUMS ? 32 : 8;
  static constexpr unsigned ALL_TESTED = FULL_WARP >> (32 - TESTED);

  const Anchors anchors;
  SumsWriter<STATISTICS> writer;
  int key;
  float anchor;
  Totals<STATISTICS> totals;

  __device__ SortedAccumulator(const Anchors& anchors, const SumsWriter<STATISTICS>& writer,
                               int key)
      : anchors(anchors), writer(writer), key(key), anchor(anchor_of(key)) {}

  __device__ __forceinline__ float anchor_of(int key) const {
    if constexpr (STATISTICS & SQDISTS) return anchors.of_key(key);
    return 0;
  }

  __device__ __forceinline__ void consume(const T* pixels, const int* keys, const Keys<T>& of_tile,
                                          int group) {
    if (of_tile.uniform >> group & 1) return consume_one(pixels);
    if (of_tile.two >> group & 1)
      return consume_two(pixels, __shfl_sync(FULL_WARP, of_tile.own, group),
                         __shfl_sync(FULL_WARP, of_tile.other, group));
    consume_few(pixels, keys[threadIdx.x], keys[31]);
  }

  __device__ __forceinline__ void consume_one(const T* pixels) {
    float x[32];
    Layout::read(pixels, x);
#pragma unroll
    for (int i = 0; i < 32; ++i) totals.add(i, x[i], anchor);
  }

  __device__ __forceinline__ void consume_few(const T* pixels, int pixel_key, int last_key) {
    float x[32];
    Layout::read(pixels, x);
    unsigned own = __ballot_sync(FULL_WARP, pixel_key == key), left = FULL_WARP;
#pragma unroll 1
    for (;;) {
      add_where(own, x);
      left &= ~own;
      if (left == 0) break;
      hold(__shfl_sync(FULL_WARP, pixel_key, __ffs(static_cast<int>(left)) - 1));
      own = __ballot_sync(FULL_WARP, pixel_key == key);
    }
    if (key != last_key) hold(last_key);
  }

  // Selects the pixels instead of multiplying by 0, because a pixel of another key may be infinite.
  __device__ __forceinline__ void add_where(unsigned own, const float (&x)[32]) {
#pragma unroll
    for (int first = 0; first < 32; first += TESTED) {
      const unsigned here = own << (32 - TESTED - first) >> (32 - TESTED);
      if (TESTED < 32 && here == ALL_TESTED) {
#pragma unroll
        for (int i = first; i < first + TESTED; ++i) totals.add(i, x[i], anchor);
      } else if (TESTED == 32 || here != 0) {
#pragma unroll
        for (int i = first; i < first + TESTED; ++i)
          if (own >> i & 1) totals.add(i, x[i], anchor);
      }
    }
  }

  // The pixels in `own` have the current key, all others have the other key.
  __device__ __forceinline__ void consume_two(const T* pixels, unsigned own, int other) {
    const float other_anchor = anchor_of(other);
    float x[32];
    Layout::read(pixels, x);
    Totals<STATISTICS> of_other;
#pragma unroll
    for (int first = 0; first < 32; first += TESTED) {
      const unsigned here = own << (32 - TESTED - first) >> (32 - TESTED);
      if (TESTED < 32 && here == ALL_TESTED) {
#pragma unroll
        for (int i = first; i < first + TESTED; ++i) totals.add(i, x[i], anchor);
      } else if (TESTED < 32 && here == 0) {
#pragma unroll
        for (int i = first; i < first + TESTED; ++i) of_other.add(i, x[i], other_anchor);
      } else {
#pragma unroll
        for (int i = first; i < first + TESTED; ++i) {
          if (own >> i & 1)
            totals.add(i, x[i], anchor);
          else
            of_other.add(i, x[i], other_anchor);
        }
      }
    }
    const Sums sums = totals.total(), other_sums = of_other.total();
    const bool keep = own >> 31;
    writer.add(keep ? other : key, select(keep, other_sums, sums));
    totals = {select(keep, sums, other_sums)};
    key = keep ? key : other;
    anchor = keep ? anchor : other_anchor;
  }

  // Stores the sums of the current key. The next key is then the current one.
  __device__ __forceinline__ void hold(int next) {
    writer.add(key, totals.total());
    totals = {};
    key = next;
    anchor = anchor_of(key);
  }

  static __device__ __forceinline__ Sums select(bool first, const Sums& a, const Sums& b) {
    return {first ? a.sum : b.sum, first ? a.sqdist : b.sqdist, first ? a.residual : b.residual};
  }
};

// Reads the features and the keys of its tiles once. Writes each statistic of each key once.
template <class T, int STATISTICS, bool CHANNELS_LAST>
__global__ void __launch_bounds__(CHANNELS, 12)
    class_moments_sorted_kernel(const Input<T> input, const Tiling tiling,
                                const SortedSums output) {
  // Neighbouring blocks read neighbouring channels, or the same planes, which then stay in cache.
  const int block = CHANNELS_LAST ? blockIdx.x % tiling.blocks : blockIdx.x / tiling.chunks;
  const int chunk = CHANNELS_LAST ? blockIdx.x / tiling.blocks : blockIdx.x % tiling.chunks;

  Ring<T, CHANNELS_LAST, true> ring(input, tiling, block, chunk);
  SortedAccumulator<T, STATISTICS, CHANNELS_LAST> accumulator(
      input.anchors_of(block), {output, tiling, input, block, chunk}, *ring.cursor.keys);

#pragma unroll 1
  for (int tile = 1 - ring.STAGES; tile < ring.tiles; ++tile) {
    ring.advance(tile);
    if (tile < 0) continue;
    const T* pixels = Stage<T, CHANNELS_LAST, true>::channel(ring.stage(tile));
    const int* keys = ring.keys(tile);
    const Keys<T> of_tile(keys, accumulator.key);
#pragma unroll 1
    for (int g = 0; g < Keys<T>::GROUPS; ++g) {
      accumulator.consume(pixels, keys, of_tile, g);
      pixels += 32 * Stage<T, CHANNELS_LAST, true>::PIXEL;
      keys += 32;
    }
  }
  accumulator.writer.finish(accumulator.key, accumulator.totals.total());
}

}  // namespace anchorops::cuda
