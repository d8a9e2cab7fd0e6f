// The operators anchorops::centroid_info_nce.cuda and centroid_info_nce_backward.cuda.
//
//   logits[r, k] = q_r·key_k/τ                 positive[r] = q_r·p_r/τ
//   lse[r] = log(e^positive[r] + Σ_k e^logits[r, k]), k: the keys that are present, without the own
//   losses[r] = lse[r] − positive[r], 0 of an absent row
//
//   dlogits[r, k] = dlosses[r]·e^(logits[r, k] − lse[r])/τ
//   dpositive[r] = dlosses[r]·(e^−losses[r] − 1)/τ, which is dlogits[r, own] if p_r is the own key
//   dqueries[r] = Σ_k dlogits[r, k]·key_k + dpositive[r]·p_r    dpositives[r] = dpositive[r]·q_r
//   dkeys[k] = Σ_r dlogits[r, k]·q_r
//
// Row r is a query of class r / G. The logits are never in memory: a block computes a tile of them
// in registers, and the backward pass computes them again for each 256 channels. All sums have a
// fixed order. A block reads 16 rows of one tensor once, and all rows of the other one from the
// second-level cache.
#include "../tensors.cuh"

#include <cmath>

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int OURS = 16, OTHERS = 64;  // rows of a tile: of the block's tensor, of the other
constexpr int EACH = OURS * OTHERS / THREADS;  // products of a thread
constexpr int DEPTH = 32, PITCH = DEPTH + 4;   // channels in shared memory; 4 avoid bank conflicts
constexpr int CHANNELS = THREADS;              // of a gradient that a block computes
constexpr int TILE_FLOATS = (OURS + OTHERS) * PITCH, DLOGITS_FLOATS = OTHERS * OURS;

// float32 [count, D] by strides. Rows that are not present are never read: they may contain NaN.
struct Rows {
  const float* data;
  const bool* present;  // [count], or null: all
  int count;
  int64_t stride, stride_d;

  __device__ bool has(int r) const { return r < count && (!present || present[r]); }
  __device__ const float* row(int r) const { return data + r * stride; }
  __device__ float at(int r, int d) const { return row(r)[d * stride_d]; }
};

struct Problem {
  Rows queries, keys,
      positives;    // positives: the keys, if a row's positive is the key of its class
  int groups, dim;  // rows of a class, channels
  bool own_key_is_positive;
  float inverse_temperature;

  __device__ int own(int r) const { return r / groups; }
  __device__ int positive(int r) const { return own_key_is_positive ? own(r) : r; }
  __device__ bool in_denominator(int r, int k) const { return keys.has(k) && k != own(r); }
};

// Adds the products of 16 rows, from first_our on, and 64 rows, from first_other on. Thread t has
// those of rows t / 16 and t % 16 + 16·i.
__device__ void multiply(float* shared, const Rows& ours, int first_our, const Rows& others,
                         int first_other, int dim, float (&products)[EACH]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float *from_ours[OURS / WARPS], *from_others[OTHERS / WARPS];
#pragma unroll
  for (int i = 0; i < OURS / WARPS; ++i) {
    const int r = first_our + warp + WARPS * i;
    from_ours[i] = ours.has(r) ? ours.row(r) : nullptr;
  }
#pragma unroll
  for (int i = 0; i < OTHERS / WARPS; ++i) {
    const int r = first_other + warp + WARPS * i;
    from_others[i] = others.has(r) ? others.row(r) : nullptr;
  }
  float* to = shared + warp * PITCH + lane;
  const float* our = shared + threadIdx.x / 16 * PITCH;
  const float* other = shared + (OURS + threadIdx.x % 16) * PITCH;
  for (int first = 0; first < dim; first += DEPTH) {
    const int d = first + lane;
    __syncthreads();  // the numbers before have been read
#pragma unroll
    for (int i = 0; i < OURS / WARPS; ++i)
      to[WARPS * i * PITCH] = from_ours[i] && d < dim ? from_ours[i][d * ours.stride_d] : 0;
#pragma unroll
    for (int i = 0; i < OTHERS / WARPS; ++i)
      to[(OURS + WARPS * i) * PITCH] =
          from_others[i] && d < dim ? from_others[i][d * others.stride_d] : 0;
    __syncthreads();
    float sums[EACH] = {};  // of few channels first: smaller rounding errors
#pragma unroll
    for (int c = 0; c < DEPTH; c += 4) {
      const Vector<float> x = load_vector(our + c);
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const Vector<float> y = load_vector(other + 16 * i * PITCH + c);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i] = fmaf(x.elements[j], y.elements[j], sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) products[i] += sums[i];
  }
}

