// Tiles of features in shared memory: 32 channels by as many pixels as make 4 KB. If the pixels of
// a channel (or, in rows, the channels of a pixel) are contiguous and aligned, they are copied
// asynchronously, 16 bytes at a time. Otherwise the warp copies one element at a time.
//
// SHIFTED_PLANES: if planes are not aligned to 16 bytes (129 × 129 pixels), a block has every
// second, fourth or eighth channel, the period: their planes begin at the same position in 16
// bytes. The tiles of a line begin at multiples of 16 bytes, the first one up to seven pixels
// before the line. Elements outside the line are never read, because they may be outside the
// tensor's memory. So the first tile is copied one element at a time; of the last 16 bytes of a
// line, only those in it are copied.
#pragma once

#include <cstdint>

#include "../tensors.cuh"
#include "arguments.cuh"

namespace anchorops::cuda {

// A tile in shared memory: [channel][pixel]; in rows [pixel][channel]. A row of it is padded, so
// that rows begin in different banks.
template <class T, int LAYOUT>
struct TileLayout {
  static constexpr int SEGMENT = Vector<T>::SIZE;  // elements of 16 bytes
  static constexpr int ROW_COUNT = LAYOUT == ROWS ? TILE_PIXELS<T> : CHANNELS;
  static constexpr int COLUMNS = LAYOUT == ROWS ? CHANNELS : TILE_PIXELS<T>;
  static constexpr int PADDING = LAYOUT == ROWS || sizeof(T) == 2 ? SEGMENT : 2 * SEGMENT;
  static constexpr int PITCH = COLUMNS + PADDING;
  static constexpr int ELEMENTS = ROW_COUNT * PITCH;
  static constexpr int BYTES = ELEMENTS * static_cast<int>(sizeof(T));

  // A lane copies the segment at its column of every STEP-th row, from its first row on.
  static constexpr int LANES = COLUMNS / SEGMENT, STEP = 32 / LANES;
  static __device__ __forceinline__ int row() { return thread_again() / LANES; }
  static __device__ __forceinline__ int column() { return thread_again() % LANES * SEGMENT; }

  static __device__ __forceinline__ int offset(int channel, int pixel) {
    return LAYOUT == ROWS ? pixel * PITCH + channel : channel * PITCH + pixel;
  }
};

// Iterates over the tiles of a chunk, in global memory.
template <class T, int LAYOUT>
struct Cursor {
  using Tile = TileLayout<T, LAYOUT>;
  static constexpr bool SHIFTED = LAYOUT == SHIFTED_PLANES;
  const Input<T>& input;
  const Tiling& tiling;
  const int channel;   // the block's first
  const bool vectors;  // whether all vectors of a tile of TILE_PIXELS pixels can be copied at once
  int line;
  int tiles_left;       // in the line
  int before;           // SHIFTED: pixels by which the line's first tile begins before it
  const T* features;    // where the lane copies its first vector
  const int32_t* keys;  // of the tile's first pixel

