// Class moments, the second stage: a warp adds the tiles of its chunk.
//
// A key that comes gets a slot in shared memory: its anchor and its sums. A lane adds its own two
// channels alone, so no two threads ever add to the same number. All lanes are at the same pixel,
// so branches that depend on its key are the same in all lanes. If eight pixels have the same key,
// they are added in registers first. If all slots are taken when another key comes, all sums go to
// the chunk's partials, from which a key that comes again continues.
#pragma once

#include <cstdint>

#include "tiles.cuh"

namespace anchorops::cuda {

// Partial results of the chunks; only those of keys that a chunk has met are written.
struct Partials {
  float2* sums;    // [chunks, num_keys, blocks, 32]
  float* sqdists;  // [chunks, num_keys, blocks]
  uint8_t* met;    // [chunks, period, num_keys]
};

// Without anchors there are no squared distances.
template <class T, bool HAS_ANCHORS, bool IN_ROWS>
struct Slots {
  using From = Tile<T, IN_ROWS>;
  // Floats of a slot: sums and anchors of all channels, a squared distance for each lane.
  static constexpr int SLOT = HAS_ANCHORS ? 2 * CHANNELS + 32 : CHANNELS;
  // At least as many as there are keys in 32 pixels, and one more. Random groups without anchors,
  // of which there are many keys, have 80.
  static constexpr int MOST = (20 << 10) / (SLOT * sizeof(float)) + 1;
  static_assert(HAS_ANCHORS ? MOST == 33 : MOST > 32 && MOST < 254);
  // The slot of ignored pixels. Its sums, which may be NaN, are not used.
  static constexpr int IGNORED = 0;
  static constexpr uint8_t NOT_MET = 255, IN_PARTIALS = 254;  // keys without a slot

  static constexpr int count(int num_keys) { return num_keys < MOST ? num_keys + 1 : MOST; }
  static constexpr size_t bytes(int num_keys) {
    return count(num_keys) * (SLOT * sizeof(float) + sizeof(int)) + num_keys;
  }

  const Input<T>& in;
  const Partials& partials;
  const int lane = threadIdx.x, chunk, block, blocks, slots;
  float* const memory;         // [slots][SLOT]
  int* const key_of_slot;      // [slots]
  uint8_t* const slot_of_key;  // [num_keys]
  int used = 1;
  float distance = 0;  // the squared distance of slot lane + 1, without what is in `sqdist`

  __device__ Slots(const Input<T>& in, const Partials& partials, int chunk, int block, int blocks,
                   void* shared)
      : in(in),
        partials(partials),
        chunk(chunk),
        block(block),
        blocks(blocks),
        slots(count(in.num_keys)),
        memory(static_cast<float*>(shared)),
        key_of_slot(reinterpret_cast<int*>(memory + slots * SLOT)),
        slot_of_key(reinterpret_cast<uint8_t*>(key_of_slot + slots)) {
    for (int i = lane; i < SLOT; i += 32) memory[IGNORED * SLOT + i] = 0;
    for (int k = lane; k < in.num_keys; k += 32) slot_of_key[k] = NOT_MET;
  }

  // Values of a slot for the lane's channels.
  __device__ float2& sums(int slot) const {
    return reinterpret_cast<float2*>(memory + slot * SLOT)[lane];
  }
  __device__ float2& anchor(int slot) const {
    return reinterpret_cast<float2*>(memory + slot * SLOT + CHANNELS)[lane];
  }
  __device__ float& sqdist(int slot) const { return memory[slot * SLOT + 2 * CHANNELS + lane]; }

  // In the partials.
  __device__ int64_t position(int key) const {
    return (int64_t{chunk} * in.num_keys + key) * blocks + block;
  }

