// The operator anchorops::centroid_info_nce.cuda.
//
//   logits[r, j] = q_r·k_j/τ + bias_j,  positive_logits[r] = q_r·p_r/τ instead of the row's own key
//   losses[r] = lse[r] − positive_logits[r],  lse[r] = log Σ e^logits over own and present keys
//
// Row r is query g of class k: r = k·G + g. Two launches: the first computes blocks of logits and
// keeps the maximum and the sum of exponentials of each row; the second, with one block, adds these
// in order. If there are few logits, they are kept for the gradient. Products have the accuracy of
// float32 (row_products.cuh).
//
// At K = 150, D = 768 there are 100 blocks of 16 × 16 logits. Each reads 98 KB (float32; half of it
// in bfloat16) from the L2 cache, 1.8 µs at its 5.5 TB/s.
#include "centroid_info_nce.cuh"
#include "row_products.cuh"
#include "warps.cuh"

#include <string>

namespace anchorops::cuda {
namespace {

// TILE rows times TILE keys. The small tile divides 150 × 150 logits into 100 blocks; its warps
// have different terms. The large one reads a fourth as much; its warps have different logits.
// Thread t then has the logits (t / 16 + 16·i, t % 16 + 16·j), i and j below PER_THREAD.
template <int TILE>
struct LogitsTile {
  static constexpr int PER_THREAD = TILE / 16, M = TILE == SMALL_TILE ? 1 : 2;
  static constexpr int WARP_ROWS = TILE / (16 * M), WARP_KEYS = TILE / 16;
  static constexpr int SPLIT = WARPS / (WARP_ROWS * WARP_KEYS), PITCH = TILE + 8;
  static constexpr size_t SHARED_BYTES = SPLIT * TILE * PITCH * sizeof(float);

  // Afterwards the sums of all terms are in shared memory.
  static __device__ void multiply(float* shared, const Rows& queries, const Rows& keys,
                                  const Present& present, int first_row, int first_key) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = lane / 4, q = lane % 4;
    const int row = warp % WARP_ROWS * 16 * M, key = warp / WARP_ROWS % WARP_KEYS * 16;
    const int split = warp / (WARP_ROWS * WARP_KEYS);
    const uint8_t *of_queries[2 * M], *of_keys[2];
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) of_queries[i] = queries.row(first_row + row + 8 * i + n);
#pragma unroll
    for (int i = 0; i < 2; ++i) of_keys[i] = keys.row(first_key + key + 8 * i + n);
    const int r = first_row + row + lane % (16 * M), k = first_key + key + lane % 16;
    const uint8_t in_queries = r < queries.count ? present.row(r) : 0;
    const uint8_t in_keys = k < keys.count ? present.key_used(k) : 0;
    RowProducts<M> products;
    constexpr int TERMS = RowProducts<M>::TERMS;
#pragma unroll 1
    for (int d = split * TERMS; d < queries.dim; d += SPLIT * TERMS)
      products.add(queries, keys, of_queries, of_keys, d, in_queries, in_keys);
    __syncthreads();  // the sums of the tile before have been read
#pragma unroll
    for (int i = 0; i < 4 * M; ++i) {
      const int m = i / 4, half = i / 2 % 2, j = i % 2;
      float* to =
          shared + (split * TILE + row + 16 * m + 8 * half + n) * PITCH + key + 8 * j + 2 * q;
      to[0] = products.totals[m][j][2 * half];
      to[1] = products.totals[m][j][2 * half + 1];
    }
    __syncthreads();
  }

  static __device__ float sum(const float* shared, int row, int column) {
    float total = 0;
#pragma unroll
    for (int split = 0; split < SPLIT; ++split)
      total += shared[(split * TILE + row) * PITCH + column];
    return total;
  }
};

