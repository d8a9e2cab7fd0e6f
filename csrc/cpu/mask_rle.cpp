// The operator anchorops::mask_rle.cpu: masks of upsampled logits as run lengths, in COCO's code,
// without computing every pixel; and mask_codes.cpu: the codes of runs that a GPU has found.
//
// The runs are in the order of the columns. Along a column of pixels the upsampled value z is
// linear between two rows of logits, so its sign changes there at most once, also with rounded
// terms: each is monotonic in the weight. A division finds the pixel, and the formula of each pixel
// mends its rounding. A cell whose four logits have one sign is not visited.
//
// Every operation is rounded, as on a GPU: where the processor could, the compiler does not fuse
// products and sums.
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bilinear.h"
#include "operators.h"

namespace anchorops::cpu::masks {
namespace {

struct Box {
  int64_t x0, y0, x1, y1;
};

// The runs of one mask as characters.
class Code {
 public:
  // The run that ends at this position. From the fourth on, a run is coded as its length minus that
  // of the run before the last; 5 bits are one character, the lowest ones first.
  void write(int64_t position) {
    const int64_t length = position - end_;
    int64_t rest = runs_ > 2 ? length - lengths_[runs_ & 1] : length;
    lengths_[runs_++ & 1] = length;
    end_ = position;
    if (code_.size() < size_ + MOST_CHARACTERS) code_.resize(2 * code_.size() + MOST_CHARACTERS);
    for (bool more = true; more;) {
      const int64_t bits = rest & 31;
      rest >>= 5;
      more = rest != (bits & 16 ? -1 : 0);
      code_[size_++] = static_cast<uint8_t>(48 + bits + 32 * more);
    }
  }

  // Of the last run.
  int64_t end() const { return end_; }

  std::vector<uint8_t> characters() const { return {code_.begin(), code_.begin() + size_}; }

 private:
  static constexpr size_t MOST_CHARACTERS = 13;  // of 64 bits

  int64_t end_ = 0, runs_ = 0;
  int64_t lengths_[2] = {};    // of the last two runs
  std::vector<uint8_t> code_;  // of which size_ are written
  size_t size_ = 0;
};

// The code, the area and the box of one mask, from the pixels at which its columns, one after
// another, change between 0 and 1.
class Runs {
 public:
  explicit Runs(int64_t height) : height_(height) {}

  // Whether the pixels from the last change on are 1.
  bool ones() const { return ones_; }

  // The change at (x, y), behind the last one.
  void change(int64_t x, int64_t y) {
    if (ones_) add_to_box(x, y);
    code_.write(x * height_ + y);
    begin_x_ = x, begin_y_ = y;
    ones_ = !ones_;
  }

  void finish(int64_t width) {
    if (ones_) add_to_box(width, 0);
    code_.write(width * height_);
  }

  std::vector<uint8_t> code() const { return code_.characters(); }
  int64_t area() const { return area_; }
  Box box() const { return area_ == 0 ? Box{} : box_; }

 private:
  // The run of ones that ends before (x, y).
  void add_to_box(int64_t x, int64_t y) {
    const int64_t last = y > 0 ? x : x - 1;  // its last column
    const bool one_column = last == begin_x_;
    if (area_ == 0) box_ = {begin_x_, height_, 0, 0};
    box_.x1 = last + 1;
    box_.y0 = std::min(box_.y0, one_column ? begin_y_ : 0);
    box_.y1 = std::max(box_.y1, one_column && y > 0 ? y : height_);
    area_ += x * height_ + y - code_.end();
  }

  int64_t height_, area_ = 0;
  int64_t begin_x_ = 0, begin_y_ = 0;  // of the last run
  bool ones_ = false;
  Box box_ = {};
  Code code_;
};

// What the masks share: where the pixels are between the logits.
template <class Stat>
struct Grid {
  Bilinear<Stat> row_positions, column_positions;
  Axis<Stat> rows, columns;
  Stat pixels_per_row;
  std::vector<int64_t>
      first;  // [h + 1]: the first row of pixels whose lower logit is row i or later
  std::vector<uint8_t> is_read;  // [w]: whether pixels are between columns j and j + 1

