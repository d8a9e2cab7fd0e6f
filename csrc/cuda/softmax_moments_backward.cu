// The operator anchorops::softmax_moments_backward.cuda: the gradient of softmax moments.
//
// dz_k = p_k·(slope + dmasses[k] + 2·p_k·dsquares[k]) - [y = k]·own; for slope and own of a pixel
// see softmax_slopes.cu
// dlogits = the transpose of the upsampling, of dz: gathered for each position, without atomics
//
// Launches: class keys, the shifts of positions, with dmasses or dsquares a pass over the logits,
// the slopes of pixels, and the gradient. Memory in addition to the gradient: keys, slopes and own
// terms, 8 to 12 bytes a pixel; shifts, 8 bytes a position.
//
// In the pass for the gradient a thread keeps 16 factors and the labels of a cell's pixels in
// registers, for all classes of a block. It sums over a cell by Horner's rule, first over its
// columns, then over its rows. A block of 8 warps has 57 KB of shared memory; two blocks are
// resident. One row of cells in 8 and one column in 32 are computed twice. Instructions determine
// the time: `make cuda-report` prints those for each cell and class, and the predicted times.
// bench/NOTES.md has both. Each class that occurs in the 512 pixels of a warp needs more.
#include "class_keys.cuh"
#include "softmax_gradients.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CLASSES = 16;
constexpr unsigned ALL_WARPS = WARPS * 32;

// The gradients of the logits at the corners of a cell, from its pixels.
struct Corners {
  float top_left = 0, top_right = 0, bottom_left = 0, bottom_right = 0;

  // A corner of weight 0 receives nothing, because dz may be NaN.
  __device__ __forceinline__ void add(float dz, float weight_y, float weight_x) {
    const auto add_to = [&](float& corner, float weight) {
      if (weight != 0) corner = fmaf(weight, dz, corner);
    };
    add_to(top_left, (1 - weight_y) * (1 - weight_x));
    add_to(top_right, (1 - weight_y) * weight_x);
    add_to(bottom_left, weight_y * (1 - weight_x));
    add_to(bottom_right, weight_y * weight_x);
  }
};

// From Σ f, Σ i·f, Σ j·f and Σ i·j·f over the pixels of a cell.
__device__ __forceinline__ Corners to_corners(const Cell& cell, float sum, float sum_i, float sum_j,
                                              float sum_ij) {
  const float right = fmaf(cell.fraction_x, sum, cell.step_x * sum_j);
  const float right_i = fmaf(cell.fraction_x, sum_i, cell.step_x * sum_ij);
  const float bottom = fmaf(cell.fraction_y, sum, cell.step_y * sum_i);
  const float both = fmaf(cell.fraction_y, right, cell.step_y * right_i);
  return {sum - bottom - (right - both), right - both, bottom - both, both};
}

// The same for f = factors·e^z·2^SCALE, by Horner's rule.
__device__ __forceinline__ Corners sum_to_corners(const Cell& cell, const Powers& powers,
                                                  const float (&factors)[TILE][TILE]) {
  float x[TILE] = {powers.x};
#pragma unroll
  for (int i = 1; i < TILE; ++i) x[i] = x[i - 1] * powers.xy;
  float sum = 0, sum_i = 0, sum_j = 0, sum_ij = 0;  // sum_i and sum_ij without a factor y
#pragma unroll
  for (int i = TILE - 1; i >= 0; --i) {
    float row = factors[i][TILE - 1], slope = row;
#pragma unroll
    for (int j = TILE - 2; j >= 0; --j) {
      row = fmaf(row, x[i], factors[i][j]);
      if (j > 0) slope = fmaf(slope, x[i], row);
    }
    slope *= x[i];
    if (i == TILE - 1) {
      sum = row, sum_j = slope;
    } else {
      sum_i = i == TILE - 2 ? sum : fmaf(sum_i, powers.y, sum);
      sum_ij = i == TILE - 2 ? sum_j : fmaf(sum_ij, powers.y, sum_j);
      sum = fmaf(sum, powers.y, row);
      sum_j = fmaf(sum_j, powers.y, slope);
    }
  }
  const float second = powers.first * powers.y;
  return to_corners(cell, powers.first * sum, second * sum_i, powers.first * sum_j,
                    second * sum_ij);
}

