// Low-resolution logits, and which of them each label pixel reads: coordinates and weights of
// F.interpolate(mode="bilinear"). Terms of weight 0 are removed by selection, because 0 · NaN is
// NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../tensors.cuh"

namespace anchorops::cuda {

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

enum class Element : int { FLOAT, BFLOAT16, HALF };

inline Element element_of(const char* operation, const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Element::FLOAT;
    case ScalarType::BFloat16:
      return Element::BFLOAT16;
    case ScalarType::Half:
      return Element::HALF;
    default:
      STD_TORCH_CHECK(false, operation, ": logits: expected float32, bfloat16 or float16");
  }
}

// Calls function with a value of the elements' type. The type is the same for a whole launch, so a
// branch around a loop replaces a kernel for each type.
template <class Function>
__device__ __forceinline__ void for_element(Element element, Function function) {
  if (element == Element::BFLOAT16)
    function(BFloat16{});
  else if (element == Element::HALF)
    function(Half{});
  else
    function(float{});
}

// (B, K, h, w) by strides; logits to read, or their gradient to write.
struct Logits {
  void* data;
  Element element;
  int batch, num_classes, height, width;
  int64_t stride_b, stride_k, stride_h, stride_w;

  __device__ int64_t offset(int image, int row, int column) const {
    return image * stride_b + row * stride_h + column * stride_w;
  }
};

inline Logits logits_of(const char* operation, const Tensor& logits) {
  return {const_cast<void*>(logits.data_ptr()),
          element_of(operation, logits),
          static_cast<int>(logits.size(0)),
          static_cast<int>(logits.size(1)),
          static_cast<int>(logits.size(2)),
          static_cast<int>(logits.size(3)),
          logits.stride(0),
          logits.stride(1),
          logits.stride(2),
          logits.stride(3)};
}

// A cell contains the pixels between two neighbouring rows (or columns) of logits: cell i those
// between rows i and i + 1, cell -1 those before the first row, the last cell those after the last
// row. The first and the last cell read only one row.
struct Axis {
  int pixels, source;
  float ratio, inverse;  // source positions for each pixel, pixels for each position
  float middle;          // of a pixel: 0 with align_corners, otherwise ½

  Axis(int64_t pixels, int64_t source, bool align_corners)
      : pixels(static_cast<int>(pixels)),
        source(static_cast<int>(source)),
        ratio(static_cast<float>(align_corners
                                     ? static_cast<double>(source - 1) /
                                           static_cast<double>(std::max<int64_t>(pixels - 1, 1))
                                     : static_cast<double>(source) / static_cast<double>(pixels))),
        inverse(1 / ratio),
        middle(align_corners ? 0 : 0.5f) {}

  __host__ __device__ float at(int pixel) const {
    return product(static_cast<float>(pixel) + middle, ratio) - middle;
  }
  __host__ __device__ int cell_of(int pixel) const {
    const float place = at(pixel);
    return place < 0 ? -1 : min(static_cast<int>(place), source - 1);
  }
  // Weight of the second row of a cell that holds the pixel.
  __host__ __device__ float fraction(int cell, int pixel) const {
    const float between = cell < 0 ? 1 : min(at(pixel) - static_cast<float>(cell), 1.0f);
    return cell == source - 1 ? 0 : between;
  }
  // The first pixel of the cell.
  __host__ __device__ int first_pixel(int cell) const {
    if (cell >= source) return pixels;
    if (cell < 0 || ratio == 0) return 0;
    const float guess = (static_cast<float>(cell) + middle) * inverse - middle;
    int pixel = static_cast<int>(min(max(guess, 0.0f), static_cast<float>(pixels)));
    pixel = min(pixel, pixels);
    while (pixel > 0 && cell_of(pixel - 1) >= cell) --pixel;
    while (pixel < pixels && cell_of(pixel) < cell) ++pixel;
    return pixel;
  }
  // The pixels of the largest cell.
  int pixels_per_cell() const {
    int exponent;
    if (std::frexp(ratio, &exponent) == 0.5f)  // a power of two: coordinates are exact
      return std::max(1, static_cast<int>(1 / ratio));
    int most = 0;
    for (int cell = -1, first = 0; cell < source; ++cell) {
      const int next = first_pixel(cell + 1);
      most = std::max(most, next - first);
      first = next;
    }
    return most;
  }
};

// p = e^(z − lse)
__device__ __forceinline__ float probability(float z, float lse) {
  return exp2_approximate((z - lse) * LOG2E);
}

__device__ __forceinline__ float interpolate(float a, float b, float weight) {
  const float between = fmaf(weight, b, (1 - weight) * a);
  return weight == 0 ? a : weight == 1 ? b : between;
}

// The logits z_k of one label pixel.
struct PixelLogits {
  const Logits& logits;
  int64_t top, bottom, left, right;  // offsets; if a weight is 0, the offset of its neighbour
  float weight_y, weight_x;

  __device__ PixelLogits(const Logits& logits, const Axis& rows, const Axis& columns, int image,
                         int y, int x)
      : logits(logits) {
    const int row = rows.cell_of(y), column = columns.cell_of(x);
    weight_y = rows.fraction(row, y);
    weight_x = columns.fraction(column, x);
    bottom = weight_y == 0 ? row : min(row + 1, logits.height - 1);
    top = weight_y == 1 ? bottom : row;
    right = weight_x == 0 ? column : min(column + 1, logits.width - 1);
    left = weight_x == 1 ? right : column;
    top = image * logits.stride_b + top * logits.stride_h;
    bottom = image * logits.stride_b + bottom * logits.stride_h;
    left *= logits.stride_w;
    right *= logits.stride_w;
  }
  // Loads all that it needs at once.
  __device__ float z(int k) const {
    const int64_t plane = k * logits.stride_k;
    float first, below, second, second_below;
    for_element(logits.element, [&](auto element) {
      const auto* x = static_cast<const decltype(element)*>(logits.data) + plane;
      first = static_cast<float>(x[top + left]);
      below = static_cast<float>(x[bottom + left]);
      second = static_cast<float>(x[top + right]);
      second_below = static_cast<float>(x[bottom + right]);
    });
    return interpolate(interpolate(first, below, weight_y),
                       interpolate(second, second_below, weight_y), weight_x);
  }
};

}  // namespace anchorops::cuda
