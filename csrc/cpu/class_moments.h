// Class moments on the CPU: what the operators (class_moments.cpp) and the vector kernels
// (class_moments_kernel.h, compiled once per instruction set) share.
#pragma once

#include "types.h"

namespace anchorops::cpu {

template <class Stat>
struct Anchors {
  const Stat* rows;        // [K, dim]; null where there are none
  const int32_t* of_keys;  // [1 + num_keys]: the row of each key
};

// The kernels of one instruction set. Features have any strides; pixel (b, h, w) of a Layout has
// keys[(b * height + h) * width + w], which is -1 where it is ignored. Tables by key that the
// kernels use start with a row for key -1, so that an ignored pixel needs no branch. A tile is up
// to `lanes` pixels of one row, in the order (b, h, w); a block is up to `lanes` channels, counted
// from channels.begin.
template <class T>
struct Kernels {
  using Stat = StatOf<T>;

  int64_t lanes, doubles;

  // Adds the tiles' pixels to sums and residuals [blocks, 1 + num_keys, lanes] and, over all
  // blocks, to sqdists [1 + num_keys, doubles]. Null pointers are left out.
  void (*forward)(const Layout& layout, const T* features, const int32_t* keys, int64_t num_keys,
                  const Anchors<Stat>& anchors, Range tiles, Range channels, double* sums,
                  double* sqdists, double* residuals);

  // Writes dfeatures. dsums [num_keys, dim] and dsqdists [num_keys] may be null; without dsqdists
  // neither features nor anchors are read.
  void (*backward)(const Layout& layout, const T* features, const int32_t* keys,
                   const Anchors<Stat>& anchors, const Stat* dsums, const Stat* dsqdists,
                   const Layout& dlayout, T* dfeatures, Range tiles, Range channels);
};

// clang-format off
namespace baseline { template <class T> Kernels<T> kernels(); }
namespace avx2 { template <class T> Kernels<T> kernels(); }
namespace avx512 { template <class T> Kernels<T> kernels(); }
// clang-format on

}  // namespace anchorops::cpu
