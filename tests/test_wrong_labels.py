"""Labels that are neither a class nor ignored, and those that are ignored: every loss module counts
them in its terms."""

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import anchorops as ao
from anchorops._ops.probability_histograms import count_labels_out_of_range
from anchorops.losses.pixel import PixelLoss
from tests.helpers.calls import LOSSES, SIGMOIDS
from tests.helpers.memory import peak_allocated_bytes
from tests.test_class_keys import INTEGERS

NAME, IGNORED = "labels_out_of_range", "labels_ignored"
each_backend = pytest.mark.on("reference", "cpu", "simulated_triton", "triton")
SIZES = [  # of logits and labels
    ((2, 5, 4, 6), (2, 16, 24)),  # by cells
    ((2, 3000, 2, 65), (2, 8, 130)),  # several tiles in a row
    ((2, 5, 4, 6), (2, 1, 16, 24)),  # with a channel
    ((2, 5, 2, 3, 3), (2, 5, 6, 7)),  # volumes
    ((2, 5, 4, 6), (2, 7, 9)),  # pixel by pixel
    ((2, 5, 40, 6), (2, 40, 6)),  # full resolution
    ((2, 5, 40, 6), (2, 13, 6)),  # down
    ((20, 5), (20,)),
    ((2, 5, 9), (2, 9)),
    ((2, 5, 2, 3, 3), (2, 2, 3, 3)),
    ((0, 5, 4, 6), (0, 16, 24)),
    ((2, 5, 4, 6), (2, 0, 24)),
]


def wrong_labels(
    shape: tuple[int, ...], classes: int, ignore_index: int, dtype: torch.dtype = torch.int64
) -> tuple[Tensor, int]:
    """Random labels, of which a fifth is ignored and a fifth out of range; and how many are."""
    limits = torch.iinfo(dtype)
    wrong = [n for n in (-1, -(2**31), classes, classes + 1, 255, 2**31) if n != ignore_index]
    wrong = [n for n in wrong if not 0 <= n < classes and limits.min <= n <= limits.max]
    labels, kind = torch.randint(0, classes, shape), torch.rand(shape)
    if limits.min <= ignore_index <= limits.max:
        labels[kind < 0.2] = ignore_index
    is_wrong = kind > 0.8
    labels[is_wrong] = torch.tensor(wrong)[torch.randint(0, len(wrong), shape)][is_wrong]
    return labels.to(dtype), int(is_wrong.sum())


def count(loss: PixelLoss, logits: Tensor, labels: Tensor) -> float:
    value = loss(logits, labels)
    for term in (loss.terms[NAME], loss.terms[IGNORED]):
        assert term.dtype == value.dtype and term.shape == () and not term.requires_grad
    ignore_index = 255 if loss.ignore_index is None else loss.ignore_index
    assert loss.terms[IGNORED] == (labels.long() == ignore_index).sum()
    return loss.terms[NAME].item()


@each_backend
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_count(backend: str, sizes: tuple) -> None:
    size, label_size = sizes
    ignore_index = 255 if size[1] < 255 else -100
    labels, expected = wrong_labels(label_size, size[1], ignore_index)
    logits = torch.randn(size, requires_grad=True)
    assert count(ao.CrossEntropy(ignore_index=ignore_index), logits, labels.to(logits.device)) == (
        expected
    )


@pytest.mark.parametrize(
    ("name", "channels"),
    [*((name, 5) for name in LOSSES), *((name, k) for name in SIGMOIDS for k in (1, 3))],
)
def test_each_loss(backend: str, name: str, channels: int) -> None:
    """With sigmoids, labels other than 0, 1 and the ignored one, of all channels."""
    size, classes = ((channels, 16, 24), 2) if name in SIGMOIDS else ((16, 24), 5)
    labels, expected = wrong_labels((3, *size), classes, 255)
    loss = (LOSSES | SIGMOIDS)[name]()
    assert count(loss, torch.randn(3, channels, 4, 6), labels) == expected


