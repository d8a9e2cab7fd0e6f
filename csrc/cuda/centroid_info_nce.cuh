// For the kernels of centroid InfoNCE: their inputs, and the logits of rows and keys.
#pragma once

#include "rows.cuh"

#include <cmath>

namespace anchorops::cuda {

// Keys and positives may be float64 if the queries are not; products are float32 in any case.
inline Tensor without_doubles(const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Double) return tensor;
  return torch::stable::to(tensor, ScalarType::Float);
}

// Which rows have a loss, and which keys are in their denominators. These are bytes as in memory,
// so nothing waits for them before they are used.
struct Present {
  const uint8_t* queries;  // bool [K, G] by strides; null: all
  const uint8_t* keys;     // bool [K] by stride; null: all classes with a present query
  bool all_keys;
  int groups;
  int64_t stride_k, stride_g, stride_keys;
  bool own_is_positive;  // a query's positive is the key of its class

  __device__ uint8_t row(int r) const {
    return queries ? queries[row_offset(r, groups, stride_k, stride_g)] : 1;
  }
  __device__ uint8_t any_row(int k) const {
    if (!queries) return groups > 0;
    if (groups == 1) return queries[k * stride_k];
    uint8_t found = 0;
#pragma unroll 2
    for (int g = 0; g < groups; ++g) found |= queries[k * stride_k + g * stride_g];
    return found;
  }
  // Whether the key is in the denominator of every row.
  __device__ uint8_t key(int k) const {
    if (all_keys) return 1;
    return keys ? keys[k * stride_keys] : any_row(k);
  }
  // Whether the key is in any term.
  __device__ uint8_t key_used(int k) const {
    if (keys && own_is_positive && !all_keys) return keys[k * stride_keys] | any_row(k);
    return key(k);
  }
};

inline const uint8_t* bytes_of(const Tensor& mask) {
  return static_cast<const uint8_t*>(mask.const_data_ptr());
}

inline Present present_of(const std::optional<Tensor>& queries, const std::optional<Tensor>& keys,
                          bool all_keys, int groups, bool own_is_positive) {
  return {.queries = queries ? bytes_of(*queries) : nullptr,
          .keys = keys ? bytes_of(*keys) : nullptr,
          .all_keys = all_keys,
          .groups = groups,
          .stride_k = queries ? queries->stride(0) : 0,
          .stride_g = queries && queries->dim() == 2 ? queries->stride(1) : 0,
          .stride_keys = keys ? keys->stride(0) : 0,
          .own_is_positive = own_is_positive};
}

// What both directions read.
struct Problem {
  Rows queries, keys, positives;  // positives: empty, if each is the key of its class
  Present present;
  const float* bias;  // [K], added to the logits of the keys, or null
  float temperature;

  // Of the logits of a row: K, rounded up to a multiple of 8.
  int width() const { return ceil_div(keys.count, 8) * 8; }
};

// Keys and positives are not float64.
inline Problem problem_of(const Tensor& queries, const Tensor& keys,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>& positives,
                          const std::optional<Tensor>& present,
                          const std::optional<Tensor>& present_keys, bool all_keys, bool mirrored,
                          double temperature) {
  const Rows rows = rows_of(queries);
  Rows own{};
  if (mirrored) own = mirrored_rows(rows);
  if (positives) own = rows_of(*positives);
  return {
      .queries = rows,
      .keys = rows_of(keys),
      .positives = own,
      .present = present_of(present, present_keys, all_keys, rows.groups, !positives && !mirrored),
      .bias = optional_data<float>(bias),
      .temperature = static_cast<float>(temperature)};
}

// Large tiles, if they fill the device.
inline bool large_tiles(int rows, int num_classes) {
  return int64_t{ceil_div(rows, 64)} * ceil_div(num_classes, 64) >= 128;
}

// What the kernel of the logits writes for the rows from `first` to `end`; null: not written.
struct LogitsOfRows {
  int first, end;
  float2* partials;        // [chunks, K·G]: largest logit of the chunk's keys without the own, and
                           // Σ e^(logit − largest)
  float* positive_logits;  // [K·G]
  float* logits;           // [end − first, width]: −∞ for the own key, where a key is not in the
                           // denominator, and from column K on
};

constexpr int SMALL_TILE = 16, LARGE_TILE = 64;  // of logits

// The keys are divided into chunks of tiles, which different blocks compute.
struct Chunks {
  int count, tiles;
};

// Problems of one launch.
template <int COUNT>
struct LogitsProblems {
  Problem problems[COUNT];
  LogitsOfRows outputs[COUNT];
};

Chunks chunks_of(int rows, int num_classes, int tile);
void compute_logits(const Problem& problem, const LogitsOfRows& output, Stream stream);
// Two problems of the same shape, with small tiles.
void compute_logits(const LogitsProblems<2>& pair, Stream stream);

// The log-sum-exp of row r of a problem: of its positive, and of the partials of all chunks.
__device__ inline float log_sum_exp(const float2* partials, float positive, int r, int rows,
                                    int chunks) {
  constexpr int AT_ONCE = 8;
  const float2* next = partials + r;
  float maximum = -INFINITY, total = 0;  // nothing waits for the positive before it is used
  for (int first = 0; first < chunks; first += AT_ONCE) {
    float2 loaded[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i, next += rows)
      loaded[i] = first + i < chunks ? *next : float2{-INFINITY, 0};
    float largest = maximum;
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) largest = fmaxf(largest, loaded[i].x);
    const float shift = largest == -INFINITY ? 0 : largest;
    total *= expf(maximum - shift);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) total += loaded[i].y * expf(loaded[i].x - shift);
    maximum = largest;
  }
  const float largest = fmaxf(maximum, positive);
  return largest + logf(total * expf(maximum - largest) + expf(positive - largest));
}

}  // namespace anchorops::cuda
