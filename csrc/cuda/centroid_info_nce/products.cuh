// The rows of centroid InfoNCE, and tiles of their inner products in registers. A block reads 16
// rows of one tensor once, and all rows of the other one from the second-level cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../tensors.cuh"

namespace anchorops::cuda {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int OURS = 16, OTHERS = 64;  // rows of a tile: of the block's tensor, of the other
constexpr int EACH = OURS * OTHERS / THREADS;  // products of a thread
constexpr int DEPTH = 32, PITCH = DEPTH + 4;   // channels in shared memory; 4 avoid bank conflicts
constexpr int TILE_FLOATS = (OURS + OTHERS) * PITCH;

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

  __device__ int own_key(int r) const { return r / groups; }
  __device__ int positive(int r) const { return own_key_is_positive ? own_key(r) : r; }
  __device__ bool in_denominator(int r, int k) const { return keys.has(k) && k != own_key(r); }
};

// Adds the products of 16 rows, from first_our on, and 64 rows, from first_other on. Thread t has
// those of rows t / 16 and t % 16 + 16·i.
__device__ inline void multiply(float* shared,  // [OURS + OTHERS, PITCH]
                                const Rows& ours, int first_our, const Rows& others,
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
      const auto x = *reinterpret_cast<const float4*>(our + c);
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const auto y = *reinterpret_cast<const float4*>(other + 16 * i * PITCH + c);
        sums[i] = fmaf(x.x, y.x, sums[i]);
        sums[i] = fmaf(x.y, y.y, sums[i]);
        sums[i] = fmaf(x.z, y.z, sums[i]);
        sums[i] = fmaf(x.w, y.w, sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) products[i] += sums[i];
  }
}

inline Rows rows_of(const Tensor& tensor, const std::optional<Tensor>& present) {
  return {.data = tensor.const_data_ptr<float>(),
          .present = optional_data<bool>(present),
          .count = static_cast<int>(tensor.size(0)),
          .stride = tensor.stride(0),
          .stride_d = tensor.stride(1)};
}

inline Problem problem_of(const char* operation, const Tensor& queries, const Tensor& keys,
                          const std::optional<Tensor>& positives,
                          const std::optional<Tensor>& present,
                          const std::optional<Tensor>& present_keys, double temperature) {
  const int64_t rows = queries.size(0), classes = keys.size(0), dim = keys.size(1);
  const int64_t groups = rows / std::max(classes, int64_t{1});
  STD_TORCH_CHECK(groups * classes == rows, operation, ": queries: expected ", classes,
                  " classes of equally many rows, got ", rows, " rows");
  check_shape(operation, "queries", queries, {rows, dim});
  check_shape(operation, "keys", keys, {classes, dim});
  check_shape(operation, "positives", positives, {rows, dim});
  check_table(operation, "present", present, {rows});
  check_table(operation, "present_keys", present_keys, {classes});
  return {.queries = rows_of(queries, present),
          .keys = rows_of(keys, present_keys),
          .positives = rows_of(positives ? *positives : keys, {}),
          .groups = static_cast<int>(std::max(groups, int64_t{1})),
          .dim = static_cast<int>(dim),
          .own_key_is_positive = !positives,
          .inverse_temperature = static_cast<float>(1 / temperature)};
}

}  // namespace anchorops::cuda
