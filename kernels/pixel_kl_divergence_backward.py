"""The gradient of the divergence of upsampled logits: the transpose of the upsampling
(upsampling_transposed.py), of

    ds_k = T·(e^(s_k − lse s) − e^(t_k − lse t))·(dtotal + dD),  0 where not valid
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import (
    PixelMap,
    contiguous_map,
    load_labels,
    load_map,
    pixel_map_of,
    probability,
)
from .launch import registers
from .pixel_kl_divergence import (
    TEACHER,
    VALID,
    all_or,
    teacher_lanes,
    teacher_logits,
    upsamplings_of,
)
from .upsampling import (
    LOGITS,
    SIZES,
    Logits,
    at_pixels,
    axes_of,
    class_planes,
    corner_ptrs,
    logits_of_image,
    logits_of_pixels,
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
    valid_ptr,  # uint8 [B, H, W]: 0 or 1
    valid_b,
    valid_h,
    valid_w,
    lse_ptr,  # float32 [B, H, W], contiguous; also the next one
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
    temperature,
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
    valid = load_labels(valid_map, image, lanes, 2, 0, CELLS)
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
    factors = [x * temperature for x in factors]

    inverse = 1 / temperature
    dlogits = Logits(dlogits_ptr, num_classes, dlogits_b, dlogits_k, dlogits_h, dlogits_w)
    dptrs, written = gradient_ptrs(dlogits, program, cells, axes, dlogits_block, CELLS)
    ptr, teacher_ptr = logits.ptr, teacher.ptr
    for _ in range(num_classes):
        s = logits_of_pixels(corner_ptrs(ptr, lanes, CELLS), lanes, CELLS)
        t = teacher_logits(teacher_ptr, lanes_of_teacher, CELLS, TEACHER_GRID)
        q = [probability(s[i] * inverse, lse[i]) for i in () + CELLS.columns]
        p = [probability(t[i] * inverse, teacher_lse[i]) for i in () + CELLS.columns]
        ds = [tl.where(valid[i] >= 0, (q[i] - p[i]) * factors[i], 0.0) for i in () + CELLS.columns]
        gradient = transposed(ds, lanes, cells, axes, CELLS, TILE)
        tl.store(dptrs, gradient.to(dlogits_ptr.dtype.element_ty), mask=written)
        ptr += logits_k
        teacher_ptr += teacher_k
        dptrs = at_pixels(dptrs, dlogits_k, CELLS)


def pixel_kl_divergence_backward(
    logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor | None,
    lse: Tensor,
    teacher_lse: Tensor,
    dtotal: Tensor | None,
    ddivergences: Tensor | None,
    temperature: float,
    align_corners: bool,
) -> Tensor:
    """See _ops/pixel_kl_divergence.py. Its memory is that of softmax_moments_backward."""
    dlogits = torch.empty_like(logits)
    if lse.numel() == 0:
        return dlogits.zero_()
    logits, teacher_logits = class_planes(logits), class_planes(teacher_logits)
    size = lse.shape[1:]
    upsamplings = upsamplings_of(logits, teacher_logits, *size, align_corners)
    tiles = tiles_of(upsamplings.student, more_registers=True)
    gradients = gradients_of_blocks(dlogits, tiles.blocks)
    _pixel_kl_divergence_bwd_kernel[(len(logits) * tiles.down * tiles.across * tiles.blocks,)](
        logits,
        *logits.stride(),
        logits.shape[1],
        teacher_logits,
        *teacher_logits.stride(),
        *pixel_map_of(all_or(valid, logits, *size)),
        lse.contiguous(),
        teacher_lse.contiguous(),
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
        **registers(255),
    )
    return sum_of_blocks(gradients, dlogits)
