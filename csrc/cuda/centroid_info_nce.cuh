// For the kernels of centroid InfoNCE: K×D tensors as rows, and the product of two tiles.
#pragma once

#include "tensors.cuh"

#include <cmath>

namespace anchorops::cuda {

constexpr int THREADS = 256;

__device__ inline int64_t row_offset(int r, int groups, int64_t stride_k, int64_t stride_g) {
  if (groups == 1) return r * stride_k;
  if (stride_k == groups * stride_g) return r * stride_g;  // no division
  return r / groups * stride_k + r % groups * stride_g;
}

// Rows of a tensor [K, D] or [K, G, D] by strides, r = k·G + g, of any dtype. The dtype is checked
// when a row is read. This takes little time compared with the product, and one kernel replaces
// nine.
struct Rows {
  const void* data;
  ScalarType dtype;
  bool vectors;  // whether 8 elements, beginning at a multiple of 8, can be read as 16-byte vectors
  int count, groups, dim;
  int64_t stride_k, stride_g, stride_d;

  __device__ int64_t offset(int r) const { return row_offset(r, groups, stride_k, stride_g); }
};

// Query G − 1 − g of each class in place of query g.
inline Rows mirrored_rows(Rows rows) {
  const int64_t itemsize = rows.dtype == ScalarType::Float ? 4 : 2;
  rows.data = static_cast<const uint8_t*>(rows.data) + (rows.groups - 1) * rows.stride_g * itemsize;
  rows.stride_g = -rows.stride_g;
  return rows;
}

// Keys and positives may be float64 if the queries are not; products are float32 in any case.
inline Tensor without_doubles(const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Double) return tensor;
  return torch::stable::to(tensor, ScalarType::Float);
}

inline Rows rows_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() != ScalarType::Double,
                  "centroid_info_nce.cuda: queries: expected float32, bfloat16 or float16");
  const bool grouped = tensor.dim() == 3;
  const int64_t groups = grouped ? tensor.size(1) : 1, stride_k = tensor.stride(0);
  const int64_t stride_g = grouped ? tensor.stride(1) : 0, stride_d = tensor.stride(-1);
  const void* data = tensor.const_data_ptr();
  return {.data = data,
          .dtype = tensor.scalar_type(),
          .vectors =
              stride_d == 1 && vectors_aligned(data, {stride_k, stride_g}, tensor.element_size()),
          .count = static_cast<int>(tensor.size(0) * groups),
          .groups = static_cast<int>(groups),
          .dim = static_cast<int>(tensor.size(-1)),
          .stride_k = stride_k,
          .stride_g = stride_g,
          .stride_d = stride_d};
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
#pragma unroll 1
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

// Eight elements of a row as in memory: 2-byte elements in `bits[0]`, 4-byte elements in both.
// Elements that are not selected are zero, whatever memory contains; both are loaded at once.
struct Eight {
  Vector<uint32_t> bits[2];
  uint8_t selected;
};

// Elements d to d + 7 of row r; zeros outside.
template <class Select>
__device__ Eight load_eight(const Rows& rows, int r, int d, Select select) {
  Eight eight{};
  if (r >= rows.count || d >= rows.dim) return eight;
  const bool wide = rows.dtype == ScalarType::Float;
  const auto* row = static_cast<const uint8_t*>(rows.data) + rows.offset(r) * (wide ? 4 : 2);
  if (rows.vectors && d + 8 <= rows.dim) {
    const auto* words = reinterpret_cast<const uint32_t*>(row + d * (wide ? 4u : 2u));
    eight.bits[0] = load_vector(words);
    if (wide) eight.bits[1] = load_vector(words + 4);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (d + i >= rows.dim) break;
      const int64_t element = (d + i) * rows.stride_d;
      if (wide)
        eight.bits[i / 4].elements[i % 4] = reinterpret_cast<const uint32_t*>(row)[element];
      else
        eight.bits[0].elements[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(row)[element]}
                                         << i % 2 * 16;
    }
  }
  eight.selected = select(r);
  return eight;
}

struct EightFloats {
  Vector<float> part[2];

  __device__ float& operator[](int i) { return part[i / 4].elements[i % 4]; }
  __device__ float operator[](int i) const { return part[i / 4].elements[i % 4]; }
};

