// The second pass of class moments: the sum of the partials that the first pass has written.
#pragma once

#include <cstdint>

#include "../tensors.cuh"

namespace anchorops::cuda {

// Partial statistics and their sum. The columns of sums are channels, in the order of the blocks.
struct Reduction {
  const float* partials;  // float32 [count, num_keys, width]
  float* out;             // float32 [num_keys, columns]
  int64_t width, columns;
  int count, rows_per_chunk;  // of partials: either 1, or the number of blocks
  int slices;                 // threads for each result, a power of two
};
struct Reductions {
  Reduction of[2];
  const uint8_t* met;  // see Partials
  int64_t num_keys;
  int period = 1;  // see Input
};

// Reads each partial and writes each result once, in a fixed order. Reductions that are not wanted
// have a count of 0.
void add_partials(Reductions all, Stream stream);

}  // namespace anchorops::cuda
