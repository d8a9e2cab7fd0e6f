// Launches of the passes over the features. Each dtype has a source file, so that the files are
// compiled at the same time.
#pragma once

#include "class_moments_tiles.cuh"

namespace anchorops::cuda {

// Statistics of chunks.
template <class T>
void launch_moments(int statistics, const Input<T>& input, const Tiling& tiling,
                    const Partials& partials, Stream stream);

}  // namespace anchorops::cuda
