// How the operators on upsampled logits divide their work. This depends only on shapes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "../labels.h"
#include "bilinear.h"
#include "operators.h"
#include "softmax_moments.h"

namespace anchorops::cpu::softmax {

template <class Stat>
Kernels<Stat> best_kernels() {
  return BEST_OF(kernels<Stat>());
}

template <class T>
Rows<T> best_rows() {
  return BEST_OF(rows<T>());
}

inline Layout layout_of(const Tensor& x) {
  return {x.size(0),   x.size(1),   x.size(2),   x.size(3),
          x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <class T>
Map<T> map_of(const std::optional<Tensor>& map) {
  if (!map) return {};
  return {map->template const_data_ptr<T>(), map->stride(0), map->stride(1), map->stride(2)};
}

template <class T>
Output<StatOf<T>> output_of(const Tensor& dlogits) {
  const Rows<T> rows = best_rows<T>();
  return {layout_of(dlogits), dlogits.mutable_data_ptr<T>(), rows.finish_row, rows.write_columns};
}

template <class Label>
decltype(Labels::read) best_label_reader() {
  return BEST_OF(label_reader<Label>());
}

inline Labels labels_of(const char* operation, const Tensor& labels, int64_t num_classes,
                        int64_t ignore_index) {
  Labels result = {labels.data_ptr(), labels.stride(0), labels.stride(1), labels.stride(2),
                   num_classes,       ignore_index,     nullptr};
  for_label_dtype(operation, labels.scalar_type(),
                  [&](auto label) { result.read = best_label_reader<decltype(label)>(); });
  return result;
}

// Tiles of the logits: strips of rows; also chunks of columns, if many classes would not fit into
// the caches.
template <class Stat>
class Tiles {
 public:
  Tiles(const Layout& layout, int64_t height, int64_t width, bool align_corners)
      : layout_(layout),
        rows_(height, layout.height, align_corners),
        columns_(width, layout.width, align_corners) {
    strips_ = ceil_div(layout.height, 16);
    // a multiple of four strips, because two or four threads wait for each other
    if (strips_ > 1) strips_ = std::min(ceil_div(strips_, 4) * 4, layout.height);
    const int64_t columns = std::clamp<int64_t>((1 << 16) / layout.dim, 32, 4096);
    chunks_ = ceil_div(layout.width, columns);
  }

  int64_t num_classes() const { return std::max<int64_t>(layout_.dim, 2); }
  bool upsampled() const { return rows_.axis().lower || columns_.axis().lower; }
  // Cells of two labels in a row waste half of their width: then they are faster for many classes.
  bool by_cells() const {
    return rows_.cells().begin && columns_.cells().begin &&
           (most_of_cell() > 2 || layout_.dim > 16);
  }
  int64_t most_of_cell() const { return columns_.cells().most; }

  template <class T>
  Problem<Stat> problem(const Tensor& logits, const Labels& labels) const {
    const Rows<T> rows = best_rows<T>();
    return {{layout_, logits.const_data_ptr<T>(), sizeof(T), num_classes(), rows.pack_row,
             rows.read_columns},
            upsampled(),
            rows_.axis(),
            columns_.axis(),
            by_cells() ? rows_.cells() : Cells{},
            by_cells() ? columns_.cells() : Cells{},
            labels,
            {}};
  }

  // Numbers in ColumnMemory::slots: for each of a tile's columns, the most labels at its right.
  int64_t slots(int64_t columns) const {
    const Axis<Stat> axis = columns_.axis();
    int64_t most = 1;
    for (int64_t i = 1, same = 1; axis.lower && i < axis.size; ++i) {
      same = axis.lower[i] == axis.lower[i - 1] ? same + 1 : 1;
      most = std::max(most, same);
    }
    return most * (ceil_div(columns, 16) * 16);
  }

  int64_t per_image() const { return strips_ * chunks_; }
  int64_t count() const { return layout_.batch * per_image(); }

  // backward: with all labels that read the tile's logits
  Tile tile(int64_t i, bool backward) const {
    backward = backward && upsampled();
    const int64_t strip = i / chunks_ % strips_, chunk = i % chunks_;
    const auto column = [&](int64_t c) {
      return std::min(ceil_div(layout_.width, 16) * c / chunks_ * 16, layout_.width);
    };
    Tile tile;
    tile.image = i / per_image();
    tile.rows = {layout_.height * strip / strips_, layout_.height * (strip + 1) / strips_};
    tile.columns = {column(chunk), column(chunk + 1)};
    // cell -1 belongs to the first tile
    tile.row_cells = {tile.rows.begin - (backward || strip == 0), tile.rows.end};
    tile.column_cells = {tile.columns.begin - (backward || chunk == 0), tile.columns.end};
    tile.label_rows = rows_.labels(tile.row_cells);
    tile.label_columns = columns_.labels(tile.column_cells);
    return tile;
  }

  // The columns that the labels of a tile of other logits read, without the last one.
  Tile tile_of_labels(Tile tile) const {
    const Axis<Stat> axis = columns_.axis();
    const auto lower = [&](int64_t label) -> int64_t {
      return axis.lower ? axis.lower[label] : label;
    };
    const Range& labels = tile.label_columns;
    tile.columns = {0, 0};
    if (labels.begin < labels.end) tile.columns = {lower(labels.begin), lower(labels.end - 1) + 1};
    return tile;
  }

 private:
  Layout layout_;
  Bilinear<Stat> rows_, columns_;
  int64_t strips_, chunks_;
};

// Of a row where whole vectors can be read and written.
inline int64_t padded(int64_t length) { return ceil_div(length, 16) * 16 + 16; }

// Calls visit(range of items, workspace) on the threads; the workspace is large enough for any
// tile.
template <class Stat, class Visit>
void for_items(const Tiles<Stat>& tiles, int64_t items, int64_t num_classes, bool backward,
               bool needs_factors, Visit visit) {
  int64_t columns = 0, labels = 0;
  for (int64_t i = 0; i < tiles.per_image(); ++i) {
    const Tile tile = tiles.tile(i, backward);
    columns = std::max(columns, tile.columns.end - tile.columns.begin);
    labels = std::max(labels, tile.label_columns.end - tile.label_columns.begin);
  }
  const int64_t packed_stride = padded(columns + 2);
  const Sizes sizes = {
      .num_classes = num_classes,
      .packed_stride = packed_stride,
      .label_stride = padded(labels),
      .slots = tiles.slots(columns + 2),
      .lanes = tiles.by_cells() ? packed_stride * (tiles.most_of_cell() + 4) : 0,
      .backward = backward,
      .needs_factors = needs_factors,
  };
  torch::stable::parallel_for(0, items, 1, [&](int64_t first, int64_t last) {
    Workspace<Stat> workspace = {};
    const ThreadMemory memory([&](ThreadMemory& parts) { workspace.take(parts, sizes); });
    visit(first, last, workspace);
  });
}

}  // namespace anchorops::cpu::softmax
