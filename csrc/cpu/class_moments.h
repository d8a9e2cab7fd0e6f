// Class moments on the CPU: declarations for the operators (class_moments.cpp) and the vector
// kernels (class_moments_kernel.h, compiled once per instruction set).
#pragma once

#include "types.h"

namespace anchorops::cpu {

template <class Stat>
struct Anchors {
  const Stat* rows;         // [K, dim]; null if there are none
  const int32_t* key_rows;  // [1 + num_keys]: the row of each key
};

// The kernels of one instruction set. Features have any strides; the key of pixel (b, h, w) of a
// Layout is keys[(b * height + h) * width + w], -1 if it is ignored. The kernels' tables, with one
// row per key, start with a row for key -1, so an ignored pixel needs no branch. A tile is up
// to `lanes` pixels of one row, in the order (b, h, w); a block is up to `lanes` channels, counted
// from channels.begin.
template <class T>
struct Kernels {
  using Stat = StatOf<T>;

  int64_t lanes, doubles;

  // Adds the tiles' pixels to sums [blocks, 1 + num_keys, lanes] and, over all
  // blocks, to sqdists [1 + num_keys, doubles]. Pointers may be null.
  void (*forward)(const Layout& layout, const T* features, const int32_t* keys, int64_t num_keys,
                  const Anchors<Stat>& anchors, Range tiles, Range channels, double* sums,
                  double* sqdists);

  // Writes dfeatures. dsums [num_keys, dim] and dsqdists [num_keys] may be null; without dsqdists
  // neither features nor anchors are read.
  void (*backward)(const Layout& layout, const T* features, const int32_t* keys,
                   const Anchors<Stat>& anchors, const Stat* dsums, const Stat* dsqdists,
                   const Layout& dlayout, T* dfeatures, Range tiles, Range channels);
};

IN_EVERY_INSTRUCTION_SET(template <class T> Kernels<T> kernels();)

}  // namespace anchorops::cpu
