"""Every kernel of the CUDA library, and every kernel of Triton, is launched by one of these cases,
which compare its results with the reference. `-rP` prints the kernels with their cases."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import masked_sums as moments
import pytest
import softmax_formulas as softmax
import torch
from launches import kernels_of, launched_by
from masked_sums import BF16, F16, F32

import anchorops as ao
from tests import (
    test_centroid_info_nce,
    test_lovasz,
    test_pixel_kl_divergence,
    test_upsampled_sums,
)
from tests.test_class_keys import INTEGERS

pytestmark = [
    pytest.mark.on("simulated_triton", "simulated_cuda", "gpu"),
]
BOTH, CUDA, TRITON = ("cuda", "triton"), ("cuda",), ("triton",)


class Case(NamedTuple):
    name: str
    run: Callable[[str], object]  # of a backend, which is chosen
    backends: tuple[str, ...] = BOTH

    def __str__(self) -> str:
        return self.name


LAYOUTS = {  # of features; in CUDA's kernels planes, shifted planes, rows, and single elements
    "planes": ("contiguous", (2, 40, 4, 40)),
    "planes of 169 pixels": ("contiguous", (2, 70, 13, 13)),
    "channels last": ("channels_last", (2, 40, 4, 10)),
    "channels last of 33": ("channels_last", (2, 33, 5, 6)),
    "lines of 3 pixels": ("contiguous", (5, 67, 3)),
}
STATISTICS: dict[str, tuple[str | None, Callable[[moments.Case, str], None]]] = {
    "sums": (None, moments.check),
    "distances": ("fixed", moments.check_distances_alone),
    "sums and distances": ("learnable", moments.check),
}


def class_moments() -> list[Case]:
    cases = []
    for dtype in (F32, BF16, F16):
        for layout, (strides, size) in LAYOUTS.items():
            for statistics, (anchors, check) in STATISTICS.items():
                case = moments.Case(size, 5, dtype, strides, "long runs", anchors)
                name = f"class moments, {dtype}, {layout}, {statistics}"
                # for Triton these are variants of a few kernels
                few = dtype == F32 and statistics == "sums and distances"
                cases.append(Case(name, partial(check, case), BOTH if few else CUDA))
    grouped = moments.Case((2, 6, 9, 20), 5, groups=3, per_image=True)
    cases.append(Case("class moments of groups", partial(moments.check, grouped)))
    return [*cases, Case("class moments, sorted", sorted_pixels, TRITON)]


def sorted_pixels(backend: str) -> None:
    """As with many keys: ranges of pixels that are sorted by key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anchorops.kernels.class_moments.chunks_of", lambda *_: 0)
        moments.check(moments.Case((600, 20), 3, labels="one key"), backend)


def softmax_moments() -> list[Case]:
    return [
        Case(
            f"softmax moments, {layout}, {', '.join(statistics) or 'cross-entropy'}",
            partial(
                softmax.check,
                softmax.Case((2, 7, 3, 5), (12, 20), layout=layout, statistics=statistics),
            ),
            TRITON,
        )
        for layout in ("contiguous", "channels_last")
        for statistics in (
            softmax.CE,
            ("probability_sums",),
            ("probability_sums", "squares"),
            softmax.ALL,
        )
    ]


def class_keys(labels_dtype: torch.dtype, backend: str) -> None:
    features, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 5, (2, 8, 10)).to(labels_dtype)
    actual = ao.ops.class_moments(features, labels, 5)
    with ao.use_backend("reference"):
        right = ao.ops.class_moments(features, labels, 5)
    torch.testing.assert_close(actual, right)


def upsampled_sums(backend: str) -> None:
    features, labels = test_upsampled_sums.example((2, 5), (4, 9))
    test_upsampled_sums.check(features, labels, test_upsampled_sums.K, False)


def info_nce(backend: str) -> None:
    test_centroid_info_nce.check(*torch.randn(3, 19, 40).div(4))


def predictions(backend: str) -> None:
    logits = torch.randn(2, 19, 3, 5)
    for dtype in (torch.int64, torch.uint8, torch.uint16):
        actual = ao.pixel_argmax(logits, (12, 20), dtype=dtype)
        with ao.use_backend("reference"):
            assert torch.equal(actual, ao.pixel_argmax(logits, (12, 20), dtype=dtype))


def confusion(backend: str) -> None:
    labels = torch.randint(0, 19, (2, 12, 20))
    actual = ao.confusion(labels, labels.flip(1), 19)
    with ao.use_backend("reference"):
        assert torch.equal(actual, ao.confusion(labels, labels.flip(1), 19))


def divergence(backend: str) -> None:
    case = test_pixel_kl_divergence.CASES[0]
    test_pixel_kl_divergence.test_divergences_and_gradients(backend, case)


def lovasz(backend: str) -> None:
    case = test_lovasz.CASES[0]
    test_lovasz.test_equals_the_reference(case, torch.float32, "", backend)


CASES = [
    *class_moments(),
    *softmax_moments(),
    *(Case(f"class keys of {dtype}", partial(class_keys, dtype), CUDA) for dtype in INTEGERS),
    Case("centroid InfoNCE", info_nce),
    Case("predictions", predictions, TRITON),
    Case("confusion matrix", confusion, TRITON),
    Case("upsampled sums", upsampled_sums, TRITON),
    Case("divergence from a teacher", divergence, TRITON),
    Case("Lovász", lovasz, TRITON),
]


def cases_of_gpus() -> list[Any]:
    return [pytest.param(case, marks=pytest.mark.on(*case.backends)) for case in CASES]


@pytest.mark.parametrize("case", cases_of_gpus(), ids=str)
def test_values_and_gradients(case: Case, backend: str):
    case.run(backend)


def test_every_kernel_is_launched(backend: str):
    """Kernels without a GPU are compared with the reference here."""
    cases_of: dict[str, list[str]] = {}
    for case in CASES:
        if backend in case.backends:
            for kernel in launched_by(partial(case.run, backend), backend):
                cases_of.setdefault(kernel, []).append(case.name)
    for kernel, names in sorted(cases_of.items()):
        print(f"{kernel}: {names[0]}" + f", and {len(names) - 1} more" * (len(names) > 1))
    assert cases_of, "no launch was noticed"
    assert cases_of.keys() == kernels_of(backend)


@pytest.mark.on("simulated_triton", "triton")
def test_volumes_launch_the_kernels_images(backend: str):
    """Volumes launch the kernels that images launch, forward and backward."""

    def cross_entropy(*size: int) -> None:
        logits, label_size = torch.randn(size, requires_grad=True), [4 * n for n in size[2:]]
        ao.pixel_cross_entropy(logits, torch.randint(0, 7, (size[0], *label_size))).backward()

    images = launched_by(lambda: cross_entropy(2, 7, 3, 5), backend)
    assert launched_by(lambda: cross_entropy(2, 7, 2, 3, 5), backend) == images != set()
