// The divergence of upsampled logits on the CPU: declarations for the operator
// (pixel_kl_divergence.cpp) and its vector kernels (pixel_kl_divergence_kernel.h).
#pragma once

#include "softmax_moments.h"

namespace anchorops::cpu::softmax {

// Student or teacher: its logits, and one thread's memory for them. Labels are processed in chunks
// of a row.
template <class Stat>
struct Model {
  Problem<Stat> problem;
  PackedMemory<Stat> packed;
  ColumnMemory<Stat> columns;
  TwoRows<Stat*> rows;  // [K, line]: logits upsampled along the row, to the labels of a chunk
};

template <class Stat>
struct Divergence {
  Model<Stat> student, teacher;
  int64_t chunk, line;              // most labels of a chunk, a multiple of 16; chunk + 16
  TwoRows<Stat*> gradients;         // [K, line], as student.rows, zero; backward only
  TwoRows<Stat*> packed_gradients;  // [K, stride], as student.packed, zero; backward only
  Map<bool> valid;                  // all pixels, if its data is null
  Stat* is_valid;                   // [4, line]
  Stat temperature;

  // What is not of the student's workspace.
  void take(ThreadMemory& memory, int64_t num_classes, int64_t teacher_stride, bool backward) {
    const int64_t length = num_classes * line;
    teacher.packed.take(memory, teacher_stride, num_classes);
    teacher.columns.take(memory, line, 0);
    memory.take(length, student.rows[0], student.rows[1], teacher.rows[0], teacher.rows[1]);
    memory.take(4 * line, is_valid);
    if (backward) memory.take_zeros(length, gradients[0], gradients[1]);
  }
};

// For each pixel, contiguous [B, H, W], null if not requested. The backward pass reads the sums of
// e^(z / T) over the classes, z: the shifted logits (softmax_rows.h). They are 0 where the sum
// would underflow: it is then computed again.
template <class Stat>
struct DivergenceMaps {
  Stat *divergences, *totals, *teacher_totals;
};

template <class Stat>
struct DivergenceGradients {
  Stat dtotal;
  Map<Stat> ddivergences;
  const Stat *totals, *teacher_totals;  // of the forward pass
};

// Tiles of both models with the same labels, those of the student's tile.
struct TwoTiles {
  Tile student, teacher;
};

// The kernels of one instruction set.
template <class Stat>
struct DivergenceKernels {
  // Writes the maps at the tiles' labels. Returns the sum of their divergences.
  double (*forward)(const Divergence<Stat>& divergence, const TwoTiles& tiles,
                    const DivergenceMaps<Stat>& maps);

  // Writes the tile of dlogits of the student.
  void (*backward)(const Divergence<Stat>& divergence, const TwoTiles& tiles,
                   const DivergenceGradients<Stat>& gradients, const Output<Stat>& output);
};

IN_EVERY_INSTRUCTION_SET(template <class Stat> DivergenceKernels<Stat> divergence_kernels();)

}  // namespace anchorops::cpu::softmax
