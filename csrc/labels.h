// Labels, keys and random groups, for all C++ backends.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace anchorops {

// Calls function with a value of the labels' type, which may be any integer type.
template <class Function>
void for_label_dtype(const char* operation, torch::headeronly::ScalarType dtype,
                     Function function) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Byte:
      return function(uint8_t{});
    case ScalarType::Char:
      return function(int8_t{});
    case ScalarType::Short:
      return function(int16_t{});
    case ScalarType::Int:
      return function(int32_t{});
    case ScalarType::Long:
      return function(int64_t{});
    case ScalarType::UInt16:
      return function(uint16_t{});
    case ScalarType::UInt32:
      return function(uint32_t{});
    case ScalarType::UInt64:
      return function(uint64_t{});
    default:
      STD_TORCH_CHECK(false, operation, ": labels: unexpected dtype");
  }
}

// Calls function with a value of the keys' type: int32, or a smaller one for classes alone.
template <class Function>
void for_key_dtype(const char* operation, torch::headeronly::ScalarType dtype, Function function) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Byte:
      return function(uint8_t{});
    case ScalarType::Short:
      return function(int16_t{});
    case ScalarType::Int:
      return function(int32_t{});
    default:
      STD_TORCH_CHECK(false, operation, ": keys: unexpected dtype");
  }
}

// The keys of all pixels are contiguous, because kernels read them consecutively.
inline void check_keys(const char* operation, const torch::stable::Tensor& keys, int64_t pixels) {
  STD_TORCH_CHECK(keys.is_contiguous() && keys.numel() == pixels, operation,
                  ": keys: expected a contiguous key for each of ", pixels, " pixels, got ",
                  keys.numel(), keys.is_contiguous() ? "" : ", not contiguous");
}

// A bijective 32-bit hash, as in anchorops/reference/split_groups.py.
constexpr uint32_t mix32(uint32_t x) {
  x = (x ^ x >> 16) * 0x21F0AAADu;
  x = (x ^ x >> 15) * 0x735A2D97u;
  return x ^ x >> 15;
}

// Random numbers of 32 bits: one for each pixel, all different.
struct PixelHash {
  uint32_t low, high;

  constexpr explicit PixelHash(int64_t seed)
      : low(mix32(static_cast<uint32_t>(seed))),
        high(mix32(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32))) {}

  constexpr uint32_t operator()(uint32_t pixel) const { return mix32(mix32(pixel ^ low) ^ high); }
};

// The bucket of a hash, floor(hash·count / 2^32), less than count. It increases with the hash, and
// `count` pixels are spread evenly over as many buckets.
constexpr uint32_t bucket_of(uint32_t hash, uint32_t count) {
  return static_cast<uint32_t>(uint64_t{hash} * count >> 32);
}

}  // namespace anchorops
