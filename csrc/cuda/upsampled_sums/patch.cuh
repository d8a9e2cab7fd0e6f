// Patches of features: the numbers that a thread holds in registers, 8 consecutive pixels of 4
// channels. 16 lanes of a warp share the channels and hold the pixels of a tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "../tensors.cuh"
#include "splat.cuh"

namespace anchorops::cuda {

constexpr int PIXELS = 8, CHANNELS = 4;
constexpr int LANES = TILE_PIXELS / PIXELS;  // with the same channels

// Channels of a block.
constexpr int channels_of(int threads) { return threads / LANES * CHANNELS; }

// What a thread reads at once: pixels of a channel, channels of a pixel, or one number.
enum class Access { PIXELS, CHANNELS, SINGLE };

// Features (B, C, H, W) whose rows join, and the grid of their labels.
struct View {
  Grids grids;
  Access access;
  int channels, num_classes;
  int image_keys;  // the sums of image i begin at row i·image_keys
  int64_t stride_b, stride_d, stride_p;

  View(const Tensor& features, const Tensor& keys, int64_t num_classes, bool per_image)
      : grids{LabelAxis(keys.size(1), features.size(2)), LabelAxis(keys.size(2), features.size(3))},
        channels(static_cast<int>(features.size(1))),
        num_classes(static_cast<int>(num_classes)),
        image_keys(per_image ? static_cast<int>(num_classes) : 0) {
    const auto size = to_vector(features.sizes()), stride = to_vector(features.strides());
    STD_TORCH_CHECK(rows_join(size, stride), "upsampled_sums: features: rows are not adjacent");
    const Pixels pixels = as_pixels(size, stride, true);
    stride_b = pixels.stride_b;
    stride_d = pixels.stride_d;
    stride_p = pixels.stride_p;
    const bool rows = stride_d == 1 && channels % CHANNELS == 0;
    const bool planes = stride_p == 1 && grids.columns.features % PIXELS == 0;
    const bool aligned = vectors_aligned(
        features.const_data_ptr(), {stride_b, rows ? stride_p : stride_d}, features.element_size());
    access = !aligned ? Access::SINGLE
             : rows   ? Access::CHANNELS
             : planes ? Access::PIXELS
                      : Access::SINGLE;
  }

  __host__ __device__ int row_tiles() const {
    return ceil_div(grids.columns.features, TILE_PIXELS);
  }
  __host__ __device__ int tiles() const { return grids.rows.features * row_tiles(); }
};

// Where a tile is in an image, and the thread's patch in the tile.
struct Place {
  int y, x;       // of the tile's first pixel
  int pixels;     // of the patch that the row has
  int64_t pixel;  // the patch's first one

  __device__ Place(const View& view, int tile)
      : y(tile / view.row_tiles()), x(tile % view.row_tiles() * TILE_PIXELS) {
    const int width = view.grids.columns.features, first = x + first_pixel();
    pixels = min(max(width - first, 0), PIXELS);
    pixel = int64_t{y} * width + first;
  }
  // Of the thread's patch, from the first ones of a tile and of a block.
  __device__ static int first_pixel() { return static_cast<int>(threadIdx.x) % LANES * PIXELS; }
  __device__ static int first_channel() { return static_cast<int>(threadIdx.x) / LANES * CHANNELS; }
};

// Elements that are read and written at once.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T)) Elements {
  T of[COUNT];
};

// The numbers of a thread: those of a patch of the tile.
template <class T>
struct Patch {
  static constexpr int IN_WORD = sizeof(unsigned) / sizeof(T);
  unsigned words[CHANNELS][PIXELS / IN_WORD];  // so that a load is not waited for before its use

  __device__ float at(int c, int p) const {
    const unsigned word = words[c][p / IN_WORD];
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(word);
    else
      return half_to_float<T>(word, p % 2);
  }

  __device__ void convert(float (&numbers)[CHANNELS][PIXELS]) const {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) numbers[c][p] = at(c, p);
  }

  // In the order of pixels. bits: of the number, in the lower bits.
  __device__ void set(int c, int p, unsigned bits) {
    unsigned& word = words[c][p / IN_WORD];
    word = p % IN_WORD ? word | bits << 16 : bits;
  }

  // from: the first number. 0 after the last channel and the last pixel.
  __device__ void load(const T* from, const View& view, int channels, int pixels) {
    if (pixels <= 0) channels = 0;
    if (view.access == Access::PIXELS) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        const auto* of_channel = reinterpret_cast<const unsigned*>(from + c * view.stride_d);
#pragma unroll
        for (int i = 0; i < PIXELS / IN_WORD; i += 4) {
          Vector<unsigned> some = {};
          if (c < channels) some = load_streaming(of_channel + i);
#pragma unroll
          for (int j = 0; j < 4; ++j) words[c][i + j] = some.elements[j];
        }
      }
    } else if (view.access == Access::CHANNELS) {
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) {
        using Words = Elements<unsigned, CHANNELS / IN_WORD>;
        Words some = {};
        if (channels > 0 && p < pixels)
          some = *reinterpret_cast<const Words*>(from + p * view.stride_p);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          const unsigned word = some.of[c / IN_WORD];
          set(c, p, IN_WORD == 1 ? word : c % 2 ? word >> 16 : word & 0xffff);
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c, from += view.stride_d) {
        const T* next = from;
#pragma unroll
        for (int p = 0; p < PIXELS; ++p, next += view.stride_p) {
          unsigned bits = 0;
          if (c < channels && p < pixels) {
            const T number = *next;
            memcpy(&bits, &number, sizeof number);
          }
          set(c, p, bits);
        }
      }
    }
  }
};

// Writes a patch of values.
template <class T>
__device__ void store(T* to, const float (&values)[CHANNELS][PIXELS], const View& view,
                      int channels, int pixels) {
  if (channels <= 0 || pixels <= 0) return;
  if (view.access == Access::PIXELS) {
    constexpr int SIZE = Vector<T>::SIZE;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int i = 0; i < PIXELS; i += SIZE) {
        float some[SIZE];
        for (int j = 0; j < SIZE; ++j) some[j] = values[c][i + j];
        if (c < channels) store_streaming(to + c * view.stride_d + i, round_to<T>(some));
      }
  } else if (view.access == Access::CHANNELS) {
#pragma unroll
    for (int p = 0; p < PIXELS; ++p) {
      Elements<T, CHANNELS> some;
      for (int c = 0; c < CHANNELS; ++c) some.of[c] = static_cast<T>(values[c][p]);
      if (p < pixels) *reinterpret_cast<Elements<T, CHANNELS>*>(to + p * view.stride_p) = some;
    }
  } else {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c, to += view.stride_d) {
      T* next = to;
#pragma unroll
      for (int p = 0; p < PIXELS; ++p, next += view.stride_p)
        if (c < channels && p < pixels) *next = static_cast<T>(values[c][p]);
    }
  }
}

// The weights of a patch's pixels, from those of a tile.
__device__ __forceinline__ void weights_of_patch(const float* weights, float (&found)[PIXELS]) {
  weights += Place::first_pixel();
#pragma unroll
  for (int i = 0; i < PIXELS; i += Vector<float>::SIZE) {
    const auto some = load_vector(weights + i);
#pragma unroll
    for (int j = 0; j < Vector<float>::SIZE; ++j) found[i + j] = some.elements[j];
  }
}

}  // namespace anchorops::cuda
