// The operator anchorops::softmax_moments.cuda: statistics of the softmax of upsampled logits.
//
// Launches: class keys (class_keys.cu), the shifts of positions (softmax_cells.cu), the lse of each
// pixel, its loss, and the sum of the partials of losses. With masses or squares: another pass over
// the logits, and a sum. With hits: pixel_argmax.cu, and a count. Memory in addition to the
// results: lse and keys, 8 bytes a pixel; shifts, 8 bytes a position; partials.
//
// In a pass over the logits a thread has 16 sums and the four corners of a cell in registers. A
// block of 8 warps has 8 rows of 32 cells, and 42 KB of shared memory. Registers permit 16 warps on
// a multiprocessor. Instructions determine the time: `make cuda-report` prints those for each cell
// and class, and the predicted times. bench/NOTES.md has both.
#include "class_keys.cuh"
#include "pixel_argmax.cuh"
#include "softmax_cells.cuh"

namespace anchorops::cuda {
namespace {

constexpr int CLASSES = 32;
constexpr unsigned ALL_WARPS = WARPS * 32;

__global__ void __launch_bounds__(ALL_WARPS, 2) softmax_lse_kernel(Cells cells,
                                                                   float* lse) {  // [B, H, W]
  Cell cell(cells);
  float sums[TILE][TILE] = {};
  if (cells.geometric) {
    LogitsStage<CLASSES> stage(cells);
    cell.set_corners(cells, stage);
    stage.for_classes([&](int, int count) {
#pragma unroll 2
      for (int k = 0; k < count; ++k)
        for_pixels(cell.powers(k * COLUMNS), [&](int i, int j, float e) { sums[i][j] += e; });
    });
  }
  unsigned apart = 0;  // pixels that are computed one by one
#pragma unroll
  for (int i = 0; i < TILE; ++i) {
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
      if (i >= cell.ny || j >= cell.nx) continue;
      const float weight_y = cell.weight_y(cells, i), weight_x = cell.weight_x(cells, j);
      const float log_sum = log2f(sums[i][j]);
      if (cell.is_regular(weight_y, weight_x) && log_sum >= SMALLEST_SUM + SCALE)
        lse[cell.pixel(cells, i, j)] = (log_sum + cell.largest(cells, weight_y, weight_x)) * LN2;
      else
        apart |= 1u << (i * TILE + j);
    }
  }
  for (; apart; apart &= apart - 1) {
    const int pixel = __ffs(apart) - 1, i = pixel / TILE, j = pixel % TILE;
    lse[cell.pixel(cells, i, j)] = log_sum_exp(cell.logits(cells, i, j), cells.logits.num_classes);
  }
}

// Sums over pixels for each class, in a block of one warp.
struct ByClass {
  float* sums;  // shared, [num_classes] for each statistic
  int num_classes, statistics;

  // label: -1 if ignored. All lanes must call it.
  __device__ void add(int label, const float (&values)[2]) const {
    unsigned left = __ballot_sync(FULL_WARP, label >= 0);
    while (left) {
      const int k = __shfl_sync(FULL_WARP, label, __ffs(left) - 1);
      left &= ~__ballot_sync(FULL_WARP, label == k);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (s >= statistics) break;
        float sum = label == k ? values[s] : 0;
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
        if (threadIdx.x == 0) sums[s * num_classes + k] += sum;
      }
    }
  }
};

// How the pixels and the classes are divided among the blocks of pixel_losses_kernel.
struct PixelBlocks {
  int per_image, pixels, classes;
};

