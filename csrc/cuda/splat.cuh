// The weights of the labels around a tile of features, for upsampling with align_corners=True:
// W[k, q] = Σ of the weights, at feature q, of the labels with key k.
//
// A tile is 128 consecutive features of a row. Each feature has PARTS threads of a block, which
// read the keys of the labels around it in turn, a row each, from memory once, otherwise from the
// caches. The keys get slots in shared memory, in any order. A weight is summed in registers as
// long as the key is the same, and then in the thread's own column of the slot; at the end the
// columns of the parts are added. The keys of a row are requested together, COLUMNS at a time, and
// the weights of these columns are computed once. If there are more keys than slots, the remaining
// ones follow in further rounds.
#pragma once

#include "tensors.cuh"

namespace anchorops::cuda {

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
  __host__ __device__ int row_tiles(int pixels) const { return ceil_div(columns.features, pixels); }
};

template <int THREADS>  // of a block
class Weights {
 public:
  static constexpr int PIXELS = 128, SLOTS = 16;
  static constexpr int PARTS = THREADS / PIXELS;
  static constexpr int COLUMNS = 8;  // around a feature, with four times as many labels

  static size_t bytes(int64_t num_classes) {
    return sizeof(float) * SLOTS * THREADS + sizeof(int) * (SLOTS + 4 + ceil_div(num_classes, 32));
  }

  // memory: the next bytes(num_classes) of shared memory, aligned to 16 bytes.
  __device__ Weights(unsigned char* memory, int num_classes)
      : weights_(reinterpret_cast<float*>(memory)),
        slots_(reinterpret_cast<int*>(weights_ + SLOTS * THREADS)),
        more_(slots_ + SLOTS),
        done_(reinterpret_cast<unsigned*>(more_ + 4)),
        words_(ceil_div(num_classes, 32)) {}

  // Before the rounds of a tile. The whole block calls it.
  __device__ void begin() {
    __syncthreads();
    for (int word = threadIdx.x; word < words_; word += THREADS) done_[word] = 0;
    if (threadIdx.x < SLOTS) slots_[threadIdx.x] = -1;
  }

  // The weights of the next keys of a tile: of the features in row y from column x on. keys: of the
  // labels of this image. Returns whether keys remain for a further round. The whole block calls
  // it.
  template <class Key>
  __device__ bool round(const Key* keys, const Grids& grids, int y, int x) {
    mark_done();
    const auto thread = static_cast<int>(threadIdx.x);
    const int part = thread / PIXELS, pixel = thread % PIXELS;
    for (int slot = 0; slot < SLOTS; ++slot) weights_[slot * THREADS + thread] = 0;
    __syncthreads();
    x += pixel;
    if (x < grids.columns.features) {
      constexpr int IGNORED = static_cast<Key>(-1);  // 255 in uint8
      int held = IGNORED;
      float* weight = nullptr;
      float total = 0;
      const auto hold = [&](int key) {
        if (weight) *weight += total;
        held = key;
        weight = key == IGNORED ? nullptr : weight_of(key);
        total = 0;
      };
      const int first_row = grids.rows.begin(y - 1) + part, end_row = grids.rows.begin(y + 1);
      const int last = grids.columns.begin(x + 1);
      const auto at = static_cast<float>(x), at_row = static_cast<float>(y);
      for (int first = grids.columns.begin(x - 1); first < last; first += COLUMNS) {
        float of_column[COLUMNS], of_columns = 0;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          const float label = static_cast<float>(first) + static_cast<float>(i);
          of_column[i] = first + i < last ? grids.columns.weight(label, at) : 0;
          of_columns += of_column[i];
        }
        const Key* line = keys + int64_t{first_row} * grids.columns.labels + first;
        for (int row = first_row; row < end_row;
             row += PARTS, line += int64_t{PARTS} * grids.columns.labels) {
          const float of_row = grids.rows.weight(static_cast<float>(row), at_row);
          int of_labels[COLUMNS];
#pragma unroll
          for (int i = 0; i < COLUMNS; ++i) of_labels[i] = line[min(i, last - 1 - first)];
          if (of_labels[0] != held) hold(of_labels[0]);
          bool same = true;
#pragma unroll
          for (int i = 1; i < COLUMNS; ++i) same &= of_labels[i] == held;
          if (same) {
            total += of_row * of_columns;
            continue;
          }
#pragma unroll
          for (int i = 0; i < COLUMNS; ++i) {
            if (of_labels[i] != held) hold(of_labels[i]);
            total += of_row * of_column[i];
          }
        }
      }
      if (weight) *weight += total;
    }
    __syncthreads();
    for (int slot = part; key(slot) >= 0; slot += PARTS) {
      float* weight = weights_ + slot * THREADS + pixel;
#pragma unroll
      for (int other = 1; other < PARTS; ++other) *weight += weight[other * PIXELS];
    }
    __syncthreads();
    return *more_;
  }

  // The key of a slot, -1 after the last one.
  __device__ int key(int slot) const { return slot < SLOTS ? slots_[slot] : -1; }
  // The weights of the tile's features for this key.
  __device__ const float* of(int slot) const { return weights_ + slot * THREADS; }

 private:
  // Frees the slots of the round before.
  __device__ void mark_done() {
    __syncthreads();
    if (threadIdx.x == 0) *more_ = 0;
    if (threadIdx.x >= SLOTS) return;
    const int key = slots_[threadIdx.x];
    if (key >= 0) atomicOr(done_ + key / 32, 1u << key % 32);
    slots_[threadIdx.x] = -1;
  }

  // The thread's weight in the slot of this key; null if it belongs to another round.
  __device__ float* weight_of(int key) {
    if (done_[key / 32] >> key % 32 & 1) return nullptr;
#pragma unroll 1
    for (int slot = 0; slot < SLOTS; ++slot) {
      const int before = atomicCAS(slots_ + slot, -1, key);
      if (before == -1 || before == key) return weights_ + slot * THREADS + threadIdx.x;
    }
    atomicExch(more_, 1);
    return nullptr;
  }

  float* weights_;  // [SLOTS, PARTS, PIXELS]
  int* slots_;      // [SLOTS]: keys, -1 if free
  int* more_;
  unsigned* done_;  // a bit for each key that an earlier round had
  int words_;
};

}  // namespace anchorops::cuda
