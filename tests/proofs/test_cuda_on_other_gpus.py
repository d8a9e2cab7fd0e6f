"""CUDA: plans depend on the GPU. With the multiprocessors of real GPUs, or with less shared memory,
class moments are within the same error budget."""

from collections.abc import Callable, Iterator

import pytest
import torch

import anchorops as ao
from tests.helpers.class_moments_cases import BF16, F32, Case, check, make_features, make_labels

pytestmark = [pytest.mark.on("simulated_cuda"), pytest.mark.usefixtures("backend")]
SetHardware = Callable[[int, int], None]


@pytest.fixture
def set_hardware() -> Iterator[SetHardware]:
    """The number of multiprocessors of the PTX machine, and KB of shared memory of each."""
    from ptx import cuda_launches

    yield cuda_launches.hardware
    cuda_launches.hardware(*cuda_launches.SMALL)


@pytest.fixture(params=[(132, 228), (58, 100)], ids=["H200", "L4"])
def other_gpu(request, set_hardware) -> None:
    set_hardware(*request.param)


@pytest.mark.usefixtures("other_gpu")
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 200, 10, 136), 150, BF16, labels="few ignored"),
        Case((2, 100, 10, 136), 40, F32, "channels_last", "long runs"),
        Case((5000, 3), 2, layout="transposed", labels="one key"),
    ],
    ids=str,
)
def test_class_moments(case: Case, backend: str):
    check(case, backend)


def test_the_plan_depends_on_the_gpu(set_hardware: SetHardware):
    """Other chunks round differently; on one kind of GPU, results are always the same."""
    features, labels = torch.randn(2, 64, 10, 136), torch.randint(0, 3, (2, 10, 136))

    def sums(multiprocessors: int, kilobytes: int) -> torch.Tensor:
        set_hardware(multiprocessors, kilobytes)
        return ao.ops.class_moments(features, labels, 3, anchors=torch.ones(3, 64)).sums

    first, second, fewer, less = (
        sums(*gpu) for gpu in ((132, 228), (132, 228), (7, 228), (7, 100))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, fewer) and not torch.equal(fewer, less)


def test_squares_of_values_with_few_bits(set_hardware: SetHardware):
    """A chunk has 370 pixels of each key. If each square were added to the total of its key, all
    of them would be rounded in the same direction: they have few bits."""
    set_hardware(1, 228)
    case = Case((1, 32, 1, 12_288), 33, BF16, labels="few ignored")
    features, labels = make_features(case), make_labels(case)
    sqdists = ao.ops.class_moments(features, labels, 33, anchors=torch.zeros(33, 32)).sqdists
    with ao.use_backend("reference"):
        exact = ao.ops.class_moments(
            features.double(), labels, 33, anchors=torch.zeros(33, 32, dtype=torch.float64)
        ).sqdists
    assert sqdists is not None and exact is not None
    assert (sqdists / exact - 1).mean().abs() < 1e-7
