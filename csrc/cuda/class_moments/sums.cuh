// Class moments, the second stage: a warp adds the tiles of its chunk.
//
// A lane adds its own two channels alone, so no two threads ever add to the same number. All lanes
// are at the same pixel, so branches that depend on its key are the same in all lanes. The sums of
// a key are in the chunk's partials. Shared memory is their cache: key k has slot k modulo the
// number of slots. If eight pixels have the same key, they are added in registers first.
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
struct Sums {
  using From = FeatureTile<T, IN_ROWS>;
  // Floats of a slot: sums and anchors of all channels, a squared distance for each lane.
  static constexpr int SLOT = HAS_ANCHORS ? 2 * CHANNELS + 32 : CHANNELS;
  // Random groups without anchors, of which there are many keys, have 80.
  static constexpr int MOST = (20 << 10) / (SLOT * sizeof(float));
  static_assert(MOST == (HAS_ANCHORS ? 32 : 80));

  static constexpr __host__ __device__ int count(int num_keys) { return min(num_keys, MOST); }
  static constexpr size_t bytes(int num_keys) {
    return ((count(num_keys) + 1) * SLOT + count(num_keys)) * sizeof(float);
  }

  const Input<T>& in;
  const Partials& partials;
  const int lane = threadIdx.x, chunk, block, blocks, slots;
  float* const memory;     // [slots + 1][SLOT]; the last is that of ignored pixels
  int* const key_of_slot;  // [slots]
  unsigned met = 0;        // bit i: whether key 32·i + lane has come; there are at most 1024
  float distance = 0;      // the squared distance of slot `lane`, without what is in `sqdists`

  __device__ Sums(const Input<T>& in, const Partials& partials, int chunk, int block, int blocks,
                  void* shared)
      : in(in),
        partials(partials),
        chunk(chunk),
        block(block),
        blocks(blocks),
        slots(count(in.num_keys)),
        memory(static_cast<float*>(shared)),
        key_of_slot(reinterpret_cast<int*>(memory + (slots + 1) * SLOT)) {
    for (int i = lane; i < (slots + 1) * SLOT; i += 32) memory[i] = 0;
    for (int s = lane; s < slots; s += 32) key_of_slot[s] = -1;
    __syncwarp();
  }

  // Values of a slot for the lane's channels.
  __device__ float2& sums(int slot) const {
    return reinterpret_cast<float2*>(memory + slot * SLOT)[lane];
  }
  __device__ float2& anchors(int slot) const {
    return reinterpret_cast<float2*>(memory + slot * SLOT + CHANNELS)[lane];
  }
  __device__ float& sqdists(int slot) const { return memory[slot * SLOT + 2 * CHANNELS + lane]; }

  // In the partials.
  __device__ int64_t position(int key) const {
    return (int64_t{chunk} * in.num_keys + key) * blocks + block;
  }

  // Adds the squared distances of all lanes. Squares of bfloat16 numbers have few bits: added one
  // by one to the total of a whole chunk, they would all be rounded in the same direction.
  __device__ void gather(int slot) {
    const float total = sum_of_warp(sqdists(slot));
    if (lane == slot) distance += total;
    sqdists(slot) = 0;
  }

  __device__ void write(int slot) {
    const int key = key_of_slot[slot];
    if (key < 0) return;
    partials.sums[position(key) * 32 + lane] = sums(slot);
    if constexpr (HAS_ANCHORS) {
      gather(slot);
      if (lane == slot) partials.sqdists[position(key)] = distance;
    }
  }

  // Gives the slot to the key.
  __device__ void replace(int slot, int key) {
    write(slot);
    const bool again = __shfl_sync(FULL_WARP, met, key % 32) >> key / 32 & 1;
    sums(slot) = again ? partials.sums[position(key) * 32 + lane] : float2{};
    if constexpr (HAS_ANCHORS) {
      if (lane == slot) distance = again ? partials.sqdists[position(key)] : 0;
      const int64_t row = in.num_keys == in.num_classes ? key : key / in.groups % in.num_classes;
      const auto of = [&](int j) {
        const int d = channel_of(block, in.period, lane, j, IN_ROWS);
        return d < in.view.dim ? __ldg(in.anchors + row * in.view.dim + d) : 0;
      };
      anchors(slot) = {of(0), of(1)};
    }
    if (lane == key % 32) met |= 1u << key / 32;
    __syncwarp();  // all lanes have read key_of_slot
    if (lane == 0) key_of_slot[slot] = key;
    __syncwarp();
  }

  __device__ void add(int slot, const float2& x, float q) const {
    const float2 sum = sums(slot);
    const float sqdist = HAS_ANCHORS ? sqdists(slot) : 0;
    sums(slot) = {sum.x + x.x, sum.y + x.y};
    if constexpr (HAS_ANCHORS) sqdists(slot) = sqdist + q;
  }

