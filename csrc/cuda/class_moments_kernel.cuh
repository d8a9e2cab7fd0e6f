// The pass over the features: a warp sums its 32 channels, one for each lane, tile after tile.
#pragma once

#include "class_moments_tiles.cuh"

namespace anchorops::cuda {

constexpr int SUMS = 1, SQDISTS = 2, RESIDUALS = 4;  // statistics

// Sums while the key repeats, in four independent parts.
template <int STATISTICS>
struct Totals {
  float sums[4] = {}, sqdists[4] = {}, residuals[4] = {};

  __device__ __forceinline__ void add(int i, float x, float anchor) {
    if constexpr (STATISTICS & SUMS) sums[i % 4] += x;
    if constexpr (STATISTICS & SQDISTS) {
      const float residual = x - anchor;
      sqdists[i % 4] = fmaf(residual, residual, sqdists[i % 4]);
      if constexpr (STATISTICS & RESIDUALS) residuals[i % 4] += residual;
    }
  }
  static __device__ __forceinline__ float total(const float (&parts)[4]) {
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
};

// Adds values of pixels to the rows of their keys, one after the other if keys are the same.
template <int N>
__device__ __forceinline__ void add_to_rows(float* table, int columns, const Vector<int>& keys,
                                            const float (&values)[N]) {
  static_assert(N <= Vector<int>::SIZE);
  float totals[N];
#pragma unroll
  for (int i = 0; i < N; ++i) totals[i] = table[keys.elements[i] * columns];
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < i; ++j)
      if (keys.elements[j] == keys.elements[i]) totals[i] = totals[j];
    totals[i] += values[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) table[keys.elements[i] * columns] = totals[i];
}

// Statistics of a chunk: in registers for the current key, otherwise in tables in shared memory,
// [1 + num_keys, 32] each, whose first row is for ignored pixels (key −1). A lane uses only its own
// column. SORTED: the statistics of a key are stored to global memory when the next key begins.
template <class T, int STATISTICS, bool SORTED>
struct Accumulator {
  const Problem<T>& problem;
  const int block, chunk, lane = threadIdx.x;
  const int64_t channel = int64_t{block} * CHANNELS + lane;
  const bool inside = channel < problem.view.dim;
  const int dim = static_cast<int>(problem.view.dim);
  const float* const anchors = problem.anchors + channel;
  float *sums, *residuals, *sqdists;  // the lane's columns, at key 0
  Totals<STATISTICS> totals;
  int key;
  float anchor = 0;
  bool pending = false;  // whether totals contain pixels
  bool first = true;     // SORTED: whether this is the first key of the chunk

  __device__ Accumulator(const Problem<T>& problem, int block, int chunk, float* tables, int key)
      : problem(problem), block(block), chunk(chunk), key(key) {
    if constexpr (SORTED) return;
    const int size = (1 + problem.num_keys) * CHANNELS;
    if constexpr (STATISTICS & SUMS) {
      sums = zero(tables, CHANNELS);
      tables += size;
    }
    if constexpr (STATISTICS & RESIDUALS) {
      residuals = zero(tables, CHANNELS);
      tables += size;
    }
    if constexpr (STATISTICS & SQDISTS) sqdists = zero(tables, problem.sqdists_columns);
  }

  __device__ float* zero(float* table, int columns) const {
    table += lane;
    if (lane < columns) {
#pragma unroll 4
      for (int k = 0; k <= problem.num_keys; ++k) table[k * columns] = 0;
    }
    return table + columns;
  }

  __device__ __forceinline__ float anchor_at(int row) const {
    return inside ? __ldg(anchors + int64_t{max(row, 0)} * dim) : 0;
  }

  // The sum over lanes of the same column (lane mod columns, which is 32, 8 or 1).
  static __device__ __forceinline__ float over_lanes(float value, int columns) {
    if (columns == CHANNELS) return value;
    value += __shfl_xor_sync(FULL_WARP, value, 16);
    value += __shfl_xor_sync(FULL_WARP, value, 8);
    if (columns == 8) return value;
    value += __shfl_xor_sync(FULL_WARP, value, 4);
    value += __shfl_xor_sync(FULL_WARP, value, 2);
    return value + __shfl_xor_sync(FULL_WARP, value, 1);
  }