// The values of a thread's pixels that every class needs.
template <bool BY_CLASS>
struct Pixels4x4 {
  float factors[TILE][TILE];  // 2^-SCALE/Σ e^z; times slope unless BY_CLASS
  float slopes[BY_CLASS ? TILE : 1][TILE];
  unsigned labels[TILE][TILE / 2];  // two in each, NONE if ignored
  unsigned regular, apart;          // bit for each pixel: by geometric sequences, or not
  static constexpr unsigned NONE = 0xffff;

  __device__ void load(const Cells& cells, const Cell& cell, const int32_t* keys, const float* lse,
                       const float* all_slopes, int key_of_class_0) {
    regular = apart = 0;
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
#pragma unroll
      for (int j = 0; j < TILE; ++j) {
        unsigned label = NONE;
        factors[i][j] = 0;
        if constexpr (BY_CLASS) slopes[i][j] = 0;
        if (i < cell.ny && j < cell.nx) {
          const int64_t pixel = cell.pixel(cells, i, j);
          const int key = keys[pixel];
          if (key >= 0) {
            label = key - key_of_class_0;
            const bool serves = cell.inverse_sum(cells, i, j, lse[pixel], factors[i][j]);
            (serves ? regular : apart) |= 1u << (i * TILE + j);
            if constexpr (BY_CLASS)
              slopes[i][j] = all_slopes[pixel];
            else
              factors[i][j] *= all_slopes[pixel];
          }
        }
        labels[i][j / 2] = j % 2 ? labels[i][j / 2] | label << 16 : label;
      }
    }
  }
  __device__ __forceinline__ unsigned label(int i, int j) const {
    return labels[i][j / 2] >> j % 2 * 16 & NONE;
  }
  // A bit for each pixel with this label.
  __device__ unsigned of_label(unsigned k) const {
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < TILE * TILE; ++i)
      if (label(i / TILE, i % TILE) == k) found |= 1u << i;
    return found;
  }
  // The smallest label of the warp's pixels that is at least `least`, or NONE.
  __device__ unsigned next_label(unsigned least) const {
    unsigned next = NONE;
#pragma unroll
    for (int i = 0; i < TILE * TILE; ++i) {
      const unsigned each = label(i / TILE, i % TILE);
      next = each >= least ? min(next, each) : next;
    }
    return __reduce_min_sync(FULL_WARP, next);
  }
};