// grid: blocks of rows × (chunks of the keys, then, if positives are given, blocks of WARPS rows) ×
// problems.
template <int TILE, int PROBLEMS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    centroid_info_nce_kernel(const __grid_constant__ LogitsProblems<PROBLEMS> given, Chunks chunks,
                             int width) {
  permit_next_kernel();
  const int which = PROBLEMS > 1 ? blockIdx.z : 0;
  const Problem& problem = given.problems[which];
  const LogitsOfRows& output = given.outputs[which];
  const Rows &queries = problem.queries, &keys = problem.keys;
  const Present& present = problem.present;
  const float inverse_temperature = 1 / problem.temperature;
  const int chunk = blockIdx.y, first_row = output.first + blockIdx.x * TILE;
  if (chunk >= chunks.count) {
    if (present.own_is_positive) return;
    const int r = first_row + (chunk - chunks.count) * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    float product = 0;
    const uint8_t *query = queries.row(r), *positive = problem.positives.row(r);
    const bool is_present = r < queries.count && present.row(r);
#pragma unroll 1
    for (int d = lane * 8; d < queries.dim; d += 32 * 8) {
      const EightFloats q = to_float(load_eight(queries, query, d), queries.dtype, is_present);
      const EightFloats p =
          to_float(load_eight(problem.positives, positive, d), problem.positives.dtype, is_present);
#pragma unroll
      for (int i = 0; i < 8; ++i) product = fmaf(q[i], p[i], product);
    }
    product = sum_of_warp(product);
    if (lane == 0 && r < output.end) output.positive_logits[r] = inverse_temperature * product;
    return;
  }

  constexpr int N = LogitsTile<TILE>::PER_THREAD;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;
  float maxima[N], totals[N];
#pragma unroll
  for (int i = 0; i < N; ++i) maxima[i] = -INFINITY, totals[i] = 0;
  const int first_tile = chunk * chunks.tiles;
  const int last_tile = min(first_tile + chunks.tiles, ceil_div(keys.count, TILE));
  for (int tile = first_tile; tile < last_tile; ++tile) {
    LogitsTile<TILE>::multiply(shared, queries, keys, present, first_row, tile * TILE);
    uint8_t in_denominator[N];  // loaded after the product, which needs all registers
    float bias[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int k = tile * TILE + column + 16 * j;
      in_denominator[j] = k < keys.count ? present.key(k) : 0;
      bias[j] = problem.bias && k < keys.count ? problem.bias[k] : 0;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int r = first_row + row + 16 * i;
      const int own = r / queries.groups - tile * TILE - column;
      float logits[N], maximum = maxima[i];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float product = LogitsTile<TILE>::sum(shared, row + 16 * i, column + 16 * j);
        logits[j] = fmaf(inverse_temperature, product, bias[j]);
        if (own == 16 * j && present.own_is_positive && output.positive_logits && r < output.end)
          output.positive_logits[r] = logits[j];
        if (own == 16 * j || !in_denominator[j]) logits[j] = -INFINITY;
        const int k = tile * TILE + column + 16 * j;
        if (output.logits && r < output.end && k < width)
          output.logits[int64_t{r - output.first} * width + k] = logits[j];
        maximum = fmaxf(maximum, logits[j]);
      }
      const float shift = maximum == -INFINITY ? 0 : maximum;
      totals[i] *= expf(maxima[i] - shift);
#pragma unroll
      for (int j = 0; j < N; ++j) totals[i] += expf(logits[j] - shift);
      maxima[i] = maximum;
    }
  }

  if (!output.partials) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {  // the 16 threads of a row
    float maximum = maxima[i];
    for (int lanes = 8; lanes; lanes /= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(FULL_WARP, maximum, lanes));
    float total = totals[i] * expf(maxima[i] - (maximum == -INFINITY ? 0 : maximum));
    for (int lanes = 8; lanes; lanes /= 2) total += __shfl_xor_sync(FULL_WARP, total, lanes);
    const int r = first_row + row + 16 * i;
    if (column == 0 && r < output.end)
      output.partials[int64_t{chunk} * queries.count + r] = {maximum, total};
  }
}

enum class Reduction { MEAN, SUM, NONE };

constexpr int REDUCE_THREADS = 512, REDUCE_WARPS = REDUCE_THREADS / 32;

// One block.
__global__ void __launch_bounds__(REDUCE_THREADS)
    reduce_kernel(const float2* partials,  // these two: see centroid_info_nce_kernel
                  const float* positive_logits, Present present,
                  float* loss,   // one, or [K·G] for NONE
                  float* lse,    // [K·G]
                  float* scale,  // the factor of the sum of the losses
                  int rows, int chunks, float loss_weight, Reduction reduction) {
  wait_for_kernel_before();
  float loss_of_thread = 0;
  int rows_of_thread = 0;
  for (int r = threadIdx.x; r < rows; r += REDUCE_THREADS) {
    const bool is_present = present.row(r);
    const float positive = positive_logits[r];
    const float result = log_sum_exp(partials, positive, r, rows, chunks);
    lse[r] = result;
    const float loss_of_row = is_present ? result - positive : 0;
    if (reduction == Reduction::NONE) loss[r] = loss_weight * loss_of_row;
    loss_of_thread += loss_of_row;
    rows_of_thread += is_present;
  }

  loss_of_thread = sum_of_warp(loss_of_thread);
  rows_of_thread = sum_of_warp(rows_of_thread);
  auto* losses = reinterpret_cast<float*>(shared_memory());      // [REDUCE_WARPS]
  auto* counts = reinterpret_cast<int*>(losses + REDUCE_WARPS);  // [REDUCE_WARPS]
  if (threadIdx.x % 32 == 0) {
    losses[threadIdx.x / 32] = loss_of_thread;
    counts[threadIdx.x / 32] = rows_of_thread;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    int count = 0;
    for (int warp = 0; warp < REDUCE_WARPS; ++warp) sum += losses[warp], count += counts[warp];
    *scale = reduction == Reduction::MEAN ? loss_weight / static_cast<float>(max(count, 1))
                                          : loss_weight;
    if (reduction != Reduction::NONE) *loss = sum * *scale;
  }
}

