// Softmax of upsampled logits, a cell of 4×4 pixels in each thread.
//
// Inside a cell z is bilinear, so e^z is geometric along rows and columns: four exponentials and
// multiplications replace one exponential for each pixel. The largest logit of a position is
// subtracted from its logits; upsampled, it is at least the largest logit of each pixel.
//
// A block processes WARPS rows of 32 cells. It stages the logits of 33 × (WARPS + 1) positions and
// CLASSES classes at a time in shared memory, shifted, as float32. The code after this does not
// depend on types, strides or layout.
//
// Geometric sequences are inaccurate if logits differ widely. Pixels are computed one by one from
// the logits if neighbours differ by more than `Cells::steepest`, if their sum falls below 2^-40,
// if they read a logit that is not finite, and always if the ratio of sizes is below 2.
#pragma once

#include "logits.cuh"

namespace anchorops::cuda {

constexpr int WARPS = 8, TILE = 4, COLUMNS = 33;
constexpr float SCALE = 30;  // shifted logits end there: 2^-126 is then 2^-156 of the largest
constexpr float SMALLEST_SUM = -40;  // log2
constexpr float NO_LOGIT = -1000;    // instead of -inf: 2^-1000 is 0

// The shift of a position of the logits.
struct Shift {
  float largest;   // log2(e)·max_k x_k; NaN if it is too large or not finite
  unsigned steep;  // RIGHT, DOWN: it differs widely from its neighbour there
};
constexpr unsigned RIGHT = 1, DOWN = 2;

struct Cells {
  Logits logits;
  Axis rows, columns;
  const Shift* shifts;  // [B, h, w]
  int pitch;            // columns of cells of one image, w + 2 or more; images are side by side
  int first_row, row_count;  // rows of cells that contain pixels
  int parts_y, parts_x;      // parts of TILE pixels of a cell, along each axis
  bool geometric;            // otherwise pixels are computed one by one

  Cells(const Logits& logits, const Axis& rows, const Axis& columns)
      : logits(logits), rows(rows), columns(columns), shifts(nullptr) {
    pitch = logits.width + 2;  // cells -1 to w - 1, and one empty cell
    first_row = rows.cell_of(0);
    row_count = rows.cell_of(rows.pixels - 1) - first_row + 1;
    parts_y = std::max(1, ceil_div(rows.pixels_per_cell(), TILE));
    parts_x = std::max(1, ceil_div(columns.pixels_per_cell(), TILE));
    // with a single class p is exactly 1
    geometric = rows.ratio <= 0.5f && columns.ratio <= 0.5f && logits.num_classes > 1;
  }

  __host__ __device__ int parts() const { return parts_y * parts_x; }
  // A block has one warp for each row of cells. All blocks are along x, because a grid may have
  // 2^31 there: first the parts of 32 columns, then all columns, then the next rows.
  int warps() const { return std::min(WARPS, row_count); }
  __host__ __device__ unsigned blocks_across() const {
    return static_cast<unsigned>((int64_t{logits.batch} * pitch + 31) / 32 * parts());
  }
  int64_t blocks() const { return ceil_div(row_count, warps()) * int64_t{blocks_across()}; }
  __device__ int block_row() const {
    return first_row + blockIdx.x / blocks_across() * (blockDim.x / 32);
  }
  __device__ int64_t block_column() const {
    return int64_t{blockIdx.x % blocks_across() / parts()} * 32;
  }
  __device__ int block_part() const { return blockIdx.x % blocks_across() % parts(); }

  // The largest difference of neighbours, in units of x, for which a sequence is accurate. Powers
  // of the ratios do not overflow, even for pixels beyond the end of a cell. No sequence that
  // starts below 2^-126 has terms that matter.
  float steepest() const {
    const float y = rows.ratio, x = columns.ratio;
    return LN2 * std::min(26.0f, 50 / (std::max(x, y) + 6 * x * y + 1e-6f));
  }

  __device__ int inside_rows(int row) const { return min(max(row, 0), logits.height - 1); }
  __device__ int inside_columns(int column) const { return min(max(column, 0), logits.width - 1); }
  __device__ const Shift& shift(int image, int row, int column) const {
    return shifts[(int64_t{image} * logits.height + inside_rows(row)) * logits.width +
                  inside_columns(column)];
  }
};

// The logits of CLASSES classes at the positions around a block's cells, in shared memory; with the
// shift subtracted if SHIFTED.
template <int CLASSES, bool SHIFTED = true>
struct LogitsStage {
  static constexpr int ROW = CLASSES * COLUMNS;
  static constexpr __host__ __device__ size_t bytes(int warps) {
    return (warps + 1) * (COLUMNS * (sizeof(int64_t) + sizeof(float)) + ROW * sizeof(float));
  }