  __device__ void start(int slot) {
    const int key = key_of_slot[slot];
    const bool again = slot_of_key[key] == IN_PARTIALS;
    sums(slot) = again ? partials.sums[position(key) * 32 + lane] : float2{};
    if constexpr (HAS_ANCHORS) {
      sqdist(slot) = 0;
      if (lane == slot - 1) distance = again ? partials.sqdists[position(key)] : 0;
      const int64_t row = in.num_keys == in.num_classes ? key : key / in.groups % in.num_classes;
      const auto of = [&](int j) {
        const int d = channel_of(block, in.period, lane, j, IN_ROWS);
        return d < in.view.dim ? __ldg(in.anchors + row * in.view.dim + d) : 0;
      };
      anchor(slot) = {of(0), of(1)};
    }
  }

  // Adds the squared distances of all lanes. Squares of bfloat16 numbers have few bits: added one
  // by one to the total of a whole chunk, they would all be rounded in the same direction.
  __device__ void gather() {
    for (int s = 1; s < used; ++s) {
      const float total = sum_of_warp(sqdist(s));
      if (lane == s - 1) distance += total;
      sqdist(s) = 0;
    }
  }

  // Writes the sums of all slots to the partials. Then all are free.
  __device__ void write() {
    for (int s = 1; s < used; ++s) partials.sums[position(key_of_slot[s]) * 32 + lane] = sums(s);
    if constexpr (HAS_ANCHORS) {
      gather();
      if (lane + 1 < used) partials.sqdists[position(key_of_slot[lane + 1])] = distance;
    }
    for (int s = 1 + lane; s < used; s += 32) slot_of_key[key_of_slot[s]] = IN_PARTIALS;
    used = 1;
    __syncwarp();
  }

  // Keys of 32 pixels get slots, in the order of the pixels; slot: the one that the key has.
  __device__ void give(int key, int slot) {
    const bool first = __ffs(static_cast<int>(__match_any_sync(FULL_WARP, key))) - 1 == lane;
    unsigned all = __ballot_sync(FULL_WARP, first && slot >= slots);
    __syncwarp();  // all lanes have read slot_of_key
    if (used + __popc(all) > slots) {
      write();
      all = __ballot_sync(FULL_WARP, first && key >= 0);
    }
    const bool gets = all >> lane & 1;
    const int given = used + __popc(all & ((1u << lane) - 1)), end = used + __popc(all);
    if (gets) key_of_slot[given] = key;
    __syncwarp();
#pragma unroll 4
    for (int s = used; s < end; ++s) start(s);
    __syncwarp();
    if (gets) slot_of_key[key] = static_cast<uint8_t>(given);
    used = end;
    __syncwarp();
  }

  // Replaces the keys of 32 pixels by their slots. Returns a bit for each pixel, whether its key is
  // not that of the pixel before.
  __device__ unsigned find(int* keys) {
    const int key = keys[lane];
    int slot = key < 0 ? IGNORED : slot_of_key[key];
    if (__any_sync(FULL_WARP, slot >= slots)) {  // rarely
      give(key, slot);
      slot = key < 0 ? IGNORED : slot_of_key[key];
    }
    const int before = __shfl_up_sync(FULL_WARP, slot, 1);
    keys[lane] = slot;
    __syncwarp();  // the slots, and what the other lanes have copied
    return __ballot_sync(FULL_WARP, slot != before);
  }