  // q + ‖x − a‖² in the lane's channels.
  static __device__ float square(const float2& x, const float2& a, float q) {
    if constexpr (HAS_ANCHORS) q = fmaf(x.y - a.y, x.y - a.y, fmaf(x.x - a.x, x.x - a.x, q));
    return q;
  }

  // A segment of one key.
  __device__ void add_run(int slot, const float2 (&x)[SEGMENT]) const {
    const float2 a = HAS_ANCHORS ? anchors(slot) : float2{};
    float2 sum = {};
    float q[2] = {};
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i) {
      q[i % 2] = square(x[i], a, q[i % 2]);
      sum.x += x[i].x, sum.y += x[i].y;
    }
    add(slot, sum, q[0] + q[1]);
  }

  // A segment of several keys.
  __device__ void add_pixels(const int* slots_of_pixels, const float2 (&x)[SEGMENT]) const {
    int at[SEGMENT];
    float q[SEGMENT];
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i) {
      at[i] = load_vector(slots_of_pixels + i / 4 * 4).elements[i % 4];
      q[i] = square(x[i], HAS_ANCHORS ? anchors(at[i]) : float2{}, 0);
    }
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i) add(at[i], x[i], q[i]);
  }

  // 32 pixels, whose slots are in shared memory too.
  __device__ void add_part(const From& tile, int part, unsigned changes) const {
#pragma unroll 1
    for (int first = part; first < part + 32; first += SEGMENT, changes >>= SEGMENT) {
      float2 x[SEGMENT];
      tile.load(first, lane, x);
      if ((changes & ((1 << SEGMENT) - 2)) == 0)
        add_run(tile.keys[first], x);
      else
        add_pixels(tile.keys + first, x);
    }
  }

  // Adds 32 pixels at once, unless two keys need the same slot: then one key after the other.
  __device__ void add_tile(From& tile) {
#pragma unroll 1
    for (int part = 0; part < From::PIXELS; part += 32) {
      const int key = tile.keys[part + lane], own = in.num_keys > MOST ? key % MOST : key;
      bool left = key >= 0;
      do {
        unsigned missing = __ballot_sync(FULL_WARP, left && key_of_slot[own] != key);
        while (missing) {
          const int i = __ffs(static_cast<int>(missing)) - 1;
          const int slot = __shfl_sync(FULL_WARP, own, i);
          replace(slot, __shfl_sync(FULL_WARP, key, i));
          missing &= ~__ballot_sync(FULL_WARP, own == slot);
        }
        const bool now = left && key_of_slot[own] == key;
        const int slot = now ? own : slots, before = __shfl_up_sync(FULL_WARP, slot, 1);
        tile.keys[part + lane] = slot;
        __syncwarp();
        add_part(tile, part, __ballot_sync(FULL_WARP, slot != before));
        __syncwarp();  // all lanes have read the slots
        left = left && !now;
      } while (__any_sync(FULL_WARP, left));
    }
  }

  __device__ void finish() {
#pragma unroll 4
    for (int s = 0; s < slots; ++s) write(s);
    if (block >= in.period) return;  // other blocks have the same pixels
    for (int k = lane; k < in.num_keys; k += 32)
      partials.met[(int64_t{chunk} * in.period + block) * in.num_keys + k] = met >> k / 32 & 1;
  }
};

template <class T, bool HAS_ANCHORS, bool IN_ROWS>
__global__ void __launch_bounds__(32, 16)
    class_moments_kernel(const Input<T> in, const Tiling tiling, const Partials partials) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto* const stages = reinterpret_cast<FeatureTile<T, IN_ROWS>*>(shared);
  const int block = blockIdx.x % tiling.blocks, chunk = blockIdx.x / tiling.blocks;
  const unsigned tiles = static_cast<unsigned>(tiling.tiles_per_chunk) + (chunk < tiling.longer);
  Copies<T, IN_ROWS> copies(in, tiling, chunk, block);
  Sums<T, HAS_ANCHORS, IN_ROWS> sums(in, partials, chunk, block, tiling.blocks, stages + STAGES);
#pragma unroll 1
  for (unsigned next = 0; next < tiles + STAGES - 1; ++next) {
    __syncwarp();  // all lanes have read the stage that is overwritten now
    if (next < tiles) {
      copies.start(stages[next % STAGES]);
      copies.next();
    }
    commit_copies();
    wait_for_copies<STAGES - 1>();  // of the lane
    __syncwarp();                   // and those of the others
    if (next >= STAGES - 1) sums.add_tile(stages[(next + 1) % STAGES]);
    if (HAS_ANCHORS && (next + 1) % (1024 / PIXELS<T>) == 0) {
#pragma unroll 4
      for (int slot = 0; slot < sums.slots; ++slot) sums.gather(slot);
    }
  }
  sums.finish();
}

}  // namespace anchorops::cuda
