#include "class_moments_instances.cuh"

namespace anchorops::cuda {

template void launch_moments<BFloat16>(int, const Input<BFloat16>&, const Tiling&, const Partials&,
                                       Stream);

}  // namespace anchorops::cuda