  __device__ __forceinline__ void flush(bool last = false) {
    if (!pending) return;
    if constexpr (SORTED) {
      store(first || last, !first);
      first = false;
    } else {
      if constexpr (STATISTICS & SUMS) sums[key * CHANNELS] += totals.total(totals.sums);
      if constexpr (STATISTICS & RESIDUALS)
        residuals[key * CHANNELS] += totals.total(totals.residuals);
      if constexpr (STATISTICS & SQDISTS) {
        const int columns = problem.sqdists_columns;
        const float total = over_lanes(totals.total(totals.sqdists), columns);
        if (lane < columns) sqdists[key * columns] += total;
      }
    }
    totals = {};
    pending = false;
  }

  // SORTED: to a row for the first or last key of the chunk, because other chunks may continue with
  // this key; or to the output.
  __device__ __forceinline__ void store(bool end, int which) const {
    if (key < 0) return;
    const int64_t dim = problem.view.dim, edge = int64_t{2} * chunk + which;
    const int64_t at = (end ? edge : key) * dim + channel;
    if (inside) {
      if constexpr (STATISTICS & SUMS)
        (end ? problem.sums_ends : problem.sums)[at] = totals.total(totals.sums);
      if constexpr (STATISTICS & RESIDUALS)
        (end ? problem.residuals_ends : problem.residuals)[at] = totals.total(totals.residuals);
    }
    if constexpr (STATISTICS & SQDISTS) {
      const float total = over_lanes(totals.total(totals.sqdists), 1);
      if (lane > 0) return;
      if (end)
        problem.sqdists_ends[edge * problem.blocks + block] = total;
      else
        problem.sqdists[int64_t{block} * problem.num_keys + key] = total;
    }
  }

  // Pixels of the current key.
  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) totals.add(i, x[i], anchor);
    pending = true;
  }

  // Pixels of few keys: bit i of `changes` says that the key of pixel i differs from the one
  // before.
  template <int N>
  __device__ __forceinline__ void add_runs(const float (&x)[N], unsigned changes, const int* keys,
                                           const int* anchor_rows) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (changes >> i & 1) {
        flush();
        key = keys[i];
        if constexpr (STATISTICS & SQDISTS) anchor = anchor_at(anchor_rows[i]);
      }
      totals.add(i, x[i], anchor);
      pending = true;
    }
  }

  // Pixels of many keys are added to the tables directly, four at a time.
  template <int N>
  __device__ __forceinline__ void add_scattered(const float (&x)[N], const int* keys,
                                                const int* anchor_rows) {
    flush();
    float near[N] = {};
    if constexpr (STATISTICS & SQDISTS)
#pragma unroll
      for (int i = 0; i < N; ++i) near[i] = anchor_at(anchor_rows[i]);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const auto four_keys = load_vector(keys + i);
      const float four[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
      if constexpr (STATISTICS & SUMS) add_to_rows(sums, CHANNELS, four_keys, four);
      if constexpr (STATISTICS & SQDISTS) {
        const int columns = problem.sqdists_columns;
        float residual[4], squares[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          residual[j] = four[j] - near[i + j];
          squares[j] = over_lanes(residual[j] * residual[j], columns);
        }
        if constexpr (STATISTICS & RESIDUALS) add_to_rows(residuals, CHANNELS, four_keys, residual);
        if (lane < columns) add_to_rows(sqdists, columns, four_keys, squares);
      }
    }
    key = keys[N - 1];
    anchor = near[N - 1];
  }

  __device__ void finish() {
    flush(true);
    if constexpr (SORTED) return;
    const int num_keys = problem.num_keys;
    const int64_t dim = problem.view.dim, base = int64_t{chunk} * num_keys * dim + channel;
    if (inside) {
#pragma unroll 4
      for (int k = 0; k < num_keys; ++k) {
        if constexpr (STATISTICS & SUMS) problem.sums[base + k * dim] = sums[k * CHANNELS];
        if constexpr (STATISTICS & RESIDUALS)
          problem.residuals[base + k * dim] = residuals[k * CHANNELS];
      }
    }
    if constexpr (STATISTICS & SQDISTS) {
      __syncwarp();
      const int columns = problem.sqdists_columns;
      float* out = problem.sqdists + (int64_t{chunk} * problem.blocks + block) * num_keys;
      for (int k = lane; k < num_keys; k += CHANNELS) {
        float total = 0;
        for (int i = 0; i < columns; ++i)  // each lane uses a different bank
          total += sqdists[k * columns + (i + lane) % columns - lane];
        out[k] = total;
      }
    }
  }
};

