// Centroid InfoNCE on the CPU: the declaration of the vector kernel (centroid_info_nce_kernel.h,
// compiled once per instruction set) for the operators (centroid_info_nce.cpp).
#pragma once

#include "types.h"

namespace anchorops::cpu {

// Replaces the products x [K] of a row by the slopes of its loss in the logits x/τ, that of its own
// key by the slope in `own`, the logit of its positive. counted [K] is 0 where a key is not in the
// denominator. Returns the loss.
IN_EVERY_INSTRUCTION_SET(template <class Stat>
                         Stat loss_of_row(Stat* x, const Stat* counted, int64_t num_classes,
                                          int64_t own_key, Stat own, Stat temperature);)

}  // namespace anchorops::cpu
