// Class moments, the first stage: tiles of features are copied to shared memory.
//
// A tile is 64 channels of 128 bytes of neighbouring pixels of a line, with the pixels' keys. A
// chunk is a range of tiles, and a block of threads, which is one warp, has 64 channels of a chunk.
// While it adds one tile, the next one is being copied.
#pragma once

#include <cstdint>

#include "../tensors.cuh"

namespace anchorops::cuda {

constexpr int CHANNELS = 64;  // of a block
constexpr int SEGMENT = 8;    // pixels that a lane reads at once
constexpr int STAGES = 2;     // tiles in shared memory

template <class T>
struct Input {
  const T* features;     // [B, D, P] by strides
  const int32_t* keys;   // int32 [B, P], −1 where ignored
  const float* anchors;  // float32 [num_classes, D]; of key k: row k / groups mod num_classes
  Pixels view;
  int num_keys, num_classes, groups;
  bool in_rows;  // the channels of a pixel are contiguous
  bool vectors;  // 16 bytes of features can be copied at once
  // Planes do not begin at multiples of 16 bytes (129 × 129 pixels). Then tiles do, and the first
  // one of a line begins up to seven pixels before it. A block has every period-th channel: their
  // planes begin at the same position in 16 bytes.
  bool shifted;
  int period;
};

// The first `longer` chunks have one tile more than the others. Blocks: of channels.
struct Tiling {
  int64_t tiles_per_chunk;
  int longer, tiles_per_line, chunks, blocks;
};

// A lane has two channels of a block; this is the j-th.
__device__ constexpr int channel_of(int block, int period, int lane, int j, bool in_rows) {
  const int i = in_rows ? 2 * lane + j : lane + 32 * j;
  return block / period * period * CHANNELS + block % period + i * period;
}

// Features are [channel][pixel] or, IN_ROWS, [pixel][channel].
template <class T, bool IN_ROWS>
struct alignas(16) Tile {
  static constexpr int SIZE = Vector<T>::SIZE, PIXELS = 128 / sizeof(T);
  static constexpr int ROWS = IN_ROWS ? PIXELS : CHANNELS, COLUMNS = IN_ROWS ? CHANNELS : PIXELS;
  static constexpr int PITCH = COLUMNS + (IN_ROWS ? 0 : SIZE);  // rows begin in different banks
  T features[ROWS][PITCH];
  int keys[PIXELS];

  // A segment of the lane's two channels.
  __device__ void load(int first, int lane, float2 (&x)[SEGMENT]) const {
    if constexpr (!IN_ROWS) {
#pragma unroll
      for (int i = 0; i < SEGMENT; i += SIZE) {
        const Vector<T> u = load_vector(&features[lane][first + i]);
        const Vector<T> v = load_vector(&features[lane + 32][first + i]);
#pragma unroll
        for (int n = 0; n < SIZE; ++n) x[i + n] = {to_float(u, n), to_float(v, n)};
      }
    } else {
#pragma unroll
      for (int i = 0; i < SEGMENT; ++i) {
        const T* const from = &features[first + i][2 * lane];
        if constexpr (sizeof(T) == 4) {
          x[i] = *reinterpret_cast<const float2*>(from);
        } else {
          const unsigned pair = *reinterpret_cast<const unsigned*>(from);
          x[i] = {half_to_float<T>(pair, false), half_to_float<T>(pair, true)};
        }
      }
    }
  }
};

// The copies of a chunk's tiles, one after the other.
template <class T, bool IN_ROWS>
struct Copies {
  using To = Tile<T, IN_ROWS>;
  static constexpr int SIZE = To::SIZE, PIXELS = To::PIXELS;
  const Input<T>& in;
  const int lane = threadIdx.x, tiles_per_line, first, channels;
  const int64_t row_stride;  // from a row of a tile to the next
  // The next tile: its number in its line; its first pixel, which is before the line for the first
  // tile of shifted planes; and where this pixel's first channel and its key are in memory.
  int tile;
  int64_t line, pixel, feature, key;

  __device__ Copies(const Input<T>& in, const Tiling& tiling, int chunk, int block)
      : in(in),
        tiles_per_line(tiling.tiles_per_line),
        first(channel_of(block, in.period, 0, 0, IN_ROWS)),
        channels(min(ceil_div(static_cast<int>(in.view.dim) - first, in.period), CHANNELS)),
        row_stride(IN_ROWS ? in.view.stride_p : in.view.stride_d * in.period) {
    const int64_t first_tile = chunk * tiling.tiles_per_chunk + min(chunk, tiling.longer);
    line = first_tile / tiles_per_line, tile = static_cast<int>(first_tile % tiles_per_line);
    enter_line();
  }

  __device__ void enter_line() {
    const int64_t begin = in.view.offset(line, first, 0);
    const auto address = reinterpret_cast<uintptr_t>(in.features + begin);
    const int64_t before = in.shifted ? address % 16 / sizeof(T) : 0;
    pixel = int64_t{tile} * PIXELS - before;
    feature = begin + pixel * in.view.stride_p;
    key = line * in.view.pixels + pixel;
  }

  __device__ void next() {
    pixel += PIXELS, key += PIXELS, feature += PIXELS * in.view.stride_p;
    if (++tile < tiles_per_line) return;
    tile = 0, ++line;
    enter_line();
  }

  // Outside of the line keys are −1; there and beyond the last channel, features are 0.
  __device__ void start(To& to) const {
    const T* const features = in.features + feature;
    const int32_t* const keys = in.keys + key;
    constexpr int LANES = To::COLUMNS / SIZE, STEP = 32 / LANES;
    const int row = lane / LANES, column = lane % LANES * SIZE;
    const int begin = static_cast<int>(max(-pixel, int64_t{0}));
    const int end = static_cast<int>(max(min(in.view.pixels - pixel, int64_t{PIXELS}), int64_t{0}));
    if (in.vectors && begin == 0 && end == PIXELS && channels == CHANNELS) {  // nearly always
      const T* from = features + row * row_stride + column;
#pragma unroll
      for (int i = 0; i < To::ROWS; i += STEP, from += STEP * row_stride)
        copy_async(&to.features[row + i][column], from);
#pragma unroll
      for (int i = lane; i < PIXELS; i += 32) copy_word_async(&to.keys[i], keys + i);
      return;
    }
    for (int i = lane; i < PIXELS; i += 32) to.keys[i] = i >= begin && i < end ? keys[i] : -1;
    if (in.vectors && begin == 0) {
      const int rows = IN_ROWS ? end : channels, columns = IN_ROWS ? channels : end;
      const int count = max(min(columns - column, SIZE), 0);
#pragma unroll 1
      for (int i = row; i < To::ROWS; i += STEP)
        copy_async(&to.features[i][column], features + i * row_stride + column,
                   i < rows ? count * static_cast<int>(sizeof(T)) : 0);
      return;
    }
    const int64_t stride_d = in.view.stride_d * in.period, stride_p = in.view.stride_p;
#pragma unroll 1
    for (int c = lane; c < To::COLUMNS; c += 32)
#pragma unroll 8
      for (int r = 0; r < To::ROWS; ++r) {
        const int p = IN_ROWS ? r : c, d = IN_ROWS ? c : r;
        const int64_t near = min(max(p, begin), end - 1);  // no branch around the load
        const T value = features[min(d, channels - 1) * stride_d + near * stride_p];
        to.features[r][c] = p == near && d < channels ? value : T(0.f);
      }
  }
};

}  // namespace anchorops::cuda
