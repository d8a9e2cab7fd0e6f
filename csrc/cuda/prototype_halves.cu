// The operators anchorops::prototype_halves.cuda and prototype_halves_backward.cuda: centroids of
// learnable prototypes V [G, K, D], and the cosine of two random halves of their groups; and a copy
// of V in the order of classes, so that its gradient is added here to the others.
//
//   m_k = mean_g V_gk    c_k = m_k / ‖m_k‖    a_k, b_k: sums of V over the two halves of the groups
//   distances_k = w·(1 − cos_k),  cos_k = a_k·b_k / (‖a_k‖·‖b_k‖)    rows_kg = V_gk
//   dV_gk = (dc_k − (c_k·dc_k)·c_k) / (G·‖m_k‖)
//           − w·ddistances_k·(b_k/‖b_k‖ − cos_k·a_k/‖a_k‖) / ‖a_k‖ + drows_kg
//
// This is for groups of the half a; for the others a and b change places. Lengths are at least eps;
// below eps, the terms (c_k·dc_k)·c_k and cos_k·a_k/‖a_k‖ are 0.
//
// One launch in each direction, a warp per class. The prototypes are read twice, the second time
// from a cache. Latency determines the time: predicted 10 µs forward and 12 µs backward
// with four groups, with the launch, not measured.
#include "../labels.h"
#include "row_lanes.cuh"
#include "tensors.cuh"
#include "warps.cuh"

#include <cmath>

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 128;

struct Prototypes {
  const float* data;    // [groups, num_classes, dim]
  const int64_t* seed;  // one
  int64_t seed_offset, num_classes, dim;
  int groups;
  float eps, loss_weight;

  // 1 in shared memory for ⌊G/2⌋ random groups, as random_halves of anchorops/ops/split_groups.py
  // draws them: the rank of a group's hash is odd.
  __device__ void draw(uint8_t* half) const {
    const PixelHash hash(*seed + seed_offset);
    for (int g = threadIdx.x; g < groups; g += THREADS) {
      int rank = 0;
      for (int i = 0; i < groups; ++i) rank += hash(i) < hash(g);
      half[g] = rank % 2;
    }
    __syncthreads();
  }

  struct Sums {
    float a, b;
  };

  // Adds the numbers first + 32·i of class k; from `dim` on they are 0.
  __device__ void add_to(Sums (&sums)[AT_ONCE], const uint8_t* half, int64_t k,
                         int64_t first) const {
    for (int g = 0; g < groups; ++g) {
      const float* row = data + (g * num_classes + k) * dim;
      float values[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) values[i] = first + 32 * i < dim ? row[first + 32 * i] : 0;
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) (half[g] ? sums[i].a : sums[i].b) += values[i];
    }
  }
};

// The lengths of the mean and of a and b, and the cosine of a and b.
struct alignas(16) Products {
  float norm, norm_a, norm_b, cosine;
};

__global__ void __launch_bounds__(THREADS) prototype_halves_kernel(Prototypes prototypes,
                                                                   float* centroids,  // [K, dim]
                                                                   float* distances,  // [K]
                                                                   float* rows,  // [K, groups, dim]
                                                                   Products* products  // [K]
) {
  auto* half = reinterpret_cast<uint8_t*>(shared_memory());
  prototypes.draw(half);
  const int64_t k = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / 32, dim = prototypes.dim;
  const int lane = threadIdx.x % 32;
  if (k >= prototypes.num_classes) return;
  const float share = 1 / static_cast<float>(prototypes.groups), eps = prototypes.eps;
  centroids += k * dim;
  float mm = 0, aa = 0, bb = 0, ab = 0;
  for (int64_t first = lane; first < dim; first += 32 * AT_ONCE) {
    Prototypes::Sums sums[AT_ONCE] = {};
    prototypes.add_to(sums, half, k, first);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const auto [a, b] = sums[i];
      const float mean = share * (a + b);
      mm += mean * mean, aa += a * a, bb += b * b, ab += a * b;
      if (first + 32 * i < dim) centroids[first + 32 * i] = mean;
    }
  }
  const float norm = sqrtf(sum_of_warp(mm));
  const float norm_a = sqrtf(sum_of_warp(aa)), norm_b = sqrtf(sum_of_warp(bb));
  const float cosine = sum_of_warp(ab) / (fmaxf(norm_a, eps) * fmaxf(norm_b, eps));
  const float inverse = 1 / fmaxf(norm, eps);
  for_lane(
      dim, [&](int64_t d) { return centroids[d]; },
      [&](int64_t d, float mean) { centroids[d] = inverse * mean; });
  for (int64_t g = 0; g < prototypes.groups; ++g) {
    const float* from = prototypes.data + (g * prototypes.num_classes + k) * dim;
    float* to = rows + (k * prototypes.groups + g) * dim;
    for_lane(
        dim, [&](int64_t d) { return from[d]; }, [&](int64_t d, float value) { to[d] = value; });
  }
  if (lane > 0) return;
  distances[k] = prototypes.loss_weight * (1 - cosine);
  products[k] = {norm, norm_a, norm_b, cosine};
}