  Grid(const Tensor& logits, int64_t height, int64_t width, bool align_corners)
      : row_positions(height, logits.size(1), align_corners),
        column_positions(width, logits.size(2), align_corners),
        rows(row_positions.axis()),
        columns(column_positions.axis()) {
    const bool inner = align_corners && rows.source > 1;  // from the first to the last row
    pixels_per_row = Stat(rows.size - inner) / Stat(rows.source - inner);
    for (int64_t i = 0; i <= rows.source; ++i) first.push_back(row_positions.labels({0, i}).end);
    for (int64_t j = 0; j < columns.source; ++j) {
      const Range pixels = column_positions.labels({j, j + 1});
      is_read.push_back(pixels.begin < pixels.end);
    }
  }
};

// The masks of one thread.
template <class T>
class Encoder {
  using Stat = StatOf<T>;

 public:
  // level: the largest z that is not set.
  Encoder(const Grid<Stat>& grid, const Tensor& logits, Stat level)
      : grid_(grid),
        level_(level),
        logits_(logits.const_data_ptr<T>()),
        stride_n_(logits.stride(0)),
        stride_h_(logits.stride(1)),
        stride_w_(logits.stride(2)),
        upper_(grid.columns.source + 1),
        lower_(grid.columns.source + 1),
        corners_(grid.columns.source),
        corners_above_(grid.columns.source),
        cells_(grid.columns.source) {}

  // box: not beyond the image.
  Runs encode(int64_t mask, const Box& box) {
    const int64_t height = grid_.rows.size, width = grid_.columns.size;
    Runs runs(height);
    if (box.x0 < box.x1 && box.y0 < box.y1) {
      find_cells(logits_ + mask * stride_n_, box);
      for (int64_t x = box.x0; x < box.x1;) {
        const int64_t left = position(grid_.columns, x).lower;
        const int64_t same = grid_.column_positions.labels({left, left + 1}).end;
        const int64_t end = std::min({same, x + COLUMNS, box.x1});
        add_columns(cells_[left], {x, end}, box, runs);
        x = end;
      }
      if (runs.ones() && box.x1 < width) runs.change(box.x1, 0);
    }
    runs.finish(width);
    return runs;
  }

 private:
  static constexpr int64_t COLUMNS = 16;  // at once

  // Pixels between two rows and two columns of logits.
  struct Cell {
    int64_t begin, end;  // rows of pixels
    int corners;         // how many of the four are 1
    Stat z[2][2];        // minus the level
  };

  // A column of pixels: 0 above the first change.
  struct Column {
    Stat weight;
    bool ones;  // whether the pixels from the last change on are 1
    std::vector<int64_t> changes;

    void start(Stat its_weight) {
      weight = its_weight, ones = false;
      changes.clear();
    }

    void change(int64_t y) {
      changes.push_back(y);
      ones = !ones;
    }
  };

  // As in upsampling.h: with weight 0, high is not used.
  static Stat between(Stat low, Stat high, Stat weight) {
    return weight == 0 ? low : (1 - weight) * low + weight * high;
  }

  static bool is_one(Stat z) { return !(z <= 0); }  // NaN is, as in pixel_argmax

  Stat z(const T* row, int64_t column) const {
    return static_cast<Stat>(row[column * stride_w_]) - level_;
  }

  // The cells between two columns of logits that have pixels, and not all one value, or another one
  // than the cell above.
  void find_cells(const T* logits, const Box& box) {
    const int64_t last_row = grid_.rows.source - 1, last_column = grid_.columns.source - 1;
    const Range rows = {position(grid_.rows, box.y0).lower,
                        position(grid_.rows, box.y1 - 1).lower + 1};
    const Range columns = {position(grid_.columns, box.x0).lower,
                           position(grid_.columns, box.x1 - 1).lower + 1};
    // the last row and the last column are their own neighbours
    const auto load = [&](int64_t i, std::vector<uint8_t>& ones) {
      const T* const row = logits + std::min(i, last_row) * stride_h_;
      for (int64_t j = columns.begin; j <= std::min(columns.end, last_column); ++j)
        ones[j] = is_one(z(row, j));
      if (columns.end > last_column) ones[columns.end] = ones[last_column];
    };
    for (int64_t j = columns.begin; j < columns.end; ++j) cells_[j].clear();
    std::fill(corners_above_.begin(), corners_above_.end(), 2);  // of no cell
    load(rows.begin, lower_);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      std::swap(upper_, lower_);
      load(i + 1, lower_);
      const int64_t begin = std::max(grid_.first[i], box.y0);
      const int64_t end = std::min(grid_.first[i + 1], box.y1);
      if (begin >= end) continue;
      for (int64_t j = columns.begin; j < columns.end; ++j)
        corners_[j] = upper_[j] + upper_[j + 1] + lower_[j] + lower_[j + 1];
      const T* const row = logits + i * stride_h_;
      const T* const next = logits + std::min(i + 1, last_row) * stride_h_;
      for (int64_t j = columns.begin; j < columns.end; ++j) {
        if (j + 8 <= columns.end && is_as_above<uint64_t>(j)) {
          j += 7;
          continue;
        }
        if (is_as_above<uint8_t>(j) || !grid_.is_read[j]) continue;
        const int64_t right = std::min(j + 1, last_column);
        cells_[j].push_back(
            {begin, end, corners_[j], {{z(row, j), z(row, right)}, {z(next, j), z(next, right)}}});
      }
      std::swap(corners_, corners_above_);
    }
  }

