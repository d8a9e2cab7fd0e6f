"""Sums of upsampled features over each class, their mean and variance, on every backend.

They are compared with those of the upsampled tensor.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from anchorops._ops.upsampled_sums import upsampled_sums
from anchorops.doctor.catalogue import Case, Entry, Inputs, Sample, formulas
from anchorops.doctor.catalogue.budget import FLOOR
from tests.helpers.memory import peak_allocated_bytes
from tests.helpers.operators import check
from tests.helpers.simulated_gpu import BACKEND

K = 5
Size = tuple[int, int]
pytestmark = pytest.mark.on("reference", "cpu", "simulated_triton")  # there are no CUDA kernels
cpu = pytest.mark.on("cpu")
on_cpu = pytest.mark.on("cpu", "reference")
OPTIONS: dict[str, Any] = {"num_classes": K, "per_image": False, "upsample": True}


@pytest.fixture(params=[1, 2**18] if not BACKEND else [2**18])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU backend works on many parts of the labels, or on one."""
    monkeypatch.setattr(sys.modules["anchorops._ops.upsampled_sums"], "CACHED", request.param)


def example(size: Size, label_size: Size, channels: int = 5) -> tuple[Tensor, Tensor]:
    labels = torch.randint(-1, K + 1, (2, *label_size))
    labels[1] = 2  # one key
    labels[0, 0, 0] = 255
    return 3 + torch.randn(2, channels, *size), labels


