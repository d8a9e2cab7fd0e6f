// The operator anchorops::centroid_info_nce.cuda.
//
//   logits[r, j] = q_r·k_j/τ,  positive_logits[r] = q_r·p_r/τ instead of the row's own key
//   losses[r] = lse[r] − positive_logits[r],  lse[r] = log Σ e^logits over own and present keys
//
// Row r is query g of class k: r = k·G + g. Two launches: the first computes blocks of logits and
// keeps the maximum and the sum of exponentials of each row; the second, with one block, adds these
// in order. Products are float32, without tensor cores: at K = 150 they are a tenth of the time.
//
// Predicted for K = 150, D = 768 on an H200, not measured: 100 blocks of 16 × 16 logits. Each reads
// 98 KB (float32; half of it in bfloat16) from the L2 cache, 1.8 µs at its 5.5 TB/s. A warp needs
// 634 instructions for 256 channels, counted in the machine code of sm_90, 256 of them
// multiplications: 2.2 µs if none waits. With the launch and three round trips of loads 5 µs. The
// second kernel is a launch, one round trip and a reduction: 2.5 µs.
#include "centroid_info_nce.cuh"

#include <cmath>
#include <string>

namespace anchorops::cuda {
namespace {

constexpr int WARPS = THREADS / 32;

// grid: blocks of rows × (chunks of the keys, then, if positives are given, blocks of WARPS rows).
template <int TILE>
__global__ void __launch_bounds__(THREADS, TILE == 64 ? 2 : 1)
    centroid_info_nce_kernel(Rows queries, Rows keys,
                             Rows positives,  // used if they were given
                             Present present,
                             float2* partials,  // [chunks, K·G]: largest logit of the chunk's keys
                                                // without the own, and Σ e^(logit − largest)
                             float* positive_logits,  // [K·G]
                             int chunks, int tiles_per_chunk, float inverse_temperature) {
  const int chunk = blockIdx.y, first_row = blockIdx.x * TILE;
  if (chunk >= chunks) {
    const int r = first_row + (chunk - chunks) * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto is_present = [&](int i) { return present.row(i); };
    float product = 0;
#pragma unroll 1
    for (int d = lane * 8; d < queries.dim; d += 32 * 8) {
      const EightFloats q = to_float(load_eight(queries, r, d, is_present), queries.dtype);
      const EightFloats p = to_float(load_eight(positives, r, d, is_present), positives.dtype);
#pragma unroll
      for (int i = 0; i < 8; ++i) product = fmaf(q[i], p[i], product);
    }
    for (int lanes = 16; lanes; lanes /= 2) product += __shfl_xor_sync(FULL_WARP, product, lanes);
    if (lane == 0 && r < queries.count) positive_logits[r] = inverse_temperature * product;
    return;
  }

  constexpr int N = Logits<TILE>::PER_THREAD;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;
  float maxima[N], totals[N];
#pragma unroll
  for (int i = 0; i < N; ++i) maxima[i] = -INFINITY, totals[i] = 0;
  const int first_tile = chunk * tiles_per_chunk;
  const int last_tile = min(first_tile + tiles_per_chunk, ceil_div(keys.count, TILE));
  for (int tile = first_tile; tile < last_tile; ++tile) {
    uint8_t in_denominator[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int k = tile * TILE + column + 16 * j;
      in_denominator[j] = k < keys.count ? present.key(k) : 0;
    }
    Logits<TILE>::multiply(shared, queries, keys, present, first_row, tile * TILE);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int r = first_row + row + 16 * i;
      const int own = r / queries.groups - tile * TILE - column;
      float logits[N], maximum = maxima[i];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        logits[j] =
            inverse_temperature * Logits<TILE>::Product::sum(shared, row + 16 * i, column + 16 * j);
        if (own == 16 * j && present.own_is_positive && r < queries.count)
          positive_logits[r] = logits[j];
        if (own == 16 * j || !in_denominator[j]) logits[j] = -INFINITY;
        maximum = fmaxf(maximum, logits[j]);
      }
      const float shift = maximum == -INFINITY ? 0 : maximum;
      totals[i] *= expf(maxima[i] - shift);
#pragma unroll
      for (int j = 0; j < N; ++j) totals[i] += expf(logits[j] - shift);
      maxima[i] = maximum;
    }
  }

#pragma unroll
  for (int i = 0; i < N; ++i) {  // the 16 threads of a row
    float maximum = maxima[i];
    for (int lanes = 8; lanes; lanes /= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(FULL_WARP, maximum, lanes));
    float total = totals[i] * expf(maxima[i] - (maximum == -INFINITY ? 0 : maximum));
    for (int lanes = 8; lanes; lanes /= 2) total += __shfl_xor_sync(FULL_WARP, total, lanes);
    const int r = first_row + row + 16 * i;
    if (column == 0 && r < queries.count)
      partials[int64_t{chunk} * queries.count + r] = {maximum, total};
  }
}

enum class Reduction { MEAN, SUM, NONE };

