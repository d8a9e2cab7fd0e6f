// Tiles of features in shared memory: 32 channels, one for each lane of a warp, by as many pixels
// as make 8 KB. Contiguous memory in a plane (or, with channels last, in a pixel) is copied
// asynchronously, 16 bytes at a time; other strides and misaligned views, element by element.
#pragma once

#include <cstring>
#include <type_traits>

#include "tensors.cuh"

namespace anchorops::cuda {

constexpr int CHANNELS = 32;  // of a block, which is one warp
constexpr int STAGES = 2;     // of the ring of tiles: one is read while the other is copied
constexpr int BATCH = 16;     // elements that a lane loads before it waits for the first

template <class T>
constexpr int TILE = 256 / static_cast<int>(sizeof(T));  // pixels

// The arguments of a kernel of class moments. A chunk is a range of tiles; pixels sorted by key are
// a single line.
template <class T>
struct Problem {
  const T* features;       // [B, D, P] by strides
  const int32_t* keys;     // int32 [B, P], −1 where ignored
  const int64_t* offsets;  // SORTED: int64 [B·P], where each pixel's features begin
  const float* anchors;    // float32 [K, D]
  float* sums;             // float32 [chunks, num_keys, D]; SORTED: [num_keys, D]
  float* residuals;        // the same
  float* sqdists;          // float32 [chunks, blocks, num_keys]; SORTED: [blocks, num_keys]
  float* sums_ends;        // SORTED: float32 [2·chunks, D], the first and the last key of a chunk
  float* residuals_ends;   // the same
  float* sqdists_ends;     // SORTED: float32 [2·chunks, blocks]
  Pixels view;
  int64_t tiles, tiles_per_chunk;
  int tiles_per_line, last_tile;  // pixels in the last tile of a line
  int num_keys, num_classes, groups;
  int chunks, blocks;         // of channels
  int sqdists_columns;        // of a key in shared memory: 32, or 8 or 1 to save space
  bool vectors, key_vectors;  // whether 16 bytes of features, of keys, can be copied at once
};

// Exact, with one instruction for each element: the high half of a word needs no shift.
template <class T>
__device__ __forceinline__ void widen(const Vector<T>& vector, float (&x)[Vector<T>::SIZE]) {
  unsigned words[4];
  memcpy(words, &vector, sizeof words);
#pragma unroll
  for (int i = 0; i < Vector<T>::SIZE; ++i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const unsigned word = words[i / 2];
      x[i] = __uint_as_float(i % 2 ? word & 0xffff0000 : word << 16);
    } else {
      x[i] = static_cast<float>(vector.elements[i]);
    }
  }
}

// The layout of a tile in shared memory: [channel][pixel], with rows padded to use different banks;
// with channels last [pixel][channel].
template <class T, bool CHANNELS_LAST>
struct Stage {
  static constexpr int SEGMENT = Vector<T>::SIZE;  // pixels that are read at once
  static constexpr int ROWS = CHANNELS_LAST ? TILE<T> : CHANNELS;
  static constexpr int COLUMNS = CHANNELS_LAST ? CHANNELS : TILE<T>;
  static constexpr int PITCH = CHANNELS_LAST ? COLUMNS : COLUMNS + SEGMENT;
  static constexpr int ELEMENTS = ROWS * PITCH;
  static constexpr int BYTES = ELEMENTS * static_cast<int>(sizeof(T));

  static __device__ __forceinline__ void read(const T* stage, int pixel, float (&x)[SEGMENT]) {
    const int lane = threadIdx.x;
    if constexpr (CHANNELS_LAST) {
#pragma unroll
      for (int i = 0; i < SEGMENT; ++i)
        x[i] = static_cast<float>(stage[(pixel + i) * PITCH + lane]);
    } else {
      widen(load_vector(stage + lane * PITCH + pixel), x);
    }
  }
};

// Iterates over the tiles of a chunk.
template <class T, bool SORTED>
struct Cursor {
  const Problem<T>& problem;
  const int64_t channel;  // the block's first
  int64_t line;
  int tiles_left;       // in the line
  const T* features;    // of the tile's first pixel and the block's first channel
  const int32_t* keys;  // of the tile's first pixel

