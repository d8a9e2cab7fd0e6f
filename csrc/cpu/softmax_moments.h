// Softmax moments on the CPU: declarations for the operators (softmax_moments.cpp,
// pixel_argmax.cpp) and the vector kernels (softmax_moments_kernel.h, compiled once per instruction
// set).
#pragma once

#include <algorithm>
#include <cstdint>

#include "bilinear.h"
#include "types.h"
#include "workspace.h"

namespace anchorops::cpu::softmax {

// Labels [batch, height, width] of some integer dtype. read writes the classes of a row's columns,
// -1 if the label is ignored or not a class. It returns the number of labels out of range: neither
// a class nor ignored.
struct Labels {
  const void* data;
  int64_t stride_b, stride_h, stride_w;
  int64_t num_classes, ignore_index;
  int64_t (*read)(const Labels& labels, int64_t image, int64_t row, Range columns,
                  int32_t* classes);
};

template <class Stat>
struct Map {
  const Stat* data;
  int64_t stride_b, stride_h, stride_w;
};

// What makes a pixel's loss from -log p (softmax_losses.h).
template <class Stat>
struct LossOptions {
  // a and v [K], of image b at b * stride_b; null: 1 and 0
  const Stat *true_weights = nullptr, *all_weights = nullptr;
  const Stat* sums_of_all_weights = nullptr;  // of each image, or of all
  int64_t stride_b = 0;
  Stat min_loss = -__builtin_inf();
  Stat focal_gamma = 0;
  bool plain = true;  // nothing but -log p
  Map<Stat> pixel_weights = {};

  // v of an image; null: 0
  const Stat* all_weights_of(int64_t image) const {
    return all_weights ? all_weights + image * stride_b : nullptr;
  }
};

// The unit of work: rows × columns of logits of one image, and their labels. In the forward pass
// these are the labels whose lower row and column are in the tile. In the backward pass a tile
// writes the gradients of its logits, so these are all labels that read them. The same holds for
// the cells. Labels of the logits' size are those of the tile in both passes.
struct Tile {
  int64_t image;
  Range rows, columns, label_rows, label_columns, row_cells, column_cells;
};

// Pixels are processed in groups of one row; cells with at most ROWS rows of labels at a time.
constexpr int64_t GROUP = 64, ROWS = 8;

// Words of bits of classes.
constexpr uint64_t CLASS_WORDS = 4;

// A value for an even and one for an odd row: two neighbouring rows are kept, and a row replaces
// the one before the other.
template <class Value>
struct TwoRows {
  Value values[2];

  Value& operator[](int64_t row) { return values[row & 1]; }
  const Value& operator[](int64_t row) const { return values[row & 1]; }
};

// What the memory of one thread must be large enough for.
struct Sizes {
  int64_t num_classes;
  int64_t packed_stride;  // columns, one more at each side, a vector
  int64_t label_stride;   // labels, a vector
  int64_t slots;          // of a row of labels
  int64_t lanes;          // pixels of a row of cells
  bool backward, needs_factors;
};

// The memory of one thread. First, rows of logits (softmax_rows.h).
template <class Stat>
struct PackedMemory {
  int64_t stride;       // length of a packed row
  TwoRows<Stat*> rows;  // [K + 1, stride]; last the sum of v_k times the others
  Stat* shifts;         // [stride]: scratch

  void take(ThreadMemory& memory, int64_t its_stride, int64_t lines) {
    stride = its_stride;
    memory.take(length(lines), rows[0], rows[1]);
    memory.take(stride, shifts);
  }
  int64_t length(int64_t lines) const { return lines * stride + 16; }
};

// Where labels of a row are between the columns of packed rows (upsampling.h).
template <class Stat>
struct ColumnMemory {
  int32_t* lower;  // [labels and a vector]: the packed column at the left of each label
  Stat* weight;    // the same: the weight of the column at its right
  int32_t* slots;  // of the transpose
  Stat* slot_weights;

  void take(ThreadMemory& memory, int64_t labels, int64_t num_slots) {
    memory.take_zeros(labels, lower);
    memory.take(labels, weight);
    memory.take_zeros(num_slots, slots);
    memory.take(num_slots, slot_weights);
  }
};

// Groups of pixels (softmax_pixels.h).
template <class Stat>
struct GroupMemory {
  int64_t size;     // pixels of a group: a multiple of 16, at most GROUP
  Stat* upsampled;  // [K, size]
  Stat* slopes;     // [K, size], of errors
  Stat* line;       // [stride]: scratch
  ColumnMemory<Stat> columns;

