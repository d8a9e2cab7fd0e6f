// Where the sums of keys go when another key comes: to tables in shared memory, or, of sorted
// pixels, to global memory for good.
#pragma once

#include "class_moments_tiles.cuh"

namespace anchorops::cuda {

constexpr int SUMS = 1, SQDISTS = 2, RESIDUALS = 4;  // statistics

// What a multiprocessor of an H200 holds: two warps for each of its four schedulers. With nine, of
// which one scheduler has three, all would wait for that one.
constexpr int BLOCKS_PER_MULTIPROCESSOR = 8;

__host__ __device__ constexpr int matrices_of(int statistics) {
  return ((statistics & SUMS) != 0) + ((statistics & RESIDUALS) != 0);
}

// What pixels of a key have added up to.
struct Sums {
  float sum = 0, sqdist = 0, residual = 0;
};

// The same while more are added, in registers: in four parts that do not wait for each other.
template <int STATISTICS>
struct Totals {
  Sums parts[4];

  __device__ __forceinline__ void add(int i, float x, float anchor) {
    Sums& part = parts[i % 4];
    if constexpr (STATISTICS & SUMS) part.sum += x;
    if constexpr (STATISTICS & SQDISTS) {
      const float residual = x - anchor;
      part.sqdist = fmaf(residual, residual, part.sqdist);
      if constexpr (STATISTICS & RESIDUALS) part.residual += residual;
    }
  }
  __device__ __forceinline__ Sums total() const {
    const auto of = [&](float Sums::* which) {
      return (parts[0].*which + parts[1].*which) + (parts[2].*which + parts[3].*which);
    };
    return {of(&Sums::sum), of(&Sums::sqdist), of(&Sums::residual)};
  }
};

__device__ __forceinline__ float over_lanes(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(FULL_WARP, value, lanes);
  return value;
}

// Adds values of pixels to their rows, one after the other where rows are the same.
template <int N>
__device__ __forceinline__ void add_to_rows(float* const (&rows)[N], const int (&ids)[N],
                                            const float (&values)[N]) {
  float totals[N];
#pragma unroll
  for (int i = 0; i < N; ++i) totals[i] = *rows[i];
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < i; ++j)
      if (ids[j] == ids[i]) totals[i] = totals[j];
    totals[i] += values[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) *rows[i] = totals[i];
}

// Partial statistics of chunks, for a kernel that adds them. Only what a chunk has met is written.
struct Partials {
  float* sums;       // float32 [chunks, num_keys, D]
  float* residuals;  // the same
  float* sqdists;    // float32 [chunks, blocks, num_keys]
  uint8_t* met;      // [chunks, num_keys]: 0 where a chunk has not met a key
  int rows;          // of a table in shared memory
};

constexpr uint8_t NOT_MET = 255, IN_GLOBAL = 254;
constexpr int MAX_ROWS = 254;
constexpr int SCATTER_BYTES = 2 * 32 * sizeof(int);  // rows of 32 pixels, and of their anchors

// Tables in shared memory, [rows, 32] for each statistic, of the keys that a chunk meets, in the
// order in which it meets them; row 0 takes what is ignored. So their size, and how many warps fit
// on a multiprocessor, does not depend on the number of keys. Keys that come when the rows are
// taken are added up in the chunk's partials in global memory. A lane touches its own column only.
template <int STATISTICS>
struct TableSink {
  using Output = Partials;

  const Partials partials;
  const int chunk, block, blocks, num_keys, dim, lane = threadIdx.x;
  const int channel = block * CHANNELS + lane;
  float* tables;    // the lane's columns: sums, residuals, sqdists, where they are wanted
  int* ids;         // [32], of the pixels that are scattered; then the rows of their anchors
  uint8_t* row_of;  // [1 + num_keys], at key 0
  int used = 1;     // rows

  static constexpr int RESIDUALS_TABLE = (STATISTICS & SUMS) != 0;
  static constexpr int SQDISTS_TABLE = matrices_of(STATISTICS);
  static constexpr int TABLES = SQDISTS_TABLE + ((STATISTICS & SQDISTS) != 0);

