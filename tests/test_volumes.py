"""Volumes: trilinear upsampling in every function of logits, labels with a channel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops._ops import volumes
from anchorops.doctor.catalogue import Case, formulas
from tests.helpers.memory import peak_allocated_bytes
from tests.helpers.operators import check
from tests.helpers.softmax_cases import BF16, CE, F64, moments

K = 4
pytestmark = pytest.mark.on("cpu", "reference")
SIZES = [  # of the logits and of the labels
    ((4, 5, 6), (16, 20, 24)),
    ((4, 5, 6), (9, 11, 13)),
    ((7, 5, 6), (3, 10, 9)),
    ((1, 5, 6), (4, 10, 12)),
    ((4, 5, 6), (4, 10, 12)),
    ((4, 5, 6), (8, 5, 6)),
    ((4, 5, 6), (4, 5, 6)),
]


@pytest.fixture(autouse=True, params=[2**22, 2 * K * 5 * 6])
def slab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """All volumes at once, or two slices at a time."""
    monkeypatch.setattr(volumes, "SLAB", request.param)
    return request.param


def inputs(
    size: tuple[int, ...] = (4, 5, 6), label_size: tuple[int, ...] = (9, 11, 13)
) -> tuple[Tensor, Tensor]:
    logits = (2 * torch.randn(2, K, *size)).requires_grad_()
    labels = torch.randint(0, K, (2, *label_size))
    labels[torch.rand(labels.shape) < 0.2] = 255
    return logits, labels


CASES = [
    *(
        moments((2, K, *size), pixels, align_corners=i % 2 > 0)
        for i, (size, pixels) in enumerate(SIZES)
    ),
    moments((2, K, 4, 5, 6), (9, 11, 13), F64, per_image=True),
    moments((2, K, 4, 5, 6), (9, 11, 13), BF16, layout="channels_last"),
    moments((2, K, 4, 5, 6), (16, 20, 24), BF16, True, layout="every other", per_image=True),
    *(
        moments((2, classes, 4, 5, 6), (9, 11, 13), statistics=CE, **options)
        for classes in (1, K)
        for options in (
            {"weights_by": "class"},
            {"weights_by": "image and class", "focal_gamma": 2.0, "min_loss": 0.3},
            {"pixel_weights": True},
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_statistic(case: Case, backend: str) -> None:
    check(case, backend)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "label_size"), SIZES)
def test_predictions(size: Any, label_size: Any, align_corners: bool, backend: str) -> None:
    logits, labels = inputs(size, label_size)
    classes = ao.pixel_argmax(logits, label_size, align_corners=align_corners)
    matrix = ao.pixel_confusion(logits, labels, align_corners=align_corners)
    metric = ao.MeanIoU(K, align_corners=align_corners)
    metric.update(logits, labels[:, None])
    z = formulas.upsampled(logits.double(), label_size, align_corners)
    chosen = z.gather(1, classes[:, None])[:, 0]
    assert (z.amax(1) - chosen <= 1e-5 * z.abs().max()).all()
    assert torch.equal(matrix, ao.confusion(classes, labels, K))
    assert torch.equal(metric.confusion, matrix)


@pytest.mark.parametrize("volume", [False, True])
def test_labels_with_a_channel(volume: bool, backend: str) -> None:
    logits, labels = inputs()
    if not volume:
        logits, labels = logits[:, :, 0], labels[:, 0]
    with_channel, weights = labels[:, None], torch.rand(labels.shape)
    teacher, size = logits.detach().flip(1), labels.shape[1:]
    for call in (
        ao.pixel_cross_entropy,
        partial(ao.pixel_cross_entropy, weight=torch.rand(K)),
        *(ao.CrossEntropy(), ao.CrossEntropy(ohem_min_kept=9), ao.CrossEntropy(focal_gamma=1.0)),
        *(ao.Dice(), ao.CrossEntropyDice(), ao.pixel_confusion),
        lambda x, y: ao.CrossEntropy()(x, y, weights),
        lambda x, y: ao.CrossEntropyDice()(x, y, weights.view_as(y)),
        lambda x, y: ao.pixel_kl_divergence(x, teacher, size, valid=y < K - 1),
    ):
        assert torch.equal(call(logits, with_channel), call(logits, labels))
    for weight in (None, torch.rand(K)):
        each = partial(ao.pixel_cross_entropy, logits, weight=weight, reduction="none")
        assert torch.equal(each(with_channel), each(labels)[:, None])
    moments = ao.ops.softmax_moments(logits, with_channel, pixel_losses=True)
    assert moments.pixel_losses.shape == with_channel.shape


def test_the_rank_of_the_logits_decides() -> None:
    """(B, 1, H, W) are labels of one slice for volumes, and of one channel for images."""
    logits, labels = torch.randn(2, K, 1, 5, 6), torch.randint(0, K, (2, 1, 10, 12))
    expected = ao.pixel_cross_entropy(logits[:, :, 0], labels)
    torch.testing.assert_close(ao.pixel_cross_entropy(logits, labels), expected)


def test_what_is_not_finite(backend: str) -> None:
    """NaN reaches only the labels that read it; −∞ masks a class."""
    logits, labels = inputs((4, 5, 6), (8, 10, 12))
    labels[labels == 3] = 0
    with torch.no_grad():
        logits[:, 3] = -torch.inf
        logits[0, 0, 0, 0, 0] = torch.nan
    losses = ao.pixel_cross_entropy(logits, labels, reduction="none")
    classes = ao.pixel_argmax(logits, (8, 10, 12))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    reads = torch.zeros_like(labels, dtype=torch.bool)
    reads[0, :3, :3, :3] = True
    assert torch.equal(losses.isnan(), reads & (labels != 255))
    assert (gradient[:, 3] == 0)[~gradient[:, 3].isnan()].all()
    assert not gradient[0, :, 2:].isnan().any() and not gradient[1].isnan().any()
    assert torch.equal(classes == 0, (classes == 0) | reads) and not (classes == 3).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [72, 8])
@pytest.mark.parametrize("name", ["cross-entropy", "divergence", "argmax"])
def test_memory_of_a_slab(
    name: str, depth: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slab and its gradient, and two slices of each kind: no float32 volume."""
    size, slices = (depth, 16, 16), 4
    logits = torch.randn(1, 16, 48, 16, 16, dtype=dtype, requires_grad=True)
    teacher, labels = logits.detach().flip(1), torch.randint(0, 16, (1, *size))
    slice_size = logits[0, :, 0].numel()
    monkeypatch.setattr(volumes, "SLAB", (2 if name == "divergence" else 1) * slices * slice_size)
    runs: dict[str, Callable[[], Any]] = {
        "cross-entropy": lambda: torch.autograd.grad(
            ao.pixel_cross_entropy(logits, labels), logits
        ),
        "divergence": lambda: torch.autograd.grad(
            ao.pixel_kl_divergence(logits, teacher, size), logits
        ),
        "argmax": lambda: ao.pixel_argmax(logits.detach(), size),
    }
    slabs = {"cross-entropy": 2, "divergence": 3, "argmax": 1}[name]
    results = 0 if name == "argmax" else logits.nbytes
    maps = 2 * labels.nbytes  # lse, or the classes, and their slabs
    bound = results + maps + 4 * slice_size * (slabs * slices + 4)
    assert peak_allocated_bytes(runs[name]) < bound < results + maps + 4 * logits.numel()