  void take(ThreadMemory& memory, const Sizes& sizes) {
    size = sizes.num_classes <= 1024 ? GROUP : 16;
    memory.take(sizes.num_classes * size, upsampled, slopes);
    memory.take(sizes.packed_stride, line);
    columns.take(memory, GROUP + 16, sizes.slots);
  }
};

// Rows of cells (softmax_cells.h), and their blocks (softmax_blocks.h).
template <class Stat>
struct CellMemory {
  int64_t lanes;     // pixels of a row of cells
  int32_t* columns;  // [lanes]: each lane's column among the tile's labels; -1: no label
  Stat* weights;     // [lanes]
  Stat* starts;      // [lanes]: the weight of the first label of a cell
  Stat* factors[6];  // [ROWS, lanes]; backward, and forward with probability_sums
  // of the labels; backward only
  int32_t* classes;      // [ROWS, lanes]
  uint64_t* class_bits;  // [blocks, CLASS_WORDS]

  void take(ThreadMemory& memory, const Sizes& sizes) {
    lanes = sizes.lanes;
    memory.take_zeros(lanes, columns);
    memory.take(lanes, weights, starts);
    const int64_t pixels = sizes.needs_factors ? ROWS * lanes : 0;
    for (Stat*& of_pixels : factors) memory.take(pixels, of_pixels);
    if (!sizes.backward) return;
    memory.take(pixels, classes);
    memory.take(lanes, class_bits);
  }
};

// Differences of two logits (softmax_two_classes.h).
template <class Stat>
struct DifferenceMemory {
  int64_t stride;            // the longer one of a packed row and a row of labels
  Stat* planes;              // [2, stride]
  TwoRows<Stat*> lines;      // [labels]: of rows of logits
  Stat* label_line;          // [labels]: of a row of labels
  TwoRows<Stat*> gradients;  // [labels], zero; backward only
  ColumnMemory<Stat> columns;

  void take(ThreadMemory& memory, const Sizes& sizes) {
    const int64_t labels = sizes.label_stride;
    stride = std::max(sizes.packed_stride, labels);
    memory.take(2 * stride, planes);
    memory.take(labels, lines[0], lines[1], label_line);
    if (sizes.backward) memory.take_zeros(labels, gradients[0], gradients[1]);
    columns.take(memory, labels, sizes.slots);
  }
};

template <class Stat>
struct Workspace {
  PackedMemory<Stat> packed;
  TwoRows<Stat*> gradients;  // as the packed rows, zero; backward only
  int64_t label_stride;      // length of a row of classes
  int32_t* classes;          // [ROWS, label_stride]: rows of the tile's labels
  GroupMemory<Stat> group;
  CellMemory<Stat> cells;
  DifferenceMemory<Stat> differences;

  void take(ThreadMemory& memory, const Sizes& sizes) {
    const int64_t lines = sizes.num_classes + 1;
    packed.take(memory, sizes.packed_stride, lines);
    if (sizes.backward) memory.take_zeros(packed.length(lines), gradients[0], gradients[1]);
    label_stride = sizes.label_stride;
    memory.take_zeros(ROWS * label_stride, classes);
    group.take(memory, sizes);
    cells.take(memory, sizes);
    differences.take(memory, sizes);
  }
};

template <class Stat>
struct Logits {
  Layout layout;  // [B, K, h, w]
  const void* data;
  int64_t bytes;  // size of a logit
  // K, but 2 if there is one channel: the logits of class 1, while those of class 0 are 0.
  int64_t num_classes;
  // Packs a row for a tile. Returns whether all logits are finite or -inf.
  bool (*pack_row)(const Logits& logits, const Tile& tile, int64_t row,
                   const PackedMemory<Stat>& packed);
  // Reads a row's columns into target [num_classes, stride], where whole vectors can be written.
  void (*read_columns)(const Logits& logits, int64_t image, int64_t row, Range columns,
                       Stat* target, int64_t stride);
};

template <class Stat>
struct Problem {
  Logits<Stat> logits;
  bool upsampled;  // labels are not of the logits' size
  Axis<Stat> rows, columns;
  Cells row_cells, column_cells;
  Labels labels;
  LossOptions<Stat> loss_options;

