"""pixel_argmax, confusion and pixel_confusion on every backend: equal integers, unless logits are
almost equal. The catalogue compares them with torch."""

import pytest
import torch
import torch.nn.functional as F

import anchorops as ao
from anchorops import reference
from anchorops.doctor.catalogue import ENTRIES, Case, Sample
from anchorops.doctor.catalogue.pixels import Pixels
from tests.helpers.cpu_kernels import same_for_all_threads
from tests.helpers.operators import check
from tests.helpers.softmax_cases import BF16, F16, F32
from tests.test_class_keys import INTEGERS

both_backends = pytest.mark.on("cpu", "reference")


@both_backends
def test_confidence_of_ties_and_what_is_not_finite(backend: str):
    logits = torch.zeros(1, 4, 2, 6)
    logits[0, :, 0, 0] = torch.tensor([1.0, 5.0, torch.nan, 0.0])
    logits[0, :, 0, 1] = torch.tensor([1.0, torch.inf, 0.0, 0.0])
    logits[0, :, 0, 2] = -torch.inf
    logits[0, 2:, 0, 3] = -torch.inf
    classes, probabilities = ao.pixel_argmax(logits.requires_grad_(), (2, 6), confidence=True)
    assert torch.equal(classes[0, 0], torch.tensor([2, 1, 0, 0, 0, 0]))
    assert not probabilities.requires_grad
    expected = logits.detach().softmax(1).amax(1)
    assert expected[0, 0, :3].isnan().all() and expected[0, 0, 3] == 0.5
    torch.testing.assert_close(probabilities, expected, equal_nan=True)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        ((2, 19, 3, 5), (12, 20)),
        ((1, 37, 9, 2), (33, 16)),
        ((1, 2, 3, 40), (12, 160)),
        ((1, 5, 1, 1), (4, 3)),
        ((2, 150, 5, 4), (5, 4)),
        ((1, 7, 9, 8), (3, 5)),
        ((1, 2, 2, 2), (3, 3)),
        *(
            pytest.param(*sizes, marks=pytest.mark.on("reference", "cpu"))
            for sizes in (
                ((2, 21, 9, 20), (72, 160)),
                ((2, 5, 17, 17), (129, 129)),
                ((2, 150, 13, 10), (31, 29)),
                ((2, 300, 2, 3), (100, 70)),
            )
        ),
    ],
)
def test_sizes(backend, size, pixels, align_corners):
    """The logit of our class is the largest, up to rounding."""
    maker = Pixels(size[1], size[2:], pixels, align_corners, batch=size[0])
    sample = Sample("sizes", maker, {"align_corners": align_corners})
    check(Case(ENTRIES["pixel_argmax"], sample), backend)
    if backend in ("cpu", "reference"):
        check(Case(ENTRIES["pixel_argmax with confidence"], sample), backend)


@pytest.mark.parametrize("pixels", [(8, 12), (5, 7), (2, 3)])
def test_first_of_equal_logits(backend, pixels):
    logits = torch.zeros(1, 40, 2, 3)
    assert not ao.pixel_argmax(logits, pixels).any()
    logits[0, [7, 33]] = 1.5
    assert (ao.pixel_argmax(logits, pixels) == 7).all()
    logits[0] = -torch.inf
    assert not ao.pixel_argmax(logits, pixels).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the machine for PTX
@pytest.mark.parametrize("pixels", [(8, 12), (5, 7), (2, 3)])
def test_nan_is_largest(backend, pixels):
    logits = torch.randn(1, 40, 2, 3)
    logits[0, 5] = torch.inf
    logits[0, 20, 0, 1] = torch.nan
    expected = reference.pixel_argmax(logits, pixels)
    assert (expected == 20).any() and (expected == 5).any()
    assert torch.equal(ao.pixel_argmax(logits, pixels), expected)
    logits[0, [11, 30]] = torch.nan
    assert (ao.pixel_argmax(logits, pixels) == 11).all()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_label_dtypes_of_confusion(backend, dtype):
    labels = torch.randint(0, 8, (2, 9, 33)).to(dtype)
    labels[0, 0, :4] = 120
    predictions = torch.randint(0, 6, labels.shape)
    expected = reference.confusion(predictions, labels, 6, ignore_index=3)
    assert torch.equal(ao.confusion(predictions, labels, 6, ignore_index=3), expected)
    logits = F.one_hot(predictions, 6).movedim(-1, 1).float()
    assert torch.equal(ao.pixel_confusion(logits, labels, ignore_index=3), expected)


