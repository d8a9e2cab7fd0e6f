"""The gradient of a loss with given slopes u_k in errors of probability_histograms.py: dz, as in
reference/probability_histograms.py, and the transpose of the upsampling (upsampling_transposed.py),
of dz. One loop over the classes computes Σ_k e^(z_k) of the pixels, as for the histograms, a second
one Σ_j p_j u_j, a third one dz.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exponentials import probabilities
from .lanes import LABELS, PixelMap, load_labels
from .launch import without_spills
from .loss_options import LossOptions
from .probability_histograms import places_of_errors
from .softmax import softmax_of
from .upsampling import (
    LOGITS,
    SIZES,
    Logits,
    at_first_class,
    at_pixels,
    axes_of,
    class_planes,
    corners_of,
    following,
    loaded,
    logits_of_image,
    upsampling_of,
)
from .upsampling_transposed import (
    DLOGITS,
    cells_of_program,
    gradient_ptrs,
    gradients_of_blocks,
    lanes_of_program,
    program_of,
    sum_of_blocks,
    tiles_of,
    transposed,
)


@triton.jit
def _slopes_of_class(slopes_ptr, p, labels, k, bins, CELLS: tl.constexpr):
    """u_k of the pixels."""
    places = places_of_errors(p, labels, k, bins, CELLS)[1]
    u = [
        tl.load(slopes_ptr + places[i], mask=labels[i] >= 0, other=0.0) for i in () + CELLS.columns
    ]
    return [tl.where(labels[i] == k, -u[i], u[i]) for i in () + CELLS.columns]


@triton.jit(do_not_specialize=(*SIZES, *LOGITS, *LABELS, *DLOGITS, "tiles_y", "tiles_x"))
def _error_loss_bwd_kernel(
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
    slopes_ptr,  # float32 [K, 2, bins]
    bins,
    dlogits_ptr,  # [blocks, B, K, h, w]
    dlogits_block,
    dlogits_b,
    dlogits_k,
    dlogits_h,
    dlogits_w,
    height,
    width,
    label_height,
    label_width,
    ratios,
    tiles_y,
    tiles_x,
    ignore_index,
    CELLS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads the logits of a tile and its edge from memory once, and from the caches for each loop
    over the classes and for neighbours. Reads labels once, except at the edge, and two slopes for
    each pixel and class. Writes dlogits once."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    program = program_of(tiles_y, tiles_x, TILE)
    logits = Logits(logits_ptr, num_classes, logits_b, logits_k, logits_h, logits_w)
    logits = logits_of_image(logits, program.image)
    lanes = lanes_of_program(program, axes, logits, CELLS, TILE)
    cells = cells_of_program(program, lanes, CELLS, TILE)
    label_map = PixelMap(labels_ptr, labels_b, labels_h, labels_w)
    labels = load_labels(label_map, program.image, lanes, num_classes, ignore_index, CELLS)
    softmax = softmax_of(logits, lanes, labels, LossOptions(), 0, False, CELLS)

    means = [tl.zeros(label.shape, tl.float32) for label in labels]  # Σ_j p_j u_j
    ptrs, slopes = softmax.ptrs, slopes_ptr
    stored = loaded(ptrs)
    for k in range(num_classes):
        p = probabilities(corners_of(stored, CELLS), softmax.lse, lanes, CELLS)
        ptrs = following(ptrs, k, logits, CELLS)
        stored = loaded(ptrs)
        u = _slopes_of_class(slopes, p, labels, k, bins, CELLS)
        means = [tl.fma(p[i], u[i], means[i]) for i in () + CELLS.columns]
        slopes += 2 * bins

    ptrs = at_first_class(ptrs, logits, CELLS)
    dlogits = Logits(dlogits_ptr, num_classes, dlogits_b, dlogits_k, dlogits_h, dlogits_w)
    dptrs, written = gradient_ptrs(dlogits, program, cells, axes, dlogits_block, CELLS)
    slopes = slopes_ptr
    stored = loaded(ptrs)
    for k in range(num_classes):
        p = probabilities(corners_of(stored, CELLS), softmax.lse, lanes, CELLS)
        ptrs = following(ptrs, k, logits, CELLS)
        stored = loaded(ptrs)
        u = _slopes_of_class(slopes, p, labels, k, bins, CELLS)
        dz = [tl.where(labels[i] >= 0, p[i] * (u[i] - means[i]), 0.0) for i in () + CELLS.columns]
        gradient = transposed(dz, lanes, cells, axes, CELLS, TILE)
        tl.store(dptrs, gradient.to(dlogits_ptr.dtype.element_ty), mask=written)
        slopes += 2 * bins
        dptrs = at_pixels(dptrs, dlogits_k, CELLS)


def error_loss_backward(
    logits: Tensor, labels: Tensor, slopes: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """logits (B, K, h, w), labels (B, H, W), slopes float32 [K, 2, bins] -> dlogits.

    It needs memory as softmax_moments_backward does.
    """
    dlogits = torch.empty_like(logits)
    if labels.numel() == 0:
        return dlogits.zero_()
    logits = class_planes(logits)
    upsampling = upsampling_of(logits, *labels.shape[1:], align_corners, maps=(labels,))
    tiles = tiles_of(upsampling, True)
    gradients = gradients_of_blocks(dlogits, tiles.blocks)
    _error_loss_bwd_kernel[(len(logits) * tiles.down * tiles.across * tiles.blocks,)](
        logits,
        *logits.stride(),
        logits.shape[1],
        labels,
        *labels.stride(),
        slopes.contiguous(),
        slopes.shape[2],
        gradients,
        *gradients.stride(),
        *upsampling.sizes,
        upsampling.ratios,
        tiles.down,
        tiles.across,
        ignore_index,
        CELLS=upsampling.cells,
        TILE=tiles.tile,
        num_warps=tiles.lanes // 32,
        enable_fp_fusion=False,  # coordinates as in F.interpolate
        **without_spills(),
    )
    return sum_of_blocks(gradients, dlogits)
