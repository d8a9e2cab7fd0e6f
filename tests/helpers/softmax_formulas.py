"""Softmax moments by torch's formulas, and the allowed error.

The error against float64 is at most twice that of torch's formula in the dtype of the statistics
(F.interpolate, log_softmax, masked sums), plus a floor that each check states.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from cpu_kernels import in_layout
from torch import Tensor

import anchorops as ao
from anchorops.reference import statistics_dtype

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EVERYTHING = {"squares": True, "pixel_losses": True, "lse": True}


class Case(NamedTuple):
    size: tuple[int, int]  # of the logits
    label_size: tuple[int, int]
    num_classes: int
    dtype: torch.dtype = F32
    align_corners: bool = False
    layout: str = "contiguous"
    labels: str = "random"
    scale: float = 3.0  # of the logits
    per_image: bool = False
    batch: int = 2


def make_logits(case: Case) -> tuple[Tensor, Tensor]:
    """Random logits of this layout, and their buffer, which is NaN around them."""
    size = (case.batch, case.num_classes, *case.size)
    values = (torch.randn(size, dtype=F64) * case.scale).to(case.dtype)
    return in_layout(values, case.layout)


def make_labels(case: Case) -> Tensor:
    """Random, or patches of 7 × 9 pixels, or one class; some ignored and some out of range."""
    shape = (case.batch, *case.label_size)
    labels = torch.randint(0, case.num_classes, shape)
    if case.labels == "coherent":
        labels = labels.repeat_interleave(7, 1).repeat_interleave(9, 2)[:, : shape[1], : shape[2]]
    elif case.labels == "one class":
        labels.fill_(case.num_classes - 1)
    elif case.labels == "ignored":
        labels.fill_(255)
    wrong = torch.tensor([255, -1, case.num_classes])[torch.randint(0, 3, shape)]
    return torch.where(torch.rand(shape) < 0.1, wrong, labels) if labels.numel() > 2 else labels


def unfused(case: Case, logits: Tensor, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """losses, overlaps, masses, squares, pixel_losses and lse by torch's formulas in this dtype,
    then counts and hits. Here also unread logits are multiplied by 0, so all must be finite."""
    z = F.interpolate(
        logits.to(dtype), case.label_size, mode="bilinear", align_corners=case.align_corners
    )
    valid = (labels >= 0) & (labels < case.num_classes) & (labels != 255)
    own = torch.where(valid, labels, 0)
    log_p = z.log_softmax(1)
    losses = -log_p.gather(1, own[:, None])[:, 0] * valid
    image = torch.arange(case.batch)[:, None, None] if case.per_image else 0
    keys = torch.where(valid, image * case.num_classes + own, -1)
    shape = (case.batch, case.num_classes) if case.per_image else (case.num_classes,)

    def by_class(values: Tensor) -> Tensor:
        sums = values.new_zeros(torch.Size(shape).numel() + 1)
        return sums.index_add(0, keys.flatten(), values.flatten())[:-1].view(shape)

    keys = torch.where(keys < 0, torch.Size(shape).numel(), keys)
    p = log_p.exp() * valid[:, None]
    axes = (2, 3) if case.per_image else (0, 2, 3)
    return [
        by_class(losses),
        by_class(p.gather(1, own[:, None])[:, 0]),
        p.sum(axes),
        p.square().sum(axes),
        losses,
        z.logsumexp(1) * valid,
        by_class(valid.long()),
        by_class((valid & (z.argmax(1) == own)).long()),
    ]


def fused(case: Case, logits: Tensor, labels: Tensor, **asked: bool) -> list[Tensor | None]:
    """The same by ao.ops.softmax_moments."""
    found = ao.ops.softmax_moments(
        logits,
        labels,
        ignore_index=255,
        align_corners=case.align_corners,
        per_image=case.per_image,
        **(EVERYTHING | asked),
    )
    return [*found[2:8], *found[:2]]


def weights_of(case: Case) -> list[Tensor]:
    """A gradient for each floating result."""
    by_class = (case.batch, case.num_classes) if case.per_image else (case.num_classes,)
    by_pixel = (case.batch, *case.label_size)
    dtype = statistics_dtype(case.dtype)
    return [torch.randn(shape, dtype=dtype) for shape in [by_class] * 4 + [by_pixel] * 2]


def check(case: Case, logits: Tensor, labels: Tensor, backend: str) -> None:
    dtype, weights = statistics_dtype(case.dtype), weights_of(case)
    results = []
    for function, x, of in (
        (lambda x: fused(case, x, labels), logits.detach(), backend),
        (lambda x: unfused(case, x, labels, F64), logits.double(), "auto"),
        (lambda x: unfused(case, x, labels, dtype), logits.to(dtype), "auto"),
    ):
        x = x.requires_grad_()
        with ao.use_backend(of):
            outputs = function(x)
            weighted = [w.to(y.dtype) for w, y in zip(weights, outputs, strict=False)]
            found = torch.autograd.grad(outputs[:6], x, weighted)  # pyright: ignore
            results.append([*outputs, *found])
    ours, exact, straightforward = results
    gradient, eps = ours[-1], torch.finfo(dtype).eps
    assert gradient.dtype == case.dtype
    if backend != "reference":
        assert gradient.stride() == torch.empty_like(logits).stride()
    assert torch.equal(ours[6], exact[6])
    # float64 is compared with sums in float64; an exponent is a difference of logits, rounded once
    spread = (logits.max() - logits.min()).item()
    floor_of_terms = eps * max(32 if dtype == F64 else 8, spread / 2)
    near_ties = (exact[7] - straightforward[7]).abs()
    assert ((ours[7] - exact[7]).abs() <= 1 + 2 * near_ties).all()
    for found, right, plain in zip(
        ours[:6] + ours[8:],
        exact[:6] + exact[8:],
        straightforward[:6] + straightforward[8:],
        strict=True,
    ):
        own = torch.finfo(found.dtype).eps
        floor = own * right.abs() + floor_of_terms * right.abs().max()
        error = (found.double() - right).abs()
        allowed = 2 * (plain.double() - right).abs().max() + floor
        assert (error <= allowed).all(), f"error {error.max():.3g}, allowed {allowed.max():.3g}"
