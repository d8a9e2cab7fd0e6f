// The products on tensor cores of a tile whose pixels have several keys: the sums for each slot are
// the one-hot matrix of the pixels' slots, times the features. The squared distance of each pixel
// to its own anchor is first added over the channels, and then for each slot by the same kind of
// product.
#pragma once

#include "../../matrices.cuh"
#include "factors.cuh"
#include "policy.cuh"
#include "slots.cuh"
#include "special_pixels.cuh"
#include "tiles.cuh"

namespace anchorops::cuda {

template <class T, int STATISTICS, int LAYOUT>
struct MixedTile {
  static constexpr Policy POLICY = policy_for<T, STATISTICS, LAYOUT>();
  static constexpr int GROUPS = TILE_PIXELS<T> / 32;
  using Fragment = Features<T, LAYOUT>;
  using Terms = unsigned[4 * GROUPS][3];

  Slots<STATISTICS>& slots;
  T* const tile;
  int* const keys;

  // Adds the pixels that have a slot. pixel_slots: those of the lane's two pixels, as placed.
  __device__ __forceinline__ void add(int2 pixel_slots) {
    const auto [has_lower, has_upper] = halves_of(pixel_slots);
    Fragment x[GROUPS];
    Vector<unsigned> codes[GROUPS];
    float squares[GROUPS][8];
#pragma unroll 1
    for (bool all_finite = false;; all_finite = true) {
      __syncwarp();
      bool finite = true;
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        codes[g] = slots.pairs(g);
        x[g] = group(g);
        if constexpr (STATISTICS & SQDISTS)
          finite &= square(x[g], codes[g], squares[g]) < LARGEST_SQUARE;
        else
          finite &= x[g].are_finite();
      }
      if (all_finite || __ballot_sync(FULL_WARP, finite) == FULL_WARP) break;
      SpecialPixels<T, STATISTICS, LAYOUT>::take_out(slots, tile, keys);
    }
    const OneHot<GROUPS> one_hot(codes, 0);
    if constexpr (STATISTICS & SQDISTS) {
      Terms terms;
#pragma unroll
      for (int i = 0; i < 4 * GROUPS; ++i)
        split(squares[i / 4][i % 4 * 2], squares[i / 4][i % 4 * 2 + 1], terms[i]);
      add_squares<0>(one_hot, terms);  // without a branch they overlap with what is before
      if (has_upper) add_squares<1>(upper_slots(), terms);
    }
    if constexpr (STATISTICS & SUMS) {
      if (has_lower) {
        if constexpr (POLICY.reloads_features) load(x);
        add_features<0>(one_hot, x);
      }
      if (has_upper) {
        load(x);
        add_features<1>(upper_slots(), x);
      }
    }
  }

 private:
  // Whether products with the lower and with the upper half of the slots are needed.
  struct Halves {
    bool lower, upper;
  };
  __device__ __forceinline__ Halves halves_of(int2 pixel_slots) const {
    constexpr int HALF = PRODUCT_SLOTS;
    if (!POLICY.skips_upper_slots || slots.used <= HALF) return {true, slots.used > HALF};
    return {!POLICY.skips_lower_slots ||
                __ballot_sync(FULL_WARP, pixel_slots.x < HALF || pixel_slots.y < HALF) != 0,
            __ballot_sync(FULL_WARP, pixel_slots.x / HALF == 1 || pixel_slots.y / HALF == 1) != 0};
  }

  __device__ __forceinline__ Fragment group(int g) const {
    return Fragment(tile + TileLayout<T, LAYOUT>::offset(0, 32 * g));
  }
  // Slots and features are read again from shared memory, because there are too few registers to
  // keep them.
  __device__ __forceinline__ OneHot<GROUPS> upper_slots() const {
    __syncwarp();
    Vector<unsigned> codes[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) codes[g] = slots.pairs(g);
    return {codes, PRODUCT_SLOTS};
  }
  __device__ __forceinline__ void load(Fragment (&x)[GROUPS]) const {
    __syncwarp();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) x[g] = group(g);
  }

  // The squared distances of the lane's pixels, added over the lane's channels. Returns the sum of
  // all of them.
  __device__ __forceinline__ float square(const Fragment& x, const Vector<unsigned>& codes,
                                          float (&squares)[8]) const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned pair = codes.elements[i / 2];
      const unsigned code = i % 2 ? pair >> 16 : pair & 0xffff;
      const Vector<float> anchor = load_vector(reinterpret_cast<const float*>(
          reinterpret_cast<const unsigned char*>(slots.anchors + slots.lane / 4 * 4) + code));
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
  __device__ __forceinline__ void add_squares(const OneHot<GROUPS>& one_hot, const Terms& terms) {
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
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      unsigned terms[4 * GROUPS][Fragment::TERMS];
      float sums[4], rest[4];
#pragma unroll
      for (int i = 0; i < 4 * GROUPS; ++i) x[i / 4].terms(j, i % 4, terms[i]);
      one_hot.template multiply<typename Fragment::Element>(terms, sums, rest);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        slots.totals.sums[j][M][i] += Fragment::TERMS > 1 ? sums[i] + rest[i] : sums[i];
    }
  }
};

}  // namespace anchorops::cuda