// A block processes a range of an image's pixels, for its share of the classes.
__global__ void __launch_bounds__(32, 32)
    pixel_losses_kernel(Logits logits, Axis rows, Axis columns,
                        const int32_t* keys,  // [B, H·W]
                        float* lse,           // [B, H·W], 0 on return where ignored
                        float* pixel_losses,  // [B, H·W] or null
                        float* partials,      // [statistics][B · blocks.per_image][K]
                        int statistics,       // losses, overlaps
                        bool keys_by_image, PixelBlocks blocks) {
  constexpr int UNROLL = 4;
  const int lane = threadIdx.x, first_class = static_cast<int>(blockIdx.y) * blocks.classes;
  const int num_classes = min(blocks.classes, logits.num_classes - first_class);
  const int image = blockIdx.x / blocks.per_image;
  const int64_t pixels = int64_t{rows.pixels} * columns.pixels;
  const int64_t first = blockIdx.x % blocks.per_image * int64_t{blocks.pixels};
  const int64_t end = min(first + blocks.pixels, pixels);
  const ByClass by_class{reinterpret_cast<float*>(shared_memory()), num_classes, statistics};
  for (int i = lane; i < statistics * num_classes; i += 32) by_class.sums[i] = 0;
  __syncwarp();
  keys += image * pixels;
  lse += image * pixels;
  if (pixel_losses) pixel_losses += image * pixels;
  const int first_key = first_class + (keys_by_image ? image * logits.num_classes : 0);

  int y = static_cast<int>((first + lane) / columns.pixels);
  int x = static_cast<int>((first + lane) % columns.pixels);
  const int step_y = 32 / columns.pixels, step_x = 32 % columns.pixels;
  for (int64_t start = first; start < end; start += 32 * UNROLL) {
    int labels[UNROLL];
    bool ignored[UNROLL];
    float log_sums[UNROLL], values[UNROLL][2];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t pixel = start + u * 32 + lane;
      const int key = pixel < end ? keys[pixel] : -1;
      const bool ours = key >= first_key && key < first_key + num_classes;
      labels[u] = ours ? key - first_key : -1;
      log_sums[u] = ours ? lse[pixel] : 0;
      ignored[u] = key < 0 && pixel < end && blockIdx.y == 0;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t pixel = start + u * 32 + lane;
      values[u][0] = values[u][1] = 0;
      if (labels[u] >= 0) {
        const PixelLogits pixel_logits(logits, rows, columns, image, y, x);
        const float loss = log_sums[u] - pixel_logits.z(first_class + labels[u]);
        values[u][0] = loss < 0 ? 0 : loss;  // negative by rounding; NaN remains
        if (statistics > 1) values[u][1] = exp2_approximate(-values[u][0] * LOG2E);
      }
      if (ignored[u]) lse[pixel] = 0;
      if (pixel_losses && (ignored[u] || labels[u] >= 0)) pixel_losses[pixel] = values[u][0];
      y += step_y;
      x += step_x;
      if (x >= columns.pixels) x -= columns.pixels, ++y;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) by_class.add(labels[u], values[u]);
  }
  __syncwarp();
  for (int i = lane; i < statistics * num_classes; i += 32)
    partials[(int64_t{i / num_classes} * gridDim.x + blockIdx.x) * logits.num_classes +
             first_class + i % num_classes] = by_class.sums[i];
}

// p of the pixels of a cell that are computed one by one, without a geometric sequence.
struct PixelsApart {
  const Cells& cells;
  const Cell& cell;
  const float* lse;

  __device__ void add(unsigned pixels, int k, float& mass, float& square) const {
    for (; pixels; pixels &= pixels - 1) {
      const int pixel = __ffs(pixels) - 1, i = pixel / TILE, j = pixel % TILE;
      const float log_p = cell.logits(cells, i, j).z(k) - lse[cell.pixel(cells, i, j)];
      const float p = exp2_approximate(log_p * LOG2E);
      mass += p;
      square += p * p;
    }
  }
};

// Sums of p and p² for each class, over the pixels of each block.
template <bool SQUARES>
__global__ void __launch_bounds__(ALL_WARPS, 2)
    softmax_masses_kernel(Cells cells,
                          const int32_t* keys,  // [B, H, W]
                          const float* lse,     // [B, H, W]
                          float* partials) {    // [1 + SQUARES][blocks][K]
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_classes = cells.logits.num_classes;
  // The order of partials: blocks are numbered downwards first, so that those of an image are
  // consecutive.
  const unsigned across = cells.blocks_across(), down = gridDim.x / across;
  const int64_t block = blockIdx.x % across * int64_t{down} + blockIdx.x / across;
  Cell cell(cells);
  LogitsStage<CLASSES> stage(cells);
  cell.set_corners(cells, stage);
  float* sums = stage.end();  // [1 + SQUARES][warps][CLASSES]

  float inverse[TILE][TILE] = {};  // 2^-SCALE/Σ e^z
  unsigned apart = 0;
#pragma unroll
  for (int i = 0; i < TILE; ++i) {
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
      if (i >= cell.ny || j >= cell.nx) continue;
      const int64_t pixel = cell.pixel(cells, i, j);
      if (keys[pixel] < 0) continue;
      if (!cell.inverse_sum(cells, i, j, lse[pixel], inverse[i][j])) apart |= 1u << (i * TILE + j);
    }
  }
  const PixelsApart pixels_apart{cells, cell, lse};
  stage.for_classes([&](int first, int count) {
    for (int k = 0; k < count; ++k) {
      float mass = 0, square = 0;
      if (cells.geometric) {
        const Powers powers = cell.powers(k * COLUMNS);
        if constexpr (SQUARES) {
          for_pixels(powers, [&](int i, int j, float e) {
            const float p = e * inverse[i][j];
            mass += p;
            square = fmaf(p, p, square);
          });
        } else {
          mass = sum_over_pixels(powers, inverse);
        }
      }
      if (apart) pixels_apart.add(apart, first + k, mass, square);
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        mass += __shfl_xor_sync(FULL_WARP, mass, lanes);
        if constexpr (SQUARES) square += __shfl_xor_sync(FULL_WARP, square, lanes);
      }
      if (lane == 0) {
        sums[warp * CLASSES + k] = mass;
        if constexpr (SQUARES) sums[(warps + warp) * CLASSES + k] = square;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (1 + SQUARES) * CLASSES; i += blockDim.x) {
      const int statistic = i / CLASSES, k = i % CLASSES;
      if (k >= count) continue;
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += sums[(statistic * warps + w) * CLASSES + k];
      partials[(int64_t{gridDim.x} * statistic + block) * num_classes + first + k] = sum;
    }
  });
}