// grid: blocks of 16 rows.
__global__ void __launch_bounds__(THREADS, 1)
    centroid_info_nce_kernel(const __grid_constant__ Problem problem,
                             float* losses,  // [R]
                             float* lse) {   // [R]
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const Rows &queries = problem.queries, &keys = problem.keys, &positives = problem.positives;
  const int column = threadIdx.x % 16, first_row = blockIdx.x * OURS;
  const int r = first_row + threadIdx.x / 16;
  float maximum = -INFINITY, total = 0;  // of the thread's logits
  for (int first = 0; first < keys.count; first += OTHERS) {
    float logits[EACH] = {};
    multiply(shared, queries, first_row, keys, first, problem.dim, logits);
    float largest = maximum;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int k = first + column + 16 * i;
      logits[i] =
          problem.in_denominator(r, k) ? problem.inverse_temperature * logits[i] : -INFINITY;
      largest = fmaxf(largest, logits[i]);
    }
    const float shift = largest == -INFINITY ? 0 : largest;
    total *= expf(maximum - shift);
#pragma unroll
    for (int i = 0; i < EACH; ++i) total += expf(logits[i] - shift);
    maximum = largest;
  }

  const bool present = queries.has(r);
  float product = 0;
  if (present)
    for (int d = column; d < problem.dim; d += 16)
      product = fmaf(queries.at(r, d), positives.at(problem.positive(r), d), product);
  float largest = maximum;
  for (int lanes = 8; lanes; lanes /= 2) {  // the 16 threads of a row
    product += __shfl_xor_sync(FULL_WARP, product, lanes);
    largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, lanes));
  }
  const float positive = problem.inverse_temperature * product;
  largest = fmaxf(largest, positive);
  total *= expf(maximum - largest);
  for (int lanes = 8; lanes; lanes /= 2) total += __shfl_xor_sync(FULL_WARP, total, lanes);
  if (column > 0 || r >= queries.count) return;
  const float result = largest + logf(total + expf(positive - largest));
  lse[r] = result;
  losses[r] = present ? result - positive : 0;
}

struct Gradients {
  const float *dlosses, *losses, *lse;  // [R]
  float *dqueries, *dkeys;              // [R, D], [K, D]
  float* dpositives;                    // [R, D], or null
};

// Of inner products. The row is present.
struct DlogitsOfRow {
  float dloss, lse, dpositive;
  int own;

  __device__ DlogitsOfRow(const Problem& problem, const Gradients& gradients, int r)
      : dloss(gradients.dlosses[r] * problem.inverse_temperature),
        lse(gradients.lse[r]),
        dpositive(dloss * expm1f(-gradients.losses[r])),
        own(problem.own(r)) {}
};

// The gradient of 16 queries, with that of their positives; or of 16 keys.
template <bool OF_QUERIES>
__device__ void write_gradients(const Problem& problem, const Gradients& gradients, int first_our) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  float* const dlogits = shared + TILE_FLOATS;  // [OTHERS, OURS]
  const Rows &queries = problem.queries, &keys = problem.keys;
  const Rows &ours = OF_QUERIES ? queries : keys, &others = OF_QUERIES ? keys : queries;
  const int our = first_our + threadIdx.x / 16, dim = problem.dim;
  const int d = blockIdx.y * CHANNELS + threadIdx.x;
  float totals[OURS] = {};
  for (int first = 0; first < others.count; first += OTHERS) {
    float products[EACH] = {};
    multiply(shared, ours, first_our, others, first, dim, products);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int place = threadIdx.x % 16 + 16 * i, other = first + place;
      const int r = OF_QUERIES ? our : other, k = OF_QUERIES ? other : our;
      float dlogit = 0;
      if (queries.has(r) && k < keys.count) {
        const DlogitsOfRow row(problem, gradients, r);
        if (problem.in_denominator(r, k))
          dlogit = row.dloss * expf(problem.inverse_temperature * products[i] - row.lse);
        else if (k == row.own && problem.own_key_is_positive && !OF_QUERIES)
          dlogit = row.dpositive;
      }
      dlogits[place * OURS + threadIdx.x / 16] = dlogit;
    }
    __syncthreads();
    float sums[OURS] = {};
    const int end = min(OTHERS, others.count - first);
    for (int i = 0; i < end; ++i) {
      const float x = d < dim && others.has(first + i) ? others.at(first + i, d) : 0;
#pragma unroll
      for (int j = 0; j < OURS; j += 4) {
        const Vector<float> four = load_vector(dlogits + i * OURS + j);
#pragma unroll
        for (int m = 0; m < 4; ++m) sums[j + m] = fmaf(four.elements[m], x, sums[j + m]);
      }
    }
#pragma unroll
    for (int j = 0; j < OURS; ++j) totals[j] += sums[j];
    __syncthreads();  // the dlogits have been read
  }

