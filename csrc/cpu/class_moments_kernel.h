// The vector kernels of class moments.
//
// The kernel processes tiles of LANES pixels × LANES channels, as one vector of channels per pixel.
// If channels are contiguous, a tile is loaded like this; if pixels are contiguous, it is
// transposed in registers. So neither the labels nor the layout change the speed much. A tile of
// one key is summed in registers; in other tiles each pixel is added to the totals of its key.
// Totals are double, sums within a tile have the features' arithmetic type.
//
// Bytes: forward reads the features once; backward writes dfeatures once and reads the features
// once if dsqdists is given. Keys and totals stay in cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "class_moments.h"
#include "simd.h"

BEGIN_TARGET
namespace anchorops::cpu::INSTRUCTION_SET {

enum class Contiguous { PIXELS, CHANNELS, NEITHER };

ALWAYS_INLINE Contiguous contiguous(const Layout& layout) {
  return layout.stride_w == 1   ? Contiguous::PIXELS
         : layout.stride_d == 1 ? Contiguous::CHANNELS
                                : Contiguous::NEITHER;
}

// LANES planes are too many streams for the hardware prefetcher. The data goes to the L2 cache: in
// the L1 cache, planes that are a multiple of 4096 bytes apart replace each other's lines.
template <class T>
ALWAYS_INLINE void prefetch(const T* source, int64_t ahead) {
  __builtin_prefetch(source + ahead, 0, 2);
}
template <class T>
constexpr int64_t PLANE_AHEAD = 768 / sizeof(T);

// A block of the channels of a tile's pixels.
template <class T>
struct TileVectors {
  using S = Simd<T>;
  static constexpr int LANES = S::LANES;

  typename S::Vec pixel[LANES];  // channels of each pixel

  // Pixels and channels beyond the given numbers become zero.
  template <Contiguous C>
  ALWAYS_INLINE void load(const T* source, const Layout& layout, int64_t pixels, int64_t channels) {
    if constexpr (C == Contiguous::NEITHER) {
      for (int p = 0; p < LANES; ++p) {
        T gathered[LANES] = {};
        for (int c = 0; p < pixels && c < channels; ++c)
          gathered[c] = source[p * layout.stride_w + c * layout.stride_d];
        pixel[p] = S::load(gathered);
      }
    } else {
      const auto [lines, length, stride] = contiguous_lines<C>(layout, pixels, channels);
      if (lines == LANES && length == LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) {
          pixel[i] = S::load(source + i * stride);
          prefetch(source + i * stride, C == Contiguous::PIXELS ? PLANE_AHEAD<T> : LANES * stride);
        }
      } else {
        for (int i = 0; i < LANES; ++i)
          pixel[i] = i < lines ? S::load(source + i * stride, length) : typename S::Vec{};
      }
      if constexpr (C == Contiguous::PIXELS) S::transpose(pixel);
    }
  }

  template <Contiguous C>
  ALWAYS_INLINE void store(T* target, const Layout& layout, int64_t pixels, int64_t channels) {
    if constexpr (C == Contiguous::NEITHER) {
      for (int p = 0; p < pixels; ++p) {
        T scattered[LANES];
        S::store(scattered, pixel[p]);
        for (int c = 0; c < channels; ++c)
          target[p * layout.stride_w + c * layout.stride_d] = scattered[c];
      }
    } else {
      const auto [lines, length, stride] = contiguous_lines<C>(layout, pixels, channels);
      if constexpr (C == Contiguous::PIXELS) S::transpose(pixel);
      if (lines == LANES && length == LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) S::store(target + i * stride, pixel[i]);
      } else {
        for (int i = 0; i < lines; ++i) S::store(target + i * stride, pixel[i], length);
      }
    }
  }

 private:
  struct Lines {
    int64_t count, length, stride;
  };

  template <Contiguous C>
  static ALWAYS_INLINE Lines contiguous_lines(const Layout& layout, int64_t pixels,
                                              int64_t channels) {
    if constexpr (C == Contiguous::PIXELS) return {channels, pixels, layout.stride_d};
    return {pixels, channels, layout.stride_w};
  }
};

template <int LANES>
ALWAYS_INLINE bool all_equal(const int32_t* keys) {
  return std::memcmp(keys, keys + 1, (LANES - 1) * sizeof *keys) == 0;
}

