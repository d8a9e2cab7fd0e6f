// Tiles of features in shared memory: 32 channels by as many pixels as make 4 KB. If the pixels of
// a channel (or, with channels last, the channels of a pixel) are contiguous and aligned, they are
// copied asynchronously, 16 bytes at a time. Otherwise the warp copies one element at a time.
//
// If planes are not aligned to 16 bytes (129 × 129 pixels), a block has every second, fourth or
// eighth channel, the period: their planes begin at the same position in 16 bytes. The tiles of a
// line begin at multiples of 16 bytes, the first one up to seven pixels before the line. Elements
// outside the line are never read, because they may be outside the tensor's memory. So the first
// tile is copied one element at a time; of the last 16 bytes of a line, only those in it are
// copied.
#pragma once

#include "tensors.cuh"

namespace anchorops::cuda {

constexpr int SUMS = 1, SQDISTS = 2;  // statistics

#ifdef __CUDA_ARCH__
constexpr int MAJOR = __CUDA_ARCH__ / 100;  // of the compute capability
#else
constexpr int MAJOR = 9;
#endif

// Warps of which a multiprocessor has the registers: three for each scheduler. From sm_100 on nvcc
// uses more registers: there are two where there are too few for three.
template <class T>
constexpr int warps_of(int statistics, int major = MAJOR) {
  return sizeof(T) == 4 && statistics == (SUMS | SQDISTS) && major >= 10 ? 8 : 12;
}

constexpr int CHANNELS = 32;  // of a block, which is one warp
constexpr int TILE_BYTES = 4096;
constexpr int STAGES = 2;  // of the ring: one is read while the other one is copied
constexpr int BATCH = 16;  // elements that a lane loads before it waits for the first

template <class T>
constexpr int TILE = TILE_BYTES / CHANNELS / static_cast<int>(sizeof(T));  // pixels

struct Anchors;

// The inputs of a kernel of class moments.
template <class T>
struct Input {
  const T* features;     // [B, D, P] by strides
  const int32_t* keys;   // int32 [B, P], −1 where ignored
  const float* anchors;  // float32 [K, D]
  Pixels view;
  int64_t row_stride;  // from a row of a tile to the next
  int num_keys, num_classes, groups;
  bool vectors, key_vectors;  // whether 16 bytes of features, of keys, can be copied at once
  int period = 1;             // from a channel of a block to the next; see first_channel
  bool shifted = false;       // whether tiles begin at multiples of 16 bytes, not where lines begin

  __device__ Anchors anchors_of(int block) const;
};

// A block has 32 channels: this one, and every period-th after it. The period is a power of two.
__device__ __forceinline__ int first_channel(int block, int period) {
  return (block & -period) * CHANNELS + (block & (period - 1));
}

inline int blocks_of(int64_t dim, int period) {
  return period * static_cast<int>(ceil_div(ceil_div(dim, period), CHANNELS));
}

// How the pixels are divided. A chunk is a range of tiles; a tile is a part of a line. The first
// `longer` chunks have one tile more than the others. The
// division depends on shapes, on the device, and on where planes begin in 16 bytes, because the
// result depends on the order of the additions.
struct Tiling {
  int64_t tiles, tiles_per_chunk;
  int longer;
  int tiles_per_line, last_tile;  // pixels in the last tile of a line, if no tile is shifted
  int chunks, blocks;             // of channels

