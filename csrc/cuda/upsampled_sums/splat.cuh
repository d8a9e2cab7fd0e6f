// The weights of the labels around a tile of features, for upsampling with align_corners=True:
// W[k, q] = Σ of the weights, at feature q, of the labels with key k.
//
// A tile is TILE_PIXELS consecutive features of a row. Each feature has SHARES threads of a block,
// which read the keys of the labels around it in turn, a row each, from memory once, otherwise from
// the caches. A key takes the next free slot in shared memory. A weight is summed in registers as
// long as the key is the same, and then in the thread's own column of the slot; at the end the
// columns of the SHARES threads are added. The keys of a row are requested together, COLUMNS at a
// time, and the weights of these columns are computed once.
//
// The results have the same bits in each run. Which slot a key takes depends on the order of the
// threads; the weights do not, because each column is summed by one thread, and the columns of a
// feature are added in order. Slots are read in the order of their keys. If there are more keys
// than slots, it depends on the threads which keys have one: then no slot is read, and rounds of
// SLOTS consecutive keys follow.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "../../device.cuh"

namespace anchorops::cuda {

constexpr int TILE_PIXELS = 128;

// Positions of the rows (or columns) of labels among those of the features. The first and the last
// ones of both coincide.
struct LabelAxis {
  int labels, features;
  float step, labels_of_feature;  // 1 / step

  LabelAxis(int64_t labels, int64_t features)
      : labels(static_cast<int>(labels)), features(static_cast<int>(features)) {
    const bool several = labels > 1;
    step = several ? static_cast<float>(static_cast<double>(features - 1) /
                                        static_cast<double>(labels - 1))
                   : 0;
    labels_of_feature = step > 0 ? 1 / step : 0;
  }

  // label: a whole number.
  __device__ float position(float label) const { return product(label, step); }
  // 0 unless the feature is one of the label's two.
  __device__ float weight(float label, float feature) const {
    return fmaxf(1 - fabsf(position(label) - feature), 0);
  }
  // The first label whose position is at this feature or after it.
  __device__ int begin(int feature) const {
    if (feature <= 0) return 0;
    if (feature >= features || step == 0) return labels;
    const auto at = static_cast<float>(feature);
    int label = min(static_cast<int>(at * labels_of_feature), labels);
    while (label > 0 && position(static_cast<float>(label - 1)) >= at) --label;
    while (label < labels && position(static_cast<float>(label)) < at) ++label;
    return label;
  }
};

// The grids of features and labels.
struct Grids {
  LabelAxis rows, columns;

  __device__ int64_t labels() const { return int64_t{rows.labels} * columns.labels; }
};

// The weights of the labels in COUNT columns from `first` on, for a feature's column; 0 from `end`
// on.
template <int COUNT>
struct ColumnWeights {
  float of[COUNT], sum = 0;

  __device__ __forceinline__ ColumnWeights(const LabelAxis& columns, int first, int end,
                                           float feature) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float label = static_cast<float>(first) + static_cast<float>(i);
      of[i] = first + i < end ? columns.weight(label, feature) : 0;
      sum += of[i];
    }
  }
};

template <int THREADS>  // of a block
class Weights {
 public:
  static constexpr int SLOT_BITS = 4, SLOTS = 1 << SLOT_BITS;
  static constexpr int SHARES = THREADS / TILE_PIXELS;
  static constexpr int COLUMNS = 8;  // around a feature, with four times as many labels

  static constexpr size_t BYTES = sizeof(float) * SLOTS * THREADS + sizeof(int) * (2 * SLOTS + 2);

  // memory: the next BYTES of shared memory, aligned to 16 bytes.
  __device__ explicit Weights(unsigned char* memory)
      : weights_(reinterpret_cast<float*>(memory)),
        slots_(reinterpret_cast<int*>(weights_ + SLOTS * THREADS)),
        sorted_(slots_ + SLOTS),
        block_(sorted_ + SLOTS),
        next_(block_ + 1) {}

  // Before the rounds of a tile.
  __device__ void begin() {
    if (threadIdx.x == 0) *next_ = ALL;
  }

