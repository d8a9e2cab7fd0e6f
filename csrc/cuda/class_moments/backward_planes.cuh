// The gradient where the pixels of a channel are contiguous. A thread processes 16 bytes of pixels,
// channel after channel. It stores them at a multiple of 16 bytes, and reads the features there.
//
// A block processes a slice of the channels. It first copies this part of the tables to shared
// memory, because the lanes of a warp read rows of different keys. If planes are not aligned to 16
// bytes (129 × 129 pixels), a slice has every second, fourth or eighth channel: their planes begin
// at the same position in 16 bytes, so a thread has the same pixels in each of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../tensors.cuh"
#include "backward.cuh"

namespace anchorops::cuda {

constexpr int PLANES_THREADS = 256;

// How planes are divided.
struct Slices {
  int period;    // from a channel of a slice to the next
  int channels;  // of a slice
  int count;     // of slices
  int blocks;    // of a slice
  unsigned vectors, vectors_per_line;
  unsigned row_bytes;  // from a row of a table to the next

  __device__ int64_t first_channel(int slice) const {
    return int64_t{slice / period} * channels * period + slice % period;
  }
};

// The rows of the tables for a slice of channels. In shared memory there is one row for each key,
// with vectors of its anchor and of dsums in turn. Sums alone are only stored, so the row contains
// them as they are written to dfeatures.
template <class T, bool HAS_DSUMS, bool HAS_DSQDISTS>
struct TableSlice {
  using Element = std::conditional_t<HAS_DSQDISTS, float, T>;
  static constexpr int STEP = Vector<Element>::SIZE;  // channels that are processed at once
  static constexpr int TABLES = HAS_DSUMS + HAS_DSQDISTS;
  const float *anchors, *dsums;
  const unsigned row_bytes;

  __device__ TableSlice(const Gradient<T>& in, const Slices& slices, int64_t first, int channels)
      : anchors(in.anchors + first), dsums(in.dsums + first), row_bytes(slices.row_bytes) {
    fill(in, slices.period, channels);
    __syncthreads();
  }

  // A thread copies one channel of every keys_at_once-th key. It loads BATCH elements before it
  // waits for the first.
  __device__ __forceinline__ void fill(const Gradient<T>& in, int period, int channels) const {
    constexpr int BATCH = 4;
    const unsigned keys_at_once = PLANES_THREADS / channels, channel = threadIdx.x % channels;
    unsigned first = threadIdx.x / channels;
    if (first >= keys_at_once) return;
    const int64_t dim = in.out.dim, source = int64_t{channel} * period;
#pragma unroll 1
    for (; first < in.num_keys; first += BATCH * keys_at_once) {
      unsigned key[BATCH], anchor_row[BATCH];
      float a[BATCH], s[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        anchor_row[i] = key[i] = min(first + i * keys_at_once, in.num_keys - 1);
        if constexpr (HAS_DSUMS) s[i] = dsums[key[i] * dim + source];
      }
      if constexpr (HAS_DSQDISTS) {
        in.to_anchors(anchor_row);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) a[i] = anchors[anchor_row[i] * dim + source];
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const bool inside = first + i * keys_at_once < in.num_keys;
        Element* const to = shared_row(key[i], channel);
        if (HAS_DSQDISTS && inside) to[0] = a[i];
        if (HAS_DSUMS && inside) to[(TABLES - 1) * STEP] = static_cast<Element>(s[i]);
      }
    }
  }

  __device__ __forceinline__ Element* shared_row(unsigned key, int channel) const {
    return reinterpret_cast<Element*>(shared_memory() + key * row_bytes) +
           channel / STEP * STEP * TABLES + channel % STEP;
  }

  // The anchors and dsums of a pixel, from this channel on.
  template <int CHANNELS>
  __device__ __forceinline__ void load(unsigned key, int channel, Element (&a)[CHANNELS],
                                       Element (&s)[CHANNELS]) const {
    const Element* const row = shared_row(key, channel);
    if constexpr (HAS_DSQDISTS) load_row(row, a);
    if constexpr (HAS_DSUMS) load_row(row + (TABLES - 1) * STEP, s);
  }
};

// The pixels of a vector of dfeatures, and their keys.
template <class T, bool HAS_DSUMS, bool HAS_DSQDISTS>
struct PlanePixels {
  using Table = TableSlice<T, HAS_DSUMS, HAS_DSQDISTS>;
  using Element = typename Table::Element;
  static constexpr int SIZE = Vector<T>::SIZE;
  unsigned key[SIZE];
  float scale[SIZE];
  unsigned valid[4] = {};  // the bits of valid pixels
  int begin, end;          // of the elements that belong to the line