  const Cells& cells;
  int positions, first_row;
  int64_t* offsets;  // [rows, COLUMNS], in the logits
  float* shifts;     // [rows, COLUMNS]
  float* tile;       // [rows, CLASSES, COLUMNS]

  // The positions begin at cell (first_row, first_column), where all images are side by side.
  __device__ LogitsStage(const Cells& cells, int first_row, int64_t first_column)
      : cells(cells),
        positions((static_cast<int>(blockDim.x) / 32 + 1) * COLUMNS),
        first_row(first_row) {
    offsets = reinterpret_cast<int64_t*>(shared_memory());
    tile = reinterpret_cast<float*>(offsets + positions);
    shifts = tile + positions * CLASSES;
    for (int i = threadIdx.x; i < positions; i += blockDim.x) {
      const int64_t at = first_column + i % COLUMNS;
      const int image = min(static_cast<int>(at / cells.pitch), cells.logits.batch - 1);
      const int row = cells.inside_rows(first_row + i / COLUMNS);
      const int column = cells.inside_columns(static_cast<int>(at % cells.pitch) - 1);
      offsets[i] = cells.logits.offset(image, row, column);
      if (SHIFTED && cells.geometric) shifts[i] = SCALE - cells.shift(image, row, column).largest;
    }
    __syncthreads();
  }

  // The stage for the block's cells.
  __device__ explicit LogitsStage(const Cells& cells)
      : LogitsStage(cells, cells.block_row(), cells.block_column()) {}

  // The end of the stage in shared memory.
  __device__ float* end() const { return shifts + positions; }

  // The shifted logit, which is always finite: -inf (p = 0) and NaN (no pixel uses it here) become
  // NO_LOGIT.
  __device__ __forceinline__ float staged(float x, int position) const {
    if constexpr (!SHIFTED) return x;
    return fmaxf(fmaf(x, LOG2E, shifts[position]), NO_LOGIT);
  }

  // Calls function(first_class, count) for CLASSES classes at a time, after staging them. Without
  // geometric sequences there are no shifts, so then shifted logits are not staged.
  template <class Function>
  __device__ __forceinline__ void for_classes(Function function) {
    const int num_classes = cells.logits.num_classes;
    for (int first = 0; first < num_classes; first += CLASSES) {
      const int count = min(CLASSES, num_classes - first);
      if (first > 0) __syncthreads();
      if (cells.geometric || !SHIFTED) load(first, count);
      __syncthreads();
      if (cells.geometric) prefetch_classes(first + CLASSES, num_classes);
      function(first, count);
    }
  }

  // Prefetches the first position of each row, for CLASSES classes before `end`: a row of the stage
  // is one line of memory, or two. In channels last, a line contains several classes, and nothing
  // is prefetched.
  __device__ void prefetch_classes(int first_class, int end) const {
    if (cells.logits.stride_k < cells.logits.stride_w) return;
    const int itemsize = cells.logits.element == Element::FLOAT ? 4 : 2;
    const auto* x = static_cast<const char*>(cells.logits.data);
    for (int i = threadIdx.x; i < positions / COLUMNS * CLASSES; i += blockDim.x) {
      const int64_t k = first_class + i % CLASSES;
      if (k < end)
        prefetch(x + (offsets[i / CLASSES * COLUMNS] + k * cells.logits.stride_k) * itemsize);
    }
  }

  // Stages the classes from first_class to first_class + count - 1.
  __device__ void load(int first_class, int count) {
    for_element(cells.logits.element, [&](auto element) {
      using T = decltype(element);
      const T* x = static_cast<const T*>(cells.logits.data) + first_class * cells.logits.stride_k;
      if (cells.logits.stride_k < cells.logits.stride_w)
        channels_last(x, count);
      else
        planes(x, count);
    });
  }

  // A warp loads 32 columns of every row in a plane, three rows of some planes at a time; the last
  // column is loaded separately.
  template <class T>
  __device__ __forceinline__ void planes(const T* x, int count) {
    constexpr int ROWS = 3, PLANES = CLASSES / WARPS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int64_t stride = cells.logits.stride_k;
    for (int k = warp; k < count; k += PLANES * warps) {
      const T* plane = x + k * stride;
      float* to = tile + k * COLUMNS + lane;
#pragma unroll 1
      for (int position = lane; position < positions; position += ROWS * COLUMNS) {
        float values[ROWS][PLANES];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const T* from = plane + offsets[min(position + r * COLUMNS, positions - 1)];
#pragma unroll
          for (int i = 0; i < PLANES; ++i, from += warps * stride)
            values[r][i] = k + i * warps < count ? static_cast<float>(*from) : 0;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          if (position + r * COLUMNS >= positions) break;
#pragma unroll
          for (int i = 0; i < PLANES; ++i)
            if (k + i * warps < count)
              to[i * warps * COLUMNS] = staged(values[r][i], position + r * COLUMNS);
          to += ROW;
        }
      }
    }
    for (int i = threadIdx.x; i < positions / COLUMNS * CLASSES; i += blockDim.x) {
      const int k = i % CLASSES, position = i / CLASSES * COLUMNS + 32;
      if (k < count)
        tile[i * COLUMNS + 32] =
            staged(static_cast<float>(x[offsets[position] + k * stride]), position);
    }
  }

