// The flags of softmax moments: those of Options in anchorops/_moments.py, in its order.
#pragma once

#include <cstdint>

namespace anchorops {

enum SoftmaxFlag : int64_t {
  ALIGN_CORNERS = 1 << 0,
  PER_IMAGE = 1 << 1,
  WITH_HITS = 1 << 2,
  WITH_MASSES = 1 << 3,
  WITH_SQUARES = 1 << 4,
  WITH_PIXEL_LOSSES = 1 << 5,
  WITH_LSE = 1 << 6,
  WITH_OUTSIDE = 1 << 7,
};

}  // namespace anchorops
