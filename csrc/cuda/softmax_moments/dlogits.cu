// The gradient of the logits: the transpose of the upsampling, of dz (gradients.cuh), gathered for
// each position without atomics.
//
// A thread keeps 16 factors and the labels of a cell's pixels in registers, for all classes of a
// block. It sums over a cell by Horner's rule, first over its columns, then over its rows. A block
// of 8 warps has 57 KB of shared memory; two blocks are resident. One row of cells in 8 and one
// column in 32 are computed twice. Instructions determine the time: `make cuda-report` prints those
// for each cell and class. Each class that occurs in the 512 pixels of a warp needs about 200 more.
#include "gradients.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CLASSES = 16;
constexpr unsigned ALL_WARPS = WARPS * 32;

// Σ f, Σ i·f, Σ j·f and Σ i·j·f over the pixels of a cell, added row by row.
struct PixelSums {
  float sum = 0, sum_i = 0, sum_j = 0, sum_ij = 0, row = 0, row_j = 0;

  __device__ __forceinline__ void add(int i, int j, float f) {
    row = j ? row + f : f;
    row_j = j ? fmaf(j, f, row_j) : 0;
    if (j < TILE - 1) return;
    sum += row;
    sum_i = fmaf(i, row, sum_i);
    sum_j += row_j;
    sum_ij = fmaf(i, row_j, sum_ij);
  }
  // The sums of f times the pixels' interpolation weights.
  __device__ __forceinline__ Corners to_corners(const Cell& cell) const {
    const float right = fmaf(cell.fraction_x, sum, cell.step_x * sum_j);
    const float right_i = fmaf(cell.fraction_x, sum_i, cell.step_x * sum_ij);
    const float bottom = fmaf(cell.fraction_y, sum, cell.step_y * sum_i);
    const float both = fmaf(cell.fraction_y, right, cell.step_y * right_i);
    return {sum - bottom - (right - both), right - both, bottom - both, both};
  }
};

// Of f = factors·e^z·2^SCALE, by Horner's rule.
__device__ __forceinline__ PixelSums sum_over_pixels(const Powers& powers,
                                                     const float (&factors)[TILE][TILE]) {
  float x[TILE] = {powers.x};
#pragma unroll
  for (int i = 1; i < TILE; ++i) x[i] = x[i - 1] * powers.xy;
  float sum = 0, sum_i = 0, sum_j = 0, sum_ij = 0;  // sum_i and sum_ij without a factor y
#pragma unroll
  for (int i = TILE - 1; i >= 0; --i) {
    float row = factors[i][TILE - 1], row_j = row;
#pragma unroll
    for (int j = TILE - 2; j >= 0; --j) {
      row = fmaf(row, x[i], factors[i][j]);
      if (j > 0) row_j = fmaf(row_j, x[i], row);
    }
    row_j *= x[i];
    if (i == TILE - 1) {
      sum = row, sum_j = row_j;
    } else {
      sum_i = i == TILE - 2 ? sum : fmaf(sum_i, powers.y, sum);
      sum_ij = i == TILE - 2 ? sum_j : fmaf(sum_ij, powers.y, sum_j);
      sum = fmaf(sum, powers.y, row);
      sum_j = fmaf(sum_j, powers.y, row_j);
    }
  }
  const float second = powers.first * powers.y;
  return {powers.first * sum, second * sum_i, powers.first * sum_j, second * sum_ij};
}

// What a launch reads in addition to the logits.
struct Inputs {
  PixelLabels labels;
  Gradients gradients;
  PixelMaps maps;
};

__device__ __forceinline__ void prefetch_pixels(const Cells& cells, const Cell& cell,
                                                const Inputs& inputs) {
  const PixelLabels& labels = inputs.labels;
  offsets_of(cells, cell, labels).prefetch_rows(labels.data, labels.itemsize);
  offsets_of(cells, cell).prefetch_rows(inputs.maps.lse, sizeof(float));
}

// The values of a thread's pixels that every class needs.
template <bool BY_CLASS>
struct PixelTerms {
  float factors[TILE][TILE];  // 2^-SCALE/Σ e^z; times slope unless BY_CLASS
  float slopes[BY_CLASS ? TILE : 1][TILE];
  CellLabels labels;
  unsigned apart;  // pixels that are computed one by one

