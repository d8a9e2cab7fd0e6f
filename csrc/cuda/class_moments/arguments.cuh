// What the forward kernels of class moments read and write, and how the pixels are divided. Terms:
//
// key: the class of a pixel, with its image and its random group; −1 if the pixel is ignored
// run: consecutive pixels with the same key
// tile: 32 channels of 32 or 64 neighbouring pixels, which a warp copies to shared memory at once
// stage: the shared memory of one tile; ring: the stages, which are used in turn
// segment: 16 bytes of a tile
// group: 32 pixels of a tile; in arguments of operators, the random groups of a class
// slot: one of the 32 places for the keys that a warp sums at a time
// chunk: consecutive tiles that one warp sums
// partial: the sums of one chunk; a second kernel adds the partials
// plan: how the work is divided; it depends on shapes, on the device (launch.cuh: hardware), and on
//       where planes begin in 16 bytes
#pragma once

#include <cstdint>

#include "../tensors.cuh"

namespace anchorops::cuda {

constexpr int SUMS = 1, SQDISTS = 2;  // statistics

// Layouts of features. PLANES: the pixels of a channel are contiguous; or any other strides, with
// which elements are copied one by one. ROWS: the channels of a pixel are contiguous.
// SHIFTED_PLANES: planes that do not begin at multiples of 16 bytes, see tiles.cuh.
constexpr int PLANES = 0, ROWS = 1, SHIFTED_PLANES = 2;

constexpr int CHANNELS = 32;  // of a block, which is one warp

template <class T>
constexpr int TILE_PIXELS = 4096 / CHANNELS / static_cast<int>(sizeof(T));  // 4 KB

// The anchors of a lane's channel.
struct ChannelAnchors {
  const float* first;  // in the first row
  int dim, num_classes, groups;
  bool inside, by_key;

  // The anchor of key k is row k / groups mod K; that of an ignored pixel is not used.
  __device__ __forceinline__ int row_of_key(int key) const {
    return max(by_key ? key : key / groups % num_classes, 0);
  }
  __device__ __forceinline__ float at(int row) const {
    return inside ? __ldg(first + int64_t{row} * dim) : 0;
  }
  __device__ __forceinline__ float at_key(int key) const { return at(row_of_key(key)); }
};

// A block has 32 channels: this one, and every period-th after it. The period is a power of two.
__device__ __forceinline__ int first_channel(int block, int period) {
  return (block & -period) * CHANNELS + (block & (period - 1));
}

inline int blocks_of(int64_t dim, int period) {
  return period * static_cast<int>(ceil_div(ceil_div(dim, period), CHANNELS));
}

template <class T>
struct Input {
  const T* features;     // [B, D, P] by strides
  const int32_t* keys;   // int32 [B, P], −1 where ignored
  const float* anchors;  // float32 [K, D]
  Pixels view;
  int64_t row_stride;  // from a row of a tile to the next
  int num_keys, num_classes, groups;
  bool vectors;  // whether 16 bytes of features can be copied at once
  int layout = PLANES;
  int period = 1;  // from a channel of a block to the next, 1 unless the layout is SHIFTED_PLANES

  __device__ ChannelAnchors anchors_of(int block) const {
    const int channel = first_channel(block, period) + static_cast<int>(threadIdx.x) * period;
    return {anchors + channel,  static_cast<int>(view.dim), num_classes, groups,
            channel < view.dim, num_keys == num_classes};
  }
};

// How the pixels are divided. A chunk is a range of tiles; a tile is a part of a line. The first
// `longer` chunks have one tile more than the others. The division depends on shapes, on the
// device, and on where planes begin in 16 bytes, because the result depends on the order of the
// additions.
struct Tiling {
  int64_t tiles, tiles_per_chunk;
  int longer;
  int tiles_per_line, last_tile;  // pixels in the last tile of a line, if no tile is shifted
  int chunks, blocks;             // of channels

  __device__ __forceinline__ int64_t first_tile(int chunk) const {
    return chunk * tiles_per_chunk + min(chunk, longer);
  }
};

// Partial statistics of chunks, for a kernel that adds them. Only keys that a chunk has met are
// written.
struct Partials {
  float* sums;     // float32 [chunks, num_keys, width], in the order of the blocks' channels
  float* sqdists;  // float32 [chunks, blocks, num_keys]
  uint8_t* met;    // [chunks · period, num_keys]: 0 where the blocks of a chunk met no such key
  int width;       // D, or 32 for each block if the period is not 1
  int period;      // Tiles of blocks that begin at different positions have different pixels.
};

// Launches the pass over the features, which writes the statistics of each chunk. Each dtype has a
// source file, so that the files are compiled at the same time (instances.cuh).
template <class T>
void launch_moments(int statistics, const Input<T>& input, const Tiling& tiling,
                    const Partials& partials, Stream stream);

}  // namespace anchorops::cuda