constexpr int SUM_WARPS = 32;

struct Sums {
  float *first, *second;  // [images, K] of each statistic
};

// Sums partials [statistics][images][rows][K] over rows, in a fixed order. A block has 32 classes
// of one image and one statistic.
__global__ void __launch_bounds__(SUM_WARPS * 32)
    sum_partials_kernel(const float* partials, Sums out, int64_t rows, int num_classes) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned across = ceil_div(num_classes, 32), statistic = blockIdx.y;
  const int k = blockIdx.x % across * 32 + lane;
  const int64_t images = gridDim.x / across, image = blockIdx.x / across;
  auto* sums = reinterpret_cast<double*>(shared_memory());  // [SUM_WARPS, 32]
  double sum = 0;
  if (k < num_classes) {
    partials += (statistic * images + image) * rows * num_classes + k;
#pragma unroll 4
    for (int64_t row = warp; row < rows; row += SUM_WARPS) sum += partials[row * num_classes];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || k >= num_classes) return;
  for (int w = 1; w < SUM_WARPS; ++w) sum += sums[w * 32 + lane];
  (statistic ? out.second : out.first)[image * num_classes + k] = static_cast<float>(sum);
}

void sum_partials(const Tensor& partials, Sums out, int statistics, int64_t images, int num_classes,
                  Stream stream) {
  const int64_t rows = partials.numel() / (statistics * images * num_classes);
  dim3 grid = grid_of("sum_partials_kernel", images * ceil_div(num_classes, 32));
  grid.y = statistics;
  launch("sum_partials_kernel", sum_partials_kernel, grid, SUM_WARPS * 32,
         SUM_WARPS * 32 * sizeof(double), stream, partials.const_data_ptr<float>(), out, rows,
         num_classes);
}

// The largest size of all partials, and of a block's sums; the number of warps that fill a device.
constexpr int64_t PARTIAL_BYTES = 16 << 20, TABLE_BYTES = 64 << 10, DEVICE_WARPS = 4096;