  // The weights of the next keys of a tile: of the features in row y from column x on. keys: of the
  // labels of this image. Returns whether keys remain for a further round. The whole block calls
  // it.
  template <class Key>
  __device__ bool round(const Key* keys, const Grids& grids, int y, int x) {
    const auto thread = static_cast<int>(threadIdx.x);
    const int share = thread / TILE_PIXELS, pixel = thread % TILE_PIXELS;
    __syncthreads();
    for (int slot = 0; slot < SLOTS; ++slot) weights_[slot * THREADS + thread] = 0;
    if (thread < SLOTS) slots_[thread] = -1;
    if (thread == 0) {
      *block_ = *next_;
      *next_ = NONE;
    }
    __syncthreads();
    if (x + pixel < grids.columns.features) add_labels(keys, grids, y, x + pixel, share);
    __syncthreads();
    const int next = *next_;
    for (int slot = share; slot < SLOTS && slots_[slot] >= 0; slot += SHARES) {
      float* weight = weights_ + slot * THREADS + pixel;
#pragma unroll
      for (int other = 1; other < SHARES; ++other) *weight += weight[other * TILE_PIXELS];
    }
    if (thread < SLOTS) sort(*block_ == ALL && next < NONE);
    __syncthreads();
    return next < NONE;
  }

  // The keys of a round in ascending order, -1 after the last one.
  __device__ int key(int i) const { return i < SLOTS ? sorted_[i] >> SLOT_BITS : -1; }
  // The weights of the tile's features for this key.
  __device__ const float* of(int i) const { return weights_ + sorted_[i] % SLOTS * THREADS; }

 private:
  // Blocks of SLOTS consecutive keys. In the first round keys may have any block.
  static constexpr int ALL = -1, NONE = INT_MAX;

  // Adds the weights of the labels around feature (y, x), in the rows of this thread's share.
  template <class Key>
  __device__ __forceinline__ void add_labels(const Key* keys, const Grids& grids, int y, int x,
                                             int share) {
    constexpr int IGNORED = static_cast<Key>(-1);  // 255 in uint8
    int held = IGNORED;
    int place = -1;  // of the thread in this key's slot, -1 if it has none in this round
    float total = 0;
    const auto hold = [&](int key) {
      if (place >= 0) weights_[place] += total;
      held = key;
      place = key == IGNORED ? -1 : place_of(key);
      total = 0;
    };
    const int first_row = grids.rows.begin(y - 1) + share, end_row = grids.rows.begin(y + 1);
    const int end = grids.columns.begin(x + 1);
    const auto at = static_cast<float>(x), at_row = static_cast<float>(y);
    for (int first = grids.columns.begin(x - 1); first < end; first += COLUMNS) {
      const ColumnWeights<COLUMNS> columns(grids.columns, first, end, at);
      const Key* line = keys + int64_t{first_row} * grids.columns.labels + first;
      for (int row = first_row; row < end_row;
           row += SHARES, line += int64_t{SHARES} * grids.columns.labels) {
        const float of_row = grids.rows.weight(static_cast<float>(row), at_row);
        int of_labels[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i)
          of_labels[i] = i == 0 || columns.of[i] > 0 ? line[i] : IGNORED;
        if (of_labels[0] != held) hold(of_labels[0]);
        bool same = true;
#pragma unroll
        for (int i = 1; i < COLUMNS; ++i) same &= of_labels[i] == held || columns.of[i] == 0;
        if (same) {
          total += of_row * columns.sum;
          continue;
        }
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          if (of_labels[i] != held && columns.of[i] > 0) hold(of_labels[i]);
          total += of_row * columns.of[i];
        }
      }
    }
    if (place >= 0) weights_[place] += total;
  }

  // The place of the thread's weight in the slot of this key; -1 if it belongs to another round.
  __device__ int place_of(int key) {
    const int block = key / SLOTS, now = *block_;
    if (now == ALL || now == block) {
#pragma unroll 1
      for (int slot = 0; slot < SLOTS; ++slot) {
        const int before = atomicCAS(slots_ + slot, -1, key);
        if (before == -1 || before == key) return slot * THREADS + threadIdx.x;
      }
    }
    if (block > now) atomicMin(next_, now == ALL ? 0 : block);
    return -1;
  }

  // One thread for each slot. Slots in use precede free ones.
  __device__ void sort(bool none) {
    const auto slot = static_cast<int>(threadIdx.x);
    const int key = slots_[slot];
    int before = 0;
#pragma unroll 1
    for (int other = 0; other < SLOTS && slots_[other] >= 0; ++other) before += slots_[other] < key;
    if (none || key < 0)
      sorted_[slot] = -1;
    else
      sorted_[before] = key << SLOT_BITS | slot;
  }

  float* weights_;  // [SLOTS, SHARES, TILE_PIXELS]
  int* slots_;      // [SLOTS]: keys, -1 if free
  int* sorted_;     // [SLOTS]: the same in the order of their keys, each with its slot
  int* block_;      // of this round
  int* next_;       // of the next one
};

}  // namespace anchorops::cuda
