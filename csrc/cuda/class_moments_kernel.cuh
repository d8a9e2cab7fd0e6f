// The pass over the features: a warp sums its 32 channels, a channel for each lane, tile after
// tile, in groups of 32 pixels. Pixels of the key that is held are added in registers. Where other
// keys come, totals go to a sink; after a group its last pixel's key is held.
//
// A group is taken in one of four ways, by what the time model says of their instructions:
// - all of the key that is held: no test of any pixel;
// - of that key and another one (a run begins, or two groups of a class alternate): both in one go;
// - of a few keys: one after the other;
// - of many: each pixel goes to the sink's tables.
#pragma once

#include "class_moments_sinks.cuh"

namespace anchorops::cuda {

// What the groups of 32 pixels of a tile hold. Bit g tells of group g whether all have the key
// before it, and whether they have that one and another. Lane g knows which of its pixels have the
// key before it, and the first other key.
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

// Sums of the key that is held, until another comes.
template <class T, int STATISTICS, bool CHANNELS_LAST, bool SORTED>
struct Accumulator {
  using Layout = Stage<T, CHANNELS_LAST>;
  using Sink = SinkOf<STATISTICS, SORTED>;
  // As many pixels are worth a test whether they have the same key, so that none is selected.
  static constexpr int TESTED = STATISTICS == SUMS ? 32 : 8;
  static constexpr unsigned ALL_TESTED = FULL_WARP >> (32 - TESTED);
  static constexpr int MANY_RUNS = 12, SCATTERED_AT_ONCE = 16;  // of 32 pixels

  const Anchors anchors;
  Sink sink;
  int key, row;
  float anchor;
  Totals<STATISTICS> totals;

  __device__ Accumulator(const Anchors& anchors, const Sink& sink, int key)
      : anchors(anchors), sink(sink), key(key), row(sink.find(key)), anchor(anchor_of(key)) {}

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
    const int lane = threadIdx.x, pixel_key = keys[lane], last_key = keys[31];
    const int before = __shfl_up_sync(FULL_WARP, pixel_key, 1);
    const unsigned begins = __ballot_sync(FULL_WARP, pixel_key != (lane ? before : key));
    if (!SORTED && __popc(begins) > MANY_RUNS) return scatter(pixels, pixel_key, last_key);
    consume_few(pixels, pixel_key, last_key);
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

  // By selection, for a pixel of another key may be infinite.
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

  // Pixels in `own` have the key that is held, all others have the other one.
  __device__ __forceinline__ void consume_two(const T* pixels, unsigned own, int other) {
    const int other_row = sink.find(other);
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
    sink.add(keep ? other : key, keep ? other_row : row, select(keep, other_sums, sums));
    totals = {select(keep, sums, other_sums)};
    key = keep ? key : other;
    row = keep ? row : other_row;
    anchor = keep ? anchor : other_anchor;
  }

  // Another key, from here on.
  __device__ __forceinline__ void hold(int next) {
    sink.add(key, row, totals.total());
    totals = {};
    key = next;
    row = sink.find(key);
    anchor = anchor_of(key);
  }

  static __device__ __forceinline__ Sums select(bool first, const Sums& a, const Sums& b) {
    return {first ? a.sum : b.sum, first ? a.sqdist : b.sqdist, first ? a.residual : b.residual};
  }

  __device__ __forceinline__ void scatter(const T* pixels, int pixel_key, int last_key) {
    if constexpr (!SORTED) {
      const bool in_tables = sink.begin_scatter(pixel_key, anchors.row_of_key(pixel_key));
#pragma unroll 1
      for (int i = 0; i < 32; i += SCATTERED_AT_ONCE) {
        float x[SCATTERED_AT_ONCE];
        Layout::read(pixels + i * Layout::PIXEL, x);
        sink.scatter(i, x, anchors, in_tables);
      }
      hold(last_key);
    }
  }
};

// Reads the features of its tiles, and their keys, once; writes each statistic of each key once.
template <class T, int STATISTICS, bool CHANNELS_LAST, bool SORTED>
__global__ void __launch_bounds__(CHANNELS, SORTED ? 12 : BLOCKS_PER_MULTIPROCESSOR)
    class_moments_kernel(const Input<T> input, const Tiling tiling,
                         const typename SinkOf<STATISTICS, SORTED>::Output output) {
  // Neighbouring blocks read neighbouring channels; with sorted pixels, the same planes, which then
  // stay in cache.
  constexpr bool CHUNKS_FIRST = SORTED && !CHANNELS_LAST;
  const int block = CHUNKS_FIRST ? blockIdx.x / tiling.chunks : blockIdx.x % tiling.blocks;
  const int chunk = CHUNKS_FIRST ? blockIdx.x % tiling.chunks : blockIdx.x / tiling.blocks;

  Ring<T, CHANNELS_LAST, SORTED> ring(input, tiling, block, chunk);
  Accumulator<T, STATISTICS, CHANNELS_LAST, SORTED> accumulator(
      input.anchors_of(block), {output, tiling, input, block, chunk, ring.end()},
      SORTED ? *ring.cursor.keys : -1);

#pragma unroll 1
  for (int tile = 1 - STAGES; tile < ring.tiles; ++tile) {
    ring.advance(tile);
    if (tile < 0) continue;
    const T* pixels = Stage<T, CHANNELS_LAST>::channel(ring.stage());
    const int* keys = ring.keys();
    const Keys<T> of_tile(keys, accumulator.key);
#pragma unroll 1
    for (int g = 0; g < Keys<T>::GROUPS; ++g) {
      accumulator.consume(pixels, keys, of_tile, g);
      pixels += 32 * Stage<T, CHANNELS_LAST>::PIXEL;
      keys += 32;
    }
  }
  accumulator.sink.finish(accumulator.key, accumulator.totals.total());
}

}  // namespace anchorops::cuda