float* data_or_null(const Tensor& tensor) {
  return tensor.numel() ? tensor.mutable_data_ptr<float>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> softmax_moments(
    Tensor logits, Tensor labels, int64_t ignore_index, bool align_corners, bool per_image,
    bool with_hits, bool with_masses, bool with_squares, bool with_pixel_losses, bool with_lse) {
  const OnDevice device(logits);
  const Stream stream = device.stream;
  const int64_t batch = logits.size(0), height = labels.size(1), width = labels.size(2);
  const int num_classes = static_cast<int>(logits.size(1));
  const int64_t images = per_image ? batch : 1;
  const auto by_class = [&](bool wanted, ScalarType dtype) {
    return new_empty(logits,
                     !wanted     ? std::vector<int64_t>{0}
                     : per_image ? std::vector<int64_t>{batch, num_classes}
                                 : std::vector<int64_t>{num_classes},
                     dtype);
  };
  const auto by_pixel = [&](bool wanted, ScalarType dtype) {
    return new_empty(logits,
                     wanted ? std::vector<int64_t>{batch, height, width} : std::vector<int64_t>{0},
                     dtype);
  };
  const Tensor losses = by_class(true, ScalarType::Float);
  const Tensor overlaps = by_class(with_masses, ScalarType::Float);
  const Tensor masses = by_class(with_masses, ScalarType::Float);
  const Tensor squares = by_class(with_squares, ScalarType::Float);
  const Tensor pixel_losses = by_pixel(with_pixel_losses, ScalarType::Float);
  const Tensor lse = by_pixel(true, ScalarType::Float);
  Tensor hits = by_class(with_hits, ScalarType::Long);
  const auto [keys, counts] =
      class_keys(labels, height, width, num_classes, per_image, ignore_index);
  const auto result = [&] {
    return std::tuple{losses,  overlaps,     masses,
                      squares, pixel_losses, with_lse ? lse : by_pixel(false, ScalarType::Float),
                      counts,  hits};
  };
  if (lse.numel() == 0) {
    for (const Tensor* each : {&losses, &overlaps, &masses, &squares})
      fill_zero(each->mutable_data_ptr<float>(), each->numel() * sizeof(float), stream);
    fill_zero(hits.mutable_data_ptr<int64_t>(), hits.numel() * sizeof(int64_t), stream);
    return result();
  }

  Cells cells(logits_of("softmax_moments.cuda", logits),
              Axis(height, logits.size(2), align_corners),
              Axis(width, logits.size(3), align_corners));
  const Tensor shifts = new_shifts(logits, cells, stream);
  const auto* keys_data = keys.const_data_ptr<int32_t>();
  auto* lse_data = lse.mutable_data_ptr<float>();
  launch_cells<LogitsStage<CLASSES>>("softmax_lse_kernel", softmax_lse_kernel, cells, 0, stream,
                                     lse_data);

  const int statistics = with_masses ? 2 : 1;
  const int64_t most = std::max<int64_t>(
      std::min(DEVICE_WARPS, PARTIAL_BYTES / (num_classes * statistics * 4)) / batch, 1);
  const int64_t pixels_per_block = std::max<int64_t>(ceil_div(height * width, most), 256);
  const int64_t blocks_per_image = ceil_div(height * width, pixels_per_block);
  const Tensor partials =
      new_empty(logits, {statistics, batch * blocks_per_image, num_classes}, ScalarType::Float);
  const int classes_per_block =
      std::min(num_classes, static_cast<int>(TABLE_BYTES / (statistics * sizeof(float))));
  dim3 grid = grid_of("pixel_losses_kernel", batch * blocks_per_image);
  grid.y = ceil_div(num_classes, classes_per_block);
  launch("pixel_losses_kernel", pixel_losses_kernel, grid, 32,
         statistics * classes_per_block * sizeof(float), stream, cells.logits, cells.rows,
         cells.columns, keys_data, lse_data, data_or_null(pixel_losses),
         partials.mutable_data_ptr<float>(), statistics, per_image,
         PixelBlocks{.per_image = static_cast<int>(blocks_per_image),
                     .pixels = static_cast<int>(pixels_per_block),
                     .classes = classes_per_block});
  sum_partials(partials, {data_or_null(losses), data_or_null(overlaps)}, statistics, images,
               num_classes, stream);

  if (with_masses || with_squares) {
    // For statistics of each image, the cells of a block are all of one image.
    if (per_image) cells.pitch = ceil_div(cells.pitch, 32) * 32;
    const Tensor by_block =
        new_empty(logits, {1 + with_squares, cells.blocks(), num_classes}, ScalarType::Float);
    const size_t bytes = (1 + with_squares) * cells.warps() * CLASSES * sizeof(float);
    launch_cells<LogitsStage<CLASSES>>(
        "softmax_masses_kernel",
        with_squares ? softmax_masses_kernel<true> : softmax_masses_kernel<false>, cells, bytes,
        stream, keys_data, static_cast<const float*>(lse_data), by_block.mutable_data_ptr<float>());
    // If only squares are requested, the masses are written to a tensor that is not used.
    const Tensor unread = by_class(with_squares && !with_masses, ScalarType::Float);
    sum_partials(by_block, {data_or_null(with_masses ? masses : unread), data_or_null(squares)},
                 1 + with_squares, images, num_classes, stream);
  }
  if (with_hits) {
    const Tensor hit_classes = by_pixel(true, ScalarType::Int);
    write_argmax(cells, keys_data, per_image ? num_classes : 0, nullptr,
                 hit_classes.mutable_data_ptr<int32_t>(), stream);
    hits = std::get<1>(class_keys(hit_classes, height, width, num_classes, per_image, -1));
  }
  return result();
}

}  // namespace
}  // namespace anchorops::cuda

STABLE_TORCH_LIBRARY_IMPL(anchorops, ANCHOROPS_DISPATCH_KEY, library) {
  library.impl("softmax_moments.cuda", TORCH_BOX(&anchorops::cuda::softmax_moments));
}