def scaled(
    call: Callable[..., tuple[Tensor, ...]], features: Tensor, labels: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """The gradients of mean and variance are as large in the features as those of the sums."""
    counts, sums, *others = call(features, labels, **options)
    return counts, sums, *(features[:, 0].numel() * x for x in others)


OURS = partial(scaled, partial(upsampled_sums, ignore_index=-1))
BY_FORMULA = partial(scaled, formulas.upsampled_sums)
ENTRY = Entry("upsampled_sums", ("upsampled_sums",), OURS, BY_FORMULA)


def check_sums(backend: str, features: Tensor, labels: Tensor, **options: Any) -> None:
    """Sums, mean, variance and gradient."""

    def make(n: int, random: Generator) -> Inputs:
        return {"features": features, "labels": labels}

    check(Case(ENTRY, Sample("sums", make, OPTIONS | options, (), 4 * FLOOR)), backend)


SIZES = [  # of the features and of the labels
    ((3, 5), (6, 10)),
    ((2, 5), (5, 8)),  # odd ratios
    ((5, 4), (3, 2)),  # fewer labels than features
    ((1, 3), (4, 6)),
    ((3, 3), (1, 2)),
    ((2, 2), (5, 1)),
    ((2, 130), (3, 150)),  # more than one tile in a row
    ((3, 4), (3, 4)),
]
SIZES_OF_CPU = [
    ((6, 10), (24, 40)),
    ((5, 7), (13, 11)),
    ((3, 1), (9, 4)),
]


@pytest.mark.parametrize(
    ("size", "label_size"),
    [
        *SIZES,
        *(pytest.param(*sizes, marks=on_cpu) for sizes in SIZES_OF_CPU),
    ],
)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("upsample", [True, pytest.param(False, marks=on_cpu)])
def test_sizes(backend, size, label_size, per_image: bool, upsample: bool, parts: None):
    check_sums(backend, *example(size, label_size), per_image=per_image, upsample=upsample)


@pytest.mark.on("simulated_triton")
def test_chunks_of_several_tiles(backend: str, monkeypatch: pytest.MonkeyPatch):
    """A program of Triton's kernel sums some tiles, as with many features."""
    monkeypatch.setattr("anchorops.kernels.upsampled_sums._MOST_CHUNKS", 4)
    check_sums(backend, *example((5, 70), (9, 75)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_size", [(4, 9), pytest.param((2, 5), marks=on_cpu)])
def test_dtypes_and_layouts(backend: str, label_size: Size, dtype: torch.dtype):
    features, labels = example((2, 5), label_size, 20)
    features = features.to(dtype)
    check_sums(backend, features, labels)
    check_sums(backend, features.contiguous(memory_format=torch.channels_last), labels)


def test_many_channels_or_keys(backend: str):
    """Several blocks of channels, and many keys in a tile."""
    check_sums(backend, *example((2, 2), (3, 4), 140), per_image=True)
    features, labels = example((1, 9), (2, 18))[0], torch.arange(72).view(2, 2, 18)
    check_sums(backend, features, labels, num_classes=72)
    check_sums(backend, features, labels % 36, num_classes=36, per_image=True)


@pytest.mark.parametrize(
    ("num_classes", "size", "label_size"),
    [
        (255, (2, 3), (4, 6)),
        (256, (2, 3), (4, 6)),
        *(
            pytest.param(n, (6, 10), label_size, marks=cpu)
            for n in (255, 256, 2**15 + 1)
            for label_size in ((24, 40), (6, 10))
        ),
    ],
)
@pytest.mark.parametrize("per_image", [False, True])
def test_last_classes_of_8_16_and_32_bits(backend, num_classes, size, label_size, per_image):
    features, labels = example(size, label_size)
    labels = torch.where((labels >= 0) & (labels < K), labels + num_classes - K, -1)
    check_sums(backend, features, labels, num_classes=num_classes, per_image=per_image)


def test_variance_does_not_cancel(backend: str):
    features, labels = example((2, 6), (3, 8))
    shifted = upsampled_sums(features + 2**12, labels, ignore_index=255, **OPTIONS)
    expected = (features + 2**12).double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(shifted.variance.double(), expected, rtol=1e-3, atol=0)


def test_nothing(backend: str):
    sums = partial(upsampled_sums, ignore_index=255, **OPTIONS)
    features, labels = example((2, 3), (4, 6))
    assert not sums(features, torch.full_like(labels, 255)).sums.any()
    nothing = sums(features[:0], labels[:0])
    assert [x.shape for x in nothing] == [(5,), (5, 5), (5,), (5,)]
    if BACKEND:
        operator = getattr(torch.ops.anchorops.upsampled_sums_backward, backend)
        keys, dsums = labels[:0].int(), torch.ones(5, 5)
        assert operator(features[:0], keys, dsums, dsums[0], None, None, 5).shape == (0, 5, 2, 3)


@pytest.mark.parametrize("per_image", [pytest.param(False, marks=on_cpu), True])
def test_features_that_no_valid_label_uses(per_image: bool, backend: str, parts: None):
    """If they are not finite, neither are mean and variance of their channel; all else is equal."""
    features, labels = example((4, 20), (8, 60))
    labels[:, :, :30] = 255  # the next ones are between columns 9 and 10
    spoilt = features.detach().clone()
    spoilt[:, 1:4, :, :9] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None, None]
    results = []
    for x in (features.detach(), spoilt):
        x.requires_grad_()
        _, sums, mean, variance = upsampled_sums(
            x, labels, K, per_image=per_image, upsample=True, ignore_index=255
        )
        dsums = torch.arange(sums.numel(), dtype=torch.float32).view(sums.shape)
        results.append((sums, *torch.autograd.grad(sums, x, dsums), mean, variance))
    others = torch.ones(features.shape[1], dtype=torch.bool)
    others[1:4] = False
    for i, (clean, ours) in enumerate(zip(*results, strict=True)):
        if i < 2:
            assert torch.equal(ours, clean)
        else:
            assert torch.equal(ours[others], clean[others]) and not ours[1:4].isfinite().any()


@cpu
def test_memory(backend: str):
    """W has 600 classes × the pixels; in int64 and float32 these are 472 MB. Only a part of it
    exists at a time.

    A part and the keys need less than 8 MiB, the gradient of the features 16 MiB.
    """
    features = torch.randn(4, 64, 128, 128, requires_grad=True)
    labels = torch.randint(0, 600, (4, 512, 512), dtype=torch.int16)

    def step() -> Tensor:
        _, sums, mean, variance = upsampled_sums(
            features, labels, 600, per_image=False, upsample=True, ignore_index=-1
        )
        loss = sums.square().sum() + mean.sum() + variance.sum()
        return torch.autograd.grad(loss, features)[0]

    step()
    assert peak_allocated_bytes(step) < 24 << 20
