"""Results have equal bits for any number of threads, from shapes where torch divides one sum among
threads: long rows, many rows, many classes. The other tests of each operator have images.

Products of matrices (InfoNCE, CeCo, embeddings) are torch's, and may depend on the threads.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops._ops.kth_largest import kth_largest
from tests.helpers.cpu_kernels import same_for_all_threads
from tests.helpers.operators import results

F32, F64 = torch.float32, torch.float64
LOGITS = {
    "points of a batch": ((1, 5, 40_001), (1, 40_001)),
    "points": ((40_001, 5), (40_001,)),
    "one row": ((1, 4, 1, 10_000), (1, 1, 40_001)),
    "short rows": ((33_000, 3, 2), (33_000, 2)),
    "one column": ((1, 4, 10_000, 1), (1, 40_001, 1)),
    "volume": ((1, 3, 8, 70, 91), (1, 8, 70, 91)),
    "cells": ((1, 7, 24, 33), (1, 96, 132)),
    "any size": ((2, 5, 20, 33), (2, 65, 129)),
}


def losses(num_classes: int) -> dict[str, ao.CrossEntropy | ao.Dice | ao.CrossEntropyDice]:
    weight, ignored = torch.rand(num_classes), {"ignore_index": -1}
    smoothing = ao.CrossEntropy(weight, label_smoothing=0.1, focal_gamma=1.5, **ignored)
    return {
        "ce": ao.CrossEntropy(weight, **ignored),
        "focal": ao.CrossEntropy(focal_gamma=2.0, **ignored),
        "focal 0.7": ao.CrossEntropy(focal_gamma=0.7, **ignored),
        "ohem": ao.CrossEntropy(weight, ohem_threshold=0.3, ohem_min_kept=1000, **ignored),
        "smoothing": ao.CrossEntropy(label_smoothing=0.1, **ignored),
        "dice": ao.Dice(squared=True, per_image=True, weight=weight, gamma=0.7, **ignored),
        "both": ao.CrossEntropyDice(smoothing, ao.Dice(log=True, **ignored)),
    }


def check(function: Callable[..., Tensor | tuple], *inputs: Tensor) -> None:
    """The results of the function, and the gradients of its inputs."""
    named = {str(i): x for i, x in enumerate(inputs)}
    same_for_all_threads(lambda: results(lambda **x: function(*x.values()), named))


@pytest.mark.parametrize(
    ("shapes", "dtype", "backend"),
    [
        *((name, F32, "cpu") for name in LOGITS),
        ("points", F64, "cpu"),
        pytest.param("points of a batch", F32, "reference", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_of_pixels(shapes: str, dtype: torch.dtype, backend: str):
    size, label_size = LOGITS[shapes]
    logits, labels = torch.randn(size, dtype=dtype), torch.randint(0, size[1], label_size)
    weights = torch.rand(label_size)
    with ao.use_backend(backend):
        for name, loss in losses(size[1]).items():
            if name == "dice":
                check(lambda x, loss=loss: loss(x, labels), logits)
            else:
                check(lambda x, w, loss=loss: loss(x, labels, w), logits, weights)


@pytest.mark.parametrize(
    ("images", "dtype"), [(1, F32), pytest.param(3, F64, marks=pytest.mark.slow)], ids=str
)
def test_losses_of_many_classes(images: int, dtype: torch.dtype):
    num_classes = 40_000 // (1 + images // 2)
    logits = torch.randn(images, num_classes, 1, 2, dtype=dtype)
    labels = torch.randint(0, num_classes, (images, 3, 5))
    for loss in losses(num_classes).values():
        check(lambda x, loss=loss: loss(x, labels), logits)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("size", "num_classes"),
    [
        ((1, 7, 40_001), 3),
        ((1, 220, 20_001), 19),
        ((40_001, 9), 4),
        ((2, 3, 40, 51), 65_536),
        ((6, 40, 12, 13), 150),
    ],
)
def test_class_moments(size: tuple[int, ...], num_classes: int, backend: str):
    labels = torch.randint(0, num_classes, (size[0], *size[2:]))
    features, anchors = torch.randn(size), torch.randn(num_classes, size[1])

    def run(f: Tensor, a: Tensor) -> tuple[Tensor | None, ...]:
        arguments = f, labels, num_classes
        return (
            ao.pixel_to_anchor_mse(f, labels, a, ignore_index=-1),
            ao.pixel_to_anchor_mse(f, labels, a, reduction="sum", ignore_index=-1),
            *ao.ops.class_moments(*arguments, anchors=a, per_image=True, ignore_index=-1),
            *ao.ops.class_moments(*arguments, anchors=a, groups=3, seed=5, ignore_index=-1),
        )

    with ao.use_backend(backend):
        check(run, features, anchors)


def test_kth_largest():
    values = torch.rand(100_000)
    same_for_all_threads(lambda: (kth_largest(values, 33_333),))
