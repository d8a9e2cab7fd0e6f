"""Masks of instances, and their loss."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import anchorops as ao

from . import formulas
from .entry import Entry, Inputs, Sample, of_options, small
from .inputs import F32, in_layout, normal, uniform
from .pixels import MOMENTS, Loss, Pixels


class Masks(NamedTuple):
    """Mask logits (N, h, w), and boxes x0, y0, x1, y1 in units of h and w."""

    logits: tuple[int, int, int] = (5, 12, 17)
    layout: str = "planes"
    dtype: torch.dtype = F32
    boxes: bool = False

    def __call__(self, n: int, random: Generator) -> Inputs:
        count, h, w = self.logits
        z = 2 * normal(1, count, n * h, n * w, random=random)
        z[0, -1] = -1.0  # an empty mask
        logits = in_layout(z.to(self.dtype), self.layout)[0]
        if not self.boxes:
            return {"logits": logits}
        boxes = uniform(count, 4, random=random) * torch.tensor([w / 2, h / 2, w, h], device="cpu")
        boxes[0] = torch.tensor([0, 0, w, h])
        return {"logits": logits, "boxes": n * boxes}


def objects(n: int, random: Generator) -> Inputs:
    """The mask logits of 20 ellipses, of a fifth to three fifths of the image's sides."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, 96 * n, device="cpu")] * 2, indexing="ij")
    centers, radii = uniform(2, 20, 1, 1, random=random), uniform(2, 20, 1, 1, random=random)
    radii = 0.1 + 0.2 * radii
    distances = ((y - centers[0]) / radii[0]) ** 2 + ((x - centers[1]) / radii[1]) ** 2
    return {"logits": 10 - 10 * distances}


def _size(logits: Tensor, ratios: Sequence[float]) -> list[int]:
    return [int(n * ratio) for n, ratio in zip(logits.shape[1:], ratios, strict=True)]


def _extents(pixels: Tensor) -> Tensor:
    """x0, y0, x1, y1 of the pixels of each mask; zeros if there are none."""
    ends = []
    for axis in (1, 2):
        some = pixels.any(axis).int()
        ends.append((some.argmax(1), some.shape[1] - some.flip(1).argmax(1)))
    boxes = torch.stack([begin for begin, _ in ends] + [end for _, end in ends], 1)
    return boxes * pixels.any(2).any(1)[:, None]


def ours(
    logits: Tensor,
    ratios: Sequence[float],
    boxes: Tensor | None = None,
    threshold: float = 0.5,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Pixels may differ where z is almost the threshold: z above it, 0 elsewhere, then does not.
    And whether areas and boxes are those of the pixels."""
    size = _size(logits, ratios)
    z = _above(logits.double(), size, threshold, **options)
    logits, options = logits.detach(), options | {"threshold": threshold}
    boxes = None if boxes is None else boxes.detach() * boxes.new_tensor([*ratios[::-1]] * 2)
    masks = ao.mask_rle(logits, size, boxes=boxes, **options)
    pixels = masks.dense().to(logits.device)
    areas = masks.areas() == pixels.sum((1, 2))
    return z.where(pixels, 0), areas, (masks.boxes() == _extents(pixels)).all(1)


def formula(
    logits: Tensor,
    ratios: Sequence[float],
    boxes: Tensor | None = None,
    threshold: float = 0.5,
    **options: Any,
) -> tuple[Tensor, ...]:
    size = _size(logits, ratios)
    z = _above(logits, size, threshold, **options).clamp(min=0)
    if boxes is not None:
        y, x = (torch.arange(n, device=logits.device) for n in size)
        x0, y0, x1, y1 = boxes.detach()[:, :, None].unbind(1)
        rows = (y >= ratios[0] * y0) & (y < ratios[0] * y1)
        columns = (x >= ratios[1] * x0) & (x < ratios[1] * x1)
        z = z.where(rows[:, :, None] & columns[:, None], 0)
    right = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    return z, right, right


def _above(logits: Tensor, size: list[int], threshold: float, **options: Any) -> Tensor:
    z = formulas.upsampled(logits.detach()[None], size, **options)[0]
    return z - math.log(threshold / (1 - threshold))


def matched(n: int, random: Generator) -> Inputs:
    """Logits of five masks, and their labels."""
    pixels = Pixels(1, (3, 5), (12, 20), sigmoid=True, half=True, batch=5)
    return {name: x[:, 0] for name, x in pixels(n, random).items()}


def mask_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ce_weight: float = 1.0,
    focal_alpha: float | None = None,
    focal_gamma: float = 0.0,
    align_corners: bool = False,
) -> Tensor:
    """The formula of ao.MaskLoss."""
    z = formulas.upsampled(logits[:, None], labels.shape[1:], align_corners)[:, 0]
    p, y, valid = z.sigmoid(), (labels == 1).to(z), labels >= 0
    losses = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    losses = losses * (p * (1 - y) + (1 - p) * y).clamp(min=2.0**-24) ** focal_gamma
    if focal_alpha is not None:
        losses = losses * (focal_alpha * y + (1 - focal_alpha) * (1 - y))
    ce, o, m, c, pixels = (
        torch.where(valid, x, 0).sum((1, 2)) for x in (losses, p * y, p, y, torch.ones_like(y))
    )
    losses = ce_weight * ce / pixels.clamp(min=1) + 1 - (2 * o + 1) / (m + c + 1)
    return losses.sum() / max(len(logits), 1)


ENTRIES = [
    Entry(
        "mask_rle",
        ("mask_rle",),
        ours,
        formula,
        (
            Sample("masks", Masks(), {"ratios": (4, 4)}, ("all", "quick", "kernels")),
            Sample("masks in boxes", Masks(boxes=True), {"ratios": (4, 2)}, ("all",)),
            Sample(
                "masks, bfloat16, aligned",
                Masks(layout="cropped", dtype=torch.bfloat16),
                {"ratios": (3.3, 2.7), "align_corners": True, "threshold": 0.3},
                ("all",),
            ),
            Sample(
                "masks, float16, fewer rows",
                Masks(layout="channels last", dtype=torch.float16),
                {"ratios": (0.4, 1)},
                ("all",),
            ),
        ),
        differentiable=False,
    ),
    Entry(
        "MaskLoss",
        MOMENTS,
        Loss(ao.MaskLoss),
        mask_loss,
        (
            small("MaskLoss", matched, ce_weight=20.0, focal_alpha=0.25, focal_gamma=2.0),
            *of_options("MaskLoss", matched, {"align_corners": True}, {"focal_alpha": 1.0}),
        ),
    ),
]