  // CLASSES lanes load the classes of a position.
  template <class T>
  __device__ __forceinline__ void channels_last(const T* x, int count) {
    const int k = threadIdx.x % CLASSES, step = blockDim.x / CLASSES;
    if (k >= count) return;
    x += k * cells.logits.stride_k;
#pragma unroll 4
    for (int i = threadIdx.x / CLASSES; i < positions; i += step)
      tile[i / COLUMNS * (ROW - COLUMNS) + k * COLUMNS + i] =
          staged(static_cast<float>(x[offsets[i]]), i);
  }
};

// e^z of a cell's pixels: first·x^j·y^i·xy^(ij), times 2^SCALE.
struct Powers {
  float first, x, y, xy;
};

// A thread's cell, and its part of the cell, up to TILE × TILE pixels.
struct Cell {
  int image, row, column;
  bool inside;                                   // whether the cell exists
  int first_y, first_x, end_y, end_x;            // its pixels
  int y, x, ny, nx;                              // the pixels of the part
  float fraction_y, fraction_x, step_y, step_x;  // of the part's first pixel; to the next one
  const float *a, *b, *c, *d;                    // staged logits at its four corners
  unsigned regular;  // bit 2i + j: geometric sequences can be used for pixels that read i rows and
                     // j columns in addition to the first ones

  // Cell `at` of all images side by side.
  __device__ Cell(const Cells& cells, int row, int64_t at, int part)
      : image(static_cast<int>(at / cells.pitch)),
        row(row),
        column(static_cast<int>(at % cells.pitch) - 1),
        regular(0) {
    inside = image < cells.logits.batch && column < cells.logits.width && row < cells.logits.height;
    image = min(image, cells.logits.batch - 1);
    first_y = cells.rows.first_pixel(row);
    first_x = cells.columns.first_pixel(column);
    end_y = inside ? cells.rows.first_pixel(row + 1) : 0;
    end_x = inside ? cells.columns.first_pixel(column + 1) : 0;
    // before the first and after the last row both corners are the same
    step_y = row < 0 || row >= cells.logits.height - 1 ? 0 : cells.rows.ratio;
    step_x = column < 0 || column >= cells.logits.width - 1 ? 0 : cells.columns.ratio;
    select(cells, part);
  }
  __device__ explicit Cell(const Cells& cells)
      : Cell(cells, cells.block_row() + threadIdx.x / 32, cells.block_column() + threadIdx.x % 32,
             cells.block_part()) {}

  __device__ void select(const Cells& cells, int part) {
    y = first_y + part / cells.parts_x * TILE;
    x = first_x + part % cells.parts_x * TILE;
    ny = min(end_y - y, TILE);
    nx = min(end_x - x, TILE);
    fraction_y = cells.rows.fraction(row, y);
    fraction_x = cells.columns.fraction(column, x);
  }

  // A corner that no regular pixel reads is replaced by one that is read; otherwise the ratios of
  // the others might not be finite.
  template <int CLASSES>
  __device__ void set_corners(const Cells& cells, const LogitsStage<CLASSES>& stage) {
    a = b = c = d = stage.tile;
    if (!cells.geometric) return;
    const Shift &sa = cells.shift(image, row, column), &sb = cells.shift(image, row, column + 1);
    const Shift& sc = cells.shift(image, row + 1, column);
    const Shift& sd = cells.shift(image, row + 1, column + 1);
    const auto finite = [](const Shift& s) { return s.largest == s.largest; };
    const bool first = inside && finite(sa);
    const bool right = first && finite(sb) && (step_x == 0 || !(sa.steep & RIGHT));
    const bool down = first && finite(sc) && (step_y == 0 || !(sa.steep & DOWN));
    const bool both = right && down && finite(sd) && (step_x == 0 || !(sc.steep & RIGHT)) &&
                      (step_y == 0 || !(sb.steep & DOWN));
    regular = first | right << 1 | down << 2 | both << 3;
    a = stage.tile + threadIdx.x / 32 * LogitsStage<CLASSES>::ROW + threadIdx.x % 32;
    b = right ? a + 1 : a;
    c = down ? a + LogitsStage<CLASSES>::ROW : a;
    d = both ? a + LogitsStage<CLASSES>::ROW + 1 : right ? b : c;
  }

