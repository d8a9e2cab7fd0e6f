"""The gradient of the divergence of upsampled logits: the transpose of the upsampling
(upsampling_transposed.py), of

    ds_k = T·(e^(s_k − lse s) − e^(t_k − lse t))·(dtotal + dD),  0 where not valid

of exponents to base 2 and lse·log2(e), which the forward pass keeps.

If lanes have rows of four equally spaced pixels, and the teacher's logits the student's size, the
exponentials are those of exponentials.py for such rows, as in softmax_moments_backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constants import LOG2_E
from .exponentials import (
    LARGEST_SPREAD_OF_GRADIENT,
    exponentials_of_lane,
    products,
    scales_of,
    shift_of_lane,
)
from .lanes import PixelMap, any_of, contiguous_map, load_again, load_map, pixel_map_of
from .launch import without_spills
from .pixel_kl_divergence import (
    TEACHER,
    VALID,
    exponents_of_both,
    load_valid,
    loaded_of_both,
    teacher_lanes,
    upsamplings_of,
    valid_map_of,
)
from .upsampling import (
    LOGITS,
    SIZES,
    Logits,
    at_pixels,
    axes_of,
    class_after,
    class_planes,
    corners_of,
    logits_of_image,
    strides_of,
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
def _of_valid(x, valid, CELLS: tl.constexpr):
    """0 where not valid."""
    return [tl.where(valid[i] >= 0, x[i], 0.0) for i in () + CELLS.columns]


@triton.jit
def _differences(q, scales, p, teacher_scales, CELLS: tl.constexpr):
    """q·scale − p·scale, both products rounded: 0 where student and teacher are equal."""
    return [q[i] * scales[i] - p[i] * teacher_scales[i] for i in () + CELLS.columns]


@triton.jit(
    do_not_specialize=(
        *(*SIZES, *LOGITS, *TEACHER, *VALID, *DLOGITS, "tiles_y", "tiles_x"),
        *strides_of("ddivergences", "bhw"),
    )
)
def _pixel_kl_divergence_bwd_kernel(
    logits_ptr,  # [B, K, h, w]
    logits_b,
    logits_k,
    logits_h,
    logits_w,
    num_classes,
    teacher_ptr,  # the same, of any size
    teacher_b,
    teacher_k,
    teacher_h,
    teacher_w,
    valid_ptr,  # uint8 [B, H, W]: 0 or 1, or None
    valid_b,
    valid_h,
    valid_w,
    lse_ptr,  # float32 [B, H, W], contiguous, to base 2; also the next one
    teacher_lse_ptr,
    dtotal_ptr,  # float32 [], or None
    ddivergences_ptr,  # float32 [B, H, W], or None
    ddivergences_b,
    ddivergences_h,
    ddivergences_w,
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
    teacher_height,
    teacher_width,
    ratios,
    teacher_ratios,
    tiles_y,
    tiles_x,
    temperature_ptr,  # float32 []
    CELLS: tl.constexpr,
    TEACHER_GRID: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads both logits of a tile and its edge from memory once, and from the caches for
    neighbours. Reads maps once, except at the edge. Writes dlogits once."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    program = program_of(tiles_y, tiles_x, TILE)
    image = program.image
    logits = Logits(logits_ptr, num_classes, logits_b, logits_k, logits_h, logits_w)
    teacher = Logits(teacher_ptr, num_classes, teacher_b, teacher_k, teacher_h, teacher_w)
    logits, teacher = logits_of_image(logits, image), logits_of_image(teacher, image)
    lanes = lanes_of_program(program, axes, logits, CELLS, TILE)
    lanes_of_teacher = teacher_lanes(
        teacher, lanes, axes, teacher_height, teacher_width, teacher_ratios, CELLS, TEACHER_GRID
    )
    cells = cells_of_program(program, lanes, CELLS, TILE)
    valid_map = PixelMap(valid_ptr, valid_b, valid_h, valid_w)
    valid = load_valid(valid_map, image, lanes, CELLS)
    lse = load_map(contiguous_map(lse_ptr, axes), image, lanes, valid, CELLS)
    teacher_lse = load_map(contiguous_map(teacher_lse_ptr, axes), image, lanes, valid, CELLS)

    factors = [tl.zeros(x.shape, tl.float32) for x in valid]
    if ddivergences_ptr is not None:
        ddivergences_map = PixelMap(
            ddivergences_ptr, ddivergences_b, ddivergences_h, ddivergences_w
        )
        factors = load_map(ddivergences_map, image, lanes, valid, CELLS)
    if dtotal_ptr is not None:
        dtotal = tl.load(dtotal_ptr)
        factors = [x + dtotal for x in factors]
    temperature = tl.load(temperature_ptr)
    factors = _of_valid([x * temperature for x in factors], valid, CELLS)

    log2e = LOG2_E / temperature
    dlogits = Logits(dlogits_ptr, num_classes, dlogits_b, dlogits_k, dlogits_h, dlogits_w)
    dptrs, written = gradient_ptrs(dlogits, program, cells, axes, dlogits_block, CELLS)
    ROWS_OF_FOUR: tl.constexpr = CELLS.x.even and CELLS.x.pixels == 4
    ROWS: tl.constexpr = ROWS_OF_FOUR if TEACHER_GRID is None else tl.constexpr(False)
    by_pixel = True
    if ROWS:
        shift, spread = shift_of_lane(lse, valid)
        teacher_shift, teacher_spread = shift_of_lane(teacher_lse, valid)
        spread = tl.maximum(spread, teacher_spread)
        scales = scales_of([x + shift for x in lse], valid, CELLS)
        scales = products(scales, factors, CELLS)
        teacher_scales = scales_of([x + teacher_shift for x in teacher_lse], valid, CELLS)
        teacher_scales = products(teacher_scales, factors, CELLS)
        ptr, teacher_ptr = logits.ptr, teacher.ptr
        stored = loaded_of_both(ptr, teacher_ptr, lanes, lanes_of_teacher, CELLS, None)
        for k in range(num_classes):
            four, teacher_four = corners_of(stored[0], CELLS), corners_of(stored[1], CELLS)
            ptr, teacher_ptr = class_after(ptr, k, logits), class_after(teacher_ptr, k, teacher)
            stored = loaded_of_both(ptr, teacher_ptr, lanes, lanes_of_teacher, CELLS, None)
            q, spread = exponentials_of_lane(four, log2e, shift, spread, lanes, CELLS)
            p, spread = exponentials_of_lane(
                teacher_four, log2e, teacher_shift, spread, lanes, CELLS
            )
            ds = _differences(q, scales, p, teacher_scales, CELLS)
            gradient = transposed(ds, lanes, cells, axes, CELLS, TILE)
            tl.store(dptrs, gradient.to(dlogits_ptr.dtype.element_ty), mask=written)
            dptrs = at_pixels(dptrs, dlogits_k, CELLS)
        by_pixel = any_of(~(spread <= LARGEST_SPREAD_OF_GRADIENT))
        dptrs = at_pixels(dptrs, -num_classes.to(tl.int64) * dlogits_k, CELLS)
    if by_pixel:
        if ROWS:
            lse = load_again(lse_ptr, image, axes, lanes, valid, CELLS)
            teacher_lse = load_again(teacher_lse_ptr, image, axes, lanes, valid, CELLS)
        ptr, teacher_ptr = logits.ptr, teacher.ptr
        stored = loaded_of_both(ptr, teacher_ptr, lanes, lanes_of_teacher, CELLS, TEACHER_GRID)
        for k in range(num_classes):
            s, t = exponents_of_both(
                stored, lanes, lanes_of_teacher, log2e, (0.0, 0.0), CELLS, TEACHER_GRID
            )
            ptr, teacher_ptr = class_after(ptr, k, logits), class_after(teacher_ptr, k, teacher)
            stored = loaded_of_both(ptr, teacher_ptr, lanes, lanes_of_teacher, CELLS, TEACHER_GRID)
            q = [tl.exp2(s[i] - lse[i]) for i in () + CELLS.columns]
            p = [tl.exp2(t[i] - teacher_lse[i]) for i in () + CELLS.columns]
            ds = [(q[i] - p[i]) * factors[i] for i in () + CELLS.columns]
            ds = _of_valid(ds, valid, CELLS)  # q and p may be NaN elsewhere
            gradient = transposed(ds, lanes, cells, axes, CELLS, TILE)
            tl.store(dptrs, gradient.to(dlogits_ptr.dtype.element_ty), mask=written)
            dptrs = at_pixels(dptrs, dlogits_k, CELLS)


def pixel_kl_divergence_backward(
    logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor | None,
    lse: Tensor,
    teacher_lse: Tensor,
    dtotal: Tensor | None,
    ddivergences: Tensor | None,
    temperature: Tensor,
    align_corners: bool,
) -> Tensor:
    """See _ops/pixel_kl_divergence.py. Its memory is that of softmax_moments_backward."""
    dlogits = torch.empty_like(logits)
    if lse.numel() == 0:
        return dlogits.zero_()
    logits, teacher_logits = class_planes(logits), class_planes(teacher_logits)
    size = lse.shape[1:]
    lse, teacher_lse = lse.contiguous(), teacher_lse.contiguous()
    maps = valid, lse, teacher_lse, ddivergences
    upsamplings = upsamplings_of(logits, teacher_logits, *size, align_corners, maps)
    tiles = tiles_of(upsamplings.student, more_registers=True)
    gradients = gradients_of_blocks(dlogits, tiles.blocks)
    _pixel_kl_divergence_bwd_kernel[(len(logits) * tiles.down * tiles.across * tiles.blocks,)](
        logits,
        *logits.stride(),
        logits.shape[1],
        teacher_logits,
        *teacher_logits.stride(),
        *valid_map_of(valid),
        lse,
        teacher_lse,
        dtotal,
        *pixel_map_of(ddivergences),
        gradients,
        *gradients.stride(),
        *upsamplings.arguments,
        tiles.down,
        tiles.across,
        temperature,
        CELLS=upsamplings.student.cells,
        TEACHER_GRID=upsamplings.teacher_grid,
        TILE=tiles.tile,
        num_warps=tiles.lanes // 32,
        enable_fp_fusion=False,  # coordinates as in F.interpolate
        **without_spills(),
    )
    return sum_of_blocks(gradients, dlogits)
