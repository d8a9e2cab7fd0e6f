"""The gradient of the divergence of upsampled logits:

    ds_k = T·(e^(s_k − lse s) − e^(t_k − lse t))·(dtotal + dD),  0 where not valid

A program computes ds of the cells of a tile, and sums it with the weights of the logits around
them, as the gradient of softmax moments does.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import LOG2_E, load_labels, load_map, pixel_map_of
from .launch import MOST_PARTS, backward_lanes, registers
from .pixel_kl_divergence import (
    TEACHER_SIZES,
    all_or,
    grids_of,
    places_of_teacher,
    teacher_logits_of_pixels,
)
from .softmax_moments_backward import (
    Tile,
    _corner_gradients,
    _gathered,
    _lanes_of_program,
    of_cells,
)
from .upsampling import (
    SIZES,
    YX,
    axes_of,
    class_planes,
    classes_contiguous,
    logits_of,
    logits_of_image,
    logits_of_pixels,
)


@triton.jit(do_not_specialize=(*SIZES, *TEACHER_SIZES, "tiles_y", "tiles_x"))
def _pixel_kl_divergence_bwd_kernel(
    logits,  # Logits
    teacher,  # Logits
    valid_map,  # PixelMap of uint8: 0 or 1
    lse_map,  # PixelMap
    teacher_lse_map,  # PixelMap
    dtotal_ptr,  # float32 [], or None
    ddivergences_map,  # PixelMap
    dlogits,  # Logits, of the first block
    stride_dlogits_block,
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
    OWN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads both logits of a tile and its edge from memory once, and from the caches for
    neighbours. Reads maps once, except at the edge. Writes dlogits once."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    pid = tl.program_id(0) // (TILE.y.blocks * TILE.x.blocks)
    block = tl.program_id(0) % (TILE.y.blocks * TILE.x.blocks)
    image = (pid // (tiles_y * tiles_x)).to(tl.int64)
    row = pid // tiles_x % tiles_y * (TILE.y.cells - TILE.y.edge)
    column = pid % tiles_x * (TILE.x.cells - TILE.x.edge)
    logits, teacher = logits_of_image(logits, image), logits_of_image(teacher, image)
    lanes = _lanes_of_program(row, column, block, axes, logits, CELLS, TILE)
    same_lanes = _lanes_of_program(row, column, block, axes, teacher, CELLS, TILE)
    size = YX(teacher_height, teacher_width)
    places = places_of_teacher(teacher, lanes, same_lanes, axes, size, teacher_ratios, CELLS, OWN)
    valid = load_labels(valid_map, image, lanes, 2, 0, CELLS)
    lse = load_map(lse_map, image, lanes, valid, CELLS)
    teacher_lse = load_map(teacher_lse_map, image, lanes, valid, CELLS)

    factor = ()
    for i in tl.static_range(len(valid)):
        factor = factor + (tl.zeros(valid[i].shape, tl.float32),)
    if ddivergences_map.ptr is not None:
        factor = load_map(ddivergences_map, image, lanes, valid, CELLS)
    dtotal = 0.0
    if dtotal_ptr is not None:
        dtotal = tl.load(dtotal_ptr)

    slope = LOG2_E / temperature
    cell_y = row - TILE.y.edge + tl.arange(0, TILE.y.cells)[:, None]
    cell_x = column - TILE.x.edge + tl.arange(0, TILE.x.cells)[None, :]
    written = (cell_y >= row) & (cell_y < height) & (cell_x >= column) & (cell_x < width)
    dlogits_ptrs = logits_of_image(dlogits, image).ptr + block.to(tl.int64) * stride_dlogits_block
    dlogits_ptrs += cell_y.to(tl.int64) * dlogits.stride_h
    dlogits_ptrs += cell_x.to(tl.int64) * dlogits.stride_w
    ptr, teacher_ptr = logits.ptr, teacher.ptr
    for _ in range(logits.num_classes):
        s = logits_of_pixels(ptr, lanes, CELLS)
        t = teacher_logits_of_pixels(teacher_ptr, places, CELLS, OWN)
        ds = ()
        for i in tl.static_range(len(s)):
            q = tl.exp2(tl.fma(s[i], slope, -LOG2_E * lse[i]))
            p = tl.exp2(tl.fma(t[i], slope, -LOG2_E * teacher_lse[i]))
            gradient = (q - p) * ((factor[i] + dtotal) * temperature)
            ds = ds + (tl.where(valid[i] >= 0, gradient, 0.0),)
        if CELLS.y.same:
            gradient = of_cells(ds[0], TILE)
        else:
            gradient = _gathered(_corner_gradients(ds, lanes, width, CELLS), cell_y, height, TILE)
        tl.store(dlogits_ptrs, gradient.to(dlogits.ptr.dtype.element_ty), mask=written)
        ptr += logits.stride_k
        teacher_ptr += teacher.stride_k
        dlogits_ptrs += dlogits.stride_k


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
    batch, _, height, width = logits.shape
    label_height, label_width = lse.shape[1:]
    grids = grids_of(logits, teacher_logits, label_height, label_width, align_corners)
    upsampling = grids.student
    cells_y, cells_x = upsampling.cells
    blocks_y, blocks_x = (triton.cdiv(cells.parts, MOST_PARTS) for cells in (cells_y, cells_x))
    parts_y, parts_x = cells_y.parts // blocks_y, cells_x.parts // blocks_x
    edge = 0 if cells_y.same else 1

    def tiles(lanes: tuple[int, int]) -> tuple[int, int]:
        down = triton.cdiv(height, lanes[0] // parts_y - edge)
        return down, triton.cdiv(width, lanes[1] // parts_x - edge)

    shapes = backward_lanes(parts_y, parts_x, width if cells_y.same else 0, by_class=True)
    lanes_y, lanes_x = min(shapes, key=lambda lanes: prod(tiles(lanes)))
    tiles_y, tiles_x = tiles((lanes_y, lanes_x))
    blocks = blocks_y * blocks_x
    in_place = blocks == 1 and not classes_contiguous(dlogits)
    if in_place:
        gradients = dlogits[None]
    else:
        dtype = torch.float32 if blocks > 1 else logits.dtype
        gradients = logits.new_empty((blocks, *logits.shape), dtype=dtype)
    tile_y = Tile(lanes_y // parts_y, edge, parts_y, blocks_y)
    tile_x = Tile(lanes_x // parts_x, edge, parts_x, blocks_x)
    _pixel_kl_divergence_bwd_kernel[(batch * tiles_y * tiles_x * blocks,)](
        logits_of(logits),
        logits_of(teacher_logits),
        pixel_map_of(all_or(valid, logits, label_height, label_width)),
        pixel_map_of(lse),
        pixel_map_of(teacher_lse),
        dtotal,
        pixel_map_of(ddivergences),
        logits_of(gradients[0]),
        gradients.stride(0),
        *upsampling.sizes,
        *teacher_logits.shape[2:],
        upsampling.ratios,
        grids.ratios,
        tiles_y,
        tiles_x,
        temperature,
        CELLS=upsampling.cells,
        OWN=grids.own,
        TILE=YX(tile_y, tile_x),
        num_warps=lanes_y * lanes_x // 32,
        enable_fp_fusion=False,  # coordinates as in F.interpolate
        **registers(255),
    )
    if in_place:
        return dlogits
    return dlogits.copy_(gradients.sum(0) if blocks > 1 else gradients[0])
