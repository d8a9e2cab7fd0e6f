"""The gradient of softmax moments: for each valid pixel dz, as in _ops/softmax_moments.py, and the
transpose of the upsampling (upsampling_transposed.py), of dz. There α is d·∂L/∂c and β is d·∂L/∂u,
with c and u of loss_options.py.

First the terms of a pixel that are the same for all classes are computed; then dz, for one class
after the other. The transpose of β·v_k is v_k times the transpose of β, which is computed once.

In even cells p_k = e^(z_k − m)·e^(m − lse), where m is the largest lse of a lane: the first factor
is a geometric sequence along a row, the second one is the same for all classes. If neighbours of a
cell differ by more than about 28 (14 with sums of probabilities), this may underflow or overflow.
Then the program computes its gradients again, with an exponential for each pixel.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constants import LOG2_E, Constant
from .exponentials import (
    LARGEST_SPREAD_OF_GRADIENT,
    exponentials_of_lane,
    probabilities,
    probability,
    products,
    scales_of,
    shift_of_lane,
)
from .lanes import (
    LABELS,
    PixelMap,
    any_of,
    classes_of,
    contiguous_map,
    largest_label,
    load_again,
    load_labels,
    load_map,
    may_have,
    pixel_map_of,
    values_of_labels,
)
from .launch import registers
from .loss_options import (
    add_sum_of_weights,
    loss_options_of,
    slopes_of_losses,
    subtract_weighted,
    weight_of_all,
)
from .softmax import losses_of_labels
from .upsampling import (
    LOGITS,
    ROW_AXIS,
    SIZES,
    Logits,
    at_first_class,
    at_pixels,
    axes_of,
    class_planes,
    corner_ptrs,
    corners_of,
    following,
    loaded,
    logits_of_image,
    strides_of,
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

# With the slopes of a class's sums, which may be as large as 1/p: p that is lost is below 2^-81.
_LARGEST_SPREAD_BY_CLASS = Constant(20.0)


class ClassGradient(NamedTuple):
    """float32 [K] or [B, K] by strides; the pointer is None if there is no gradient."""

    ptr: Any
    stride_b: int
    stride_k: int


class Gradients(NamedTuple):
    dlosses: ClassGradient
    dintersections: ClassGradient
    dprobability_sums: ClassGradient
    dsquares: ClassGradient


class PixelsOfLanes(NamedTuple):
    """The pixels of a program's lanes."""

    image: Any
    logits: Any  # Logits of the image
    lanes: Any
    labels: Any  # of each pixel of a lane, −1 if ignored
    c: Any  # −log p_y, 0 where ignored
    lse: Any


class ClassValues(NamedTuple):
    """What the gradient of a class needs, for each of its pixels. It is loaded before the
    probabilities of the class are computed, so that nothing waits for it."""

    dprobability_sum: Any
    dsquare: Any
    all_weight: Any  # v_k of loss_options.py


class Terms(NamedTuple):
    """What is the same for all classes."""

    factors: Any  # of each pixel, for p_k
    alphas: Any  # of each pixel
    beta: Any  # the transpose of β
    classes: Any  # of the labels: classes_of


@triton.jit
def _class_value(gradient, image, k):
    """The number of a class; 0 if there is no gradient."""
    if gradient.ptr is None:
        return 0.0
    else:
        ptr = gradient.ptr + image * gradient.stride_b
        return tl.load(ptr + tl.cast(k, tl.int64) * gradient.stride_k)


@triton.jit
def _class_values(k, gradients, loss_options, image):
    return ClassValues(
        _class_value(gradients.dprobability_sums, image, k),
        _class_value(gradients.dsquares, image, k),
        weight_of_all(k, loss_options, image),
    )


@triton.jit
def _add_of_labels(x, gradient, weight_map, pixels, CELLS: tl.constexpr):
    """x + w · the number of the class of each pixel."""
    if gradient.ptr is None:
        return x
    else:
        image, _, lanes, labels, _, _ = pixels
        ptr = gradient.ptr + image * gradient.stride_b
        added = values_of_labels(ptr, gradient.stride_k, labels)
        if weight_map.ptr is not None:
            weights = load_map(weight_map, image, lanes, labels, CELLS)
            added = [weights[i] * added[i] for i in () + CELLS.columns]
        return [x[i] + added[i] for i in () + CELLS.columns]