@pytest.mark.parametrize("num_classes", [2, 3, 19, 150, 4096])
def test_classes_of_confusion(backend, num_classes):
    labels = torch.randint(-1, num_classes + 1, (700,))
    predictions = torch.randint(-1, num_classes + 1, (700,))
    labels[:200], predictions[:200] = num_classes - 1, num_classes - 1
    expected = reference.confusion(predictions, labels, num_classes, ignore_index=0)
    assert torch.equal(ao.confusion(predictions, labels, num_classes, ignore_index=0), expected)
    predictions, labels = predictions.view(2, 350).mT, labels.view(2, 350).mT
    assert torch.equal(ao.confusion(predictions, labels, num_classes, ignore_index=0), expected)


@pytest.mark.on("cpu")
@pytest.mark.parametrize("num_classes", [19, 257])
def test_threads_with_and_without_a_matrix(backend, num_classes: int):
    """Of two threads, the second counts one pixel less than the matrix of 257 classes has cells."""
    labels = torch.randint(0, num_classes, (2 * 257**2 - 1,))
    expected = labels.bincount(minlength=num_classes).diag()
    same_for_all_threads(
        lambda: [ao.confusion(labels, labels, num_classes, ignore_index=-1) - expected]
    )
    assert torch.equal(ao.confusion(labels, labels, num_classes, ignore_index=-1), expected)


def test_values_outside_are_left_out(backend):
    labels = torch.tensor([0, 1, 2**40, -(2**40), 2**32 + 1, 255, 2, 2, 2])
    predictions = torch.tensor([1, 1, 1, 1, 1, 1, -1, 2**32 + 2, 3])
    expected = torch.tensor([[0, 1, 0], [0, 1, 0], [0, 0, 0]])
    assert torch.equal(ao.confusion(predictions, labels, 3), expected)


@pytest.mark.on("reference", "cpu", "simulated_triton", "triton")
@pytest.mark.parametrize(
    ("size", "pixels", "align_corners", "dtype"),
    [
        ((2, 19, 3, 5), (12, 20), False, BF16),
        ((2, 5, 4, 6), (17, 25), True, F32),
        ((1, 37, 6, 7), (6, 7), False, BF16),
        ((1, 7, 9, 8), (3, 5), False, F16),
        ((1, 3, 7, 33), (21, 99), False, F32),
        ((1, 2, 7, 33), (7, 33), False, F32),
    ],
)
def test_correct_is_the_diagonal(backend, size, pixels, align_corners, dtype):
    """The arithmetic is the same, so this holds even if logits are equal up to rounding."""
    labels = torch.randint(0, size[1], (size[0], *pixels))
    labels[torch.rand(labels.shape) < 0.2] = 255
    options = {"align_corners": align_corners}
    base = 50 * torch.randn(size[0], 1, *size[2:])
    for logits in (torch.randn(size).mul(4).round().div(4), base + torch.randint(0, 3, size) / 1e3):
        logits = logits.to(dtype)
        predictions = ao.pixel_argmax(logits, pixels, **options)
        matrix = reference.confusion(predictions, labels, size[1], ignore_index=255)
        moments = ao.ops.softmax_moments(logits, labels, **options)
        assert torch.equal(moments.correct, matrix.diagonal())
        assert torch.equal(ao.pixel_confusion(logits, labels, **options), matrix)
