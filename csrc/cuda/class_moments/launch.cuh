// The launch of the pass over the features. Each dtype has a source file, so that the files are
// compiled at the same time.
#pragma once

#include "arguments.cuh"

namespace anchorops::cuda {

// The statistics of each chunk.
template <class T>
void launch_moments(int statistics, const Input<T>& input, const Tiling& tiling,
                    const Partials& partials, Stream stream);

}  // namespace anchorops::cuda