  __device__ __forceinline__ void load(const Cells& cells, const Cell& cell, const Inputs& inputs,
                                       const Corners& shifts, int first_key) {
    labels.load(inputs.labels, cells, cell);
    const unsigned valid = labels.valid();
    load_map(cells, cell, valid, inputs.maps.lse, factors);
    if constexpr (BY_CLASS) {
      apart = to_inverse_sums(cells, cell, shifts, valid, factors);
      load_map(cells, cell, valid & ~apart, inputs.maps.slopes, slopes);  // 0 · NaN is NaN
    } else {
      float loaded[TILE][TILE];
      if (inputs.maps.slopes) {
        load_map(cells, cell, valid, inputs.maps.slopes, loaded);
      } else {
        const float* dlosses = inputs.gradients.dlosses + first_key;
        for_tile([&](int i, int j) {
          loaded[i][j] = dlosses[valid & bit_of(i, j) ? labels.at(i, j) : 0];
        });
      }
      apart = to_inverse_sums(cells, cell, shifts, valid, factors);
      const unsigned regular = valid & ~apart;  // 0 · NaN is NaN
      for_tile([&](int i, int j) { factors[i][j] *= regular & bit_of(i, j) ? loaded[i][j] : 0; });
    }
  }

  // The terms of all classes, of pixels that are not apart; of class k if BY_CLASS.
  __device__ __forceinline__ Corners of_class(const Cell& cell, const Powers& powers,
                                              const Gradients& gradients, int key) const {
    if constexpr (!BY_CLASS) {
      return sum_over_pixels(powers, factors).to_corners(cell);
    } else {
      const float dmass = Gradients::at(gradients.dmasses, key);
      const float dsquare = 2 * Gradients::at(gradients.dsquares, key);
      PixelSums sums;
      for_pixels(powers, [&](int i, int j, float e) {
        const float p = e * factors[i][j];
        sums.add(i, j, p * fmaf(p, dsquare, slopes[i][j] + dmass));
      });
      return sums.to_corners(cell);
    }
  }

  // The terms of the pixels with label k, of those that are not apart.
  __device__ __forceinline__ Corners of_label(const Cells& cells, const Cell& cell,
                                              const Inputs& inputs, unsigned k, int key) const {
    const float* own = inputs.maps.own;
    const float dloss = own ? 0 : inputs.gradients.dlosses[key];
    const unsigned pixels = labels.of_class(k) & ~apart;
    PixelSums sums;
    const auto add = [&](int i, int j) {
      const float term = own ? own[cell.pixel(cells, i, j)] : dloss;
      sums.sum -= term;
      sums.sum_i = fmaf(-i, term, sums.sum_i);
      sums.sum_j = fmaf(-j, term, sums.sum_j);
      sums.sum_ij = fmaf(-i * j, term, sums.sum_ij);
    };
    if constexpr (BY_CLASS) {  // in a loop that needs few registers
      for_each_of(pixels, add);
    } else {
      for_tile([&](int i, int j) {
        if (pixels & bit_of(i, j)) add(i, j);
      });
    }
    return sums.to_corners(cell);
  }

  // All terms of class k, of the pixels that are computed one by one.
  __device__ Corners of_apart(const Cells& cells, const Cell& cell, const Inputs& inputs, int k,
                              int first_key) const {
    const auto& [all_labels, gradients, maps] = inputs;
    const unsigned of_label = labels.of_class(k);
    const int key = first_key + k;
    Corners corners;
    for_each_of(apart, [&](int i, int j) {
      const int64_t pixel = cell.pixel(cells, i, j);
      float slope, own;
      if (BY_CLASS || maps.slopes)
        slope = maps.slopes[pixel], own = maps.own[pixel];
      else
        slope = own = gradients.dlosses[first_key + labels.of_pixel(i, j)];
      if (!(of_label & bit_of(i, j))) own = 0;
      const float p = exp2_approximate((cell.logits(cells, i, j).z(k) - maps.lse[pixel]) * LOG2E);
      slope +=
          Gradients::at(gradients.dmasses, key) + 2 * p * Gradients::at(gradients.dsquares, key);
      add_weighted(p * slope - own, cells.rows.fraction(cell.row, cell.y + i),
                   cells.columns.fraction(cell.column, cell.x + j), corners);
    });
    return corners;
  }

  // A corner of weight 0 receives nothing, because dz may be NaN.
  __device__ static void add_weighted(float dz, float weight_y, float weight_x, Corners& corners) {
    const auto add_to = [&](float& corner, float weight) {
      if (weight != 0) corner = fmaf(weight, dz, corner);
    };
    add_to(corners.top_left, (1 - weight_y) * (1 - weight_x));
    add_to(corners.top_right, (1 - weight_y) * weight_x);
    add_to(corners.bottom_left, weight_y * (1 - weight_x));
    add_to(corners.bottom_right, weight_y * weight_x);
  }
};

// The gradients of CLASSES classes in shared memory, behind the staged logits. The gradient of a
// position is the sum of the cells below it and of those above it.
struct GradientStage {
  int pitch;
  int64_t* offsets;       // [warps, 32] of positions in dlogits, negative if there is none
  float *tops, *bottoms;  // [CLASSES, warps, 32] of the cells right of and left of a position

  static __host__ __device__ size_t start(int warps) {
    return ceil_div(LogitsStage<CLASSES>::bytes(warps), sizeof(int64_t)) * sizeof(int64_t);
  }
  static size_t bytes(int warps) {
    return start(warps) + warps * 32 * sizeof(int64_t) +
           2 * CLASSES * (warps * 32 + 1) * sizeof(float);
  }

