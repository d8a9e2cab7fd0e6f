#include "class_moments_instances.cuh"

namespace anchorops::cuda {

template void launch_moments<float>(int, const Input<float>&, const Tiling&, const Partials&,
                                    Stream);

}  // namespace anchorops::cuda