  __device__ __forceinline__ int64_t first_tile(int chunk) const {
    return chunk * tiles_per_chunk + min(chunk, longer);
  }
  // The same tiles in another number of chunks.
  Tiling in_chunks(int64_t wanted) const {
    Tiling other = *this;
    other.chunks = static_cast<int>(std::clamp<int64_t>(wanted, 1, tiles));
    other.tiles_per_chunk = tiles / other.chunks;
    other.longer = static_cast<int>(tiles % other.chunks);
    return other;
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

// The anchors of a lane's channel.
struct Anchors {
  const float* of_channel;  // at the first row
  int dim, num_classes, groups;
  bool inside, by_key;

  // The anchor of key k is row k / groups mod K; that of an ignored pixel is not used.
  __device__ __forceinline__ int row_of_key(int key) const {
    return max(by_key ? key : key / groups % num_classes, 0);
  }
  __device__ __forceinline__ float at(int row) const {
    return inside ? __ldg(of_channel + int64_t{row} * dim) : 0;
  }
  __device__ __forceinline__ float of_key(int key) const { return at(row_of_key(key)); }
};

template <class T>
__device__ Anchors Input<T>::anchors_of(int block) const {
  const int channel = first_channel(block, period) + static_cast<int>(threadIdx.x) * period;
  return {anchors + channel,  static_cast<int>(view.dim), num_classes, groups,
          channel < view.dim, num_keys == num_classes};
}

// The layout of a tile in shared memory: [channel][pixel], or [pixel][channel] with channels last.
// Rows are padded so that they are in different banks.
template <class T, bool CHANNELS_LAST>
struct Stage {
  static constexpr int SEGMENT = Vector<T>::SIZE;
  static constexpr int ROWS = CHANNELS_LAST ? TILE<T> : CHANNELS;
  static constexpr int COLUMNS = CHANNELS_LAST ? CHANNELS : TILE<T>;
  static constexpr int PADDING = CHANNELS_LAST || sizeof(T) == 2 ? SEGMENT : 2 * SEGMENT;
  static constexpr int PITCH = COLUMNS + PADDING;
  static constexpr int ELEMENTS = ROWS * PITCH;
  static constexpr int BYTES = ELEMENTS * static_cast<int>(sizeof(T));

  // A lane copies the segment at its column of every STEP-th row, from its first row on.
  static constexpr int LANES = COLUMNS / SEGMENT, STEP = 32 / LANES;
  static __device__ __forceinline__ int row() { return thread_again() / LANES; }
  static __device__ __forceinline__ int column() { return thread_again() % LANES * SEGMENT; }

  static __device__ __forceinline__ int offset(int channel, int pixel) {
    return CHANNELS_LAST ? pixel * PITCH + channel : channel * PITCH + pixel;
  }
};

// Iterates over the tiles of a chunk. SHIFTED: tiles begin at multiples of 16 bytes.
template <class T, bool CHANNELS_LAST, bool SHIFTED = false>
struct Cursor {
  using Layout = Stage<T, CHANNELS_LAST>;
  const Input<T>& input;
  const Tiling& tiling;
  const int channel;   // the block's first
  const bool vectors;  // whether all vectors of a tile of TILE pixels can be copied at once
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
    int64_t pixel = int64_t{tile} * TILE<T>;
    const int of_image = static_cast<int>(view.lines_per_image);
    features = input.features + channel * view.stride_d + line / of_image * view.stride_b +
               line % of_image * view.stride_h;
    if constexpr (SHIFTED) {
      before = reinterpret_cast<uintptr_t>(features) % sizeof(Vector<T>) / sizeof(T);
      pixel -= before;
    }
    features += pixel * view.stride_p + to_lane();
    keys = input.keys + int64_t{line} * view.pixels + pixel;
  }
  __device__ __forceinline__ void next() {
    if (--tiles_left == 0) {
      ++line;
      return enter_line(0);
    }
    features += TILE<T> * input.view.stride_p;
    keys += TILE<T>;
  }
  // Pixels begin() to end() − 1 of the tile belong to the line.
  __device__ __forceinline__ int begin() const {
    return SHIFTED && tiles_left == tiling.tiles_per_line ? before : 0;
  }
  __device__ __forceinline__ int end() const {
    if constexpr (!SHIFTED) return tiles_left == 1 ? tiling.last_tile : TILE<T>;
    return min(min(tiles_left - 1, 2) * TILE<T> + tiling.last_tile + before, TILE<T>);
  }
  __device__ __forceinline__ int channels() const {
    if constexpr (SHIFTED)
      return min(ceil_div(static_cast<int>(input.view.dim) - channel, input.period), CHANNELS);
    return static_cast<int>(min(input.view.dim - channel, int64_t{CHANNELS}));
  }
  // The offset of the lane's first vector from the tile's first feature.
  __device__ __forceinline__ int64_t to_lane() const {
    return Layout::column() + Layout::row() * input.row_stride;
  }
};

// Copies the features and the keys of a tile. Outside the line, keys are −1; outside the
// line and beyond the channels, features are 0.
template <class T, bool CHANNELS_LAST, bool SHIFTED>
__device__ __forceinline__ void fill_stage(T* stage, int* keys,
                                           const Cursor<T, CHANNELS_LAST, SHIFTED>& cursor) {
  using Layout = Stage<T, CHANNELS_LAST>;
  constexpr int SEGMENT = Layout::SEGMENT, PITCH = Layout::PITCH, STEP = Layout::STEP;
  const Input<T>& input = cursor.input;
  const int lane = thread_again(), begin = cursor.begin(), end = cursor.end();
  const bool whole = begin == 0 && end == TILE<T>;

  if (SHIFTED && whole) {
#pragma unroll
    for (int i = 0; i < TILE<T>; i += 32) copy_word_async(keys + i + lane, cursor.keys + i + lane);
  } else if (!SHIFTED && input.key_vectors && whole) {
    if (lane * 4 < TILE<T>) copy_async(keys + lane * 4, cursor.keys + lane * 4);
  } else {
    for (int i = lane; i < TILE<T>; i += 32) keys[i] = i >= begin && i < end ? cursor.keys[i] : -1;
  }

  const int64_t row_stride = input.row_stride;
  const int row = Layout::row(), column = Layout::column();
  T* const to = stage + row * PITCH + column;
  if (cursor.vectors && whole) {
#pragma unroll
    for (int i = 0; i < Layout::ROWS; i += STEP)
      copy_async(to + i * PITCH, cursor.features + i * row_stride);
    return;
  }
  const T* const first = cursor.features - cursor.to_lane();
  const int channels = cursor.channels();
  if ((SHIFTED || input.vectors) && begin == 0) {
    const int rows = CHANNELS_LAST ? end : channels, columns = end + channels - rows;
    const int bytes = max(min(columns - column, SEGMENT), 0) * static_cast<int>(sizeof(T));
    const T* from = first + (bytes > 0 ? column : 0);
#pragma unroll(SHIFTED ? Layout::ROWS / STEP : 1)
    for (int i = 0; i < Layout::ROWS; i += STEP)
      copy_async(to + i * PITCH, from + (row + i) * row_stride, row + i < rows ? bytes : 0);
    return;
  }

  // A lane has one pixel and iterates over the channels. With channels last, it has one channel and
  // iterates over the pixels.
#pragma unroll 1
  for (int left = 0; left < Layout::COLUMNS; left += 32) {
    const int column = left + lane;
    const int64_t pixel_stride = input.view.stride_p;
    const T* from = first + (CHANNELS_LAST ? lane : column * pixel_stride);
#pragma unroll 1
    for (int batch = 0; batch < Layout::ROWS; batch += BATCH) {
      T values[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int row = batch + i, pixel = CHANNELS_LAST ? row : column;
        const bool inside =
            pixel >= begin && pixel < end && (CHANNELS_LAST ? column : row) < channels;
        const int64_t offset = row * (CHANNELS_LAST ? pixel_stride : row_stride);
        values[i] = inside ? from[offset] : T(0.f);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) stage[(batch + i) * PITCH + column] = values[i];
    }
  }
}

// The tiles of a chunk, one after the other: while one is read, the next one is copied.
template <class T, bool CHANNELS_LAST, bool SHIFTED = false>
struct Ring {
  using Layout = Stage<T, CHANNELS_LAST>;
  static constexpr int BYTES = STAGES * (Layout::BYTES + TILE<T> * int{sizeof(int)});

  Cursor<T, CHANNELS_LAST, SHIFTED> cursor;
  const int tiles;  // of the chunk

  __device__ Ring(const Input<T>& input, const Tiling& tiling, int block, int chunk)
      : cursor(input, tiling, first_channel(block, SHIFTED ? input.period : 1),
               static_cast<int>(tiling.first_tile(chunk))),
        tiles(static_cast<int>(tiling.tiles_per_chunk) + (chunk < tiling.longer)) {}

  static __device__ __forceinline__ T* stage_at(int index) {
    return reinterpret_cast<T*>(shared_memory()) + index * Layout::ELEMENTS;
  }
  static __device__ __forceinline__ int* keys_at(int index) {
    return reinterpret_cast<int*>(shared_memory() + STAGES * Layout::BYTES) + index * TILE<T>;
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
      fill_stage(stage_at(free), keys_at(free), cursor);
      cursor.next();
    }
    commit_copies();
    wait_for_copies<STAGES - 1>();
    __syncwarp();
  }
};

}  // namespace anchorops::cuda
