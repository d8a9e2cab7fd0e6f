"""Masks of instances as run lengths, from low-resolution logits."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._backend import chosen_backend, select
from .._checks import (
    check_flags,
    check_floating,
    check_not_empty,
    check_size,
    check_strided,
    check_threshold,
    describe,
    fail,
)
from .._libraries import unusable
from .._torch_state import in_transform
from .registration import define, run
from .triton_launch import launcher


def _fake_codes(changes: Tensor, offsets: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """All on the CPU. The results are those of `reference.mask_codes`."""
    characters = torch.library.get_ctx().new_dynamic_size()
    return changes.new_empty(characters, dtype=torch.uint8), torch.empty_like(offsets)


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """Logits (N, h, w) of any strides, boxes on the CPU. The results are those of
    `reference.mask_rle`; the codes are on the CPU, areas and boxes with the logits."""
    count = logits.shape[0]
    characters = torch.library.get_ctx().new_dynamic_size()
    return (
        logits.new_empty(characters, dtype=torch.uint8, device="cpu"),
        logits.new_empty(count + 1, dtype=torch.int64, device="cpu"),
        logits.new_empty(count, dtype=torch.int64),
        logits.new_empty((count, 4), dtype=torch.int64),
    )


_launch = launcher("mask_rle")


def _triton(
    logits: Tensor, height: int, width: int, threshold: float, *options: Any
) -> tuple[Tensor, ...]:
    """Triton finds the pixels at which the masks change; the CPU writes their codes."""
    level = math.log(threshold) - math.log1p(-threshold)
    changes, offsets, *of_masks = _launch(logits, height, width, level, *options)
    compiled = unusable()["cpu"] is None
    encode = torch.ops.anchorops.mask_codes.cpu if compiled else reference.mask_codes
    return *encode(changes.cpu(), offsets, height * width), *of_masks


define(
    "mask_codes",
    "(Tensor changes, Tensor offsets, SymInt pixels) -> (Tensor, Tensor)",
    _fake_codes,
    backends=("cpu",),
)
define(
    "mask_rle",
    "(Tensor logits, SymInt height, SymInt width, float threshold, Tensor? boxes, "
    "bool align_corners) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    triton=_triton,
    any_strides=True,
)


class MaskRLE:
    """N masks of one size as run lengths: what `mask_rle` returns. The codes are on the CPU.

    It can be pickled. len(masks) is N. masks[i], masks[i:j], and masks[x] of a tensor of numbers or
    bools, are MaskRLEs of these masks, or raise IndexError; they own their memory. `size` is
    (H, W).
    """

    def __init__(self, size: tuple[int, int], results: Sequence[Tensor]) -> None:
        self.size = size
        self._characters, self._offsets, self._areas, self._boxes = results

    def coco(self, compressed: bool = True) -> list[dict[str, Any]]:
        """[{"size": [H, W], "counts": …}, …], as pycocotools.mask.encode, but the counts are str,
        which json takes, where pycocotools has bytes. It takes both. With compressed=False they are
        lists of ints, the lengths of runs in the order of the columns: of zeros, ones, zeros, …"""
        check_flags("MaskRLE.coco", compressed=compressed)
        if not compressed:
            return [{"size": [*self.size], "counts": counts.tolist()} for counts in self._counts()]
        text = self._characters.numpy().tobytes().decode("ascii")
        ends = self._offsets.tolist()
        codes = (text[a:b] for a, b in pairwise(ends))
        return [{"size": [*self.size], "counts": code} for code in codes]

    def areas(self) -> Tensor:
        """The number of pixels of each mask, int64 [N], on the device of the logits."""
        return self._areas.clone()

    def boxes(self) -> Tensor:
        """x0, y0, x1, y1 of the pixels of each mask, int64 [N, 4], on the device of the logits; x1
        and y1 are exclusive. Zeros for an empty mask."""
        return self._boxes.clone()

    def dense(self) -> Tensor:
        """The masks, bool [N, H, W], on the CPU."""
        height, width = self.size
        masks = torch.empty((len(self), height, width), dtype=torch.bool, device="cpu")
        for mask, counts in zip(masks, self._counts(), strict=True):
            ones = torch.arange(len(counts), device="cpu") % 2 == 1
            mask.copy_(ones.repeat_interleave(counts).view(width, height).T)
        return masks

    def _counts(self) -> list[Tensor]:
        codes = self._characters.split(self._offsets.diff().tolist())
        return [_decode(code) for code in codes]

    def __len__(self) -> int:
        return len(self._areas)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "MaskRLE":
        if isinstance(index, Tensor):
            index = index.cpu()
        try:
            # torch is about to read a sequence of sequences, as a str is, in another way
            several = isinstance(index, Sequence) and len(index) > 0
            numbers = torch.tensor(index, device="cpu") if several else index
            chosen = torch.arange(len(self), device="cpu")[numbers].flatten()
        except (IndexError, TypeError, ValueError) as error:  # ValueError: a negative step
            problem = f"expected indices of {len(self)} masks, got {describe(index)}"
            raise type(error)(f"MaskRLE: index: {problem}") from None
        begins, ends = self._offsets[chosen].tolist(), self._offsets[chosen + 1].tolist()
        codes = [self._characters[a:b] for a, b in zip(begins, ends, strict=True)]
        characters = torch.cat([self._characters[:0], *codes])
        offsets = F.pad(self._offsets.diff()[chosen].cumsum(0), (1, 0))
        results = characters, offsets, self._areas[chosen], self._boxes[chosen]
        return MaskRLE(self.size, results)

    def __repr__(self) -> str:
        return f"MaskRLE({len(self)} masks of {self.size[0]} × {self.size[1]})"


@torch.compiler.disable(reason="the size of the result depends on the data")
def mask_rle(
    logits: Tensor,
    size: Sequence[int],
    *,
    threshold: float = 0.5,
    boxes: Tensor | None = None,
    align_corners: bool = False,
) -> MaskRLE:
    """The masks sigmoid(upsampled logits) > threshold as run lengths, as COCO stores them.

    Equal to F.interpolate(logits.float()[None], size, mode="bilinear",
    align_corners=align_corners)[0].sigmoid() > threshold, except for rounding where both are almost
    equal, and to `pixel_argmax` with `sigmoid`. Neither upsampled logits nor masks of all pixels
    are stored: time and memory are those of the borders of the masks. The codes of all backends but
    the reference are the same.

    On a GPU the call synchronises once, for the number of runs, and then copies the runs to the
    CPU, which writes the codes. Where "auto" finds that `triton` cannot serve (float64, a GPU of a
    compute capability below 7.5, other devices), it copies the logits to the CPU, and takes `cpu`,
    not `reference`. The size of the result depends on the data, so torch.compile breaks the graph
    at the call, and it is not for CUDA graphs, torch.export and torch.vmap. Logits are detached.

    Args:
        logits: (N, h, w), any strides; float32, bfloat16, float16 or float64.
        size: (H, W) of the masks, at most 2²³ each: a sequence or an array.
        threshold: of the probability, in (0, 1). NaN is above it.
        boxes: (N, 4), of any real dtype: x0, y0, x1, y1 in pixels of the masks. Pixel (y, x) is
            inside if x0 ≤ x < x1 and y0 ≤ y < y1; the others are 0, and are not visited. What is
            beyond the image is cut off; a box with x1 ≤ x0 or y1 ≤ y0 is empty. Boxes of a GPU are
            first copied to the CPU, which synchronises once more.
        align_corners: as in F.interpolate.

    Returns:
        A `MaskRLE`. If H or W is 0, its masks are empty.

    Raises:
        ValueError: wrong shape, dtype, size, threshold or box; NaN in a box; a chosen backend that
            does not support the call.
    """
    function = "mask_rle"
    check_floating(function, "logits", logits, (3,), "(N, h, w)")
    if in_transform(logits):
        fail(function, "logits", "a tensor outside of torch.func", "one of a transform")
    height, width = check_size(function, size)
    for argument, shape in (("size", (height, width)), ("logits", logits.shape[1:])):
        if max(shape) > 2**23:  # pixel + 1/2 must be exact
            fail(function, argument, "axes of at most 2^23", tuple(shape))
    check_not_empty(function, "logits", logits, len(logits) * height * width, "mask")
    threshold = check_threshold(function, threshold)
    check_flags(function, align_corners=align_corners)
    limits = None if boxes is None else _pixels_inside(boxes, len(logits), height, width)
    logits, device = logits.detach(), logits.device
    without_triton = chosen_backend() == "auto" and unusable()["triton"] is not None
    if device.type != "cpu" and (without_triton or select(function, logits, 1) == "reference"):
        logits = logits.cpu()
    backend = select(function, logits, 1)
    if backend == "reference":
        results = reference.mask_rle(logits, (height, width), threshold, limits, align_corners)
    else:
        arguments = logits, height, width, threshold, limits, align_corners
        results = run("mask_rle", backend, *arguments)
    characters, offsets, areas, own_boxes = results
    return MaskRLE((height, width), (characters, offsets, areas.to(device), own_boxes.to(device)))


def _pixels_inside(boxes: Tensor, count: int, height: int, width: int) -> Tensor:
    """The ranges of pixels in the boxes, cut to the image: int64 [N, 4], on the CPU."""
    check_strided("mask_rle", "boxes", boxes)
    if not isinstance(boxes, Tensor) or boxes.shape != (count, 4):
        fail("mask_rle", "boxes", f"a tensor ({count}, 4), as logits", describe(boxes))
    if boxes.is_complex() or boxes.dtype == torch.bool:
        fail("mask_rle", "boxes", "a real dtype", boxes.dtype)
    limits = boxes.detach().to("cpu", torch.float64)
    if limits.isnan().any():
        fail("mask_rle", "boxes", "numbers", f"NaN in box {limits.isnan().any(1).nonzero()[0, 0]}")
    most = limits.new_tensor([width, height, width, height])
    return limits.ceil().clamp(min=0).minimum(most).long()


def _decode(characters: Tensor) -> Tensor:
    """The lengths of the runs of one mask, int64."""
    bits = characters.long() - 48
    last = bits < 32
    number = last.cumsum(0) - last.long()  # to which a character belongs
    begin = torch.cat([last.new_ones(1), last[:-1]]).nonzero()[:, 0]
    shift = 5 * (torch.arange(len(bits), device=bits.device) - begin[number])
    numbers = bits.new_zeros(len(begin)).index_add(0, number, (bits & 31) << shift)
    numbers -= (bits[last] & 16) << shift[last] + 1
    for first in (1, 2):
        numbers[first::2] = numbers[first::2].cumsum(0)
    return numbers
