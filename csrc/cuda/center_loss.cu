// The operators anchorops::center_loss.cuda and center_loss_backward.cuda: CeCo's loss of class
// centers, from the sums of their pixels.
//
//   m_k = sums_k / max(counts_k, 1)    x_k = (m_k − mean)/√(variance + eps)    z_k = γ·x_k + β
//   h_k = ReLU(P z_k + b)    u_k = h_k / max(‖h_k‖, 1e−12)    ẑ_k = u_k/(1 − dropout), or 0
//   loss = loss_weight · mean_{k present} −log softmax_k(scale·⟨ẑ_k, etf⟩ + log(prior + 1e−12))
//
//   dγ = Σ dz_k·x_k    dβ = Σ dz_k    dm_k = γ·dz_k/√(variance + eps)
//   dmean = −Σ dm_k    dvariance = −½·γ·dγ/(variance + eps)
//
// A center depends on no other one: a block computes its loss, and dz_k and the gradient of P z_k
// of this loss. A second kernel adds the losses. The backward pass multiplies by dloss.
//
// P and the simplex are read twice for each center, from the second-level cache: 170 MB at K = 150,
// E = 512, C = 128. Latency determines the time: predicted 41 µs forward and 6 µs backward at
// K = 150, 23 and 4 µs at K = 19, with the launches, not measured.
#include "tensors.cuh"
#include "warps.cuh"

#include <cmath>

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr float SHORTEST = 1e-12f;  // as torch.nn.functional.normalize

// The sum over the block, for all of its threads. memory: [WARPS], shared.
__device__ float sum_of_block(float value, float* memory) {
  value = sum_of_warp(value);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < WARPS; ++warp) total += memory[warp];
  __syncthreads();
  return total;
}

__device__ float max_of_block(float value, float* memory) {
  value = max_of_warp(value);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 0; warp < WARPS; ++warp) value = fmaxf(value, memory[warp]);
  __syncthreads();
  return value;
}

// out[i] = ⟨matrix[i, :], vector⟩ for i < rows; a warp computes eight rows at once, because one row
// alone would wait for its loads and for its sum. vector and out: shared.
__device__ void multiply(const float* matrix, const float* vector, float* out, int rows,
                         int columns) {
  constexpr int AT_ONCE = 8;
  const int lane = threadIdx.x % 32;
  for (int first = threadIdx.x / 32 * AT_ONCE; first < rows; first += WARPS * AT_ONCE) {
    float totals[AT_ONCE] = {};
#pragma unroll 4
    for (int i = lane; i < columns; i += 32) {
      float numbers[AT_ONCE];
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r) numbers[r] = matrix[min(first + r, rows - 1) * columns + i];
#pragma unroll
      for (int r = 0; r < AT_ONCE; ++r) totals[r] += numbers[r] * vector[i];
    }
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) {
      totals[r] = sum_of_warp(totals[r]);
      if (lane == 0 && first + r < rows) out[first + r] = totals[r];
    }
  }
  __syncthreads();
}

// Σ_i vector[i]·matrix[i, column]. vector: shared. The last row is loaded in place of those after
// it, so that 16 rows are always requested together.
__device__ float multiply_transposed(const float* matrix, const float* vector, int column, int rows,
                                     int columns) {
  constexpr int AT_ONCE = 16;
  float total = 0;
  const float* next = matrix + column;
#pragma unroll 1
  for (int left = rows; left > 0; left -= AT_ONCE, next += AT_ONCE * columns, vector += AT_ONCE) {
    float numbers[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) numbers[i] = next[min(i, left - 1) * columns];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (i < left) total += vector[i] * numbers[i];
  }
  return total;
}

struct Inputs {
  const float* sums;                                       // [R, C]
  const int64_t* counts;                                   // [R]
  const float *mean, *variance, *norm_weight, *norm_bias;  // [C]
  const float *weight, *bias;                              // [E, C], [E]
  const float *etf, *prior;                                // [K, E], [K]
  const float* noise;                                      // [R, E] or null
  int rows, channels, dim, classes;
  float eps, scale, dropout;
};

struct Results {
  float* losses;    // [R]
  float* centers;   // [R, C]
  float* dcenters;  // [R, C]
  float* dhidden;   // [R, E]
};

__device__ float center_of(const Inputs& in, int64_t row, int c) {
  const auto count = static_cast<float>(max(in.counts[row], int64_t{1}));
  const float deviation = sqrtf(in.variance[c] + in.eps);
  const float x = (in.sums[row * in.channels + c] / count - in.mean[c]) / deviation;
  return x * in.norm_weight[c] + in.norm_bias[c];
}

