// The vector kernels of class moments. Included once per instruction set, in its namespace.
//
// The unit is a tile: LANES pixels × LANES channels, as one vector of channels per pixel. Where
// channels are contiguous it is loaded so; where pixels are, the square is transposed in registers.
// Pixels of equal key are then added up vector by vector, so that neither the labels nor the layout
// change the speed much, and a key's total in double once per tile.
//
// Bytes: forward reads the features once; backward writes dfeatures once and reads the features once
// where dsqdists is given. Keys and the [num_keys, LANES] totals of a channel block stay in cache.

template <class T>
struct Tile {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  static constexpr int LANES = S::LANES;

  Vec pixel[LANES];  // channels of each pixel

  ALWAYS_INLINE void load(const T* source, const Layout& layout, int64_t pixels, int64_t channels) {
    if (layout.stride_w == 1) {
      if (pixels == LANES && channels == LANES) {
#pragma GCC unroll 16
        for (int c = 0; c < LANES; ++c) pixel[c] = S::load(source + c * layout.stride_d);
      } else {
        for (int c = 0; c < LANES; ++c)
          pixel[c] = c < channels ? S::load(source + c * layout.stride_d, pixels) : Vec{};
      }
      S::transpose(pixel);
    } else if (layout.stride_d == 1) {
      for (int p = 0; p < pixels; ++p) pixel[p] = S::load(source + p * layout.stride_w, channels);
    } else {
      for (int p = 0; p < pixels; ++p) {
        T gathered[LANES] = {};
        for (int c = 0; c < channels; ++c)
          gathered[c] = source[p * layout.stride_w + c * layout.stride_d];
        pixel[p] = S::load(gathered);
      }
    }
  }

  ALWAYS_INLINE void store(T* target, const Layout& layout, int64_t pixels, int64_t channels) {
    if (layout.stride_w == 1) {
      S::transpose(pixel);
      if (pixels == LANES && channels == LANES) {
#pragma GCC unroll 16
        for (int c = 0; c < LANES; ++c) S::store(target + c * layout.stride_d, pixel[c]);
      } else {
        for (int c = 0; c < channels; ++c)
          S::store(target + c * layout.stride_d, pixel[c], pixels);
      }
    } else if (layout.stride_d == 1) {
      for (int p = 0; p < pixels; ++p) S::store(target + p * layout.stride_w, pixel[p], channels);
    } else {
      for (int p = 0; p < pixels; ++p) {
        T scattered[LANES];
        S::store(scattered, pixel[p]);
        for (int c = 0; c < channels; ++c)
          target[p * layout.stride_w + c * layout.stride_d] = scattered[c];
      }
    }
  }
};

// Calls visit(b, h, w, pixels, index of the first pixel) for each tile of the range.
template <int LANES, class Visit>
ALWAYS_INLINE void for_tiles(const Layout& layout, Range tiles, Visit visit) {
  const int64_t tiles_of_row = (layout.width + LANES - 1) / LANES;
  int64_t row = tiles.begin / tiles_of_row, w = tiles.begin % tiles_of_row * LANES;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t pixels = std::min<int64_t>(LANES, layout.width - w);
    visit(row / layout.height, row % layout.height, w, pixels, row * layout.width + w);
    w += LANES;
    if (w >= layout.width) w = 0, ++row;
  }
}

ALWAYS_INLINE bool all_equal(const int32_t* keys, int64_t count) {
  int32_t difference = 0;
  for (int64_t i = 1; i < count; ++i) difference |= keys[i] ^ keys[0];
  return difference == 0;
}

template <class T, bool ANCHORS, bool RESIDUALS>
void forward(const Layout& layout, const T* features, const int32_t* keys, int64_t num_keys,
             const Anchors<StatOf<T>>& anchors, Range tiles, Range channels, double* sums,
             double* sqdists, double* residuals) {
  using S = Simd<T>;
  using Stat = typename S::Stat;
  using Vec = typename S::Vec;
  constexpr int LANES = S::LANES;

  for_tiles<LANES>(layout, tiles, [&](int64_t b, int64_t h, int64_t w, int64_t pixels, int64_t p) {
    const int32_t* key = keys + p;
    const bool uniform = all_equal(key, pixels);
    if (uniform && key[0] < 0) return;
    const T* source = features + b * layout.stride_b + h * layout.stride_h + w * layout.stride_w;

    int64_t total = 0;  // of this block in sums and residuals
    for (int64_t c = channels.begin; c < channels.end; c += LANES, total += num_keys * LANES) {
      const int64_t width = std::min<int64_t>(LANES, channels.end - c);
      Tile<T> tile;
      tile.load(source + c * layout.stride_d, layout, pixels, width);

      const auto add = [&](int64_t k, int begin, int end) __attribute__((always_inline)) {
        Vec sum = {}, square = {}, residual = {}, anchor = {};
        if constexpr (ANCHORS)
          anchor = Simd<Stat>::load(anchors.rows + anchors.of_keys[k] * layout.dim + c, width);
#pragma GCC unroll 16
        for (int i = begin; i < end; ++i) {
          const Vec f = tile.pixel[i];
          sum += f;
          if constexpr (ANCHORS) square += (f - anchor) * (f - anchor);
          if constexpr (RESIDUALS) residual += f - anchor;
        }
        if (sums) accumulate<Stat, LANES>(sums + total + k * LANES, sum);
        if constexpr (ANCHORS) accumulate<Stat, LANES>(sqdists + k * LANES, square);
        if constexpr (RESIDUALS) accumulate<Stat, LANES>(residuals + total + k * LANES, residual);
      };

      if (uniform && pixels == LANES) {
        add(key[0], 0, LANES);
      } else {
        for (int begin = 0, end; begin < pixels; begin = end) {
          for (end = begin + 1; end < pixels && key[end] == key[begin];) ++end;
          if (key[begin] >= 0) add(key[begin], begin, end);
        }
      }
    }
  });
}