__device__ inline EightFloats to_float(const Eight& eight, ScalarType dtype) {
  EightFloats floats{};
  if (!eight.selected) return floats;
  const auto convert = [&](auto value_of) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t pair = eight.bits[0].elements[i / 2];
      floats[i] = value_of(i, static_cast<uint16_t>(i % 2 ? pair >> 16 : pair));
    }
  };
  if (dtype == ScalarType::Float)
    convert([&](int i, uint16_t) { return __uint_as_float(eight.bits[i / 4].elements[i % 4]); });
  else if (dtype == ScalarType::BFloat16)
    convert([](int, uint16_t half) { return __uint_as_float(uint32_t{half} << 16); });
  else
    convert([](int, uint16_t half) { return static_cast<float>(Half(half, Half::from_bits())); });
  return floats;
}

// Copies ROWS × COLUMNS elements from memory to float32 [ROWS][PITCH] in shared memory. With this
// pitch, rows that are read at once are in different banks.
template <int ROWS, int COLUMNS>
struct OperandStage {
  static constexpr int PITCH = COLUMNS + 4, SIZE = ROWS * PITCH;
  static constexpr int EIGHTS = ROWS * COLUMNS / 8, PER_THREAD = ceil_div(EIGHTS, THREADS);
  Eight eights[PER_THREAD];

  template <class Select>
  __device__ void load(const Rows& rows, int first_row, int first_column, Select select) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
      if (EIGHTS % THREADS == 0 || unit(i) < EIGHTS)
        eights[i] = load_eight(rows, first_row + row(i), first_column + column(i), select);
  }
  // selected: of the rows of this thread's units.
  __device__ void load(const Rows& rows, int first_row, int first_column,
                       const uint8_t (&selected)[PER_THREAD]) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
      eights[i] = load_eight(rows, first_row + row(i), first_column + column(i),
                             [&](int) { return selected[i]; });
  }

  // This thread's i-th unit of eight elements, its row, and its first column.
  static __device__ int unit(int i) { return threadIdx.x + i * THREADS; }
  static __device__ int row(int i) { return unit(i) / (COLUMNS / 8); }
  static __device__ int column(int i) { return unit(i) % (COLUMNS / 8) * 8; }

  __device__ void store(float* shared, ScalarType dtype) const {
    store_values(shared, [&](int i) { return to_float(eights[i], dtype); });
  }

  // values(i): the eight values of this thread's unit i.
  template <class Values>
  __device__ void store_values(float* shared, Values values) const {
    // Every second group of four lanes begins with its second half, so eight lanes use each bank
    // once.
    const bool swap = threadIdx.x & 4;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      if (EIGHTS % THREADS && unit(i) >= EIGHTS) continue;
      const EightFloats floats = values(i);
      float* address = shared + row(i) * PITCH + column(i);
      store_vector(address + 4 * swap, swap ? floats.part[1] : floats.part[0]);
      store_vector(address + 4 * !swap, swap ? floats.part[0] : floats.part[1]);
    }
  }
};

// A block's tile of a product, M × N outputs, DEPTH terms at a time. A and B are copied to shared
// memory without a transpose: outputs are their rows, or their columns. A thread computes 4 × 4
// outputs and every SPLIT-th group of four terms: 8 reads of 16 bytes for 64 multiplications. At
// the end the sums of all terms are in shared memory.
template <int M, int N, int DEPTH, bool A_BY_ROWS, bool B_BY_ROWS,
          template <int, int> class StageOfA = OperandStage>
struct TileProduct {
  using A = StageOfA<A_BY_ROWS ? M : DEPTH, A_BY_ROWS ? DEPTH : M>;
  using B = OperandStage<B_BY_ROWS ? N : DEPTH, B_BY_ROWS ? DEPTH : N>;
  static constexpr int SPLIT = THREADS / (M / 4 * N / 4), PITCH = N + 4;
  static constexpr int SHARED_FLOATS = std::max(A::SIZE + B::SIZE, SPLIT * M * PITCH);
  static constexpr size_t SHARED_BYTES = SHARED_FLOATS * sizeof(float);
  static_assert(SHARED_BYTES <= MAX_SHARED_BYTES);

  template <bool BY_ROWS, int GROUPS, int OPERAND_PITCH>
  static __device__ void read(const float* shared, int group, int step, Vector<float> (&four)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      four[i] = load_vector(BY_ROWS ? shared + (group + GROUPS * i) * OPERAND_PITCH + 4 * step
                                    : shared + (4 * step + i) * OPERAND_PITCH + 4 * group);
  }