  __device__ Cursor(const Problem<T>& problem, int64_t channel, int64_t tile)
      : problem(problem), channel(channel), line(tile / problem.tiles_per_line) {
    enter_line(static_cast<int>(tile % problem.tiles_per_line));
  }
  __device__ void enter_line(int tile) {
    const Pixels& view = problem.view;
    tiles_left = problem.tiles_per_line - tile;
    const int64_t pixel = int64_t{tile} * TILE<T>;
    features = problem.features + channel * view.stride_d;
    if constexpr (!SORTED) features += view.line_offset(line) + pixel * view.stride_p;
    keys = problem.keys + line * view.pixels + pixel;
  }
  __device__ __forceinline__ void next() {
    if (--tiles_left == 0) {
      ++line;
      return enter_line(0);
    }
    if constexpr (!SORTED) features += TILE<T> * problem.view.stride_p;
    keys += TILE<T>;
  }
  __device__ __forceinline__ int pixels() const {
    return tiles_left == 1 ? problem.last_tile : TILE<T>;
  }
  // The offset of the pixel's features from `features`.
  __device__ __forceinline__ int64_t offset(int pixel) const {
    if constexpr (!SORTED) return pixel * problem.view.stride_p;
    return pixel < pixels() ? problem.offsets[keys - problem.keys + pixel] : 0;
  }
};

// Copies keys of a tile, −1 beyond the pixels, and its features, 0 beyond the pixels and channels.
template <class T, bool CHANNELS_LAST, bool SORTED>
__device__ __forceinline__ void fill_stage(T* stage, int* keys, const Cursor<T, SORTED>& cursor) {
  using Shape = Stage<T, CHANNELS_LAST>;
  constexpr int SEGMENT = Shape::SEGMENT, PITCH = Shape::PITCH;
  constexpr int VECTORS = Shape::COLUMNS / SEGMENT, STEP = 32 / VECTORS;  // rows copied at once
  const Problem<T>& problem = cursor.problem;
  const Pixels& view = problem.view;
  const int lane = threadIdx.x, pixels = cursor.pixels();
  const int channels = static_cast<int>(min(view.dim - cursor.channel, int64_t{CHANNELS}));

  if (problem.key_vectors && pixels == TILE<T>) {
    if (lane * 4 < TILE<T>) copy_async(keys + lane * 4, cursor.keys + lane * 4);
  } else {
    for (int i = lane; i < TILE<T>; i += 32) keys[i] = i < pixels ? cursor.keys[i] : -1;
  }

  const int row = lane / VECTORS, column = lane % VECTORS * SEGMENT;
  const int64_t row_stride = CHANNELS_LAST ? view.stride_p : view.stride_d;
  if (problem.vectors && (CHANNELS_LAST || !SORTED)) {
    T* const to = stage + row * PITCH + column;
    if (pixels == TILE<T> && channels == CHANNELS) {
      const T* from = cursor.features + column + (SORTED ? 0 : row * row_stride);
#pragma unroll
      for (int i = 0; i < Shape::ROWS; i += STEP)
        copy_async(to + i * PITCH, from + (SORTED ? cursor.offset(row + i) : i * row_stride));
    } else {
      const int rows = CHANNELS_LAST ? pixels : channels, columns = pixels + channels - rows;
      const int bytes = max(min(columns - column, SEGMENT), 0) * static_cast<int>(sizeof(T));
      const T* from = cursor.features + (bytes > 0 ? column : 0);
#pragma unroll 1
      for (int i = 0; i < Shape::ROWS; i += STEP)
        copy_async(to + i * PITCH,
                   from + (SORTED ? cursor.offset(row + i) : (row + i) * row_stride),
                   row + i < rows ? bytes : 0);
    }
    return;
  }

  // A lane has one pixel and iterates over the channels; with channels last, the other way round.
#pragma unroll 1
  for (int first = 0; first < Shape::COLUMNS; first += 32) {
    const int column = first + lane;
    const T* from = cursor.features + (CHANNELS_LAST ? lane : cursor.offset(column));
#pragma unroll 1
    for (int batch = 0; batch < Shape::ROWS; batch += BATCH) {
      T values[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int row = batch + i;
        const bool inside =
            (CHANNELS_LAST ? row : column) < pixels && (CHANNELS_LAST ? column : row) < channels;
        const int64_t offset = CHANNELS_LAST ? cursor.offset(row) : row * row_stride;
        values[i] = inside ? from[offset] : T(0.f);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) stage[(batch + i) * PITCH + column] = values[i];
    }
  }
}

}  // namespace anchorops::cuda