// dz of pixels that are computed one by one, without a geometric sequence.
__device__ inline void add_apart(const Cells& cells, const Cell& cell, const PixelMaps& maps,
                                 const Gradients& gradients, unsigned pixels, int64_t key, int k,
                                 Corners& corners) {
  for (; pixels; pixels &= pixels - 1) {
    const int i = (__ffs(pixels) - 1) / TILE, j = (__ffs(pixels) - 1) % TILE;
    const int64_t pixel = cell.pixel(cells, i, j);
    const float p = exp2_approximate((cell.logits(cells, i, j).z(k) - maps.lse[pixel]) * LOG2E);
    const float slope = maps.slopes[pixel] + Gradients::at(gradients.dmasses, key) +
                        2 * p * Gradients::at(gradients.dsquares, key);
    const float own = maps.keys[pixel] == key ? maps.own[pixel] : 0;
    corners.add(p * slope - own, cell.weight_y(cells, i), cell.weight_x(cells, j));
  }
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
__global__ void __launch_bounds__(ALL_WARPS, BY_CLASS ? BLOCKS_BY_CLASS : 2)
    softmax_dlogits_kernel(Cells cells, Gradients gradients, PixelMaps maps,
                           Logits dlogits,  // [B, K, h, w] by strides
                           int classes_per_block) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto across = static_cast<unsigned>(blocks_across(cells));
  const int first_row = static_cast<int>(blockIdx.x / across) * (warps - 1) - 1;
  const int64_t first_column = int64_t{blockIdx.x % across} * 31;
  const int first_class = static_cast<int>(blockIdx.y) * classes_per_block;
  const int end_class = min(first_class + classes_per_block, cells.logits.num_classes);
  LogitsStage<CLASSES> stage(cells, first_row, first_column);
  // For the position at the left of each cell: offsets in dlogits, negative if there is none;
  // [CLASSES, warps, 32] of its top and of its bottom.
  auto* offsets = reinterpret_cast<int64_t*>(
      shared_memory() +
      ceil_div(LogitsStage<CLASSES>::bytes(warps), sizeof(int64_t)) * sizeof(int64_t));
  const int pitch = warps * 32 + 1;
  float *tops = reinterpret_cast<float*>(offsets + warps * 32), *bottoms = tops + CLASSES * pitch;
  Cell cell(cells, first_row + warp, first_column + lane, 0);
  cell.set_corners(cells, stage);
  const bool is_position = warp > 0 && lane > 0 && cell.inside && cell.column >= 0;
  offsets[threadIdx.x] = is_position ? dlogits.offset(cell.image, cell.row, cell.column) : -1;
  const int parts = cells.parts();
  const int64_t table = gradients.by_image ? int64_t{cell.image} * cells.logits.num_classes : 0;
  Pixels4x4<BY_CLASS> pixels;

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
        pixels.load(cells, cell, maps.keys, maps.lse, maps.slopes, static_cast<int>(table));
      }
      const auto write = [&](int k, const Corners& corners, bool add) {
        float top = corners.top_left + __shfl_up_sync(FULL_WARP, corners.top_right, 1);
        float bottom = corners.bottom_left + __shfl_up_sync(FULL_WARP, corners.bottom_right, 1);
        const int at = k * pitch + threadIdx.x;
        if (add) top += tops[at], bottom += bottoms[at];
        tops[at] = top;
        bottoms[at] = bottom;
      };
      if (cells.geometric) {
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          const Powers powers = cell.powers(k * COLUMNS);
          if constexpr (BY_CLASS) {
            const float dmass = Gradients::at(gradients.dmasses, table + first + k);
            const float dsquare = 2 * Gradients::at(gradients.dsquares, table + first + k);
            float sum = 0, sum_i = 0, sum_j = 0, sum_ij = 0, row = 0, row_j = 0;
            for_pixels(powers, [&](int i, int j, float e) {
              const float p = e * pixels.factors[i][j];
              const float dz = p * fmaf(p, dsquare, pixels.slopes[i][j] + dmass);
              row = j ? row + dz : dz;
              row_j = j ? fmaf(j, dz, row_j) : 0;
              if (j < TILE - 1) return;
              sum += row;
              sum_i = fmaf(i, row, sum_i);
              sum_j += row_j;
              sum_ij = fmaf(i, row_j, sum_ij);
            });
            write(k, to_corners(cell, sum, sum_i, sum_j, sum_ij), part > 0);
          } else {
            write(k, sum_to_corners(cell, powers, pixels.factors), part > 0);
          }
        }
      } else if (part == 0) {
        for (int k = 0; k < count; ++k) write(k, {}, false);
      }
      // The rest is needed for few classes, or few cells.
#pragma unroll 1
      for (int k = pixels.next_label(first); k < first + count; k = pixels.next_label(k + 1)) {
        Corners corners;
        for (unsigned own = pixels.of_label(k) & pixels.regular; own; own &= own - 1) {
          const int i = (__ffs(own) - 1) / TILE, j = (__ffs(own) - 1) % TILE;
          corners.add(-maps.own[cell.pixel(cells, i, j)], fmaf(i, cell.step_y, cell.fraction_y),
                      fmaf(j, cell.step_x, cell.fraction_x));
        }
        write(k - first, corners, true);
      }
      if (__ballot_sync(FULL_WARP, pixels.apart)) {
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          Corners corners;
          add_apart(cells, cell, maps, gradients, pixels.apart, table + first + k, first + k,
                    corners);
          write(k, corners, true);
        }
      }
    }
    __syncthreads();
    for_element(dlogits.element, [&](auto element) {
      using T = decltype(element);
      T* out = static_cast<T*>(dlogits.data) + first * dlogits.stride_k;
      const auto store = [&](T* plane, int k, int position) {
        if (offsets[position] >= 0)
          plane[offsets[position]] =
              static_cast<T>(tops[k * pitch + position] + bottoms[k * pitch + position - 32]);
      };
      if (dlogits.stride_k < dlogits.stride_w) {
        const int k = threadIdx.x % CLASSES;
        T* plane = out + k * dlogits.stride_k;
        for (int i = 32 + threadIdx.x / CLASSES; k < count && i < warps * 32;
             i += blockDim.x / CLASSES)
          store(plane, k, i);
      } else {
        for (int k = warp; k < count; k += warps) {
          T* plane = out + k * dlogits.stride_k;
#pragma unroll 4
          for (int i = 32 + lane; i < warps * 32; i += 32) store(plane, k, i);
        }
      }
    });
    __syncthreads();
  }
}