  // pixel: that of the first element; before the line for the first vector of a line
  __device__ PlanePixels(const Gradient<T>& in, int64_t line, int64_t pixel)
      : begin(static_cast<int>(max(-pixel, int64_t{0}))),
        end(static_cast<int>(min(in.out.pixels - pixel, int64_t{SIZE}))) {
    const int32_t* const keys = in.keys + line * in.out.pixels + pixel;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      constexpr int BITS = 8 * sizeof(T);
      const int k = i >= begin && i < end ? keys[i] : -1;
      if (k >= 0) valid[i * BITS / 32] |= (0xffffffff >> (32 - BITS)) << i * BITS % 32;
      key[i] = max(k, 0);
      if constexpr (HAS_DSQDISTS) scale[i] = 2 * in.dsqdists[key[i]];
    }
  }

  __device__ bool whole() const { return begin == 0 && end == SIZE; }

  // The gradient of CHANNELS channels; `channel` is the first of them in the slice.
  template <int CHANNELS, bool WHOLE>
  __device__ __forceinline__ void write(const T* features, int64_t stride, const Table& tables,
                                        int channel, T* dfeatures, int64_t dstride) const {
    std::conditional_t<HAS_DSQDISTS, float, Element> values[CHANNELS][SIZE];
    if constexpr (HAS_DSQDISTS) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) load<WHOLE>(features + c * stride, values[c]);
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      Element a[CHANNELS], s[CHANNELS] = {};
      tables.load(key[i], channel, a, s);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        if constexpr (HAS_DSQDISTS)
          values[c][i] = fmaf(values[c][i] - a[c], scale[i], s[c]);
        else
          values[c][i] = s[c];
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) store<WHOLE>(dfeatures + c * dstride, values[c]);
  }

  template <bool WHOLE>
  __device__ __forceinline__ void load(const T* address, float (&values)[SIZE]) const {
    if constexpr (WHOLE) {
      const Vector<T> vector = load_streaming(address);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) values[i] = to_float(vector, i);
    } else {
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        values[i] = i >= begin && i < end ? static_cast<float>(address[i]) : 0;
    }
  }

  template <bool WHOLE, class Value>
  __device__ __forceinline__ void store(T* address, const Value (&values)[SIZE]) const {
    Vector<T> vector;
    if constexpr (std::is_same_v<Value, T>) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) vector.elements[i] = values[i];
    } else {
      vector = round_to<T>(values);
    }
    vector = keep(vector, valid);
    if constexpr (WHOLE) {
      store_streaming(address, vector);
    } else {
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        if (i >= begin && i < end) address[i] = vector.elements[i];
    }
  }
};

template <class T, bool HAS_DSUMS, bool HAS_DSQDISTS>
__global__ void __launch_bounds__(PLANES_THREADS, 2)
    class_moments_backward_planes_kernel(const Gradient<T> in, const Slices slices) {
  using Table = TableSlice<T, HAS_DSUMS, HAS_DSQDISTS>;
  constexpr int SIZE = Vector<T>::SIZE, STEP = Table::STEP;
  const int64_t first = slices.first_channel(blockIdx.x / slices.blocks);
  const int channels = static_cast<int>(
      min(ceil_div(in.out.dim - first, int64_t{slices.period}), int64_t{slices.channels}));
  if (channels <= 0) return;
  const Table tables(in, slices, first, channels);
  const int64_t stride = slices.period * in.view.stride_d,
                dstride = slices.period * in.out.stride_d;

  for (unsigned vector = blockIdx.x % slices.blocks * PLANES_THREADS + threadIdx.x;
       vector < slices.vectors; vector += slices.blocks * PLANES_THREADS) {
    const int64_t line = vector / slices.vectors_per_line;
    T* dfeatures = in.dfeatures + in.out.offset(line, first, 0);
    const int before = reinterpret_cast<uintptr_t>(dfeatures) % sizeof(Vector<T>) / sizeof(T);
    const int64_t pixel = int64_t{vector % slices.vectors_per_line} * SIZE - before;
    dfeatures += pixel;
    const T* features = in.features + in.view.offset(line, first, pixel);
    const PlanePixels<T, HAS_DSUMS, HAS_DSQDISTS> pixels(in, line, pixel);
    int channel = 0;
    const auto write = [&]<int CHANNELS, bool WHOLE>() {
      pixels.template write<CHANNELS, WHOLE>(features, stride, tables, channel, dfeatures, dstride);
      features += CHANNELS * stride;
      dfeatures += CHANNELS * dstride;
      channel += CHANNELS;
    };
    if (pixels.whole()) {
#pragma unroll 1
      while (channel + STEP <= channels) write.template operator()<STEP, true>();
#pragma unroll 1
      while (channel < channels) write.template operator()<1, true>();
    } else {
#pragma unroll 1
      while (channel < channels) write.template operator()<1, false>();
    }
  }
}

}  // namespace anchorops::cuda