__global__ void __launch_bounds__(THREADS)
    prototype_halves_backward_kernel(const float* dcentroids,  // [K, dim] or null
                                     const float* ddistances,  // [K] by stride, or null
                                     int64_t stride_ddistances,
                                     const float* drows,  // [K, groups, dim] or null
                                     Prototypes prototypes,
                                     const float* centroids,    // [K, dim]
                                     const Products* products,  // [K]
                                     float* dprototypes         // [groups, K, dim]
    ) {
  auto* half = reinterpret_cast<uint8_t*>(shared_memory());
  prototypes.draw(half);
  const int64_t k = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / 32, dim = prototypes.dim;
  const int lane = threadIdx.x % 32;
  if (k >= prototypes.num_classes) return;
  const float eps = prototypes.eps;
  const auto [norm, norm_a, norm_b, cosine] = products[k];
  const float dcosine =
      ddistances ? -prototypes.loss_weight * ddistances[k * stride_ddistances] : 0;
  const float inverse = 1 / (fmaxf(norm, eps) * static_cast<float>(prototypes.groups));
  const float inverse_a = 1 / fmaxf(norm_a, eps), inverse_b = 1 / fmaxf(norm_b, eps);
  const float cosine_a = norm_a < eps ? 0 : cosine, cosine_b = norm_b < eps ? 0 : cosine;
  float product = 0;
  if (dcentroids && norm >= eps) {
    for_lane(
        dim, [&](int64_t d) { return dcentroids[k * dim + d] * centroids[k * dim + d]; },
        [&](int64_t, float term) { product += term; });
    product = sum_of_warp(product);
  }
  for (int64_t first = lane; first < dim; first += 32 * AT_ONCE) {
    Prototypes::Sums of[AT_ONCE] = {};  // then the gradients of a and b
    prototypes.add_to(of, half, k, first);
    float dmeans[AT_ONCE] = {};
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t d = first + 32 * i;
      if (dcentroids && d < dim)
        dmeans[i] = inverse * (dcentroids[k * dim + d] - product * centroids[k * dim + d]);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const float a = of[i].a * inverse_a, b = of[i].b * inverse_b;
      of[i] = {dmeans[i] + dcosine * (b - cosine_a * a) * inverse_a,
               dmeans[i] + dcosine * (a - cosine_b * b) * inverse_b};
    }
    for (int64_t g = 0; g < prototypes.groups; ++g) {
      const int64_t row = (k * prototypes.groups + g) * dim;
      float* to = dprototypes + (g * prototypes.num_classes + k) * dim;
      float values[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        values[i] = drows && first + 32 * i < dim ? drows[row + first + 32 * i] : 0;
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i)
        if (first + 32 * i < dim) to[first + 32 * i] = (half[g] ? of[i].a : of[i].b) + values[i];
    }
  }
}

Prototypes prototypes_of(const Tensor& prototypes, const Tensor& seed, int64_t seed_offset,
                         double eps, double loss_weight) {
  return {.data = prototypes.const_data_ptr<float>(),
          .seed = seed.const_data_ptr<int64_t>(),
          .seed_offset = seed_offset,
          .num_classes = prototypes.size(1),
          .dim = prototypes.size(2),
          .groups = static_cast<int>(prototypes.size(0)),
          .eps = static_cast<float>(eps),
          .loss_weight = static_cast<float>(loss_weight)};
}

dim3 blocks_for(const Prototypes& prototypes) {
  return grid_of("prototype_halves.cuda", ceil_div(prototypes.num_classes, int64_t{THREADS / 32}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_halves(Tensor prototypes, Tensor seed,
                                                            int64_t seed_offset, double eps,
                                                            double loss_weight) {
  const OnDevice device(prototypes);
  const Prototypes given = prototypes_of(prototypes, seed, seed_offset, eps, loss_weight);
  const int64_t num_classes = given.num_classes;
  Tensor centroids = new_empty(prototypes, {num_classes, given.dim}, ScalarType::Float);
  Tensor distances = new_empty(prototypes, {num_classes}, ScalarType::Float);
  Tensor rows = new_empty(prototypes, {num_classes, given.groups, given.dim}, ScalarType::Float);
  Tensor products = new_empty(prototypes, {num_classes, 4}, ScalarType::Float);
  launch("prototype_halves_kernel", prototype_halves_kernel, blocks_for(given), THREADS,
         given.groups, device.stream, given, centroids.mutable_data_ptr<float>(),
         distances.mutable_data_ptr<float>(), rows.mutable_data_ptr<float>(),
         reinterpret_cast<Products*>(products.mutable_data_ptr<float>()));
  return {centroids, distances, rows, products};
}

Tensor prototype_halves_backward(std::optional<Tensor> dcentroids, std::optional<Tensor> ddistances,
                                 std::optional<Tensor> drows, Tensor prototypes, Tensor seed,
                                 Tensor centroids, Tensor products, int64_t seed_offset, double eps,
                                 double loss_weight) {
  const OnDevice device(prototypes);
  const Prototypes given = prototypes_of(prototypes, seed, seed_offset, eps, loss_weight);
  Tensor dprototypes = new_empty(prototypes, to_vector(prototypes.sizes()), ScalarType::Float);
  launch("prototype_halves_backward_kernel", prototype_halves_backward_kernel, blocks_for(given),
         THREADS, given.groups, device.stream, optional_data<float>(dcentroids),
         optional_data<float>(ddistances), ddistances ? ddistances->stride(0) : 0,
         optional_data<float>(drows), given, centroids.const_data_ptr<float>(),
         reinterpret_cast<const Products*>(products.const_data_ptr<float>()),
         dprototypes.mutable_data_ptr<float>());
  return dprototypes;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("prototype_halves.cuda", TORCH_BOX(&anchorops::cuda::prototype_halves));
  library.impl("prototype_halves_backward.cuda",
               TORCH_BOX(&anchorops::cuda::prototype_halves_backward));
}