Tensor softmax_moments_backward(Tensor logits, Tensor labels, Tensor lse,
                                std::optional<Tensor> dlosses, std::optional<Tensor> doverlaps,
                                std::optional<Tensor> dmasses, std::optional<Tensor> dsquares,
                                std::optional<Tensor> dpixel_losses, std::optional<Tensor> dlse,
                                int64_t ignore_index, bool align_corners) {
  const OnDevice device(logits);
  const Stream stream = device.stream;
  Tensor dlogits = torch::stable::empty_like(logits);
  if (dlogits.numel() == 0) return dlogits;
  const int64_t batch = logits.size(0), height = labels.size(1), width = labels.size(2);
  if (height * width == 0) {
    fill_zero(dlogits.data_ptr(), dlogits.numel() * dlogits.element_size(), stream);
    return dlogits;
  }
  // If rows are not contiguous, or one row is expanded to all, they are copied: B×K.
  bool by_image = false;
  for (auto* table : {&dlosses, &doverlaps, &dmasses, &dsquares}) {
    if (!*table) continue;
    *table = torch::stable::contiguous(**table);
    by_image = (*table)->dim() == 2;
  }
  const auto map = [](const std::optional<Tensor>& map) {
    if (!map) return PixelGradient{};
    return PixelGradient{map->const_data_ptr<float>(), map->stride(0), map->stride(1),
                         map->stride(2)};
  };
  const Gradients gradients{optional_data<float>(dlosses),
                            optional_data<float>(doverlaps),
                            optional_data<float>(dmasses),
                            optional_data<float>(dsquares),
                            map(dpixel_losses),
                            map(dlse),
                            by_image};
  lse = torch::stable::contiguous(lse);

  const int num_classes = static_cast<int>(logits.size(1));
  const Tensor keys =
      std::get<0>(class_keys(labels, height, width, num_classes, by_image, ignore_index));
  Cells cells(logits_of("softmax_moments_backward.cuda", logits),
              Axis(height, logits.size(2), align_corners),
              Axis(width, logits.size(3), align_corners));
  const Tensor shifts = new_shifts(logits, cells, stream);
  const Tensor slopes = new_empty(logits, {batch, height, width}, ScalarType::Float);
  const bool slope_is_own = !dlse && !dmasses && !dsquares;
  const Tensor own =
      slope_is_own ? slopes : new_empty(logits, {batch, height, width}, ScalarType::Float);
  const PixelMaps maps{keys.const_data_ptr<int32_t>(), lse.const_data_ptr<float>(),
                       slopes.const_data_ptr<float>(), own.const_data_ptr<float>()};
  write_slopes(cells, gradients, maps.keys, maps.lse, slopes.mutable_data_ptr<float>(),
               own.mutable_data_ptr<float>(), stream);

  const int warps = std::min(WARPS, cells.logits.height + 1);
  const int64_t blocks = blocks_across(cells) * ceil_div(cells.logits.height, warps - 1);
  // If there are few blocks, the classes are divided among more of them.
  constexpr int64_t BLOCKS = 1024;
  const int64_t shares = std::clamp<int64_t>(BLOCKS / blocks, 1, ceil_div(num_classes, CLASSES));
  const int classes_per_block =
      ceil_div(ceil_div(num_classes, static_cast<int>(shares)), CLASSES) * CLASSES;
  dim3 grid = grid_of("softmax_dlogits_kernel", blocks);
  grid.y = ceil_div(num_classes, classes_per_block);
  const size_t bytes =
      ceil_div(LogitsStage<CLASSES>::bytes(warps), sizeof(int64_t)) * sizeof(int64_t) +
      warps * 32 * sizeof(int64_t) + 2 * CLASSES * (warps * 32 + 1) * sizeof(float);
  const auto run = [&](auto kernel) {
    launch("softmax_dlogits_kernel", kernel, grid, warps * 32, bytes, stream, cells, gradients,
           maps, logits_of("softmax_moments_backward.cuda", dlogits), classes_per_block);
  };
  if (dmasses || dsquares)
    run(softmax_dlogits_kernel<true>);
  else
    run(softmax_dlogits_kernel<false>);
  return dlogits;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("softmax_moments_backward.cuda",
               TORCH_BOX(&anchorops::cuda::softmax_moments_backward));
}