@triton.jit
def _add_map(x, pixel_map, pixels, CELLS: tl.constexpr):
    """x + the number of each pixel."""
    if pixel_map.ptr is None:
        return x
    else:
        added = load_map(pixel_map, pixels.image, pixels.lanes, pixels.labels, CELLS)
        return [x[i] + added[i] for i in () + CELLS.columns]


@triton.jit
def _subtract_intersections(x, gradients, pixels, CELLS: tl.constexpr):
    """x − p_y·dintersections[y]"""
    if gradients.dintersections.ptr is None:
        return x
    else:
        ptr = gradients.dintersections.ptr + pixels.image * gradients.dintersections.stride_b
        dintersections = values_of_labels(ptr, gradients.dintersections.stride_k, pixels.labels)
        p = [probability(0.0, c) for c in pixels.c]
        return [tl.fma(-p[i], dintersections[i], x[i]) for i in () + CELLS.columns]


@triton.jit
def _subtract_all_classes(x, gradients, pixels, CELLS: tl.constexpr):
    """x − Σ_j p_j·(dprobability_sums[j] + 2·p_j·dsquares[j])"""
    if gradients.dprobability_sums.ptr is not None or gradients.dsquares.ptr is not None:
        image, logits, lanes, _, _, lse = pixels
        ptrs = corner_ptrs(logits.ptr, lanes, CELLS)
        stored = loaded(ptrs)
        for k in range(logits.num_classes):
            p = probabilities(corners_of(stored, CELLS), lse, lanes, CELLS)
            ptrs = following(ptrs, k, logits, CELLS)
            stored = loaded(ptrs)
            dprobability_sum = _class_value(gradients.dprobability_sums, image, k)
            dsquare = 2 * _class_value(gradients.dsquares, image, k)
            x = [
                tl.fma(-p[i], tl.fma(p[i], dsquare, dprobability_sum), x[i])
                for i in () + CELLS.columns
            ]
    return x


@triton.jit
def _valid_cells(four, labels, CELLS: tl.constexpr):
    """The four logits of a cell, 0 if all of its pixels are ignored, because p·0 of NaN is NaN."""
    if CELLS.x.select:
        return four
    else:
        valid = tl.max(largest_label(labels), ROW_AXIS, keep_dims=True) >= 0
        return [tl.where(valid, x, 0.0) for x in four]


@triton.jit
def _pixel_gradients(
    k, p, values, terms, gradients, pixels, BY_PIXEL: tl.constexpr, CELLS: tl.constexpr
):
    """dz_k of each pixel, except for β·v_k."""
    factors, alphas, _, classes = terms
    image, labels = pixels.image, pixels.labels
    twice_dsquare = 2 * values.dsquare
    dz = ()
    for i in tl.static_range(len(p)):
        factor = factors[i]
        if gradients.dprobability_sums.ptr is not None:
            factor += values.dprobability_sum
        if gradients.dsquares.ptr is not None:
            factor = tl.fma(p[i], twice_dsquare, factor)
        gradient = p[i] * factor
        if CELLS.x.select:  # p of an ignored pixel may be NaN
            gradient = tl.where(labels[i] >= 0, gradient, 0.0)
        dz = dz + (gradient,)
    if may_have(classes, k):
        alpha = _class_value(gradients.dlosses, image, k)
        dintersection = _class_value(gradients.dintersections, image, k)
        of_label = ()
        for i in tl.static_range(len(p)):
            label_term = alphas[i] if BY_PIXEL else alpha
            if gradients.dintersections.ptr is not None:
                label_term = tl.fma(p[i], -dintersection, label_term)
            of_label = of_label + (tl.where(labels[i] == k, dz[i] - label_term, dz[i]),)
        dz = of_label
    return dz