  // The position of a thread is at the left end of the top of its cell. Those of the first row and
  // column of the block belong to its neighbours.
  __device__ GradientStage(const Logits& dlogits, const Cell& cell)
      : pitch(static_cast<int>(blockDim.x) + 1) {
    offsets = reinterpret_cast<int64_t*>(shared_memory() + start(blockDim.x / 32));
    tops = reinterpret_cast<float*>(offsets + blockDim.x);
    bottoms = tops + CLASSES * pitch;
    const bool owned = threadIdx.x >= 32 && threadIdx.x % 32 > 0 && cell.inside && cell.column >= 0;
    offsets[threadIdx.x] = owned ? dlogits.offset(cell.image, cell.row, cell.column) : -1;
  }

  // Sets the gradients from the thread's cell, or adds to them. All lanes must call it.
  __device__ __forceinline__ void put(int k, const Corners& corners, bool add) const {
    float top = corners.top_left + __shfl_up_sync(FULL_WARP, corners.top_right, 1);
    float bottom = corners.bottom_left + __shfl_up_sync(FULL_WARP, corners.bottom_right, 1);
    const int at = k * pitch + threadIdx.x;
    if (add) top += tops[at], bottom += bottoms[at];
    tops[at] = top;
    bottoms[at] = bottom;
  }

  // Stores the gradients of the classes from first to first + count - 1.
  __device__ __forceinline__ void store(const Logits& dlogits, int first, int count) const {
    for_element(dlogits.element, [&](auto element) {
      using T = decltype(element);
      T* out = static_cast<T*>(dlogits.data) + first * dlogits.stride_k;
      if (dlogits.stride_k < dlogits.stride_w)
        store_channels_last(out, dlogits.stride_k, count);
      else
        store_planes(out, dlogits.stride_k, count);
    });
  }
  template <class T>
  __device__ __forceinline__ void store_position(T* plane, int k, int position) const {
    if (offsets[position] >= 0)
      plane[offsets[position]] =
          static_cast<T>(tops[k * pitch + position] + bottoms[k * pitch + position - 32]);
  }
  template <class T>
  __device__ __forceinline__ void store_planes(T* out, int64_t stride, int count) const {
    const int warps = blockDim.x / 32;
    for (int k = threadIdx.x / 32; k < count; k += warps) {
#pragma unroll 4
      for (int i = 32 + threadIdx.x % 32; i < warps * 32; i += 32)
        store_position(out + k * stride, k, i);
    }
  }
  template <class T>
  __device__ __forceinline__ void store_channels_last(T* out, int64_t stride, int count) const {
    const int k = threadIdx.x % CLASSES, step = blockDim.x / CLASSES;
    for (int i = 32 + threadIdx.x / CLASSES; k < count && i < static_cast<int>(blockDim.x);
         i += step)
      store_position(out + k * stride, k, i);
  }
};

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
__global__ void __launch_bounds__(ALL_WARPS, BY_CLASS ? BLOCKS_BY_CLASS : 2)
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
  prefetch_pixels(cells, cell, inputs);
  cell.set_corners(cells, stage);
  const GradientStage sums(dlogits, cell);
  const int first_key = inputs.gradients.first_key(cell.image, cells.logits.num_classes);
  const int parts = cells.parts;
  PixelTerms<BY_CLASS> terms;

#pragma unroll 1
  for (int first = first_class; first < end_class; first += CLASSES) {
    const int count = min(CLASSES, end_class - first);
    if (cells.geometric) stage.load(first, count);
    __syncthreads();
    if (cells.geometric) stage.prefetch_classes(first + CLASSES, end_class);
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      if (parts > 1 || first == first_class) {
        cell.select(cells, part);
        terms.load(cells, cell, inputs, stage.shifts_of_cell(), first_key);
      }
      if (cells.geometric) {
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          const Powers powers = cell.powers(k * COLUMNS);
          sums.put(k, terms.of_class(cell, powers, inputs.gradients, first_key + first + k),
                   part > 0);
        }
      } else if (part == 0) {
        for (int k = 0; k < count; ++k) sums.put(k, {}, false);
      }
      // The rest is needed for few classes, or few cells.
#pragma unroll 1
      for (int k = terms.labels.next(first); k < first + count; k = terms.labels.next(k + 1))
        sums.put(k - first, terms.of_label(cells, cell, inputs, k, first_key + k), true);
      if (__ballot_sync(FULL_WARP, terms.apart)) {
#pragma unroll 1
        for (int k = 0; k < count; ++k)
          sums.put(k, terms.of_apart(cells, cell, inputs, first + k, first_key), true);
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
         warps * 32, GradientStage::bytes(warps), stream, cells, Inputs{labels, gradients, maps},
         dlogits, classes_per_block);
}

}  // namespace anchorops::cuda
