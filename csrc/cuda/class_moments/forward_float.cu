#include "instances.cuh"

namespace anchorops::cuda {

template void launch_moments(int, const Input<float>&, const Tiling&, const Partials&, Stream);

}  // namespace anchorops::cuda
