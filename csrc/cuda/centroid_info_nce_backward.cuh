// For the gradients of centroid InfoNCE: what their kernel reads and writes.
#pragma once

#include "centroid_info_nce.cuh"

namespace anchorops::cuda {

// The gradient of each row's loss.
struct DlossOfRows {
  const float* dloss;  // [K·G] by strides, 0 for a scalar
  int64_t stride_k, stride_g;
  const float* scale;            // one
  const float* lse;              // [K·G]
  const float* positive_logits;  // [K·G]
  float inverse_temperature;
  int groups;

  // As in memory, so nothing waits for it before it is used.
  struct Loaded {
    float dloss, scale, lse, positive;
    uint8_t selected;
    int row;
  };

  struct OfRow {
    float dloss, lse, dpositive;  // dloss/τ. An absent row: 0, ∞, 0
    int own;                      // the class of the row if its own key has no logit, otherwise −1

    __device__ float dlogit(int k, float logit) const {
      const float gradient = dloss * expf(logit - lse);
      return k == own ? dpositive : gradient;
    }
    // That of another lane.
    __device__ OfRow of_lane(int lane) const {
      return {__shfl_sync(FULL_WARP, dloss, lane), __shfl_sync(FULL_WARP, lse, lane),
              __shfl_sync(FULL_WARP, dpositive, lane), __shfl_sync(FULL_WARP, own, lane)};
    }
  };

  __device__ Loaded load(int r, const Present& present) const {
    return {dloss[row_offset(r, groups, stride_k, stride_g)],
            *scale,
            lse[r],
            positive_logits[r],
            present.row(r),
            r};
  }
  __device__ OfRow row(const Loaded& of, const Present& present) const {
    if (!of.selected) return {0, INFINITY, 0, -1};
    const float factor = of.dloss * of.scale * inverse_temperature;
    return {factor, of.lse, factor * expm1f(of.positive - of.lse),
            present.own_is_positive ? of.row / groups : -1};
  }
  __device__ OfRow row(int r, const Present& present) const {
    return row(load(r, present), present);
  }
};

// Logits of the rows from first_row on, and what their gradients need.
struct KeptLogits {
  const float* logits;  // [rows, width]
  int rows, width, first_row;
  DlossOfRows losses;
  Present present;

  __device__ const float* at(int r, int k) const { return logits + int64_t{r} * width + k; }
  __device__ DlossOfRows::Loaded load(int r) const {
    return r < rows ? losses.load(first_row + r, present) : DlossOfRows::Loaded{};
  }
  __device__ DlossOfRows::OfRow row(const DlossOfRows::Loaded& loaded) const {
    return losses.row(loaded, present);
  }
};

// The rows of a new tensor.
struct Output {
  void* data;
  ScalarType dtype;
  int count, dim;

  template <class T>
  __device__ void store(int64_t start, int elements, const EightFloats& values) const {
    T* address = static_cast<T*>(data) + start;
    if (elements < 8 || dim % 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < elements) address[i] = static_cast<T>(values[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; i += Vector<T>::SIZE) {
      Vector<T> vector;
#pragma unroll
      for (int j = 0; j < Vector<T>::SIZE; ++j) vector.elements[j] = static_cast<T>(values[i + j]);
      store_vector(address + i, vector);
    }
  }

  // Adds elements d to d + 7 of row r, float32, to the values.
  __device__ void add_to(int r, int d, EightFloats& values) const {
    if (r >= count) return;
    const float* row = static_cast<const float*>(data) + int64_t{r} * dim;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (d + i < dim) values[i] += row[d + i];
  }

  // Elements d to d + 7 of row r.
  __device__ void store(int r, int d, const EightFloats& values) const {
    const int64_t start = int64_t{r} * dim + d;
    const int elements = min(dim - d, 8);
    if (r >= count || elements <= 0) return;
    if (dtype == ScalarType::Float)
      store<float>(start, elements, values);
    else if (dtype == ScalarType::BFloat16)
      store<BFloat16>(start, elements, values);
    else
      store<Half>(start, elements, values);
  }
};

inline Output output_of(const Tensor& tensor, const Rows& rows) {
  return {tensor.mutable_data_ptr(), tensor.scalar_type(), rows.count, rows.dim};
}

struct Outputs {
  Output dqueries;    // [K, G, D]
  Output dkeys;       // [K, D]
  bool with_dkeys;    // otherwise dkeys are not computed
  Output dpositives;  // [K, G, D], if positives were given
  float* dbias;       // [K] or null
  bool mirrored;      // positives are queries
  bool add;           // to dkeys, float32, and to dbias
};

// Problems of one launch. All their logits were kept, or there is one problem.
template <int COUNT>
struct GradientProblems {
  Problem problems[COUNT];
  KeptLogits logits[COUNT];
  Outputs outputs[COUNT];
  bool same_queries;  // dqueries of the first problem are those of all
};

// Two problems of the same shape, with small tiles.
void compute_gradients(const GradientProblems<2>& pair, Stream stream);

}  // namespace anchorops::cuda