// One block of a multiprocessor may use all registers. With fewer, loads wait for registers.
__global__ void __launch_bounds__(THREADS, 1) center_loss_kernel(Inputs in, Results results) {
  permit_next_kernel();
  auto* const memory = reinterpret_cast<float*>(shared_memory());  // [WARPS]
  float* const center = memory + WARPS;                            // [C]
  float* const hidden = center + in.channels;                      // [E]
  float* const query = hidden + in.dim;                            // [E]
  float* const logits = query + in.dim;                            // [K]
  const int64_t row = blockIdx.x;
  const auto thread = static_cast<int>(threadIdx.x);
  const bool present = in.counts[row] > 0;
  for (int c = thread; c < in.channels; c += THREADS) {
    center[c] = present ? center_of(in, row, c) : 0;
    results.centers[row * in.channels + c] = center[c];
  }
  __syncthreads();
  multiply(in.weight, center, hidden, in.dim, in.channels);

  float squares = 0;
  for (int e = thread; e < in.dim; e += THREADS) {
    const float h = hidden[e] + in.bias[e];
    hidden[e] = h < 0 ? 0 : h;  // fmaxf would hide NaN
    squares += hidden[e] * hidden[e];
  }
  const float norm = sqrtf(sum_of_block(squares, memory)), length = fmaxf(norm, SHORTEST);
  const auto kept = [&](int e) {
    if (!in.noise) return 1.f;
    return in.noise[row * in.dim + e] < in.dropout ? 0 : 1 / (1 - in.dropout);
  };
  for (int e = thread; e < in.dim; e += THREADS) query[e] = hidden[e] / length * kept(e);
  __syncthreads();
  multiply(in.etf, query, logits, in.classes, in.dim);

  const auto own = static_cast<int>(row % in.classes);
  float top = -INFINITY, total = 0;
  for (int k = thread; k < in.classes; k += THREADS) {
    logits[k] = in.scale * logits[k] + logf(in.prior[k] + 1e-12f);
    top = fmaxf(top, logits[k]);
  }
  top = max_of_block(top, memory);
  for (int k = thread; k < in.classes; k += THREADS) total += expf(logits[k] - top);
  const float lse = top + logf(sum_of_block(total, memory));
  if (thread == 0) results.losses[row] = present ? lse - logits[own] : 0;
  __syncthreads();
  for (int k = thread; k < in.classes; k += THREADS)  // dlogits from here on
    logits[k] = expf(logits[k] - lse) - (k == own ? 1.f : 0.f);
  __syncthreads();

  float product = 0;
  for (int e = thread; e < in.dim; e += THREADS) {
    const float dquery = multiply_transposed(in.etf, logits, e, in.classes, in.dim);
    query[e] = in.scale * dquery * kept(e);  // du from here on
    product += query[e] * hidden[e] / length;
  }
  product = sum_of_block(product, memory);
  if (norm < SHORTEST) product = 0;
  for (int e = thread; e < in.dim; e += THREADS) {
    const float dhidden = (query[e] - product * hidden[e] / length) / length;
    query[e] = present && !(hidden[e] <= 0) ? dhidden : 0;
    results.dhidden[row * in.dim + e] = query[e];
  }
  __syncthreads();
  for (int c = thread; c < in.channels; c += THREADS)
    results.dcenters[row * in.channels + c] =
        multiply_transposed(in.weight, query, c, in.dim, in.channels);
}

__global__ void __launch_bounds__(THREADS)
    mean_kernel(const float* losses,    // [rows]
                const int64_t* counts,  // [rows]
                float* loss, float* number, int rows, float loss_weight) {
  wait_for_kernel_before();
  auto* const memory = reinterpret_cast<float*>(shared_memory());  // [WARPS]
  float total = 0, present = 0;
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    total += losses[row];
    present += counts[row] > 0 ? 1.f : 0.f;
  }
  total = sum_of_block(total, memory);
  present = sum_of_block(present, memory);
  if (threadIdx.x > 0) return;
  *loss = loss_weight * total / fmaxf(present, 1);
  *number = present;
}

struct Gradients {
  const float *dloss, *number;                 // []
  const float* dcenters;                       // [R, C]
  float* dsums;                                // [R, C]
  float *dmean, *dvariance, *dweight, *dbias;  // [C]
};

// A warp for each channel, its lanes are centers.
__global__ void __launch_bounds__(THREADS)
    center_loss_backward_kernel(Inputs in, Gradients gradients, float loss_weight) {
  const int c = static_cast<int>(blockIdx.x) * WARPS + static_cast<int>(threadIdx.x) / 32;
  if (c >= in.channels) return;
  const float factor = *gradients.dloss * loss_weight / fmaxf(*gradients.number, 1);
  const float deviation = sqrtf(in.variance[c] + in.eps);
  const float slope = in.norm_weight[c] / deviation;
  float dweight = 0, dbias = 0;
#pragma unroll 4
  for (int row = threadIdx.x % 32; row < in.rows; row += 32) {
    const auto count = static_cast<float>(max(in.counts[row], int64_t{1}));
    const int64_t at = int64_t{row} * in.channels + c;
    const float dcenter = factor * gradients.dcenters[at];
    dbias += dcenter;
    dweight += dcenter * (in.sums[at] / count - in.mean[c]) / deviation;
    gradients.dsums[at] = dcenter * slope / count;
  }
  dweight = sum_of_warp(dweight);
  dbias = sum_of_warp(dbias);
  if (threadIdx.x % 32 > 0) return;
  gradients.dmean[c] = -slope * dbias;
  gradients.dvariance[c] = -slope * dweight / (2 * deviation);
  gradients.dweight[c] = dweight;
  gradients.dbias[c] = dbias;
}