#pragma unroll
  for (int j = 0; j < OURS; ++j) {
    const int i = first_our + j;
    if (i >= ours.count || d >= dim) continue;
    const int64_t place = int64_t{i} * dim + d;
    if (!OF_QUERIES) {
      gradients.dkeys[place] = totals[j];
      continue;
    }
    const bool present = queries.has(i);
    const float weight = present ? DlogitsOfRow(problem, gradients, i).dpositive : 0;
    gradients.dqueries[place] =
        present ? fmaf(weight, problem.positives.at(problem.positive(i), d), totals[j]) : 0;
    if (gradients.dpositives) gradients.dpositives[place] = present ? weight * queries.at(i, d) : 0;
  }
}

// grid: (blocks of 16 queries, then of 16 keys) × blocks of 256 channels.
__global__ void __launch_bounds__(THREADS, 1)
    centroid_info_nce_backward_kernel(const __grid_constant__ Problem problem,
                                      const __grid_constant__ Gradients gradients) {
  const int row_blocks = ceil_div(problem.queries.count, OURS), block = blockIdx.x;
  if (block < row_blocks)
    write_gradients<true>(problem, gradients, block * OURS);
  else
    write_gradients<false>(problem, gradients, (block - row_blocks) * OURS);
}

Rows rows_of(const Tensor& tensor, const std::optional<Tensor>& present) {
  return {.data = tensor.const_data_ptr<float>(),
          .present = optional_data<bool>(present),
          .count = static_cast<int>(tensor.size(0)),
          .stride = tensor.stride(0),
          .stride_d = tensor.stride(1)};
}

Problem problem_of(const Tensor& queries, const Tensor& keys,
                   const std::optional<Tensor>& positives, const std::optional<Tensor>& present,
                   const std::optional<Tensor>& present_keys, double temperature) {
  const auto classes = std::max(keys.size(0), int64_t{1});
  return {.queries = rows_of(queries, present),
          .keys = rows_of(keys, present_keys),
          .positives = rows_of(positives ? *positives : keys, {}),
          .groups = static_cast<int>(std::max(queries.size(0) / classes, int64_t{1})),
          .dim = static_cast<int>(keys.size(1)),
          .own_key_is_positive = !positives,
          .inverse_temperature = static_cast<float>(1 / temperature)};
}

std::tuple<Tensor, Tensor> centroid_info_nce(Tensor queries, Tensor keys,
                                             std::optional<Tensor> positives,
                                             std::optional<Tensor> present,
                                             std::optional<Tensor> present_keys,
                                             double temperature) {
  const OnDevice device(queries);
  const Problem problem = problem_of(queries, keys, positives, present, present_keys, temperature);
  Tensor losses = new_empty(queries, {queries.size(0)}, ScalarType::Float);
  Tensor lse = new_empty(queries, {queries.size(0)}, ScalarType::Float);
  launch("centroid_info_nce_kernel", centroid_info_nce_kernel,
         ceil_div(problem.queries.count, OURS), THREADS, TILE_FLOATS * sizeof(float), device.stream,
         problem, losses.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>());
  return {losses, lse};
}

std::tuple<Tensor, Tensor, Tensor> centroid_info_nce_backward(
    Tensor dlosses, Tensor queries, Tensor keys, std::optional<Tensor> positives,
    std::optional<Tensor> present, std::optional<Tensor> present_keys, Tensor losses, Tensor lse,
    double temperature) {
  const OnDevice device(queries);
  const Problem problem = problem_of(queries, keys, positives, present, present_keys, temperature);
  const auto like = [](const Tensor& tensor) {
    return new_empty(tensor, to_vector(tensor.sizes()), ScalarType::Float);
  };
  const Tensor empty = new_empty(queries, {0}, ScalarType::Float);
  Tensor dqueries = like(queries), dkeys = like(keys);
  Tensor dpositives = positives ? like(*positives) : empty;
  const Gradients gradients = {
      .dlosses = dlosses.const_data_ptr<float>(),
      .losses = losses.const_data_ptr<float>(),
      .lse = lse.const_data_ptr<float>(),
      .dqueries = dqueries.mutable_data_ptr<float>(),
      .dkeys = dkeys.mutable_data_ptr<float>(),
      .dpositives = positives ? dpositives.mutable_data_ptr<float>() : nullptr};
  const int blocks = ceil_div(problem.queries.count, OURS) + ceil_div(problem.keys.count, OURS);
  launch("centroid_info_nce_backward_kernel", centroid_info_nce_backward_kernel,
         dim3(blocks, ceil_div(problem.dim, CHANNELS)), THREADS,
         (TILE_FLOATS + DLOGITS_FLOATS) * sizeof(float), device.stream, problem, gradients);
  return {dqueries, dkeys, dpositives};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("centroid_info_nce.cuda", TORCH_BOX(&anchorops::cuda::centroid_info_nce));
  library.impl("centroid_info_nce_backward.cuda",
               TORCH_BOX(&anchorops::cuda::centroid_info_nce_backward));
}
