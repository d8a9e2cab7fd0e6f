// The operators anchorops::anchor_losses.cuda and anchor_losses_backward.cuda: SAR's losses of
// pixels and of anchors, from numbers of each class.
//
//   p2a = loss_weight·Σ q_k / max(D·Σ n_k, 1)    over the classes with an open gate
//   aux = aux_weight·Σ w_k c_k                   over the unsure anchors, exp(−c_k) ≤ tau
//   w_k = c_k / (Σ c_j + 1e-9), or 1 / max(their number, 1)
//
//   dq_k = dp2a·slopes[0, k],  dc_k = daux·slopes[1, k]; the forward pass computes the slopes
//
// One launch in each direction; the forward pass is a warp for each loss. Latency determines the
// time: predicted 5 µs forward and 3 µs backward for K = 150, with the launch, not measured.
#include "row_lanes.cuh"
#include "tensors.cuh"
#include "warps.cuh"

#include <cmath>

namespace anchorops::cuda {
namespace {

constexpr int THREADS = 256;  // of a block of the backward pass

struct Options {
  int64_t classes, dim;
  float loss_weight, aux_weight, tau;
  bool reweight, detach_weights;
};

__device__ bool is_unsure(float cross_entropy, float tau) { return expf(-cross_entropy) <= tau; }

__device__ void pixel_loss(const float* sqdists, const int64_t* counts, const bool* gate,
                           float* p2a, float* slopes, const Options& options, int lane) {
  float sqdist = 0;
  int64_t pixels = 0;
  struct OfClass {
    float sqdist;
    int64_t count;
    bool open;
  };
  for_lane(
      options.classes, [&](int64_t k) { return OfClass{sqdists[k], counts[k], !gate || gate[k]}; },
      [&](int64_t, OfClass of) {
        sqdist += of.open ? of.sqdist : 0;
        pixels += of.open ? of.count : 0;
      });
  const float size = static_cast<float>(max(options.dim * sum_of_warp(pixels), int64_t{1}));
  sqdist = sum_of_warp(sqdist);
  if (lane == 0) *p2a = options.loss_weight * (sqdist / size);
  const float slope = options.loss_weight / size;
  for_lane(
      options.classes, [&](int64_t k) { return !gate || gate[k]; },
      [&](int64_t k, bool open) { slopes[k] = open ? slope : 0; });
}

__device__ void anchor_loss(const bool* gate, const float* cross_entropies, float* aux, float* logs,
                            float* slopes, const Options& options, int lane) {
  float sum = 0, squares = 0;
  int number = 0, open = 0;
  struct OfClass {
    float loss;
    bool open;
  };
  for_lane(
      options.classes, [&](int64_t k) { return OfClass{cross_entropies[k], gate[k]}; },
      [&](int64_t, OfClass of) {
        const bool unsure = is_unsure(of.loss, options.tau);
        open += of.open;
        number += unsure;
        sum += unsure ? of.loss : 0;
        squares += unsure ? of.loss * of.loss : 0;
      });
  number = sum_of_warp(number);
  open = sum_of_warp(open);
  sum = sum_of_warp(sum);
  squares = sum_of_warp(squares);
  const float divisor = options.reweight ? sum + 1e-9f : static_cast<float>(max(number, 1));
  const float mean = (options.reweight ? squares : sum) / divisor;
  if (lane == 0) {
    *aux = options.aux_weight * mean;
    logs[0] = static_cast<float>(open) / static_cast<float>(options.classes);
    logs[1] = static_cast<float>(number);
  }
  for_lane(
      options.classes, [&](int64_t k) { return cross_entropies[k]; },
      [&](int64_t k, float loss) {
        float slope = 1;
        if (options.reweight) slope = options.detach_weights ? loss : 2 * loss - mean;
        slopes[k] = is_unsure(loss, options.tau) ? options.aux_weight * (slope / divisor) : 0;
      });
}

// Two warps: the first computes the loss of pixels, the second that of anchors.
__global__ void __launch_bounds__(64)
    anchor_losses_kernel(const float* sqdists,          // [classes]
                         const int64_t* counts,         // [classes]
                         const bool* gate,              // [classes], or null
                         const float* cross_entropies,  // [classes], or null
                         float* p2a,                    // []
                         float* aux,                    // []
                         float* logs,    // [2]: share of open gates, number of unsure anchors
                         float* slopes,  // [2, classes], or [1, classes] without cross_entropies
                         Options options) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32)
    pixel_loss(sqdists, counts, gate, p2a, slopes, options, lane);
  else
    anchor_loss(gate, cross_entropies, aux, logs, slopes + options.classes, options, lane);
}