  // load_a(stage, term) and load_b(stage, term) load DEPTH terms, beginning at `term`.
  template <class LoadA, class LoadB>
  static __device__ void multiply(float* shared, int terms, ScalarType a_dtype, ScalarType b_dtype,
                                  LoadA load_a, LoadB load_b) {
    const int group_n = threadIdx.x % (N / 4), group_m = threadIdx.x / (N / 4) % (M / 4);
    const int split = threadIdx.x / (N / 4 * (M / 4));
    float totals[4][4] = {};
    A a;
    B b;
    for (int term = -DEPTH; term < terms; term += DEPTH) {
      if (term >= 0) {
        __syncthreads();
        a.store(shared, a_dtype);
        b.store(shared + A::SIZE, b_dtype);
        __syncthreads();
      }
      if (term + DEPTH < terms) {
        load_a(a, term + DEPTH);
        load_b(b, term + DEPTH);
      }
      if (term < 0) continue;
#pragma unroll 4
      for (int step = 0; step < DEPTH / 4; step += SPLIT) {
        Vector<float> x[4], y[4];
        read<A_BY_ROWS, M / 4, A::PITCH>(shared, group_m, step + split, x);
        read<B_BY_ROWS, N / 4, B::PITCH>(shared + A::SIZE, group_n, step + split, y);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
              totals[m][n] = fmaf((A_BY_ROWS ? x[m].elements[i] : x[i].elements[m]),
                                  (B_BY_ROWS ? y[n].elements[i] : y[i].elements[n]), totals[m][n]);
      }
    }
    __syncthreads();
    shared += split * M * PITCH;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float* row = shared + (A_BY_ROWS ? group_m + M / 4 * m : 4 * group_m + m) * PITCH;
      if constexpr (B_BY_ROWS) {
#pragma unroll
        for (int n = 0; n < 4; ++n) row[group_n + N / 4 * n] = totals[m][n];
      } else {
        store_vector(row + 4 * group_n,
                     Vector<float>{{totals[m][0], totals[m][1], totals[m][2], totals[m][3]}});
      }
    }
    __syncthreads();
  }

  static __device__ float sum(const float* shared, int m, int n) {
    float total = 0;
#pragma unroll
    for (int split = 0; split < SPLIT; ++split) total += shared[(split * M + m) * PITCH + n];
    return total;
  }

  static __device__ EightFloats sum_eight(const float* shared, int m, int n) {
    EightFloats total{};
#pragma unroll
    for (int split = 0; split < SPLIT; ++split)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto four = load_vector(shared + (split * M + m) * PITCH + n + 4 * half);
#pragma unroll
        for (int i = 0; i < 4; ++i) total[4 * half + i] += four.elements[i];
      }
    return total;
  }
};

// TILE rows times TILE keys. The small tile divides 150 × 150 logits into 100 blocks; the large one
// reads a fourth as much. Thread t then has the logits (t / 16 + 16·i, t % 16 + 16·j), i and j
// below PER_THREAD.
template <int TILE>
struct LogitsTile {
  static constexpr int PER_THREAD = TILE / 16;
  using Product = TileProduct<TILE, TILE, TILE == 16 ? 256 : 32, true, true>;

  static __device__ void multiply(float* shared, const Rows& queries, const Rows& keys,
                                  const Present& present, int first_row, int first_key) {
    // The rows of a thread's units are the same for all terms.
    using A = typename Product::A;
    using B = typename Product::B;
    uint8_t rows_selected[A::PER_THREAD], keys_selected[B::PER_THREAD];
#pragma unroll
    for (int i = 0; i < A::PER_THREAD; ++i) {
      const int r = first_row + A::row(i);
      rows_selected[i] = r < queries.count ? present.row(r) : 0;
    }
#pragma unroll
    for (int i = 0; i < B::PER_THREAD; ++i) {
      const int k = first_key + B::row(i);
      keys_selected[i] = k < keys.count ? present.key_used(k) : 0;
    }
    Product::multiply(
        shared, queries.dim, queries.dtype, keys.dtype,
        [&](auto& stage, int d) { stage.load(queries, first_row, d, rows_selected); },
        [&](auto& stage, int d) { stage.load(keys, first_key, d, keys_selected); });
  }
};

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
  float maximum = positive;
#pragma unroll 8
  for (int chunk = 0; chunk < chunks; ++chunk)
    maximum = fmaxf(maximum, partials[int64_t{chunk} * rows + r].x);
  float total = expf(positive - maximum);
#pragma unroll 8
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const float2 partial = partials[int64_t{chunk} * rows + r];
    total += partial.y * expf(partial.x - maximum);
  }
  return maximum + logf(total);
}

}  // namespace anchorops::cuda