// Calls visit(offset, pixels, keys, uniform) for each tile: its offset in a layout, its number of
// pixels, LANES keys (-1 beyond the row's end), and whether they are all the same.
template <int LANES, class Visit>
ALWAYS_INLINE void for_tiles(const Layout& shape, const int32_t* keys, Range tiles, Visit visit) {
  if (tiles.begin == tiles.end) return;  // also if there are no pixels: avoids a division by 0
  const int64_t tiles_of_row = (shape.width + LANES - 1) / LANES;
  const int64_t row = tiles.begin / tiles_of_row;
  int64_t b = row / shape.height, h = row % shape.height, w = tiles.begin % tiles_of_row * LANES;
  keys += row * shape.width + w;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const auto offset = [=](const Layout& layout) INLINE_LAMBDA {
      return b * layout.stride_b + h * layout.stride_h + w * layout.stride_w;
    };
    const int64_t pixels = std::min<int64_t>(LANES, shape.width - w);
    if (pixels == LANES) {
      visit(offset, pixels, keys, all_equal<LANES>(keys));
    } else {
      int32_t padded[LANES];
      for (int i = 0; i < LANES; ++i) padded[i] = i < pixels ? keys[i] : -1;
      visit(offset, pixels, static_cast<const int32_t*>(padded), all_equal<LANES>(padded));
    }
    keys += pixels;
    w += LANES;
    if (w >= shape.width) {
      w = 0;
      if (++h == shape.height) h = 0, ++b;
    }
  }
}

// Row k of a [num_keys, dim] matrix, from channel c on.
template <class Stat>
ALWAYS_INLINE typename Simd<Stat>::Vec row(const Stat* matrix, int64_t k, int64_t dim, int64_t c,
                                           int64_t width) {
  return Simd<Stat>::load(matrix + k * dim + c, width);
}

template <class T, Contiguous C, bool ANCHORS>
void forward(const Layout& layout, const T* features, const int32_t* keys, int64_t num_keys,
             const Anchors<StatOf<T>>& anchors, Range tiles, Range channels, double* sums,
             double* sqdists) {
  using Vec = typename Simd<T>::Vec;
  constexpr int LANES = Simd<T>::LANES;
  constexpr int DOUBLES = VECTOR_BYTES / sizeof(double);

  for_tiles<LANES>(
      layout, keys, tiles,
      [&](auto offset, int64_t pixels, const int32_t* key, bool uniform) INLINE_LAMBDA {
        if (uniform && key[0] < 0) return;
        const T* source = features + offset(layout);
        int64_t totals = 0;  // of this block of channels, in sums

        // The size of whole tiles is known at compile time, so they stay in registers.
        const auto add_tile = [&](int64_t c, auto tile_pixels, auto width) INLINE_LAMBDA {
          TileVectors<T> vectors;
          vectors.template load<C>(source + c * layout.stride_d, layout, tile_pixels, width);
          const auto add = [&](int64_t k, Vec sum, Vec square) INLINE_LAMBDA {
            if (sums) accumulate(sums + totals + (k + 1) * LANES, sum);
            if constexpr (ANCHORS) accumulate(sqdists + (k + 1) * DOUBLES, fold(square));
          };
          const auto anchor = [&](int64_t k) INLINE_LAMBDA {
            if constexpr (!ANCHORS) return Vec{};
            return row(anchors.rows, anchors.key_rows[k + 1], layout.dim, c, width);
          };
          if (uniform) {
            const int64_t k = key[0];
            const Vec a = anchor(k);
            Vec sum = {}, square = {};
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) {
              const Vec difference = vectors.pixel[i] - a;
              sum += vectors.pixel[i];
              square += difference * difference;
            }
            add(k, sum, square);
          } else {
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) {
              const int64_t k = key[i];
              const Vec difference = vectors.pixel[i] - anchor(k);
              add(k, vectors.pixel[i], difference * difference);
            }
          }
        };

        const std::integral_constant<int64_t, LANES> whole;
        for (int64_t c = channels.begin; c < channels.end; c += LANES) {
          const int64_t width = std::min<int64_t>(LANES, channels.end - c);
          if (pixels == LANES && width == LANES)
            add_tile(c, whole, whole);
          else
            add_tile(c, pixels, width);
          totals += (num_keys + 1) * LANES;
        }
      });
}

