#pragma once

#include <string>
#include <vector>

namespace anchorops {

// Rotates the numbers of each block of 64 by one position, by a kernel with this fault.
std::vector<float> rotate(const std::string& fault, const std::vector<float>& numbers);

}  // namespace anchorops