@pytest.mark.parametrize(
    ("dtype", "ignore_index"),
    [
        (torch.uint8, 255),
        (torch.uint8, -1),  # no label is ignored: 255 is out of range
        (torch.int8, -100),
        (torch.int16, -1),
        (torch.uint16, 65_535),
        (torch.int32, 2**40),
        (torch.uint32, 255),
        (torch.uint64, 255),
        (torch.int64, -100),
        (torch.int64, 3),  # a class
    ],
)
def test_dtypes_and_ignored_labels(backend: str, dtype: torch.dtype, ignore_index: int) -> None:
    labels, expected = wrong_labels((2, 16, 24), 5, ignore_index, dtype)
    assert expected > 0
    loss = ao.CrossEntropy(ignore_index=ignore_index)
    assert count(loss, torch.randn(2, 5, 4, 6), labels) == expected


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 255, 300, 65_535, 2**40, 2**63 - 1])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_out_of_range_are_counted(dtype: torch.dtype, ignore_index: int) -> None:
    """Lovasz counts them."""
    limits = torch.iinfo(dtype)
    values = (-(2**63), -100, -1, 0, 3, 4, 5, 44, 127, 128, 255, 300, 65_535, 2**31, 2**63 - 1)
    values = [n for n in (*values, ignore_index) if limits.min <= n <= limits.max]
    classes = torch.tensor(sum(0 <= n < 5 and n != ignore_index for n in values))
    labels = torch.tensor([[values]], dtype=dtype)
    expected = sum(not 0 <= n < 5 and n != ignore_index for n in values)
    assert count_labels_out_of_range(labels, classes, ignore_index) == expected


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_out_of_range_are_counted_needs_no_copy_in_int64(dtype: torch.dtype) -> None:
    """The mask needs a byte a label, its copy for the sum four."""
    labels, counts = torch.zeros(2, 256, 256).to(dtype), torch.zeros(5, dtype=torch.int64)
    peak = peak_allocated_bytes(lambda: count_labels_out_of_range(labels, counts, 7))
    assert peak < 6 * labels.numel()


@pytest.mark.parametrize(
    "loss", [ao.CrossEntropy(ohem_threshold=0.5), ao.CrossEntropy(ohem_min_kept=10)], ids=str
)
def test_with_pixel_weights(backend: str, loss: PixelLoss) -> None:
    labels, expected = wrong_labels((2, 16, 24), 5, 255)
    loss(torch.randn(2, 5, 4, 6), labels, torch.rand(labels.shape).round())
    assert loss.terms[NAME] == expected and loss.terms[IGNORED] == (labels == 255).sum() > 0


@pytest.mark.on("cpu")
def test_more_labels_than_float32_counts(backend: str) -> None:
    labels = torch.zeros(1, 4097, 4097, dtype=torch.uint8)  # 2^24 + 8193
    labels[0, 0, 0] = 255
    assert count(ao.CrossEntropy(), torch.randn(1, 2, 4, 4), labels) == 0


def test_strides_and_logits_that_are_not_finite(backend: str) -> None:
    labels, expected = wrong_labels((16, 24, 2), 5, 255)
    logits = torch.full((2, 5, 4, 6), torch.nan)
    assert count(ao.CrossEntropy(), logits, labels.permute(2, 0, 1)) == expected
    bools = torch.rand(2, 16, 24) < 0.5  # they are never wrong
    assert count(ao.BinaryCrossEntropy(), logits[:, :1], bools) == 0


def test_vmap(backend: str) -> None:
    logits = torch.randn(3, 2, 5, 4, 6)
    labels, _ = wrong_labels((3, 2, 16, 24), 5, 255)

    def counts(logits: Tensor, labels: Tensor) -> Tensor:
        loss = ao.CrossEntropy()
        loss(logits, labels)
        return torch.stack([loss.terms[NAME], loss.terms[IGNORED]])

    expected = torch.stack([counts(x, y) for x, y in zip(logits, labels, strict=True)])
    assert expected.all()
    torch.testing.assert_close(vmap(counts)(logits, labels), expected)


@pytest.mark.parametrize("loss", [ao.CrossEntropy(), ao.BinaryCrossEntropy()], ids=str)
def test_compiled(loss: PixelLoss) -> None:
    logits = torch.randn(2, 5, 4, 6, requires_grad=True)
    shape = (2, 5, 16, 24) if loss.sigmoid else (2, 16, 24)
    labels, expected = wrong_labels(shape, 2 if loss.sigmoid else 5, 255)
    torch.compile(loss, fullgraph=True)(logits, labels).backward()
    assert loss.terms[NAME] == expected and loss.terms[IGNORED] == (labels == 255).sum()