template <class T, Contiguous C, bool SQDISTS>
void backward(const Layout& layout, const T* features, const int32_t* keys,
              const Anchors<StatOf<T>>& anchors, const StatOf<T>* dsums, const StatOf<T>* dsqdists,
              const Layout& dlayout, T* dfeatures, Range tiles, Range channels) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  constexpr int LANES = S::LANES;
  const int64_t dim = layout.dim;
  const Contiguous source_contiguous = contiguous(layout);

  for_tiles<LANES>(
      layout, keys, tiles,
      [&](auto offset, int64_t pixels, const int32_t* key, bool uniform) INLINE_LAMBDA {
        const T* source = SQDISTS ? features + offset(layout) : nullptr;
        T* target = dfeatures + offset(dlayout);

        const auto write_tile = [&](int64_t c, auto tile_pixels, auto width) INLINE_LAMBDA {
          TileVectors<T> vectors;
          if constexpr (SQDISTS) {
            const T* from = source + c * layout.stride_d;
            if (source_contiguous == C)
              vectors.template load<C>(from, layout, tile_pixels, width);
            else
              vectors.template load<Contiguous::NEITHER>(from, layout, tile_pixels, width);
          }
#pragma GCC unroll 16
          for (int i = 0; i < LANES; ++i) {
            const int64_t k = key[i];
            Vec df = {};
            if (k >= 0) {
              if constexpr (SQDISTS)
                df =
                    (vectors.pixel[i] - row(anchors.rows, anchors.key_rows[k + 1], dim, c, width)) *
                    (2 * dsqdists[k]);
              if (dsums) df += row(dsums, k, dim, c, width);
            }
            vectors.pixel[i] = df;
          }
          vectors.template store<C>(target + c * dlayout.stride_d, dlayout, tile_pixels, width);
        };

        // In the planes of a tile of one key, its gradient and anchor are scalars, so nothing is
        // transposed. All loads come before the stores, which would alias with them if planes are
        // 4096 bytes apart.
        const auto write_uniform_planes = [&](int64_t c) INLINE_LAMBDA {
          const int64_t k = key[0], a = SQDISTS && k >= 0 ? anchors.key_rows[k + 1] : 0;
          Vec plane[LANES] = {};
          if (k >= 0) {
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) {
              if constexpr (SQDISTS) {
                const T* from = source + (c + i) * layout.stride_d;
                plane[i] = (S::load(from) - anchors.rows[a * dim + c + i]) * (2 * dsqdists[k]);
                prefetch(from, PLANE_AHEAD<T>);
              }
              if (dsums) plane[i] += dsums[k * dim + c + i];
            }
          }
#pragma GCC unroll 16
          for (int i = 0; i < LANES; ++i) S::store(target + (c + i) * dlayout.stride_d, plane[i]);
        };

        const std::integral_constant<int64_t, LANES> whole;
        for (int64_t c = channels.begin; c < channels.end; c += LANES) {
          const int64_t width = std::min<int64_t>(LANES, channels.end - c);
          if (pixels < LANES || width < LANES)
            write_tile(c, pixels, width);
          else if (C == Contiguous::PIXELS && source_contiguous == C && uniform)
            write_uniform_planes(c);
          else
            write_tile(c, whole, whole);
        }
      });
}

template <class T, Contiguous C>
auto forward_kernel(bool anchors) {
  return anchors ? forward<T, C, true> : forward<T, C, false>;
}

template <class T, Contiguous C>
auto backward_kernel(bool sqdists) {
  return sqdists ? backward<T, C, true> : backward<T, C, false>;
}

template <class T>
void any_forward(const Layout& layout, const T* features, const int32_t* keys, int64_t num_keys,
                 const Anchors<StatOf<T>>& anchors, Range tiles, Range channels, double* sums,
                 double* sqdists) {
  const auto choose =
      contiguous(layout) == Contiguous::PIXELS     ? forward_kernel<T, Contiguous::PIXELS>
      : contiguous(layout) == Contiguous::CHANNELS ? forward_kernel<T, Contiguous::CHANNELS>
                                                   : forward_kernel<T, Contiguous::NEITHER>;
  choose(anchors.rows)(layout, features, keys, num_keys, anchors, tiles, channels, sums, sqdists);
}

template <class T>
void any_backward(const Layout& layout, const T* features, const int32_t* keys,
                  const Anchors<StatOf<T>>& anchors, const StatOf<T>* dsums,
                  const StatOf<T>* dsqdists, const Layout& dlayout, T* dfeatures, Range tiles,
                  Range channels) {
  const auto choose =
      contiguous(dlayout) == Contiguous::PIXELS     ? backward_kernel<T, Contiguous::PIXELS>
      : contiguous(dlayout) == Contiguous::CHANNELS ? backward_kernel<T, Contiguous::CHANNELS>
                                                    : backward_kernel<T, Contiguous::NEITHER>;
  choose(dsqdists)(layout, features, keys, anchors, dsums, dsqdists, dlayout, dfeatures, tiles,
                   channels);
}

template <class T>
Kernels<T> kernels() {
  return {Simd<T>::LANES, VECTOR_BYTES / sizeof(double), any_forward<T>, any_backward<T>};
}

template Kernels<float> kernels();
template Kernels<double> kernels();
template Kernels<BFloat16> kernels();
template Kernels<Half> kernels();

}  // namespace anchorops::cpu::INSTRUCTION_SET
END_TARGET