@triton.jit
def _class_gradient(
    k, p, values, terms, gradients, pixels, cells, axes, loss_options,
    BY_PIXEL: tl.constexpr, CELLS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of the logits of class k."""
    dz = _pixel_gradients(k, p, values, terms, gradients, pixels, BY_PIXEL, CELLS)
    gradient = transposed(dz, pixels.lanes, cells, axes, CELLS, TILE)
    return subtract_weighted(gradient, terms.beta, values.all_weight, loss_options)


@triton.jit(
    do_not_specialize=(
        *(*SIZES, *LOGITS, *LABELS, *DLOGITS, "tiles_y", "tiles_x"),
        *(*strides_of("dpixel_losses", "bhw"), *strides_of("weights", "bhw")),
    )
)
def _softmax_moments_bwd_kernel(
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
    lse_ptr,  # float32 [B, H, W], contiguous
    gradients,  # Gradients
    dpixel_losses_ptr,  # float32 [B, H, W], or None
    dpixel_losses_b,
    dpixel_losses_h,
    dpixel_losses_w,
    loss_options,  # LossOptions
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
    weights_ptr,  # float32 [B, H, W], or None
    weights_b,
    weights_h,
    weights_w,
    CELLS: tl.constexpr,
    TILE: tl.constexpr,
    BY_PIXEL: tl.constexpr,  # whether α depends on more than the class of a pixel
    BY_CLASS: tl.constexpr,  # whether dz depends on p in other ways than p·factor
):
    """Reads the logits of a tile and its edge from memory once, and from the caches for each loop
    over the classes and for neighbours. Reads labels, lse and maps once, except at the edge. Writes
    dlogits once."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    program = program_of(tiles_y, tiles_x, TILE)
    image = program.image
    logits = Logits(logits_ptr, num_classes, logits_b, logits_k, logits_h, logits_w)
    logits = logits_of_image(logits, image)
    lanes = lanes_of_program(program, axes, logits, CELLS, TILE)
    label_map = PixelMap(labels_ptr, labels_b, labels_h, labels_w)
    labels = load_labels(label_map, image, lanes, num_classes, ignore_index, CELLS)
    lse = load_map(contiguous_map(lse_ptr, axes), image, lanes, labels, CELLS)
    ptrs = corner_ptrs(logits.ptr, lanes, CELLS)
    c = losses_of_labels(logits, ptrs, lse, lanes, labels, CELLS)  # left out if nothing reads it
    pixels = PixelsOfLanes(image, logits, lanes, labels, c, lse)

    d = [tl.zeros(label.shape, tl.float32) for label in labels]
    dpixel_losses = PixelMap(dpixel_losses_ptr, dpixel_losses_b, dpixel_losses_h, dpixel_losses_w)
    d = _add_map(d, dpixel_losses, pixels, CELLS)
    weight_map = PixelMap(weights_ptr, weights_b, weights_h, weights_w)
    d = _add_of_labels(d, gradients.dlosses, weight_map, pixels, CELLS)
    alphas, betas = slopes_of_losses(
        d, c, logits, lanes, labels, lse, loss_options, image, weights_ptr is not None, CELLS
    )
    alphas = [tl.where(labels[i] >= 0, alphas[i], 0.0) for i in () + CELLS.columns]
    factors = add_sum_of_weights(alphas, betas, loss_options, image, CELLS)
    factors = _subtract_intersections(factors, gradients, pixels, CELLS)
    factors = _subtract_all_classes(factors, gradients, pixels, CELLS)
    cells = cells_of_program(program, lanes, CELLS, TILE)
    beta = betas
    if loss_options.all_weights is not None:
        beta = transposed(betas, lanes, cells, axes, CELLS, TILE)

    dlogits = Logits(dlogits_ptr, num_classes, dlogits_b, dlogits_k, dlogits_h, dlogits_w)
    dptrs, written = gradient_ptrs(dlogits, program, cells, axes, dlogits_block, CELLS)
    factors = [tl.where(labels[i] >= 0, factors[i], 0.0) for i in () + CELLS.columns]
    terms = Terms(factors, alphas, beta, classes_of(labels))
    by_pixel = True
    if CELLS.x.even:
        shift, spread = shift_of_lane([x * LOG2_E for x in lse], labels)
        scales = scales_of([tl.fma(x, LOG2_E, shift) for x in lse], labels, CELLS)
        terms_of_rows = terms
        if not BY_CLASS:  # p·factor as e^(z − m)·(e^(m − lse)·factor)
            terms_of_rows = Terms(products(scales, factors, CELLS), alphas, beta, terms.classes)
        stored = loaded(ptrs)
        for k in range(num_classes):
            four = corners_of(stored, CELLS)
            ptrs = following(ptrs, k, logits, CELLS)
            stored = loaded(ptrs)
            values = _class_values(k, gradients, loss_options, image)
            p, spread = exponentials_of_lane(four, LOG2_E, shift, spread, lanes, CELLS)
            if BY_CLASS:
                p = products(p, scales, CELLS)
            gradient = _class_gradient(
                k, p, values, terms_of_rows, gradients, pixels, cells, axes, loss_options,
                BY_PIXEL, CELLS, TILE,
            )  # fmt: skip
            tl.store(dptrs, gradient.to(dlogits_ptr.dtype.element_ty), mask=written)
            dptrs = at_pixels(dptrs, dlogits_k, CELLS)
        LIMIT: tl.constexpr = _LARGEST_SPREAD_BY_CLASS if BY_CLASS else LARGEST_SPREAD_OF_GRADIENT
        by_pixel = any_of(~(spread <= LIMIT))
        # Back to class 0, because pointers that are kept need registers: ptrs from the last class,
        # dptrs from behind it, which is one step more than (n − 1).
        ptrs = at_first_class(ptrs, logits, CELLS)
        dptrs = at_pixels(dptrs, -(num_classes - 1).to(tl.int64) * dlogits_k - dlogits_k, CELLS)
    if by_pixel:
        lse = load_again(lse_ptr, image, axes, lanes, labels, CELLS)
        stored = loaded(ptrs)
        for k in range(num_classes):
            four = _valid_cells(corners_of(stored, CELLS), labels, CELLS)
            ptrs = following(ptrs, k, logits, CELLS)
            stored = loaded(ptrs)
            values = _class_values(k, gradients, loss_options, image)
            p = probabilities(four, lse, lanes, CELLS)
            gradient = _class_gradient(
                k, p, values, terms, gradients, pixels, cells, axes, loss_options,
                BY_PIXEL, CELLS, TILE,
            )  # fmt: skip
            tl.store(dptrs, gradient.to(dlogits_ptr.dtype.element_ty), mask=written)
            dptrs = at_pixels(dptrs, dlogits_k, CELLS)


def _by_class(gradient: Tensor | None) -> ClassGradient:
    if gradient is None:
        return ClassGradient(None, 0, 0)
    stride_b, stride_k = (0, 0, *gradient.stride())[-2:]
    return ClassGradient(gradient, stride_b, stride_k)


def softmax_moments_backward(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    dlosses: Tensor | None,
    dintersections: Tensor | None,
    dprobability_sums: Tensor | None,
    dsquares: Tensor | None,
    dpixel_losses: Tensor | None,
    options: Any,
) -> Tensor:
    """See _ops/softmax_moments.py; options: Options of _moments.py.

    In addition to the gradient it needs memory for copies of logits and gradient, if classes are
    contiguous. If cells have more than MOST_PARTS parts along an axis, it needs a float32 gradient
    for each block of parts: 4·K bytes for every 32 × 32 pixels, or 16 × 16.
    """
    dlogits = torch.empty_like(logits)
    if labels.numel() == 0:
        return dlogits.zero_()
    logits = class_planes(logits)
    loss_options = loss_options_of(options)
    by_class = any(x is not None for x in (dintersections, dprobability_sums, dsquares))
    rows = loss_options.most_rows(by_class)
    weights = options.pixel_weights if dlosses is not None else None
    lse = lse.contiguous()
    maps = labels, lse, dpixel_losses, weights
    upsampling = upsampling_of(logits, *labels.shape[1:], options.align_corners, rows, maps=maps)
    by_pixel = dpixel_losses is not None or weights is not None
    more_registers = by_class or by_pixel or loss_options.change_losses
    tiles = tiles_of(upsampling, more_registers)
    gradients = gradients_of_blocks(dlogits, tiles.blocks)
    _softmax_moments_bwd_kernel[(len(logits) * tiles.down * tiles.across * tiles.blocks,)](
        logits,
        *logits.stride(),
        logits.shape[1],
        labels,
        *labels.stride(),
        lse,
        Gradients(*map(_by_class, (dlosses, dintersections, dprobability_sums, dsquares))),
        *pixel_map_of(dpixel_losses),
        loss_options,
        gradients,
        *gradients.stride(),
        *upsampling.sizes,
        upsampling.ratios,
        tiles.down,
        tiles.across,
        options.ignore_index,
        *pixel_map_of(weights),
        CELLS=upsampling.cells,
        TILE=tiles.tile,
        BY_PIXEL=by_pixel or loss_options.change_losses or not by_class,
        BY_CLASS=by_class,
        num_warps=tiles.lanes // 32,
        enable_fp_fusion=False,  # coordinates as in F.interpolate
        # two programs on a multiprocessor, if they do not spill
        **registers(128 if upsampling.cells.y.even and not more_registers else 255),
    )
    return sum_of_blocks(gradients, dlogits)