// Reads the features of its tiles, and their keys, once; writes each statistic of each key once.
template <class T, int STATISTICS, bool CHANNELS_LAST, bool SORTED>
__global__ void __launch_bounds__(CHANNELS, 12) class_moments_kernel(const Problem<T> problem) {
  using Shape = Stage<T, CHANNELS_LAST>;
  constexpr int SEGMENT = Shape::SEGMENT, GROUPS = TILE<T> / 32;
  const int lane = threadIdx.x;
  // Neighbouring blocks read neighbouring channels; with sorted pixels, the same planes, which then
  // stay in cache.
  constexpr bool CHUNKS_FIRST = SORTED && !CHANNELS_LAST;
  const int block = CHUNKS_FIRST ? blockIdx.x / problem.chunks : blockIdx.x % problem.blocks;
  const int chunk = CHUNKS_FIRST ? blockIdx.x % problem.chunks : blockIdx.x / problem.blocks;

  T* const stages = reinterpret_cast<T*>(shared_memory());
  int* const staged_keys = reinterpret_cast<int*>(shared_memory() + STAGES * Shape::BYTES);
  int* const staged_rows = staged_keys + STAGES * TILE<T>;
  float* const tables = reinterpret_cast<float*>(staged_rows + TILE<T>);
  const bool anchors_by_key = problem.num_keys == problem.num_classes;

  const int64_t first_tile = chunk * problem.tiles_per_chunk;
  const int tiles = static_cast<int>(min(problem.tiles_per_chunk, problem.tiles - first_tile));
  Cursor<T, SORTED> cursor(problem, int64_t{block} * CHANNELS, first_tile);
  int last_key = SORTED ? *cursor.keys : -1;
  Accumulator<T, STATISTICS, SORTED> accumulator(problem, block, chunk, tables, last_key);
  if constexpr (STATISTICS & SQDISTS)
    accumulator.anchor = accumulator.anchor_at(last_key / problem.groups % problem.num_classes);

  int slot = 0;
  for (int tile = 1 - STAGES; tile < tiles; ++tile) {
    __syncwarp();  // all lanes have read what is overwritten now
    if (tile + STAGES - 1 < tiles) {
      const int free = (slot + STAGES - 1) % STAGES;
      fill_stage<T, CHANNELS_LAST>(stages + free * Shape::ELEMENTS, staged_keys + free * TILE<T>,
                                   cursor);
      cursor.next();
    }
    commit_copies();
    if (tile >= 0) {
      wait_for_copies<STAGES - 1>();
      __syncwarp();
      const T* stage = stages + slot * Shape::ELEMENTS;
      const int* keys = staged_keys + slot * TILE<T>;
      const int* anchor_rows = anchors_by_key ? keys : staged_rows;
      unsigned changes = 0;  // lane g: which of the 32 pixels beginning at 32·g begin a run
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        const int key = keys[g * 32 + lane];
        const int key_before = __shfl_up_sync(FULL_WARP, key, 1);
        const unsigned begins = __ballot_sync(FULL_WARP, key != (lane ? key_before : last_key));
        if (lane == g) changes = begins;
        last_key = keys[g * 32 + 31];
      }
      if constexpr (STATISTICS & SQDISTS) {
        if (!anchors_by_key) {
          for (int i = lane; i < TILE<T>; i += 32)
            staged_rows[i] = keys[i] / problem.groups % problem.num_classes;
          __syncwarp();
        }
      }

#pragma unroll 1
      for (int g = 0; g < GROUPS; ++g) {
        const unsigned group_changes = __shfl_sync(FULL_WARP, changes, g);
        if (group_changes == 0) {
#pragma unroll
          for (int i = 0; i < 32; i += SEGMENT) {
            float x[SEGMENT];
            Shape::read(stage, g * 32 + i, x);
            accumulator.add(x);
          }
          continue;
        }
#pragma unroll 1
        for (int i = 0; i < 32; i += SEGMENT) {
          const int pixel = g * 32 + i;
          const unsigned own = group_changes >> i & ((1u << SEGMENT) - 1);
          float x[SEGMENT];
          Shape::read(stage, pixel, x);
          if (own == 0)
            accumulator.add(x);
          else if (SORTED || __popc(own) <= 2)
            accumulator.add_runs(x, own, keys + pixel, anchor_rows + pixel);
          else if constexpr (!SORTED)
            accumulator.add_scattered(x, keys + pixel, anchor_rows + pixel);
        }
      }
    }
    slot = (slot + 1) % STAGES;
  }
  accumulator.finish();
}

}  // namespace anchorops::cuda