  // The index of a pixel of the tile's image in contiguous maps [B, H, W].
  int64_t pixel(const Tile& tile, int64_t y, int64_t x) const {
    return (tile.image * rows.size + y) * columns.size + x;
  }
};

// The sums that follow from a pixel's loss and weight: `share_of_pixel` of softmax_losses.h.
enum LossSum { LOSSES, USED, LOSS_SUMS };

// For each class [K], null if not requested.
struct Sums {
  double* loss_sums[LOSS_SUMS];  // the first is never null
  double *intersections, *probability_sums, *squares;
  int64_t *counts, *correct;
  int64_t* labels_out_of_range;  // one number, never null
};

// For each pixel, contiguous [B, H, W], null if not requested. totals, for the backward pass: the
// sum of e^z over the classes, z minus its shift (softmax_rows.h), or 0 if the backward pass does
// not read it: where pixels are processed one by one.
template <class Stat>
struct Maps {
  Stat *pixel_losses, *totals;
};

// For each class [K], of image b at b * stride_b. Null if not given.
template <class Stat>
struct Gradients {
  const Stat *dlosses, *dintersections, *dprobability_sums, *dsquares;
  int64_t stride_b;
  Map<Stat> dpixel_losses;
  const Stat* totals;  // of the forward pass
  // A power of two, by which the largest of dprobability_sums and dsquares becomes 1 to 2: products
  // of small ones and powers of e would underflow.
  Stat dp_scale;
};

template <class Stat>
struct Output {
  Layout layout;  // dlogits
  void* dlogits;
  // Writes a tile's row of dlogits, if the row is in the tile, and sets its gradients to zero:
  // [K + 1, stride], as in packed rows.
  void (*finish_row)(const Problem<Stat>& problem, const Output& output, const Tile& tile,
                     int64_t row, Stat* gradients, int64_t stride);
  // Writes source [num_classes, stride], where whole vectors can be read, to a row's columns.
  void (*write_columns)(const Output& output, int64_t num_classes, int64_t image, int64_t row,
                        Range columns, const Stat* source, int64_t stride);
};

// Predictions [B, H, W], of an integer type of 1, 2, 4 or 8 bytes that holds all classes.
struct Predictions {
  void* data;
  int64_t itemsize;

  // Calls write(pointer to the element at the index), typed.
  template <class Write>
  void at(int64_t index, Write write) const {
    switch (itemsize) {
      case 1:
        return write(static_cast<uint8_t*>(data) + index);
      case 2:
        return write(static_cast<uint16_t*>(data) + index);
      case 4:
        return write(static_cast<uint32_t*>(data) + index);
      default:
        return write(static_cast<int64_t*>(data) + index);
    }
  }
};

// Errors of probabilities (probability_histograms_kernel.h).
struct Histograms {
  int32_t* counts;  // [K, 2, bins]: of pixels of the class, and of others
  int64_t bins;
};

template <class Stat>
struct ErrorSlopes {
  const Stat* data;  // of the loss in each error: [K, 2, bins]
  int64_t bins;
};

// The kernels of one instruction set.
template <class Stat>
struct Kernels {
  // Adds to sums and writes the maps at the tile's labels.
  void (*forward)(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                  const Sums& sums, const Maps<Stat>& maps);

  // Writes the tile of dlogits.
  void (*backward)(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                   const Gradients<Stat>& gradients, const Output<Stat>& output);

  // Adds the errors at the tile's labels, except those of other classes in bin 0.
  void (*count_errors)(const Problem<Stat>& problem, const Tile& tile,
                       const Workspace<Stat>& workspace, const Histograms& histograms);

  // Writes the tile of dlogits, of a loss with these slopes.
  void (*error_gradients)(const Problem<Stat>& problem, const Tile& tile,
                          const Workspace<Stat>& workspace, const ErrorSlopes<Stat>& slopes,
                          const Output<Stat>& output);

  // Writes predictions at the tile's labels.
  void (*argmax)(const Problem<Stat>& problem, const Tile& tile, const Workspace<Stat>& workspace,
                 const Predictions& predictions);
};

// Functions that depend on the dtype of the logits.
template <class T>
struct Rows {
  decltype(Logits<StatOf<T>>::pack_row) pack_row;
  decltype(Logits<StatOf<T>>::read_columns) read_columns;
  decltype(Output<StatOf<T>>::finish_row) finish_row;
  decltype(Output<StatOf<T>>::write_columns) write_columns;
};

IN_EVERY_INSTRUCTION_SET(template <class Label> decltype(Labels::read) label_reader();)
IN_EVERY_INSTRUCTION_SET(template <class T> Rows<T> rows();)
IN_EVERY_INSTRUCTION_SET(template <class Stat> Kernels<Stat> kernels();)

}  // namespace anchorops::cpu::softmax