  // Whether these cells, one a byte, have all one value, and the cells above the same one.
  template <class Bytes>
  bool is_as_above(int64_t j) const {
    Bytes here, above;
    std::memcpy(&here, &corners_[j], sizeof here);
    std::memcpy(&above, &corners_above_[j], sizeof above);
    const Bytes mixed = here & static_cast<Bytes>(0x0303030303030303);  // neither 0 nor 4
    return (mixed | (here ^ above)) == 0;
  }

  // Columns of pixels between the same two columns of logits. Cell by cell, because neighbouring
  // columns take the same branches.
  void add_columns(const std::vector<Cell>& cells, Range range, const Box& box, Runs& runs) {
    const int64_t count = range.end - range.begin;
    for (int64_t k = 0; k < count; ++k)
      pixels_[k].start(position(grid_.columns, range.begin + k).weight);
    for (const Cell& cell : cells)
      for (int64_t k = 0; k < count; ++k) add_cell(cell, pixels_[k]);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t x = range.begin + k;
      auto change = pixels_[k].changes.cbegin();
      if (runs.ones()) {  // the last column's end
        if (change != pixels_[k].changes.cend() && *change == 0)
          ++change;
        else
          runs.change(x, 0);
      }
      for (; change != pixels_[k].changes.cend(); ++change) runs.change(x, *change);
      if (runs.ones() && box.y1 < grid_.rows.size) runs.change(x, box.y1);
    }
  }

  void add_cell(const Cell& cell, Column& column) const {
    if (cell.corners % 4 == 0) {
      if (column.ones != (cell.corners == 4)) column.change(cell.begin);
      return;
    }
    const Stat low = between(cell.z[0][0], cell.z[0][1], column.weight);
    const Stat high = between(cell.z[1][0], cell.z[1][1], column.weight);
    const bool first = is_one(low);
    // the first pixel that has not the value of `low`
    const int64_t other = is_one(high) == first ? cell.end : find_change(low, high, cell);
    if (column.ones != first && other > cell.begin) column.change(cell.begin);
    if (column.ones == first && other < cell.end) column.change(other);
  }

  // The first pixel of the cell whose value is not that of `low`, or the cell's end: where z is 0,
  // by division; its rounding is mended with the formula of each pixel. NaN is found by steps.
  int64_t find_change(Stat low, Stat high, const Cell& cell) const {
    const auto is_as_low = [&](int64_t y) {
      return is_one(between(low, high, position(grid_.rows, y).weight)) == is_one(low);
    };
    const Stat zero = low / (low - high);  // its weight, 0 to 1 or NaN
    const Stat last = position(grid_.rows, cell.end - 1).weight;
    const Stat behind = std::max(Stat(0), (last - zero) * grid_.pixels_per_row + 1);
    int64_t y = std::max(cell.begin, cell.end - static_cast<int64_t>(behind));
    while (y < cell.end && is_as_low(y)) ++y;
    while (y > cell.begin && !is_as_low(y - 1)) --y;
    return y;
  }

  const Grid<Stat>& grid_;
  const Stat level_;
  const T* const logits_;
  const int64_t stride_n_, stride_h_, stride_w_;
  std::vector<uint8_t> upper_, lower_;            // [w + 1]: which logits of two rows are 1
  std::vector<uint8_t> corners_, corners_above_;  // [w]: how many of the four of each cell are 1
  std::vector<std::vector<Cell>> cells_;          // [w]
  Column pixels_[COLUMNS];
};

