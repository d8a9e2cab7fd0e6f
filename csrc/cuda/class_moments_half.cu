#include "class_moments_instances.cuh"

namespace anchorops::cuda {

template void launch_moments<Half>(int, const Input<Half>&, const Tiling&, const Partials&, Stream);

}  // namespace anchorops::cuda