  template <class T>
  __device__ TableSink(const Partials& partials, const Tiling& tiling, const Input<T>& input,
                       int block, int chunk, unsigned char* memory)
      : partials(partials),
        chunk(chunk),
        block(block),
        blocks(tiling.blocks),
        num_keys(input.num_keys),
        dim(static_cast<int>(input.view.dim)),
        tables(reinterpret_cast<float*>(memory + SCATTER_BYTES) + lane),
        ids(reinterpret_cast<int*>(memory)),
        row_of(memory + SCATTER_BYTES + TABLES * partials.rows * CHANNELS * sizeof(float) + 1) {
    for (int k = lane - 1; k < num_keys; k += 32) row_of[k] = k < 0 ? 0 : NOT_MET;
    clear(0);
    __syncwarp();
  }

  __device__ __forceinline__ float* table(int which) const {
    return tables + which * partials.rows * CHANNELS;
  }
  __device__ __forceinline__ void clear(int row) const {
#pragma unroll
    for (int i = 0; i < TABLES; ++i) table(i)[row * CHANNELS] = 0;
  }

  // The partials of a key in global memory.
  __device__ __forceinline__ float* global(float* matrix, int key) const {
    return matrix + (int64_t{chunk} * num_keys + key) * dim + channel;
  }
  __device__ __forceinline__ float* global_sqdist(int key) const {
    return partials.sqdists + (int64_t{chunk} * blocks + block) * num_keys + key;
  }
  __device__ __forceinline__ bool inside() const { return channel < dim; }

  // Finds a place for a key's sums.
  __device__ __forceinline__ void meet(int key) {
    const int row = used < partials.rows ? used++ : IN_GLOBAL;
    __syncwarp();
    if (lane == 0) row_of[key] = static_cast<uint8_t>(row);
    __syncwarp();
    if (row != IN_GLOBAL) return clear(row);
    if (inside()) {
      if constexpr (STATISTICS & SUMS) *global(partials.sums, key) = 0;
      if constexpr (STATISTICS & RESIDUALS) *global(partials.residuals, key) = 0;
    }
    if constexpr (STATISTICS & SQDISTS)
      if (lane == 0) *global_sqdist(key) = 0;
  }

  // The row of a key, which may have none yet.
  __device__ __forceinline__ int find(int key) const { return row_of[key]; }

  __device__ __forceinline__ void add(int key, int row, const Sums& sums) {
    if (row >= IN_GLOBAL && !has_row(key, row)) return add_to_global(key, sums);
    float* const at = tables + row * CHANNELS;
    const int size = partials.rows * CHANNELS;
    float totals[TABLES];  // all are read before the first is written, or each would wait
#pragma unroll
    for (int i = 0; i < TABLES; ++i) totals[i] = at[i * size];
    if constexpr (STATISTICS & SUMS) totals[0] += sums.sum;
    if constexpr (STATISTICS & RESIDUALS) totals[RESIDUALS_TABLE] += sums.residual;
    if constexpr (STATISTICS & SQDISTS) totals[SQDISTS_TABLE] += sums.sqdist;
#pragma unroll
    for (int i = 0; i < TABLES; ++i) at[i * size] = totals[i];
  }

  // Looks again: the key may have been met since its row was looked up.
  __device__ __forceinline__ bool has_row(int key, int& row) {
    if (row_of[key] == NOT_MET) meet(key);
    row = row_of[key];
    return row != IN_GLOBAL;
  }

  __device__ __forceinline__ void add_to_global(int key, const Sums& sums) const {
    if (inside()) {
      if constexpr (STATISTICS & SUMS) *global(partials.sums, key) += sums.sum;
      if constexpr (STATISTICS & RESIDUALS) *global(partials.residuals, key) += sums.residual;
    }
    if constexpr (STATISTICS & SQDISTS) {
      const float total = over_lanes(sums.sqdist);
      if (lane == 0) *global_sqdist(key) += total;
    }
  }