// Raises unless boxes are int64 [count, 4], x0, y0, x1, y1, not beyond the image.
void check_boxes(const Tensor& boxes, int64_t count, int64_t height, int64_t width) {
  STD_TORCH_CHECK(boxes.scalar_type() == ScalarType::Long && boxes.dim() == 2 &&
                      boxes.size(0) == count && boxes.size(1) == 4 && boxes.is_contiguous(),
                  "mask_rle.cpu: boxes: expected int64 [N, 4], contiguous");
  const int64_t* box = boxes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i, box += 4)
    STD_TORCH_CHECK(box[0] >= 0 && box[1] >= 0 && box[2] <= width && box[3] <= height,
                    "mask_rle.cpu: boxes: expected none beyond the image");
}

// All characters, and where the code of each mask begins, [count + 1].
std::tuple<Tensor, Tensor> joined(const std::vector<std::vector<uint8_t>>& codes) {
  const auto count = static_cast<int64_t>(codes.size());
  Tensor offsets = new_empty({count + 1}, ScalarType::Long);
  int64_t* const offset = offsets.mutable_data_ptr<int64_t>();
  offset[0] = 0;
  for (int64_t i = 0; i < count; ++i)
    offset[i + 1] = offset[i] + static_cast<int64_t>(codes[i].size());
  Tensor characters = new_empty({offset[count]}, ScalarType::Byte);
  for (int64_t i = 0; i < count; ++i)
    std::copy(codes[i].begin(), codes[i].end(), characters.mutable_data_ptr<uint8_t>() + offset[i]);
  return {characters, offsets};
}

// changes: the positions x·height + y at which the masks change, one mask after another; offsets:
// where those of each mask begin, [N + 1]; pixels: of a mask.
std::tuple<Tensor, Tensor> mask_codes(Tensor changes, Tensor offsets, int64_t pixels) {
  for (const Tensor& x : {changes, offsets})
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.dim() == 1 && x.is_contiguous(),
                    "mask_codes.cpu: expected int64 of one axis, contiguous");
  const int64_t count = offsets.size(0) - 1;
  const int64_t* const change = changes.const_data_ptr<int64_t>();
  const int64_t* const offset = offsets.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(count >= 0 && offset[0] == 0 && offset[count] == changes.size(0) &&
                      std::is_sorted(offset, offset + count + 1),
                  "mask_codes.cpu: offsets: expected 0 to the number of changes, ascending");
  std::vector<std::vector<uint8_t>> codes(count);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Code code;
      for (int64_t j = offset[i]; j < offset[i + 1]; ++j) code.write(change[j]);
      code.write(pixels);
      codes[i] = code.characters();
    }
  });
  return joined(codes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_rle(Tensor logits, int64_t height, int64_t width,
                                                    double threshold, std::optional<Tensor> boxes,
                                                    bool align_corners) {
  const int64_t count = logits.size(0);
  if (boxes) {
    boxes = torch::stable::contiguous(*boxes);
    check_boxes(*boxes, count, height, width);
  }
  const int64_t* limits = boxes ? boxes->const_data_ptr<int64_t>() : nullptr;
  std::vector<std::vector<uint8_t>> codes(count);
  Tensor areas = new_empty({count}, ScalarType::Long);
  Tensor own_boxes = new_empty({count, 4}, ScalarType::Long);
  int64_t* const area = areas.mutable_data_ptr<int64_t>();
  int64_t* const own_box = own_boxes.mutable_data_ptr<int64_t>();
  for_dtype("mask_rle.cpu", logits.scalar_type(), [&](auto element) {
    using Stat = StatOf<decltype(element)>;
    const Grid<Stat> grid(logits, height, width, align_corners);
    const auto level = static_cast<Stat>(std::log(threshold) - std::log1p(-threshold));
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      Encoder<decltype(element)> encoder(grid, logits, level);
      for (int64_t i = begin; i < end; ++i) {
        Box box = {0, 0, width, height};
        if (limits) std::memcpy(&box, limits + 4 * i, sizeof box);
        const Runs runs = encoder.encode(i, box);
        codes[i] = runs.code();
        area[i] = runs.area();
        const Box own = runs.box();
        std::memcpy(own_box + 4 * i, &own, sizeof own);
      }
    });
  });
  const auto [characters, offsets] = joined(codes);
  return {characters, offsets, areas, own_boxes};
}

}  // namespace
}  // namespace anchorops::cpu::masks

STABLE_TORCH_LIBRARY_IMPL(anchorops, CPU, library) {
  library.impl("mask_rle.cpu", TORCH_BOX(&anchorops::cpu::masks::mask_rle));
  library.impl("mask_codes.cpu", TORCH_BOX(&anchorops::cpu::masks::mask_codes));
}
