// The weights of the labels around a tile of features, for upsampling with align_corners=True:
// W[k, q] = Σ of the weights, at feature q, of the labels with key k.
//
// A tile is 128 consecutive features of a row, one for each thread of a block. A thread reads the
// keys of the labels around its feature, from memory once, otherwise from the caches. The keys get
// slots in shared memory, in any order. A weight is summed in registers as long as the key is the
// same, and then in the thread's own column of the slot. The keys of a row are requested together,
// COLUMNS at a time, and the weights of these columns are computed once. If there are more keys
// than slots, the remaining ones follow in further rounds.
#pragma once

#include "tensors.cuh"

namespace anchorops::cuda {

// Positions of the rows (or columns) of labels among those of the features. The first and the last
// ones of both coincide.
struct LabelAxis {
  int labels, features;
  float step;

  LabelAxis(int64_t labels, int64_t features)
      : labels(static_cast<int>(labels)),
        features(static_cast<int>(features)),
        step(labels > 1 ? static_cast<float>(static_cast<double>(features - 1) /
                                             static_cast<double>(labels - 1))
                        : 0) {}

  __device__ float position(int label) const { return product(static_cast<float>(label), step); }
  __device__ int upper(int label) const {
    return min(static_cast<int>(position(label)), features - 1);
  }
  // The weight of the feature, which is the upper one of the label's two features or the lower one.
  __device__ float weight(int label, int feature) const {
    const int up = upper(label);
    const float below = up < features - 1 ? position(label) - static_cast<float>(up) : 0;
    return up == feature ? 1 - below : below;
  }
  // The first label whose upper feature is this one or a later one.
  __device__ int begin(int feature) const {
    if (feature <= 0) return 0;
    if (feature >= features || step == 0) return labels;
    int label = min(static_cast<int>(static_cast<float>(feature) / step), labels);
    while (label > 0 && upper(label - 1) >= feature) --label;
    while (label < labels && upper(label) < feature) ++label;
    return label;
  }
};

// The grids of features and labels.
struct Grids {
  LabelAxis rows, columns;

  __device__ int64_t labels() const { return int64_t{rows.labels} * columns.labels; }
  __host__ __device__ int row_tiles(int pixels) const { return ceil_div(columns.features, pixels); }
};

class Weights {
 public:
  static constexpr int PIXELS = 128, SLOTS = 32;
  static constexpr int COLUMNS = 8;  // around a feature, with four times as many labels

  static size_t bytes(int64_t num_classes) {
    return sizeof(float) * SLOTS * PIXELS + sizeof(int) * (SLOTS + 4 + ceil_div(num_classes, 32));
  }

  // memory: the next bytes(num_classes) of shared memory, aligned to 16 bytes.
  __device__ Weights(unsigned char* memory, int num_classes)
      : weights_(reinterpret_cast<float*>(memory)),
        slots_(reinterpret_cast<int*>(weights_ + SLOTS * PIXELS)),
        more_(slots_ + SLOTS),
        done_(reinterpret_cast<unsigned*>(more_ + 4)),
        words_(ceil_div(num_classes, 32)) {}

  // The weights of the first keys of a tile: of the block's features in row y from column x on.
  // keys: of the labels of this image. Returns whether keys remain for next_round. The whole block
  // calls it.
  template <class Key>
  __device__ bool first_round(const Key* keys, const Grids& grids, int y, int x) {
    __syncthreads();
    for (int word = threadIdx.x; word < words_; word += PIXELS) done_[word] = 0;
    return round(keys, grids, y, x);
  }

  template <class Key>
  __device__ bool next_round(const Key* keys, const Grids& grids, int y, int x) {
    __syncthreads();
    if (threadIdx.x == 0)
      for (int slot = 0; slot < SLOTS; ++slot) {
        const int key = slots_[slot];
        done_[key / 32] |= 1u << key % 32;
      }
    return round(keys, grids, y, x);
  }

  // The key of a slot, -1 after the last one.
  __device__ int key(int slot) const { return slot < SLOTS ? slots_[slot] : -1; }
  // The weights of the tile's features for this key.
  __device__ const float* of(int slot) const { return weights_ + slot * PIXELS; }

 private:
  template <class Key>
  __device__ bool round(const Key* keys, const Grids& grids, int y, int x) {
    __syncthreads();
    const auto thread = static_cast<int>(threadIdx.x);
    if (thread < SLOTS) slots_[thread] = -1;
    if (thread == 0) *more_ = 0;
    for (int slot = 0; slot < SLOTS; ++slot) weights_[slot * PIXELS + thread] = 0;
    __syncthreads();
    x += thread;
    if (x < grids.columns.features) {
      constexpr int IGNORED = static_cast<Key>(-1);  // 255 in uint8
      int held = IGNORED;
      float* weight = nullptr;
      float total = 0;
      const int end_row = grids.rows.begin(y + 1);
      const int first_row = grids.rows.begin(y - 1), last = grids.columns.begin(x + 1);
      for (int first = grids.columns.begin(x - 1); first < last; first += COLUMNS) {
        float of_column[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i)
          of_column[i] = first + i < last ? grids.columns.weight(first + i, x) : 0;
        const Key* line = keys + int64_t{first_row} * grids.columns.labels + first;
        for (int row = first_row; row < end_row; ++row, line += grids.columns.labels) {
          const float of_row = grids.rows.weight(row, y);
          Key of_labels[COLUMNS];
#pragma unroll
          for (int i = 0; i < COLUMNS; ++i) of_labels[i] = first + i < last ? line[i] : 0;
#pragma unroll
          for (int i = 0; i < COLUMNS; ++i) {
            const int key = first + i < last ? of_labels[i] : held;
            if (key != held) {
              if (weight) *weight += total;
              held = key;
              weight = key == IGNORED ? nullptr : weight_of(key);
              total = 0;
            }
            total += of_row * of_column[i];
          }
        }
      }
      if (weight) *weight += total;
    }
    __syncthreads();
    return *more_;
  }

  // The thread's weight in the slot of this key; null if it belongs to another round.
  __device__ float* weight_of(int key) {
    if (done_[key / 32] >> key % 32 & 1) return nullptr;
#pragma unroll 1
    for (int slot = 0; slot < SLOTS; ++slot) {
      const int before = atomicCAS(slots_ + slot, -1, key);
      if (before == -1 || before == key) return weights_ + slot * PIXELS + threadIdx.x;
    }
    atomicExch(more_, 1);
    return nullptr;
  }

  float* weights_;  // [SLOTS, PIXELS]
  int* slots_;      // [SLOTS]: keys, -1 if free
  int* more_;
  unsigned* done_;  // a bit for each key that an earlier round had
  int words_;
};

}  // namespace anchorops::cuda