  // Lane i has pixel i's key, and the row of its anchor. Returns whether all keys have their rows
  // in the tables.
  __device__ __forceinline__ bool begin_scatter(int key, int anchor_row) {
    int row = row_of[key];
    while (const unsigned unmet = __ballot_sync(FULL_WARP, row == NOT_MET)) {
      meet(__shfl_sync(FULL_WARP, key, __ffs(static_cast<int>(unmet)) - 1));
      if (row == NOT_MET) row = row_of[key];
    }
    __syncwarp();  // the scatter before has been read
    ids[lane] = row == IN_GLOBAL ? partials.rows + key : row;
    if constexpr (STATISTICS & SQDISTS) ids[32 + lane] = anchor_row;
    __syncwarp();
    return __ballot_sync(FULL_WARP, row == IN_GLOBAL) == 0;
  }

  // N pixels from pixel i of the group on. in_tables: all of them have their rows in the tables.
  template <int N>
  __device__ __forceinline__ void scatter(int i, const float (&x)[N], const Anchors& anchors,
                                          bool in_tables) const {
    Vector<int> rows[N / 4];
#pragma unroll
    for (int j = 0; j < N / 4; ++j) rows[j] = load_vector(ids + i + 4 * j);
    float near[N] = {};
    if constexpr (STATISTICS & SQDISTS) {
#pragma unroll
      for (int j = 0; j < N; j += 4) {
        const Vector<int> anchor_rows = load_vector(ids + 32 + i + j);
#pragma unroll
        for (int k = 0; k < 4; ++k) near[j + k] = anchors.at(anchor_rows.elements[k]);
      }
    }
    if (in_tables)
      scatter<2, true>(rows, x, near);
    else  // as many loads at once as registers allow without spills: they take long
      scatter<TABLES == 3 ? 2 : 8, false>(rows, x, near);
  }

  template <int AT_ONCE, bool IN_TABLES, int N>
  __device__ __forceinline__ void scatter(const Vector<int> (&rows)[N / 4], const float (&x)[N],
                                          const float (&near)[N]) const {
#pragma unroll
    for (int first = 0; first < N; first += AT_ONCE) {
      int ids[AT_ONCE];
      float values[AT_ONCE], residuals[AT_ONCE], squares[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        ids[i] = rows[(first + i) / 4].elements[(first + i) % 4];
        values[i] = x[first + i];
        residuals[i] = values[i] - near[first + i];
        squares[i] = residuals[i] * residuals[i];
      }
      const auto add = [&](int which, const float (&values)[AT_ONCE], const auto& in_global) {
        float* at[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          const bool here = IN_TABLES || ids[i] < partials.rows;
          float* const in_table = table(which) + (here ? ids[i] : 0) * CHANNELS;
          float* const elsewhere = in_global(here ? 0 : ids[i] - partials.rows);
          at[i] = here || !in_global.wanted ? in_table : elsewhere;
        }
        add_to_rows(at, ids, values);
      };
      if constexpr (STATISTICS & SUMS) add(0, values, GlobalRow{*this, partials.sums, inside()});
      if constexpr (STATISTICS & RESIDUALS)
        add(RESIDUALS_TABLE, residuals, GlobalRow{*this, partials.residuals, inside()});
      if constexpr (STATISTICS & SQDISTS) {
        if constexpr (!IN_TABLES) {
#pragma unroll
          for (int i = 0; i < AT_ONCE; ++i) {
            const float total = over_lanes(squares[i]);
            squares[i] = ids[i] < partials.rows ? squares[i] : total;
          }
        }
        add(SQDISTS_TABLE, squares, GlobalSqdist{*this, lane == 0});
      }
    }
  }

  // Where a key's partial lies in global memory, and whether this lane adds to it.
  struct GlobalRow {
    const TableSink& sink;
    float* matrix;
    bool wanted;
    __device__ __forceinline__ float* operator()(int key) const { return sink.global(matrix, key); }
  };
  struct GlobalSqdist {
    const TableSink& sink;
    bool wanted;
    __device__ __forceinline__ float* operator()(int key) const { return sink.global_sqdist(key); }
  };

