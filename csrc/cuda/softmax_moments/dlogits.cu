// The gradient of the logits: the transpose of the upsampling, of dz (gradients.cuh), gathered for
// each position without atomics.
//
// A thread keeps 16 factors and the labels of a cell's pixels in registers, for all classes of a
// block (pixel_terms.cuh). A block of 8 warps has 57 KB of shared memory; two blocks are resident.
// One row of cells in 8 and one column in 32 are computed twice. `make cuda-report` prints the
// instructions for each cell and class; each class that occurs in the 512 pixels of a warp needs
// about 200 more.
#include <algorithm>
#include <cstdint>

#include "gradient_stage.cuh"
#include "pixel_terms.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CLASSES = 16;

__device__ __forceinline__ void prefetch_pixels(const Cell& cell, const Inputs& inputs) {
  const PixelLabels& labels = inputs.labels;
  offsets_of(cell, labels).prefetch_rows(labels.data, labels.itemsize);
  offsets_of(cell).prefetch_rows(inputs.maps.lse, sizeof(float));
}

// Blocks of one multiprocessor. From sm_100 on nvcc uses more than 128 registers for masses.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int BLOCKS_BY_CLASS = 1;
#else
constexpr int BLOCKS_BY_CLASS = 2;
#endif

// For 31 columns of cells each, of all images side by side.
__host__ __device__ inline int64_t blocks_across(const Cells& cells) {
  return ceil_div(int64_t{cells.logits.batch} * cells.pitch - 1, 31);
}

// A block computes the gradient of 31 columns and of one row less than it has warps, for its share
// of the classes. Its neighbours compute the cells at its edges again. Blocks are in the order of
// columns, then rows; the shares of the classes are another dimension of the grid.
template <bool BY_CLASS>
__global__ void __launch_bounds__(WARPS * 32, BY_CLASS ? BLOCKS_BY_CLASS : 2)
    softmax_dlogits_kernel(Cells cells, Inputs inputs,
                           Logits dlogits,  // [B, K, h, w] by strides
                           int classes_per_block) {
  const auto across = static_cast<unsigned>(blocks_across(cells));
  const int first_row = static_cast<int>(blockIdx.x / across * (blockDim.x / 32 - 1)) - 1;
  const Columns columns(int64_t{blockIdx.x % across} * 31, cells.pitch);
  const int first_class = static_cast<int>(blockIdx.y) * classes_per_block;
  const int end_class = min(first_class + classes_per_block, cells.logits.num_classes);
  LogitsStage<CLASSES> stage(cells, first_row, columns);
  Cell cell(cells, first_row + threadIdx.x / 32, columns, 0);
  prefetch_pixels(cell, inputs);
  const Sequences sequences(cell, stage);
  const GradientStage<CLASSES> sums(dlogits, cell);
  // Not a variable: for sm_80 there is no register left to hold it.
  const auto first_key = [&] {
    return inputs.gradients.first_key(cell.image, cells.logits.num_classes);
  };
  const int parts = cells.parts;
  CellLabels labels;
  RegularPixels<BY_CLASS> regular;
  unsigned irregular;  // pixels

#pragma unroll 1
  for (int first = first_class; first < end_class; first += CLASSES) {
    const int count = min(CLASSES, end_class - first);
    stage.load(first, count);
    __syncthreads();
    stage.prefetch_classes(first + CLASSES, end_class);
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      if (parts > 1 || first == first_class) {
        cell.select(part);
        labels.load(inputs.labels, cell);
        irregular = regular.load(sequences, stage.shifts_of_cell(), labels, inputs, first_key());
      }
#pragma unroll 1
      for (int k = 0; k < count; ++k)
        sums.put(
            k, regular.terms(cell, sequences.powers(k), inputs.gradients, first_key() + first + k),
            part > 0);
      // The rest is needed for few classes, or few cells.
#pragma unroll 1
      for (int k = labels.next(first); k < first + count; k = labels.next(k + 1)) {
        const unsigned pixels = labels.pixels_with_class(k) & ~irregular;
        sums.put(k - first, label_terms<!BY_CLASS>(cell, inputs, pixels, first_key() + k), true);
      }
      if (__ballot_sync(FULL_WARP, irregular)) {
#pragma unroll 1
        for (int k = 0; k < count; ++k)
          sums.put(
              k, irregular_terms<BY_CLASS>(cell, inputs, labels, irregular, first + k, first_key()),
              true);
      }
    }
    __syncthreads();
    sums.store(dlogits, first, count);
    __syncthreads();
  }
}

}  // namespace

void write_dlogits(const Cells& cells, const PixelLabels& labels, const Gradients& gradients,
                   const PixelMaps& maps, const Logits& dlogits, Stream stream) {
  const int num_classes = cells.logits.num_classes;
  const int warps = std::min(WARPS, cells.logits.height + 1);
  const int64_t blocks = blocks_across(cells) * ceil_div(cells.logits.height, warps - 1);
  // If there are few blocks, the classes are divided among more of them.
  constexpr int64_t BLOCKS = 1024;
  const int64_t shares = std::clamp<int64_t>(BLOCKS / blocks, 1, ceil_div(num_classes, CLASSES));
  const int classes_per_block =
      ceil_div(ceil_div(num_classes, static_cast<int>(shares)), CLASSES) * CLASSES;
  dim3 grid = grid_of("softmax_dlogits_kernel", blocks);
  grid.y = ceil_div(num_classes, classes_per_block);
  launch("softmax_dlogits_kernel",
         gradients.by_class() ? softmax_dlogits_kernel<true> : softmax_dlogits_kernel<false>, grid,
         warps * 32, GradientStage<CLASSES>::bytes(warps), stream, cells,
         Inputs{labels, gradients, maps}, dlogits, classes_per_block);
}

}  // namespace anchorops::cuda
