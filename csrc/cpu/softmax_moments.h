// Softmax moments on the CPU: what the operators (softmax_moments.cpp, pixel_argmax.cpp) and the
// vector kernels (softmax_moments_kernel.h, compiled once per instruction set) share.
#pragma once

#include "types.h"

namespace anchorops::cpu::softmax {

// Label i of an axis lies at (1 - weight[i]) * logit[lower[i]] + weight[i] * logit[lower[i] + 1],
// where the last logit is its own neighbour. Null pointers where label i is logit i.
template <class Stat>
struct Axis {
  int64_t size, source;  // numbers of labels and of logits
  const int32_t* lower;
  const Stat* weight;
};

// Labels [batch, height, width] of some integer dtype. read writes the classes of a row's columns,
// -1 where the label is ignored or no class.
struct Labels {
  const void* data;
  int64_t stride_b, stride_h, stride_w;
  int64_t num_classes, ignore_index;
  void (*read)(const Labels& labels, int64_t image, int64_t row, Range columns, int32_t* classes);
};

template <class T>
struct Problem {
  using Stat = StatOf<T>;
  Layout layout;  // of logits [B, K, h, w]
  const T* logits;
  Axis<Stat> rows, columns;
  Labels labels;
};

// The unit of work: logits of one image, rows × columns of them, and the labels that belong to
// them. Forward, these are the labels whose lower row and column are in the tile; backward, where
// a tile writes its logits' gradients, all that read its logits. `read` has one column more at
// either side, where there is one and it is read.
struct Tile {
  int64_t image;
  Range rows, columns, read, label_rows, label_columns;
};

// Logits are packed by rows [K, stride] in Stat. Pixels are handled in groups of one row.
constexpr int64_t GROUP = 64;

// One thread's memory.
template <class Stat>
struct Workspace {
  int64_t stride;      // of packed rows, a multiple of 16 with at least 16 columns to spare
  int64_t group;       // pixels of a group: a multiple of 16, at most GROUP
  Stat* packed[2];     // [K, stride]: rows of even and of odd number
  Stat* shifts[2];     // [stride]
  Stat* gradients[2];  // [K, stride], zero; backward only
  Stat* upsampled;     // [K, group]
  Stat* line;          // [stride]
  int32_t* classes;    // of a row of the tile's labels
};

// By class [K], null where not asked for.
struct Sums {
  double *losses, *overlaps, *masses, *squares;
  int64_t *counts, *hits;
};

// By pixel, contiguous [B, H, W], null where not asked for.
template <class Stat>
struct Maps {
  Stat *pixel_losses, *lse;
};

template <class Stat>
struct Map {
  const Stat* data;
  int64_t stride_b, stride_h, stride_w;
};

// Null where not given. By class [K], of image b at b * stride_b.
template <class Stat>
struct Gradients {
  const Stat *dlosses, *doverlaps, *dmasses, *dsquares;
  int64_t stride_b;
  Map<Stat> dpixel_losses, dlse;
  const Stat* lse;  // contiguous [B, H, W], of the forward pass
};

// The kernels of one instruction set.
template <class T>
struct Kernels {
  using Stat = StatOf<T>;

  // Adds to sums and writes the maps at the tile's labels.
  void (*forward)(const Problem<T>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                  const Sums& sums, const Maps<Stat>& maps);

  // Writes the tile of dlogits.
  void (*backward)(const Problem<T>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                   const Gradients<Stat>& gradients, const Layout& dlayout, T* dlogits);

  // Writes predictions [B, H, W] at the tile's labels.
  void (*argmax)(const Problem<T>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                 int64_t* predictions);
};

// clang-format off
namespace baseline { template <class T> Kernels<T> kernels(); }
namespace avx2 { template <class T> Kernels<T> kernels(); }
namespace avx512 { template <class T> Kernels<T> kernels(); }
// clang-format on

}  // namespace anchorops::cpu::softmax
