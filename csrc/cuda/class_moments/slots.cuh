// A warp sums at most 32 keys at a time. Each of these keys has a slot. A slot is a row of the
// products on tensor cores: the one-hot matrix of the pixels' slots, times the features. The totals
// of the slots are in registers, their anchors in shared memory. If all slots are taken and
// another key comes, the totals are added to the chunk's partials in global memory, and all slots
// are free again. Therefore the time does not depend on where runs begin. It depends on the number
// of keys: more than 16 need a second product, and with more keys than slots these are freed again
// and again.
#pragma once

#include <cstdint>

#include "../warps.cuh"
#include "arguments.cuh"

namespace anchorops::cuda {

constexpr int SLOTS = 32, NO_SLOT = SLOTS;
constexpr int PRODUCT_SLOTS = 16;  // of one product: the lower or the upper half of the slots
// Elements from the anchor of one slot to the next; NO_SLOT has zeros. Channel 8·j + n is at
// 4·n + j. The padding puts neighbouring slots into different banks.
constexpr int ANCHOR_PITCH = CHANNELS + 8;
constexpr uint8_t NOT_MET = 255, IN_PARTIALS = 254;  // keys without a slot

// The code of a slot has 16 bits. It is the offset of the slot's anchor in bytes. Read as a
// bfloat16 number it is finite, and different for each slot.
__host__ __device__ constexpr unsigned slot_code(int slot) {
  return slot * ANCHOR_PITCH * sizeof(float);
}

// The totals of the slots. [j][m] is a product C (matrices.cuh) of slots 16·m to 16·m + 15 and
// channels 8·j to 8·j + 7. So lane 4n + q has eight channels of slots 16·m + 8·h + n, and a part of
// their squared distances.
struct SlotTotals {
  using Products = float[4][SLOTS / PRODUCT_SLOTS][4];
  Products sums = {};
  float sqdists[SLOTS / PRODUCT_SLOTS][2] = {};  // [m][h]

  // The lane's i-th channel.
  static __device__ __forceinline__ float& at(Products& values, int m, int h, int i) {
    return values[i / 2][m][2 * h + i % 2];
  }
};
// From the first of a lane's eight channels, 2q, to the i-th.
__device__ constexpr int channel_of_lane(int i) { return i / 2 * 8 + i % 2; }

template <int STATISTICS>
struct Slots {
  static constexpr int ANCHORS_BYTES =
      STATISTICS & SQDISTS ? (SLOTS + 1) * ANCHOR_PITCH * int{sizeof(float)} : 0;
  static constexpr int CODES_BYTES = 64 * sizeof(uint16_t), KEYS_BYTES = SLOTS * sizeof(int2);
  static constexpr int64_t bytes(int64_t num_keys) {
    return ANCHORS_BYTES + CODES_BYTES + KEYS_BYTES + 1 + num_keys;
  }

  const Partials partials;
  const ChannelAnchors all_anchors;
  const int chunk, block, blocks, num_keys, width, lane = threadIdx.x;
  float* const anchors;        // float32 [SLOTS + 1, ANCHOR_PITCH]
  unsigned* const codes;       // of the tile's pixels' slots, in the order of place()
  int2* const keys;            // [SLOTS]: the key, and whether the partials contain it
  uint8_t* const slot_of_key;  // [1 + num_keys], slots of keys from −1 on; points to key 0
  int used = 0;
  SlotTotals totals;

  template <class T>
  __device__ Slots(const Partials& partials, const Tiling& tiling, const Input<T>& input, int block,
                   int chunk, unsigned char* memory)
      : partials(partials),
        all_anchors(input.anchors_of(block)),
        chunk(chunk),
        block(block),
        blocks(tiling.blocks),
        num_keys(input.num_keys),
        width(partials.width),
        anchors(reinterpret_cast<float*>(memory)),
        codes(reinterpret_cast<unsigned*>(memory + ANCHORS_BYTES)),
        keys(reinterpret_cast<int2*>(memory + ANCHORS_BYTES + CODES_BYTES)),
        slot_of_key(memory + ANCHORS_BYTES + CODES_BYTES + KEYS_BYTES + 1) {
    keys[lane] = {0, 0};
    for (int k = lane - 1; k < num_keys; k += 32) slot_of_key[k] = k < 0 ? NO_SLOT : NOT_MET;
    clear_anchors();
    __syncwarp();
  }

  // The slot's anchor in the lane's channel.
  __device__ __forceinline__ float& anchor(int slot) const {
    return anchors[slot * ANCHOR_PITCH + lane % 8 * 4 + lane / 8];
  }

  // Free slots have anchors of 0: 0 pixels times an anchor that is not finite would be NaN.
  __device__ __forceinline__ void clear_anchors() const {
    if constexpr (STATISTICS & SQDISTS)
      for (int s = 0; s <= SLOTS; ++s) anchor(s) = 0;
  }