template <int TILE, int PROBLEMS>
void launch_logits(const LogitsProblems<PROBLEMS>& given, Stream stream) {
  const LogitsOfRows& output = given.outputs[0];
  const int rows = output.end - output.first;
  const Chunks chunks = chunks_of(rows, given.problems[0].keys.count, TILE);
  bool positives = false;
  for (const Problem& problem : given.problems)
    positives |= output.positive_logits && !problem.present.own_is_positive;
  const dim3 grid(ceil_div(rows, TILE), chunks.count + (positives ? TILE / WARPS : 0), PROBLEMS);
  launch("centroid_info_nce_kernel", centroid_info_nce_kernel<TILE, PROBLEMS>, grid, THREADS,
         LogitsTile<TILE>::SHARED_BYTES, stream, given, chunks, given.problems[0].width());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> centroid_info_nce(
    Tensor queries, Tensor keys, std::optional<Tensor> bias, std::optional<Tensor> positives,
    std::optional<Tensor> present, std::optional<Tensor> present_keys, bool all_keys, bool mirrored,
    double temperature, double loss_weight, std::string reduction, int64_t logits_at_once) {
  const OnDevice device(queries);
  keys = without_doubles(keys);
  if (positives) positives = without_doubles(*positives);
  std::vector<int64_t> shape = to_vector(queries.sizes());
  shape.pop_back();
  const auto new_floats = [&](const std::vector<int64_t>& size) {
    return new_empty(queries, size, ScalarType::Float);
  };
  const bool reduces = reduction != "none";
  Tensor loss = new_floats(reduces ? std::vector<int64_t>{} : shape), scale = new_floats({});
  Tensor lse = new_floats(shape), positive_logits = new_floats(shape);

  const Problem problem = problem_of(queries, keys, bias, positives, present, present_keys,
                                     all_keys, mirrored, temperature);
  const int rows = problem.queries.count, width = problem.width();
  const bool kept = int64_t{rows} * width <= logits_at_once;
  Tensor logits = new_floats(kept ? std::vector<int64_t>{rows, width} : std::vector<int64_t>{0});
  const int tile = large_tiles(rows, problem.keys.count) ? LARGE_TILE : SMALL_TILE;
  const int chunks = chunks_of(rows, problem.keys.count, tile).count;
  Tensor partials = new_floats({chunks, rows, 2});
  const auto* of_chunks = reinterpret_cast<const float2*>(partials.const_data_ptr<float>());
  compute_logits(problem,
                 {.first = 0,
                  .end = rows,
                  .partials = reinterpret_cast<float2*>(partials.mutable_data_ptr<float>()),
                  .positive_logits = positive_logits.mutable_data_ptr<float>(),
                  .logits = kept ? logits.mutable_data_ptr<float>() : nullptr},
                 device.stream);
  launch_early("centroid_info_nce reduce_kernel", reduce_kernel, 1, REDUCE_THREADS,
               REDUCE_WARPS * (sizeof(float) + sizeof(int)), device.stream, of_chunks,
               positive_logits.const_data_ptr<float>(), problem.present,
               loss.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(),
               scale.mutable_data_ptr<float>(), rows, chunks, static_cast<float>(loss_weight),
               reduction == "mean" ? Reduction::MEAN
               : reduces           ? Reduction::SUM
                                   : Reduction::NONE);
  return {loss, lse, positive_logits, scale, logits};
}

}  // namespace

Chunks chunks_of(int rows, int num_classes, int tile) {
  const int blocks = 4 * hardware().multiprocessors;
  const int row_blocks = ceil_div(rows, tile), tiles = ceil_div(num_classes, tile);
  const int each = ceil_div(max(tiles, 1), ceil_div(blocks, max(row_blocks, 1)));
  return {ceil_div(tiles, each), each};
}

void compute_logits(const Problem& problem, const LogitsOfRows& output, Stream stream) {
  const int rows = output.end - output.first, num_classes = problem.keys.count;
  const LogitsProblems<1> given{{problem}, {output}};
  large_tiles(rows, num_classes) ? launch_logits<LARGE_TILE>(given, stream)
                                 : launch_logits<SMALL_TILE>(given, stream);
}

void compute_logits(const LogitsProblems<2>& pair, Stream stream) {
  launch_logits<SMALL_TILE>(pair, stream);
}

}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("centroid_info_nce.cuda", TORCH_BOX(&anchorops::cuda::centroid_info_nce));
}
