"""How far results are from float64, beside torch's formulas in float32.

    python bench/counted_precision.py [--out bench/results/counted-precision.json]

Two sections: values and gradients of pixel losses, and the gradient of `ao.Lovasz`, which rounds
errors to bins. On a CPU; a minute.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from operations import focal
from record import ROOT, save_counts
from torch import Tensor

import anchorops as ao
from anchorops.catalogue import usual
from anchorops.catalogue.formulas import sorted_loss

Function = Callable[..., Tensor]
SHAPES = (  # logits (B, K, h, w), and the size of the labels
    ((1, 2, 16, 16), (64, 64)),
    ((1, 2, 33, 33), (33, 33)),
    ((2, 3, 9, 21), (36, 84)),
    ((1, 5, 12, 7), (96, 56)),
    ((1, 7, 17, 17), (65, 65)),
    ((1, 19, 16, 32), (64, 128)),
    ((1, 19, 40, 24), (40, 24)),
    ((1, 21, 10, 14), (25, 51)),
    ((1, 40, 20, 20), (11, 13)),
    ((1, 150, 8, 8), (64, 64)),
)
ROUNDING = 2.0**-24  # of float32
SCALES, SEEDS = (1.0, 10.0, 100.0, 1e3, 1e4), 20  # of normal logits
CLASS_PIXELS, EXAMPLES, BINS = (1, 2, 7, 20, 50), 150, (1024, 8192)
NUM_CLASSES, PIXELS = 5, 4096  # of Lovász


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the classes that are present."""
    z = usual.upsampled(logits, labels)
    p, classes = z.softmax(1), F.one_hot(labels, z.shape[1]).movedim(-1, 1).to(z.dtype)
    counts, present = classes.sum((0, 2, 3)), classes.amax((0, 2, 3)) > 0
    scores = 2 * (p * classes).sum((0, 2, 3)) / (p.sum((0, 2, 3)) + counts)
    return 1 - scores[present].mean()


def squared(logits: Tensor, labels: Tensor, of: Function = usual.cross_entropy) -> Tensor:
    return of(logits, labels, reduction="none").square().mean()


LOSSES: dict[str, tuple[Function, Function]] = {
    "cross-entropy": (ao.pixel_cross_entropy, usual.cross_entropy),
    "squared cross-entropies": (partial(squared, of=ao.pixel_cross_entropy), squared),
    "Dice": (ao.Dice(), dice),
    "focal": (ao.CrossEntropy(focal_gamma=2.0), focal),
}


def with_gradient(loss: Function, logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def error(actual: Tensor, exact: Tensor, labels: int) -> float:
    """The largest error, divided by the largest entry of the exact result, at least by 1e-6, for a
    gradient by 1e-6 for each label: all pixels of smaller ones are saturated."""
    floor = 1e-6 / (labels if exact.dim() else 1)
    return float((actual - exact).abs().max() / exact.abs().max().clamp(min=floor))


def examples() -> Iterator[tuple[tuple[int, ...], tuple[int, int]]]:
    for (shape, size), seed in product(SHAPES, range(SEEDS)):
        torch.manual_seed(seed)
        yield shape, size


def rows_of_losses() -> Iterator[dict[str, Any]]:
    """For each loss and scale the number of results, of those whose error is more than twice
    torch's and more than 1e-6, and the largest such ratio, where torch's is at least ROUNDING."""
    for (name, losses), scale in product(LOSSES.items(), SCALES):
        pairs = []
        for shape, size in examples():
            logits, labels = scale * torch.randn(shape), torch.randint(shape[1], (1, *size))
            labels = labels.expand(shape[0], *size).contiguous()
            ours, formula = (partial(loss, labels=labels) for loss in losses)
            exact = with_gradient(formula, logits.double())
            both = [with_gradient(loss, logits) for loss in (ours, formula)]
            for right, *actual in zip(exact, *both, strict=True):
                pairs.append([error(x, right, labels.numel()) for x in actual])
        larger = [a / max(b, ROUNDING) for a, b in pairs if a > max(2 * b, 1e-6)]
        row = {"loss": name, "scale": scale, "results": len(pairs), "larger": len(larger)}
        yield row | {"worst": max(larger, default=0.0)}


def of_last_class(logits: Tensor, is_class: Tensor) -> Tensor:
    return sorted_loss((is_class.to(logits) - logits.softmax(1)[:, -1]).abs(), is_class)


def rows_of_lovasz() -> Iterator[dict[str, Any]]:
    """The relative error of the gradient of one class with few pixels, in float64. Trained: the
    logit of the pixel's class is larger by 6."""
    for bins, trained, pixels in product(BINS, (False, True), CLASS_PIXELS):
        loss, errors = ao.Lovasz(classes=[NUM_CLASSES - 1], bins=bins), []
        for seed in range(EXAMPLES):
            torch.manual_seed(seed)
            labels = torch.randint(NUM_CLASSES - 1, (PIXELS,))
            labels[:pixels] = NUM_CLASSES - 1
            logits = 2 * torch.randn(PIXELS, NUM_CLASSES, dtype=torch.float64)
            logits += 6 * trained * F.one_hot(labels, NUM_CLASSES)
            is_class = labels == NUM_CLASSES - 1
            exact = with_gradient(partial(of_last_class, is_class=is_class), logits)[1]
            ours = with_gradient(partial(loss, labels=labels), logits)[1]
            errors.append(float((ours - exact).norm() / exact.norm()))
        row = {"bins": bins, "trained": trained, "pixels": pixels, "worst": max(errors)}
        yield row | {"median": float(torch.tensor(errors).median())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/counted-precision.json")
    args = parser.parse_args()
    rows = [{"section": "losses", **row} for row in rows_of_losses()]
    rows += [{"section": "lovasz", **row} for row in rows_of_lovasz()]
    save_counts(args.out, rows)


if __name__ == "__main__":
    main()