  // Returns the slots of two keys of each lane; new keys get free slots. Returns NO_SLOT for key
  // −1, and if all slots are taken.
  __device__ __forceinline__ int2 find(int first_key, int second_key) {
    int2 slots = {slot_of_key[first_key], slot_of_key[second_key]};
    if (__ballot_sync(FULL_WARP, max(slots.x, slots.y) > NO_SLOT)) {
      const int first = used;
      assign(first_key);
      assign(second_key);
      if constexpr (STATISTICS & SQDISTS) {
        const int row = all_anchors.row_of_key(keys[lane].x);
#pragma unroll 4
        for (int s = first; s < used; ++s)
          anchor(s) = all_anchors.at(__shfl_sync(FULL_WARP, row, s));
        __syncwarp();
      }
      slots = {min(int{slot_of_key[first_key]}, NO_SLOT),
               min(int{slot_of_key[second_key]}, NO_SLOT)};
    }
    return slots;
  }

  // Stores the codes of the lane's two pixels. The halves of [group][q][i] are the codes of pixels
  // 8·i + 2q and 8·i + 2q + 1 of the group.
  __device__ __forceinline__ void place(int2 pixel_slots) const {
    codes[lane / 16 * 16 + lane % 4 * 4 + lane % 16 / 4] =
        slot_code(pixel_slots.y) << 16 | slot_code(pixel_slots.x);
  }
  __device__ __forceinline__ Vector<unsigned> pairs(int group) const {
    return load_vector(codes + group * 16 + lane % 4 * 4);
  }
  __device__ __forceinline__ uint16_t& code(int pixel) const {
    const int pair = pixel / 32 * 16 + pixel % 8 / 2 * 4 + pixel % 32 / 8;
    return reinterpret_cast<uint16_t*>(codes)[2 * pair + pixel % 2];
  }

  // The first lane of all lanes with the same key assigns its slot.
  __device__ __forceinline__ void assign(int wanted) {
    const unsigned before_lane = (1u << lane) - 1;
    const int state = slot_of_key[wanted];
    const unsigned same = __match_any_sync(FULL_WARP, wanted);
    const unsigned all = __ballot_sync(FULL_WARP, state > NO_SLOT && (same & before_lane) == 0);
    const int slot = used + __popc(all & before_lane);
    __syncwarp();
    if (all >> lane & 1 && slot < SLOTS) {
      keys[slot] = {wanted, state == IN_PARTIALS};
      slot_of_key[wanted] = static_cast<uint8_t>(slot);
    }
    used = min(used + __popc(all), SLOTS);
    __syncwarp();
  }

  // Adds a pixel whose key has no slot to the partials. value: of the lane's channel.
  __device__ __forceinline__ void add_to_partials(int key, float value) const {
    const bool add = slot_of_key[key] == IN_PARTIALS;
    const auto store = [&](float* at, float term) { *at = add ? *at + term : term; };
    const int channel = block * CHANNELS + thread_again();
    const int64_t at = (int64_t{chunk} * num_keys + key) * width + channel;
    const bool inside = channel < width;
    if constexpr (STATISTICS & SUMS)
      if (inside) store(partials.sums + at, value);
    if constexpr (STATISTICS & SQDISTS) {
      const float difference = value - all_anchors.at_key(key);
      const float sqdist = sum_of_warp(difference * difference);
      if (lane == 0)
        store(partials.sqdists + (int64_t{chunk} * blocks + block) * num_keys + key, sqdist);
    }
    __syncwarp();  // all lanes have read slot_of_key
    if (lane == 0) slot_of_key[key] = IN_PARTIALS;
    __syncwarp();
  }

  // Adds all totals to the partials. Afterwards all slots are free.
  __device__ __forceinline__ void evict() {
    __syncwarp();  // all lanes have read the anchors and slots
    const int first_channel = block * CHANNELS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < SLOTS / 8; ++i) {
      const int slot = 8 * i + lane / 4, m = i / 2, h = i % 2;
      const int2 key = keys[slot];
      const bool add = key.y;
      const int64_t row = int64_t{chunk} * num_keys + key.x;
      const auto store = [&](float* matrix, auto& values) {
        float* const partial = matrix + row * width + first_channel;
        float before[8];
#pragma unroll
        for (int c = 0; c < 8; ++c)
          before[c] = add && slot < used && first_channel + channel_of_lane(c) < width
                          ? partial[channel_of_lane(c)]
                          : 0;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          float& value = totals.at(values, m, h, c);
          if (slot < used && first_channel + channel_of_lane(c) < width)
            partial[channel_of_lane(c)] = before[c] + value;
          value = 0;
        }
      };
      if constexpr (STATISTICS & SUMS) store(partials.sums, totals.sums);
      if constexpr (STATISTICS & SQDISTS) {
        float total = totals.sqdists[m][h];
        totals.sqdists[m][h] = 0;
        total += __shfl_xor_sync(FULL_WARP, total, 1);
        total += __shfl_xor_sync(FULL_WARP, total, 2);
        if (slot < used && lane % 4 == 0) {
          float* const at = partials.sqdists + row - int64_t{chunk} * num_keys +
                            (int64_t{chunk} * blocks + block) * num_keys;
          *at = add ? *at + total : total;
        }
      }
    }
    if (lane < used) slot_of_key[keys[lane].x] = IN_PARTIALS;
    used = 0;
    clear_anchors();
    __syncwarp();
  }

  __device__ void finish() {
    evict();
    if (block < partials.period) {
      const int64_t row = int64_t{chunk} * partials.period + block;
      for (int k = lane; k < num_keys; k += 32)
        partials.met[row * num_keys + k] = slot_of_key[k] == IN_PARTIALS;
    }
  }
};

}  // namespace anchorops::cuda