__global__ void __launch_bounds__(THREADS)
    anchor_losses_backward_kernel(const float* dp2a,    // [], or null
                                  const float* daux,    // [], or null
                                  const float* slopes,  // [2, classes] or [1, classes]
                                  float* gradients,     // as slopes
                                  int64_t classes, int64_t size) {
  const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (i >= size) return;
  const float* gradient = i < classes ? dp2a : daux;
  gradients[i] = gradient ? *gradient * slopes[i] : 0;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> anchor_losses(Tensor sqdists, Tensor counts,
                                                         std::optional<Tensor> gate,
                                                         std::optional<Tensor> cross_entropies,
                                                         int64_t dim, double loss_weight,
                                                         double aux_weight, double tau,
                                                         bool reweight, bool detach_weights) {
  const OnDevice device(sqdists);
  const int64_t classes = sqdists.size(0), both = cross_entropies.has_value();
  const std::vector<int64_t> scalar, none = {0};
  Tensor p2a = new_empty(sqdists, scalar, ScalarType::Float);
  Tensor aux = new_empty(sqdists, both ? scalar : none, ScalarType::Float);
  Tensor logs = new_empty(sqdists, {2 * both}, ScalarType::Float);
  Tensor slopes = new_empty(sqdists, {1 + both, classes}, ScalarType::Float);
  const Options options = {.classes = classes,
                           .dim = dim,
                           .loss_weight = static_cast<float>(loss_weight),
                           .aux_weight = static_cast<float>(aux_weight),
                           .tau = static_cast<float>(tau),
                           .reweight = reweight,
                           .detach_weights = detach_weights};
  launch("anchor_losses_kernel", anchor_losses_kernel, 1, both ? 64 : 32, 0, device.stream,
         sqdists.const_data_ptr<float>(), counts.const_data_ptr<int64_t>(),
         optional_data<bool>(gate), optional_data<float>(cross_entropies),
         p2a.mutable_data_ptr<float>(), aux.mutable_data_ptr<float>(),
         logs.mutable_data_ptr<float>(), slopes.mutable_data_ptr<float>(), options);
  return {p2a, aux, logs, slopes};
}

Tensor anchor_losses_backward(std::optional<Tensor> dp2a, std::optional<Tensor> daux,
                              Tensor slopes) {
  const OnDevice device(slopes);
  Tensor gradients = new_empty(slopes, to_vector(slopes.sizes()), ScalarType::Float);
  const int64_t size = slopes.numel();
  launch("anchor_losses_backward_kernel", anchor_losses_backward_kernel,
         grid_of("anchor_losses_backward.cuda", ceil_div(size, int64_t{THREADS})), THREADS, 0,
         device.stream, optional_data<float>(dp2a), optional_data<float>(daux),
         slopes.const_data_ptr<float>(), gradients.mutable_data_ptr<float>(), slopes.size(1), size);
  return gradients;
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("anchor_losses.cuda", TORCH_BOX(&anchorops::cuda::anchor_losses));
  library.impl("anchor_losses_backward.cuda", TORCH_BOX(&anchorops::cuda::anchor_losses_backward));
}