const float* data(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> center_loss(
    Tensor sums, Tensor counts, Tensor mean, Tensor variance, Tensor norm_weight, Tensor norm_bias,
    Tensor weight, Tensor bias, Tensor etf, Tensor prior, std::optional<Tensor> noise, double eps,
    double scale, double dropout, double loss_weight) {
  const OnDevice device(sums);
  const int64_t rows = sums.size(0), channels = sums.size(1), dim = weight.size(0);
  const int64_t classes = prior.size(0);
  const auto empty = [&](const std::vector<int64_t>& size) {
    return new_empty(sums, size, ScalarType::Float);
  };
  Tensor loss = empty({}), number = empty({}), losses = empty({rows});
  Tensor centers = empty({rows, channels}), dcenters = empty({rows, channels});
  Tensor dhidden = empty({rows, dim});
  const Inputs inputs = {.sums = data(sums),
                         .counts = counts.const_data_ptr<int64_t>(),
                         .mean = data(mean),
                         .variance = data(variance),
                         .norm_weight = data(norm_weight),
                         .norm_bias = data(norm_bias),
                         .weight = data(weight),
                         .bias = data(bias),
                         .etf = data(etf),
                         .prior = data(prior),
                         .noise = optional_data<float>(noise),
                         .rows = static_cast<int>(rows),
                         .channels = static_cast<int>(channels),
                         .dim = static_cast<int>(dim),
                         .classes = static_cast<int>(classes),
                         .eps = static_cast<float>(eps),
                         .scale = static_cast<float>(scale),
                         .dropout = static_cast<float>(dropout)};
  const Results results = {.losses = losses.mutable_data_ptr<float>(),
                           .centers = centers.mutable_data_ptr<float>(),
                           .dcenters = dcenters.mutable_data_ptr<float>(),
                           .dhidden = dhidden.mutable_data_ptr<float>()};
  launch("center_loss_kernel", center_loss_kernel, grid_of("center_loss.cuda", rows), THREADS,
         sizeof(float) * (WARPS + channels + 2 * dim + classes), device.stream, inputs, results);
  launch_early("mean_kernel", mean_kernel, 1, THREADS, sizeof(float) * WARPS, device.stream,
               data(losses), inputs.counts, loss.mutable_data_ptr<float>(),
               number.mutable_data_ptr<float>(), inputs.rows, static_cast<float>(loss_weight));
  return {loss, number, centers, dcenters, dhidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> center_loss_backward(
    Tensor dloss, Tensor number, Tensor dcenters, Tensor sums, Tensor counts, Tensor mean,
    Tensor variance, Tensor norm_weight, double eps, double loss_weight) {
  const OnDevice device(sums);
  const int64_t rows = sums.size(0), channels = sums.size(1);
  const auto empty = [&](const std::vector<int64_t>& size) {
    return new_empty(sums, size, ScalarType::Float);
  };
  Tensor dsums = empty({rows, channels}), dmean = empty({channels}), dvariance = empty({channels});
  Tensor dweight = empty({channels}), dbias = empty({channels});
  const Inputs inputs = {.sums = data(sums),
                         .counts = counts.const_data_ptr<int64_t>(),
                         .mean = data(mean),
                         .variance = data(variance),
                         .norm_weight = data(norm_weight),
                         .rows = static_cast<int>(rows),
                         .channels = static_cast<int>(channels),
                         .eps = static_cast<float>(eps)};
  const Gradients gradients = {.dloss = data(dloss),
                               .number = data(number),
                               .dcenters = data(dcenters),
                               .dsums = dsums.mutable_data_ptr<float>(),
                               .dmean = dmean.mutable_data_ptr<float>(),
                               .dvariance = dvariance.mutable_data_ptr<float>(),
                               .dweight = dweight.mutable_data_ptr<float>(),
                               .dbias = dbias.mutable_data_ptr<float>()};
  launch("center_loss_backward_kernel", center_loss_backward_kernel,
         grid_of("center_loss.cuda", ceil_div(channels, int64_t{WARPS})), THREADS, 0, device.stream,
         inputs, gradients, static_cast<float>(loss_weight));
  return {dsums, dmean, dvariance, dweight, dbias};
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("center_loss.cuda", TORCH_BOX(&anchorops::cuda::center_loss));
  library.impl("center_loss_backward.cuda", TORCH_BOX(&anchorops::cuda::center_loss_backward));
}
