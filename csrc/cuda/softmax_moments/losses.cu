// lse and the loss of each pixel, and the statistics of the pixels of each class.
//
// Reads the logits and the labels once, and writes lse: 12 bytes a pixel with int64 labels.
// `make cuda-report` prints the instructions of the loop over classes. After this loop, each class
// that occurs in a warp's 512 pixels needs about 250 instructions.
#include <cmath>

#include "../upsampled_logits/sequences.cuh"
#include "../warps.cuh"
#include "statistics.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CLASSES = 32;
constexpr float UNSCALED = 0x1p-30f;  // 2^-SCALE
constexpr int SUMMED_CLASSES = 256;   // at a time; their sums replace the stage in shared memory

// log Σ_k e^z of one pixel, as torch.logsumexp if z is not finite.
__device__ inline float log_sum_exp(const PixelLogits& logits, int num_classes) {
  float largest = -INFINITY, shift = 0, sum = 0;
  for (int k = 0; k < num_classes; ++k) {
    const float z = logits.z(k);
    const float larger = fmaxf(largest, z);  // if z is NaN, the sum is NaN
    if (larger > largest) {
      const float next = larger == INFINITY ? 0 : larger;
      sum *= exp2_approximate((largest - next) * LOG2E);
      largest = larger;
      shift = next;
    }
    sum += exp2_approximate((z - shift) * LOG2E);
  }
  return shift + logf(sum);
}

// Replaces the sums of these pixels, Σ_k e^z·2^shift, by lse, and others by 0.
__device__ __forceinline__ void to_lse(const Sequences& sequences, const CellWeights& weights,
                                       const Corners& shifts, unsigned pixels, PixelValues& sums) {
  const Cell& cell = sequences.cell;
  unsigned irregular = 0;
  weights.interpolate(shifts, [&](int i, int j, float shift) {
    const float log_sum = log2_approximate(sums[i][j] * UNSCALED);
    const bool serves = sequences.serve(weights, i, j) && log_sum >= SMALLEST_SUM;
    sums[i][j] = serves && pixels & bit_of(i, j) ? (log_sum - (shift - SCALE)) * LN2 : 0;
    if (!serves) irregular |= pixels & bit_of(i, j);
  });
  for_each_in(irregular, [&](int i, int j) {
    add_to_pixel(i, j, log_sum_exp(cell.logits(i, j), cell.cells.logits.num_classes), sums);
  });
}

// Sums over a warp's pixels of one class; `values` are their lse, which their losses replace.
template <bool OVERLAPS>
struct ClassSums {
  static constexpr int NUMBER = 2 + OVERLAPS;
  float loss = 0, overlap = 0;
  int pixels = 0;

  __device__ __forceinline__ void add(const Corners& logits, unsigned k, const CellLabels& labels,
                                      const CellWeights& weights, PixelValues& values) {
    weights.interpolate(logits, [&](int i, int j, float z) {
      if (labels.at(i, j) != k) return;
      float& value = values[i][j];
      value -= z;
      if (value < 0) value = 0;  // by rounding; NaN remains
      loss += value;
      if constexpr (OVERLAPS) overlap += exp2_approximate(-value * LOG2E);
      ++pixels;
    });
  }
  // To table[0], table[stride] and so on, in the order of Statistics.
  __device__ __forceinline__ void store(float* table, int stride) const {
    const float losses = sum_of_warp(loss), overlaps = OVERLAPS ? sum_of_warp(overlap) : 0;
    const int count = sum_of_warp(pixels);
    if (threadIdx.x % 32) return;
    table[0] = losses;
    if constexpr (OVERLAPS) table[stride] = overlaps;
    table[(NUMBER - 1) * stride] = static_cast<float>(count);
  }
};

// The sums of all classes over the block's pixels. Each warp has a table in shared memory; a label
// occurs there at most once.
template <bool OVERLAPS>
__device__ __forceinline__ void sum_by_class(const Cell& cell, const CellLabels& labels,
                                             const CellWeights& weights, PixelValues& values,
                                             float* partials) {
  using Sums = ClassSums<OVERLAPS>;
  const int lane = threadIdx.x % 32, stride = blockDim.x / 32 * SUMMED_CLASSES;
  const int num_classes = cell.cells.logits.num_classes;
  auto* tables = reinterpret_cast<float*>(shared_memory());  // [NUMBER, warps, SUMMED_CLASSES]
  float* table = tables + threadIdx.x / 32 * SUMMED_CLASSES;
  const CellLogits logits(cell);
  for (int first = 0; first < num_classes; first += SUMMED_CLASSES) {
    const int count = min(SUMMED_CLASSES, num_classes - first);
    __syncthreads();
    for (int k = lane; k < count; k += 32)
      for (int s = 0; s < Sums::NUMBER; ++s) table[s * stride + k] = 0;
    __syncwarp();
    for (unsigned k = labels.next(first); k < first + count; k = labels.next(k + 1)) {
      Sums sums;
      sums.add(logits.corners(k), k, labels, weights, values);
      sums.store(table + (k - first), stride);
    }
    __syncthreads();
    add_warps<Sums::NUMBER, SUMMED_CLASSES>(cell.cells, tables, first, count, partials);
  }
}

template <bool OVERLAPS>
__global__ void __launch_bounds__(WARPS * 32, 2)
    softmax_losses_kernel(Cells cells, PixelLabels all_labels, LossMaps maps,
                          float* partials) {  // [statistics, blocks, K]
  static_assert(ClassSums<OVERLAPS>::NUMBER * SUMMED_CLASSES * sizeof(float) <=
                LogitsStage<CLASSES>::bytes(1) / 2);
  const Cell cell(cells);
  offsets_of(cell, all_labels).prefetch_rows(all_labels.data, all_labels.itemsize);
  LogitsStage<CLASSES> stage(cells);
  const Sequences sequences(cell, stage);
  PixelValues values = {};  // Σ e^z, then lse, then the losses
  stage.for_classes([&](int, int count) {
#pragma unroll 2
    for (int k = 0; k < count; ++k)
      for_each_power(sequences.powers(k), [&](int i, int j, float e) { values[i][j] += e; });
  });
  CellLabels labels;
  labels.load(all_labels, cell);
  const CellWeights weights(cell);
  to_lse(sequences, weights, stage.shifts_of_cell(), labels.valid(), values);
  store_map(cell, values, maps.lse);
  sum_by_class<OVERLAPS>(cell, labels, weights, values, partials);
  if (maps.pixel_losses) store_map(cell, values, maps.pixel_losses);
}

}  // namespace

void write_losses(const Tensor& logits, const Cells& cells, const PixelLabels& labels,
                  const LossMaps& maps, const Statistics& statistics, Stream stream) {
  const auto kernel =
      statistics.sums[1] ? softmax_losses_kernel<true> : softmax_losses_kernel<false>;
  sum_launches(logits, cells, statistics, stream, [&](const Cells& some, float* partials) {
    launch_cells<LogitsStage<CLASSES>>("softmax_losses_kernel", kernel, some, 0, stream, labels,
                                       maps, partials);
  });
}

}  // namespace anchorops::cuda