  // The last key's totals, and the tables to global memory.
  __device__ void finish(int key, const Sums& sums) {
    add(key, find(key), sums);
    __syncwarp();
    for (int first = 0; first < num_keys; first += 32) {
      const int key = first + lane;
      const int row = key < num_keys ? row_of[key] : NOT_MET;
      if (block == 0 && key < num_keys)
        partials.met[int64_t{chunk} * num_keys + key] = row != NOT_MET;
      if constexpr (STATISTICS & SQDISTS) {
        if (row < IN_GLOBAL) {
          float total = 0;
          for (int i = 0; i < CHANNELS; ++i)  // each lane in a bank of its own
            total += table(SQDISTS_TABLE)[row * CHANNELS + (i + lane) % CHANNELS - lane];
          *global_sqdist(key) = total;
        }
      }
      if constexpr (matrices_of(STATISTICS) > 0) {
        unsigned here = __ballot_sync(FULL_WARP, row < IN_GLOBAL);
        while (here) {
          const int from = __ffs(static_cast<int>(here)) - 1;
          here &= here - 1;
          const int its_row = __shfl_sync(FULL_WARP, row, from) * CHANNELS;
          if (!inside()) continue;
          if constexpr (STATISTICS & SUMS) *global(partials.sums, first + from) = table(0)[its_row];
          if constexpr (STATISTICS & RESIDUALS)
            *global(partials.residuals, first + from) = table(RESIDUALS_TABLE)[its_row];
        }
      }
    }
  }
};

// The sums of sorted pixels. The first and the last key's of a chunk are its ends: neighbours may
// have more of these keys.
struct SortedSums {
  float* sums;            // float32 [num_keys, D]
  float* residuals;       // the same
  float* sqdists;         // float32 [blocks, num_keys]
  float* sums_ends;       // float32 [2·chunks, D]
  float* residuals_ends;  // the same
  float* sqdists_ends;    // float32 [2·chunks, blocks]
};

template <int STATISTICS>
struct SortedSink {
  using Output = SortedSums;

  const SortedSums out;
  const int chunk, block, blocks, num_keys, dim, lane = threadIdx.x;
  const int channel = block * CHANNELS + lane;
  bool first = true;  // whether no key of the chunk has been stored

  template <class T>
  __device__ SortedSink(const SortedSums& out, const Tiling& tiling, const Input<T>& input,
                        int block, int chunk, const unsigned char*)
      : out(out),
        chunk(chunk),
        block(block),
        blocks(tiling.blocks),
        num_keys(input.num_keys),
        dim(static_cast<int>(input.view.dim)) {}

  __device__ __forceinline__ int find(int) const { return 0; }

  __device__ __forceinline__ void add(int key, int, const Sums& sums) {
    store(key, sums, first, !first);
    first = false;
  }
  __device__ void finish(int key, const Sums& sums) const { store(key, sums, true, !first); }

  // To the end of the chunk that this key is, or to the output.
  __device__ __forceinline__ void store(int key, const Sums& sums, bool end, int which) const {
    if (key < 0) return;
    const int64_t edge = int64_t{2} * chunk + which, at = (end ? edge : key) * dim + channel;
    if (channel < dim) {
      if constexpr (STATISTICS & SUMS) (end ? out.sums_ends : out.sums)[at] = sums.sum;
      if constexpr (STATISTICS & RESIDUALS)
        (end ? out.residuals_ends : out.residuals)[at] = sums.residual;
    }
    if constexpr (STATISTICS & SQDISTS) {
      const float total = over_lanes(sums.sqdist);
      if (lane > 0) return;
      if (end)
        out.sqdists_ends[edge * blocks + block] = total;
      else
        out.sqdists[int64_t{block} * num_keys + key] = total;
    }
  }
};

template <int STATISTICS, bool SORTED>
using SinkOf = std::conditional_t<SORTED, SortedSink<STATISTICS>, TableSink<STATISTICS>>;

}  // namespace anchorops::cuda
