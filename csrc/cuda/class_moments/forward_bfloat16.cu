#include "instances.cuh"

namespace anchorops::cuda {

template void launch_moments(int, const Input<BFloat16>&, const Tiling&, const Partials&, Stream);

}  // namespace anchorops::cuda