  __device__ __forceinline__ Powers powers(int at) const {
    const float down = c[at] - a[at], down_right = d[at] - b[at];
    const float left = fmaf(fraction_y, down, a[at]);
    const float across = fmaf(fraction_y, down_right, b[at]) - left;
    const float cross = down_right - down;
    return {exp2_approximate(fmaf(fraction_x, across, left)), exp2_approximate(step_x * across),
            exp2_approximate(step_y * fmaf(fraction_x, cross, down)),
            exp2_approximate(step_x * step_y * cross)};
  }

  __device__ float weight_y(const Cells& cells, int i) const {
    return cells.rows.fraction(row, y + i);
  }
  __device__ float weight_x(const Cells& cells, int j) const {
    return cells.columns.fraction(column, x + j);
  }
  __device__ bool is_regular(float weight_y, float weight_x) const {
    return regular >> ((weight_y != 0) * 2 + (weight_x != 0)) & 1;
  }
  // log2 of the divisor of e^z.
  __device__ float largest(const Cells& cells, float weight_y, float weight_x) const {
    const auto of = [&](int i, int j) { return cells.shift(image, row + i, column + j).largest; };
    return interpolate(interpolate(of(0, 0), of(1, 0), weight_y),
                       interpolate(of(0, 1), of(1, 1), weight_y), weight_x) -
           SCALE;
  }
  // 2^-SCALE/Σ e^z in units of the pixel's largest logit; false if it cannot be used.
  __device__ bool inverse_sum(const Cells& cells, int i, int j, float lse, float& inverse) const {
    const float weight_y = this->weight_y(cells, i), weight_x = this->weight_x(cells, j);
    if (!is_regular(weight_y, weight_x)) return false;
    const float exponent = fmaf(-lse, LOG2E, largest(cells, weight_y, weight_x));
    if (!(exponent <= -SCALE - SMALLEST_SUM)) return false;
    inverse = exp2_approximate(exponent);
    return true;
  }
  __device__ int64_t pixel(const Cells& cells, int i, int j) const {
    return (int64_t{image} * cells.rows.pixels + y + i) * cells.columns.pixels + x + j;
  }
  __device__ PixelLogits logits(const Cells& cells, int i, int j) const {
    return {cells.logits, cells.rows, cells.columns, image, y + i, x + j};
  }
};

// Calls function(i, j, e^z·2^SCALE) for all pixels of the cell.
template <class Function>
__device__ __forceinline__ void for_pixels(const Powers& powers, Function function) {
  float first = powers.first, x = powers.x;
#pragma unroll
  for (int i = 0; i < TILE; ++i) {
    float e = first;
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
      function(i, j, e);
      e *= x;
    }
    first *= powers.y;
    x *= powers.xy;
  }
}

// Σ factors·e^z·2^SCALE over the pixels of a cell, by Horner's rule.
__device__ __forceinline__ float sum_over_pixels(const Powers& powers,
                                                 const float (&factors)[TILE][TILE]) {
  float x[TILE] = {powers.x}, sum = 0;
#pragma unroll
  for (int i = 1; i < TILE; ++i) x[i] = x[i - 1] * powers.xy;
#pragma unroll
  for (int i = TILE - 1; i >= 0; --i) {
    float row = factors[i][TILE - 1];
#pragma unroll
    for (int j = TILE - 2; j >= 0; --j) row = fmaf(row, x[i], factors[i][j]);
    sum = i == TILE - 1 ? row : fmaf(sum, powers.y, row);
  }
  return powers.first * sum;
}

// log Σ_k e^z of one pixel, as torch.logsumexp if z is not finite.
__device__ inline float log_sum_exp(const PixelLogits& logits, int num_classes) {
  float largest = -INFINITY, shift = 0, sum = 0;
  for (int k = 0; k < num_classes; ++k) {
    const float z = logits.z(k);
    const float larger = fmaxf(largest, z);  // if z is NaN, the sum is NaN
    if (larger > largest) {
      const float next = larger == INFINITY ? 0 : larger;
      sum *= exp2_approximate((largest - next) * LOG2E);
      largest = larger;
      shift = next;
    }
    sum += exp2_approximate((z - shift) * LOG2E);
  }
  return shift + logf(sum);
}

// Launches cells.blocks() blocks of cells.warps() warps. Shared memory: a LogitsStage, then
// extra_bytes.
template <class Staged, class... Parameters, class... Arguments>
void launch_cells(const char* name, void (*kernel)(Cells, Parameters...), const Cells& cells,
                  size_t extra_bytes, Stream stream, const Arguments&... arguments) {
  launch(name, kernel, grid_of(name, cells.blocks()), cells.warps() * 32,
         Staged::bytes(cells.warps()) + extra_bytes, stream, cells, arguments...);
}

// The shift of each position: softmax_cells.cu.
Tensor new_shifts(const Tensor& logits, Cells& cells, Stream stream);

}  // namespace anchorops::cuda
