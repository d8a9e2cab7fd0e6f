"""Histograms of the errors of softmax probabilities: see reference/probability_histograms.py.

A program computes Σ_k e^(z_k) of the pixels of a tile, in one loop over the classes (softmax.py). A
second loop computes the probabilities, and counts the errors with integer atomics, whose order does
not matter. Most errors are below 1/bins: they are not counted there, but are the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponentials import probabilities
from .lanes import LABELS, NO_CLASS, PixelMap, load_labels, next_label, number_of
from .launch import without_spills
from .loss_options import LossOptions
from .softmax import softmax_of
from .upsampling import (
    FORWARD_LANES,
    LOGITS,
    SIZES,
    Logits,
    axes_of,
    class_planes,
    corners_of,
    following,
    lanes_of_tile,
    loaded,
    logits_of_image,
    upsampling_of,
)


@triton.jit
def places_of_errors(p, labels, k, bins, CELLS: tl.constexpr):
    """The bins of the pixels' errors for class k, and where they are in [2, bins]: the first row is
    that of the pixels of class k. NaN is an error of 1 for the pixel's class, of 0 for others."""
    p = [tl.where(x == x, x, 0.0) for x in p]
    errors = [tl.where(labels[i] == k, 1 - p[i], p[i]) for i in () + CELLS.columns]
    bin_index = [tl.minimum((x * bins).to(tl.int32), bins - 1) for x in errors]
    row = [tl.where(label == k, 0, bins) for label in labels]
    return bin_index, [row[i] + bin_index[i] for i in () + CELLS.columns]


@triton.jit(do_not_specialize=(*SIZES, *LOGITS, *LABELS, "tiles"))
def _probability_histograms_kernel(
    logits_ptr,  # [B, K, h, w]
    logits_b,
    logits_k,
    logits_h,
    logits_w,
    num_classes,
    labels_ptr,  # integers [B, H, W]
    labels_b,
    labels_h,
    labels_w,
    counts_ptr,  # int64 [K, 2, bins], zero on entry
    bins,
    height,
    width,
    label_height,
    label_width,
    ratios,
    tiles,
    ignore_index,
    CELLS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads the logits of a tile from memory once, and from the caches for the second loop and for
    neighbours. Reads each label once. Adds 1 for each error of at least 1/bins, and for each label
    of the tile its number to counts[label, 0, 0]."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    logits = Logits(logits_ptr, num_classes, logits_b, logits_k, logits_h, logits_w)
    logits = logits_of_image(logits, image)
    lanes = lanes_of_tile(tile, axes, logits, CELLS, LANES)
    label_map = PixelMap(labels_ptr, labels_b, labels_h, labels_w)
    labels = load_labels(label_map, image, lanes, num_classes, ignore_index, CELLS)
    softmax = softmax_of(logits, lanes, labels, LossOptions(), 0, False, CELLS)
    ptrs, class_counts = softmax.ptrs, counts_ptr
    stored = loaded(ptrs)
    for k in range(num_classes):
        p = probabilities(corners_of(stored, CELLS), softmax.lse, lanes, CELLS)
        ptrs = following(ptrs, k, logits, CELLS)
        stored = loaded(ptrs)
        bin_index, places = places_of_errors(p, labels, k, bins, CELLS)
        for i in tl.static_range(len(labels)):
            counted = (labels[i] >= 0) & (bin_index[i] > 0)
            one = tl.full(counted.shape, 1, tl.int64)
            tl.atomic_add(class_counts + places[i], one, mask=counted, sem="relaxed")
        class_counts += 2 * bins
    label = next_label(labels, -1)
    while label < NO_CLASS:
        pixels = number_of([labels[i] == label for i in () + CELLS.columns])
        tl.atomic_add(counts_ptr + label.to(tl.int64) * 2 * bins, pixels, sem="relaxed")
        label = next_label(labels, label)


def probability_histograms(
    logits: Tensor, labels: Tensor, bins: int, ignore_index: int, align_corners: bool
) -> Tensor:
    """logits (B, K, h, w), labels (B, H, W) -> int64 [K, 2, bins]. Logits whose classes are
    contiguous are copied."""
    batch, num_classes = logits.shape[:2]
    counts = logits.new_zeros((num_classes, 2, bins), dtype=torch.int64)
    if labels.numel() == 0:
        return counts
    logits = class_planes(logits)
    upsampling = upsampling_of(logits, *labels.shape[1:], align_corners, maps=(labels,))
    block = FORWARD_LANES
    tiles = triton.cdiv(upsampling.lanes, block)
    _probability_histograms_kernel[(batch * tiles,)](
        logits,
        *logits.stride(),
        num_classes,
        labels,
        *labels.stride(),
        counts,
        bins,
        *upsampling.sizes,
        upsampling.ratios,
        tiles,
        ignore_index,
        CELLS=upsampling.cells,
        LANES=block,
        num_warps=block // 32,
        enable_fp_fusion=False,  # coordinates as in F.interpolate
        **without_spills(),
    )
    pixels = counts[:, 0, 0]
    pixels = torch.stack([pixels, pixels.sum() - pixels], 1)
    counts[:, :, 0] = pixels - counts[:, :, 1:].sum(2)
    return counts
