// The operator anchorops::split_groups.cpu: each key's pixels are divided at random into groups of
// equal size (±1), by the rank of a pixel's hash among the hashes of its key.
//
// Nothing is sorted. The n pixels of a key are divided among n buckets by their hashes, in
// ascending order, so a bucket has one pixel on average. The rank of a pixel is the number of
// pixels in the buckets before its own, plus the number of smaller hashes in its own bucket.
#include <torch/csrc/stable/library.h>

#include "../labels.h"
#include "operators.h"

namespace anchorops::cpu {
namespace {

// counts [num_keys]; starts [num_keys]: the number of pixels with smaller keys.
void write_groups(const int32_t* keys, const int64_t* counts, const int64_t* starts,
                  const PixelHash& hash, int64_t pixels, int64_t buckets, int64_t groups,
                  int32_t* split) {
  std::vector<uint32_t> first(buckets), next(pixels);  // lists of pixels + 1; 0 is their end
  for (int64_t p = 0; p < pixels; ++p) {
    const int32_t key = keys[p];
    split[p] = -1;
    if (key < 0) continue;
    const auto pixel = static_cast<uint32_t>(p);
    uint32_t& head =
        first[starts[key] + bucket_of(hash(pixel), static_cast<uint32_t>(counts[key]))];
    next[p] = std::exchange(head, pixel + 1);
  }
  int64_t before = 0;
  for (const uint32_t head : first) {
    const int64_t in_buckets_before = before;
    for (uint32_t a = head; a; a = next[a - 1], ++before) {
      int64_t rank = in_buckets_before - starts[keys[a - 1]];
      for (uint32_t b = head; b; b = next[b - 1]) rank += hash(b - 1) < hash(a - 1);
      split[a - 1] = static_cast<int32_t>(keys[a - 1] * groups + rank % groups);
    }
  }
}

std::tuple<Tensor, Tensor> split_groups(Tensor keys, Tensor counts, Tensor seed, int64_t groups) {
  const int64_t pixels = keys.numel(), num_keys = counts.numel();
  check_keys("split_groups.cpu", keys, pixels);
  STD_TORCH_CHECK(pixels < int64_t{1} << 32, "split_groups.cpu: keys: more than 2^32 pixels");
  std::vector<int64_t> shape(counts.sizes().begin(), counts.sizes().end());
  shape.push_back(groups);
  Tensor split = new_empty({keys.sizes().begin(), keys.sizes().end()}, ScalarType::Int);
  Tensor group_counts = new_empty(shape, ScalarType::Long);

  const auto* key_counts = counts.const_data_ptr<int64_t>();
  auto* out = group_counts.mutable_data_ptr<int64_t>();
  std::vector<int64_t> starts(num_keys + 1);
  for (int64_t k = 0; k < num_keys; ++k) {
    starts[k + 1] = starts[k] + key_counts[k];
    for (int64_t g = 0; g < groups; ++g) *out++ = (key_counts[k] - g + groups - 1) / groups;
  }
  write_groups(keys.const_data_ptr<int32_t>(), key_counts, starts.data(),
               PixelHash(*seed.const_data_ptr<int64_t>()), pixels, starts[num_keys], groups,
               split.mutable_data_ptr<int32_t>());
  return {split, group_counts};
}

}  // namespace
}  // namespace anchorops::cpu

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  library.impl("split_groups.cpu", TORCH_BOX(&anchorops::cpu::split_groups));
}