  // There are less than 2^31 tiles and lines, and divisions of 32 bits need fewer registers.
  __device__ Cursor(const Input<T>& input, const Tiling& tiling, int channel, int tile)
      : input(input),
        tiling(tiling),
        channel(channel),
        vectors((SHIFTED || input.vectors) && channels() == CHANNELS),
        line(tile / tiling.tiles_per_line) {
    enter_line(tile % tiling.tiles_per_line);
  }
  __device__ void enter_line(int tile) {
    const Pixels& view = input.view;
    tiles_left = tiling.tiles_per_line - tile;
    int64_t pixel = int64_t{tile} * TILE_PIXELS<T>;
    const int lines_per_image = static_cast<int>(view.lines_per_image);
    features = input.features + channel * view.stride_d;
    features += line / lines_per_image * view.stride_b + line % lines_per_image * view.stride_h;
    if constexpr (SHIFTED) {
      before = reinterpret_cast<uintptr_t>(features) % sizeof(Vector<T>) / sizeof(T);
      pixel -= before;
    }
    features += pixel * view.stride_p;
    features += to_lane();
    keys = input.keys + int64_t{line} * view.pixels + pixel;
  }
  __device__ __forceinline__ void next() {
    if (--tiles_left == 0) {
      ++line;
      return enter_line(0);
    }
    features += TILE_PIXELS<T> * input.view.stride_p;
    keys += TILE_PIXELS<T>;
  }
  // Pixels begin() to end() − 1 of the tile belong to the line.
  __device__ __forceinline__ int begin() const {
    return SHIFTED && tiles_left == tiling.tiles_per_line ? before : 0;
  }
  __device__ __forceinline__ int end() const {
    if constexpr (!SHIFTED) return tiles_left == 1 ? tiling.last_tile : TILE_PIXELS<T>;
    return min(min(tiles_left - 1, 2) * TILE_PIXELS<T> + tiling.last_tile + before, TILE_PIXELS<T>);
  }
  __device__ __forceinline__ int channels() const {
    if constexpr (SHIFTED)
      return min(ceil_div(static_cast<int>(input.view.dim) - channel, input.period), CHANNELS);
    return static_cast<int>(min(input.view.dim - channel, int64_t{CHANNELS}));
  }
  // The offset of the lane's first vector from the tile's first feature.
  __device__ __forceinline__ int64_t to_lane() const {
    return Tile::column() + Tile::row() * input.row_stride;
  }
};

// Copies the keys of a tile; outside the line they are −1.
template <class T, int LAYOUT>
__device__ __forceinline__ void load_keys(int* keys, const Cursor<T, LAYOUT>& cursor, int begin,
                                          int end) {
  constexpr int PIXELS = TILE_PIXELS<T>;
  const int lane = thread_again();
  if (begin == 0 && end == PIXELS) {
#pragma unroll
    for (int i = 0; i < PIXELS; i += 32) copy_word_async(keys + i + lane, cursor.keys + i + lane);
  } else {
    for (int i = lane; i < PIXELS; i += 32) keys[i] = i >= begin && i < end ? cursor.keys[i] : -1;
  }
}

// Copies the features of pixels 0 to end − 1, 16 bytes at a time; all others become 0.
template <class T, int LAYOUT>
__device__ __forceinline__ void load_vectors(T* stage, const Cursor<T, LAYOUT>& cursor, int end) {
  using Tile = TileLayout<T, LAYOUT>;
  constexpr int STEP = Tile::STEP;
  const int64_t row_stride = cursor.input.row_stride;
  const int row = Tile::row(), column = Tile::column();
  T* const to = stage + row * Tile::PITCH + column;
  const T* const first = cursor.features - cursor.to_lane();
  const int channels = cursor.channels();
  const int rows = LAYOUT == ROWS ? end : channels, columns = end + channels - rows;
  const int bytes = max(min(columns - column, Tile::SEGMENT), 0) * static_cast<int>(sizeof(T));
  const T* from = first + (bytes > 0 ? column : 0);
#pragma unroll(LAYOUT == SHIFTED_PLANES ? Tile::ROW_COUNT / STEP : 1)
  for (int i = 0; i < Tile::ROW_COUNT; i += STEP)
    copy_async(to + i * Tile::PITCH, from + (row + i) * row_stride, row + i < rows ? bytes : 0);
}

// Copies the features of pixels begin to end − 1, one element at a time; all others become 0. A
// lane has one pixel and iterates over the channels; in rows it has one channel and iterates over
// the pixels.
template <class T, int LAYOUT>
__device__ __forceinline__ void load_elements(T* stage, const Cursor<T, LAYOUT>& cursor, int begin,
                                              int end) {
  using Tile = TileLayout<T, LAYOUT>;
  constexpr bool IN_ROWS = LAYOUT == ROWS;
  constexpr int BATCH = 16;  // elements that a lane loads before it waits for the first
  const int lane = thread_again(), channels = cursor.channels();
  const int64_t row_stride = cursor.input.row_stride, pixel_stride = cursor.input.view.stride_p;
  const T* const first = cursor.features - cursor.to_lane();
#pragma unroll 1
  for (int left = 0; left < Tile::COLUMNS; left += 32) {
    const int column = left + lane;
    const T* from = first + (IN_ROWS ? lane : column * pixel_stride);
#pragma unroll 1
    for (int batch = 0; batch < Tile::ROW_COUNT; batch += BATCH) {
      T values[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int row = batch + i, pixel = IN_ROWS ? row : column;
        const bool inside = pixel >= begin && pixel < end && (IN_ROWS ? column : row) < channels;
        const int64_t offset = row * (IN_ROWS ? pixel_stride : row_stride);
        values[i] = inside ? from[offset] : T(0.f);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) stage[(batch + i) * Tile::PITCH + column] = values[i];
    }
  }
}

// Copies the features and the keys of a tile.
template <class T, int LAYOUT>
__device__ __forceinline__ void load_tile(T* stage, int* keys, const Cursor<T, LAYOUT>& cursor) {
  using Tile = TileLayout<T, LAYOUT>;
  const int begin = cursor.begin(), end = cursor.end();
  load_keys(keys, cursor, begin, end);
  if (cursor.vectors && begin == 0 && end == TILE_PIXELS<T>) {  // nearly always
    const int64_t row_stride = cursor.input.row_stride;
    T* const to = stage + Tile::row() * Tile::PITCH + Tile::column();
#pragma unroll
    for (int i = 0; i < Tile::ROW_COUNT; i += Tile::STEP)
      copy_async(to + i * Tile::PITCH, cursor.features + i * row_stride);
  } else if ((LAYOUT == SHIFTED_PLANES || cursor.input.vectors) && begin == 0) {
    load_vectors(stage, cursor, end);
  } else {
    load_elements(stage, cursor, begin, end);
  }
}

// The tiles of a chunk, one after the other: while one is read, the next one is copied.
template <class T, int LAYOUT>
struct Ring {
  static constexpr int STAGES = 2;
  using Tile = TileLayout<T, LAYOUT>;
  static constexpr int BYTES = STAGES * (Tile::BYTES + TILE_PIXELS<T> * int{sizeof(int)});