  // Adds to one slot, or to different ones, of which it reads all before it writes.
  template <int COUNT>
  __device__ void add(const int (&at)[COUNT], const float2 (&x)[COUNT],
                      const float (&q)[COUNT]) const {
    float2 old[COUNT];
    float old_q[COUNT];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      old[n] = sums(at[n]);
      if constexpr (HAS_ANCHORS) old_q[n] = sqdist(at[n]);
    }
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      sums(at[n]) = {old[n].x + x[n].x, old[n].y + x[n].y};
      if constexpr (HAS_ANCHORS) sqdist(at[n]) = old_q[n] + q[n];
    }
  }

  // q + ‖x − a‖² in the lane's channels.
  static __device__ float square(const float2& x, const float2& a, float q) {
    if constexpr (HAS_ANCHORS) q = fmaf(x.y - a.y, x.y - a.y, fmaf(x.x - a.x, x.x - a.x, q));
    return q;
  }

  // A segment of one key.
  __device__ void add_run(int slot, const float2 (&x)[SEGMENT]) const {
    float2 a = HAS_ANCHORS ? anchor(slot) : float2{}, sum = {};
    float q[2] = {};
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i) {
      q[i % 2] = square(x[i], a, q[i % 2]);
      sum.x += x[i].x, sum.y += x[i].y;
    }
    add<1>({slot}, {sum}, {q[0] + q[1]});
  }

  // A segment of several keys: two pixels at a time, so that the lane waits less often.
  __device__ void add_pixels(const int* slots_of_pixels, unsigned changes,
                             const float2 (&x)[SEGMENT]) const {
    int at[SEGMENT];
    float2 a[SEGMENT];
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i) {
      at[i] = load_vector(slots_of_pixels + i / 4 * 4).elements[i % 4];
      a[i] = HAS_ANCHORS ? anchor(at[i]) : float2{};
    }
#pragma unroll
    for (int i = 0; i < SEGMENT; i += 2) {
      const float2 u = x[i], v = x[i + 1];
      const float q = square(u, a[i], 0);
      if (changes >> (i + 1) & 1)
        add<2>({at[i], at[i + 1]}, {u, v}, {q, square(v, a[i + 1], 0)});
      else
        add<1>({at[i]}, {{u.x + v.x, u.y + v.y}}, {square(v, a[i + 1], q)});
    }
  }

  __device__ void add_tile(From& tile) {
#pragma unroll 1
    for (int part = 0; part < From::PIXELS; part += 32) {
      unsigned changes = find(tile.keys + part);
#pragma unroll 1
      for (int first = part; first < part + 32; first += SEGMENT, changes >>= SEGMENT) {
        float2 x[SEGMENT];
        tile.load(first, lane, x);
        if ((changes & ((1 << SEGMENT) - 2)) == 0)
          add_run(tile.keys[first], x);
        else
          add_pixels(tile.keys + first, changes, x);
      }
    }
  }

  __device__ void finish() {
    write();
    if (block >= in.period) return;  // other blocks have the same pixels
    for (int k = lane; k < in.num_keys; k += 32)
      partials.met[(int64_t{chunk} * in.period + block) * in.num_keys + k] =
          slot_of_key[k] != NOT_MET;
  }
};

// Without the second number, of blocks on a multiprocessor, ptxas spills.
template <class T, bool HAS_ANCHORS, bool IN_ROWS>
__global__ void __launch_bounds__(32, 8)
    class_moments_kernel(const Input<T> in, const Tiling tiling, const Partials partials) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto* const stages = reinterpret_cast<Tile<T, IN_ROWS>*>(shared);
  const int block = blockIdx.x % tiling.blocks, chunk = blockIdx.x / tiling.blocks;
  const int tiles = static_cast<int>(tiling.tiles_per_chunk) + (chunk < tiling.longer);
  Copies<T, IN_ROWS> copies(in, tiling, chunk, block);
  Slots<T, HAS_ANCHORS, IN_ROWS> slots(in, partials, chunk, block, tiling.blocks, stages + STAGES);
#pragma unroll 1
  for (int tile = 1 - STAGES; tile < tiles; ++tile) {
    __syncwarp();  // all lanes have filled the slots, or read the stage that is overwritten now
    const int next = tile + STAGES - 1;
    if (next < tiles) {
      copies.start(stages[next % STAGES]);
      copies.next();
    }
    commit_copies();
    wait_for_copies<STAGES - 1>();  // of the lane; `find` has the barrier
    if (tile < 0) continue;
    slots.add_tile(stages[tile % STAGES]);
    if (HAS_ANCHORS && (tile + 1) % (256 / Tile<T, IN_ROWS>::PIXELS) == 0) slots.gather();
  }
  slots.finish();
}

}  // namespace anchorops::cuda