template <class T, bool SQDISTS>
void backward(const Layout& layout, const T* features, const int32_t* keys,
              const Anchors<StatOf<T>>& anchors,
              const StatOf<T>* dsums, const StatOf<T>* dsqdists,
              const Layout& dlayout, T* dfeatures, Range tiles, Range channels) {
  using S = Simd<T>;
  using Stat = typename S::Stat;
  using Vec = typename S::Vec;
  constexpr int LANES = S::LANES;
  const int64_t dim = layout.dim;
  const bool planes = dlayout.stride_w == 1 && (!SQDISTS || layout.stride_w == 1);

  for_tiles<LANES>(layout, tiles, [&](int64_t b, int64_t h, int64_t w, int64_t pixels, int64_t p) {
    const int32_t* key = keys + p;
    const auto offset = [&](const Layout& l, int64_t channel) {
      return b * l.stride_b + channel * l.stride_d + h * l.stride_h + w * l.stride_w;
    };

    if (planes && pixels == LANES && all_equal(key, LANES)) {
      // One key: its gradient and anchor are scalars of each channel's plane.
      const int64_t k = key[0];
      const int64_t a = SQDISTS && k >= 0 ? anchors.of_keys[k] : 0;
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        Vec df = {};
        if (k >= 0) {
          if constexpr (SQDISTS)
            df = (S::load(features + offset(layout, c)) - anchors.rows[a * dim + c]) *
                 (2 * dsqdists[k]);
          if (dsums) df += dsums[k * dim + c];
        }
        S::store(dfeatures + offset(dlayout, c), df);
      }
      return;
    }

    for (int64_t c = channels.begin; c < channels.end; c += LANES) {
      const int64_t width = std::min<int64_t>(LANES, channels.end - c);
      Tile<T> tile;
      if constexpr (SQDISTS) tile.load(features + offset(layout, c), layout, pixels, width);
      for (int i = 0; i < pixels; ++i) {
        const int64_t k = key[i];
        Vec df = {};
        if (k >= 0) {
          if constexpr (SQDISTS)
            df = (tile.pixel[i] -
                  Simd<Stat>::load(anchors.rows + anchors.of_keys[k] * dim + c, width)) *
                 (2 * dsqdists[k]);
          if (dsums) df += Simd<Stat>::load(dsums + k * dim + c, width);
        }
        tile.pixel[i] = df;
      }
      tile.store(dfeatures + offset(dlayout, c), dlayout, pixels, width);
    }
  });
}

template <class T>
void any_forward(const Layout& layout, const T* features, const int32_t* keys, int64_t num_keys,
                 const Anchors<StatOf<T>>& anchors, Range tiles, Range channels, double* sums,
                 double* sqdists, double* residuals) {
  const auto kernel = residuals      ? forward<T, true, true>
                      : anchors.rows ? forward<T, true, false>
                                     : forward<T, false, false>;
  kernel(layout, features, keys, num_keys, anchors, tiles, channels, sums, sqdists, residuals);
}

template <class T>
void any_backward(const Layout& layout, const T* features, const int32_t* keys,
                  const Anchors<StatOf<T>>& anchors, const StatOf<T>* dsums,
                  const StatOf<T>* dsqdists, const Layout& dlayout, T* dfeatures, Range tiles,
                  Range channels) {
  const auto kernel = dsqdists ? backward<T, true> : backward<T, false>;
  kernel(layout, features, keys, anchors, dsums, dsqdists, dlayout, dfeatures, tiles, channels);
}

template <class T>
Kernels<T> kernels() {
  return {Simd<T>::LANES, any_forward<T>, any_backward<T>};
}

template Kernels<float> kernels();
template Kernels<double> kernels();
template Kernels<BFloat16> kernels();
template Kernels<Half> kernels();