  Cursor<T, LAYOUT> cursor;
  const int tiles;  // of the chunk

  __device__ Ring(const Input<T>& input, const Tiling& tiling, int block, int chunk)
      : cursor(input, tiling, first_channel(block, LAYOUT == SHIFTED_PLANES ? input.period : 1),
               static_cast<int>(tiling.first_tile(chunk))),
        tiles(static_cast<int>(tiling.tiles_per_chunk) + (chunk < tiling.longer)) {}

  static __device__ __forceinline__ T* stage_at(int index) {
    return reinterpret_cast<T*>(shared_memory()) + index * Tile::ELEMENTS;
  }
  static __device__ __forceinline__ int* keys_at(int index) {
    return reinterpret_cast<int*>(shared_memory() + STAGES * Tile::BYTES) + index * TILE_PIXELS<T>;
  }
  static __device__ unsigned char* end() { return shared_memory() + BYTES; }
  __device__ __forceinline__ T* stage(int tile) const { return stage_at(tile % STAGES); }
  __device__ __forceinline__ int* keys(int tile) const { return keys_at(tile % STAGES); }

  // Starts the copy of tile + STAGES − 1 and waits for the copy of this tile. The first call has
  // tile 1 − STAGES, which only starts a copy.
  __device__ __forceinline__ void advance(int tile) {
    __syncwarp();  // all lanes have read the stage that is overwritten now
    if (tile + STAGES - 1 < tiles) {
      const int free = (tile + STAGES - 1) % STAGES;
      load_tile(stage_at(free), keys_at(free), cursor);
      cursor.next();
    }
    commit_copies();
    wait_for_copies<STAGES - 1>();
    __syncwarp();
  }
};

}  // namespace anchorops::cuda