// One block.
__global__ void __launch_bounds__(THREADS)
    reduce_kernel(const float2* partials,  // these two: see centroid_info_nce_kernel
                  const float* positive_logits, Present present,
                  float* loss,   // one, or [K·G] for NONE
                  float* lse,    // [K·G]
                  float* scale,  // the factor of the sum of the losses
                  int rows, int chunks, Reduction reduction) {
  float loss_of_thread = 0;
  int rows_of_thread = 0;
  for (int r = threadIdx.x; r < rows; r += THREADS) {
    const bool is_present = present.row(r);
    const float positive = positive_logits[r];
    float maximum = positive, total = 1;
#pragma unroll 8
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const float2 partial = partials[int64_t{chunk} * rows + r];
      const float larger = fmaxf(maximum, partial.x);
      total = total * expf(maximum - larger) + partial.y * expf(partial.x - larger);
      maximum = larger;
    }
    const float result = maximum + logf(total);
    lse[r] = result;
    const float loss_of_row = is_present ? result - positive : 0;
    if (reduction == Reduction::NONE) loss[r] = loss_of_row;
    loss_of_thread += loss_of_row;
    rows_of_thread += is_present;
  }

  for (int lanes = 16; lanes; lanes /= 2) {
    loss_of_thread += __shfl_xor_sync(FULL_WARP, loss_of_thread, lanes);
    rows_of_thread += __shfl_xor_sync(FULL_WARP, rows_of_thread, lanes);
  }
  auto* losses = reinterpret_cast<float*>(shared_memory());  // [WARPS]
  auto* counts = reinterpret_cast<int*>(losses + WARPS);     // [WARPS]
  if (threadIdx.x % 32 == 0) {
    losses[threadIdx.x / 32] = loss_of_thread;
    counts[threadIdx.x / 32] = rows_of_thread;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    int count = 0;
    for (int warp = 0; warp < WARPS; ++warp) sum += losses[warp], count += counts[warp];
    *scale = reduction == Reduction::MEAN ? 1.0f / static_cast<float>(max(count, 1)) : 1;
    if (reduction != Reduction::NONE) *loss = sum * *scale;
  }
}

template <int TILE>
int launch_logits(const Rows& queries, const Rows& keys, const Rows& positives,
                  const Present& present, const Tensor& like, Tensor* partials,
                  const Tensor& positive_logits, float inverse_temperature, Stream stream) {
  constexpr int BLOCKS = 528;  // fill an H200 four times
  const int row_blocks = ceil_div(queries.count, TILE), tiles = ceil_div(keys.count, TILE);
  const int tiles_per_chunk = ceil_div(max(tiles, 1), ceil_div(BLOCKS, max(row_blocks, 1)));
  const int chunks = ceil_div(tiles, tiles_per_chunk);
  const int blocks_of_positives = present.own_is_positive ? 0 : TILE / WARPS;
  *partials = new_empty(like, {chunks, queries.count, 2}, ScalarType::Float);
  launch("centroid_info_nce_kernel", centroid_info_nce_kernel<TILE>,
         dim3(row_blocks, chunks + blocks_of_positives), THREADS,
         Logits<TILE>::Product::SHARED_BYTES, stream, queries, keys, positives, present,
         reinterpret_cast<float2*>(partials->mutable_data_ptr<float>()),
         positive_logits.mutable_data_ptr<float>(), chunks, tiles_per_chunk, inverse_temperature);
  return chunks;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> centroid_info_nce(
    Tensor queries, Tensor keys, std::optional<Tensor> positives, std::optional<Tensor> present,
    std::optional<Tensor> present_keys, double temperature, std::string reduction) {
  const OnDevice device(queries);
  keys = without_doubles(keys);
  if (positives) positives = without_doubles(*positives);
  std::vector<int64_t> shape = to_vector(queries.sizes());
  shape.pop_back();
  const bool reduces = reduction != "none";
  Tensor loss = new_empty(queries, reduces ? std::vector<int64_t>{} : shape, ScalarType::Float);
  Tensor lse = new_empty(queries, shape, ScalarType::Float);
  Tensor positive_logits = new_empty(queries, shape, ScalarType::Float);
  Tensor scale = new_empty(queries, {}, ScalarType::Float), partials;

  const Rows rows = rows_of(queries);
  const Present mask = present_of(present, present_keys, rows.groups, !positives);
  const auto launch_tiles = large_tiles(rows.count, static_cast<int>(keys.size(0)))
                                ? launch_logits<64>
                                : launch_logits<16>;
  const int chunks =
      launch_tiles(rows, rows_of(keys), positives ? rows_of(*positives) : Rows{}, mask, queries,
                   &partials, positive_logits, static_cast<float>(1 / temperature), device.stream);
  launch("centroid_info_nce reduce_kernel", reduce_kernel, 1, THREADS,
         WARPS * (sizeof(float) + sizeof(int)), device.stream,
         reinterpret_cast<const float2*>(partials.const_data_ptr<float>()),
         positive_logits.const_data_ptr<float>(), mask, loss.mutable_data_ptr<float>(),
         lse.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>(), rows.count, chunks,
         reduction == "mean" ? Reduction::MEAN
         : reduces           ? Reduction::SUM
                             : Reduction::NONE);
  return {loss, lse, positive_logits, scale};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("centroid_info_nce.cuda", TORCH_BOX(&anchorops::cuda::centroid_info_nce));
}
