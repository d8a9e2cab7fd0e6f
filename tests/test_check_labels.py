"""check_labels and ignore_index of everything that takes labels: which labels are wrong, which are
ignored, and what the default ignores."""

import pytest
import torch

import anchorops as ao
from tests.helpers.calls import OF_LABELS, OF_SIGMOIDS, UNCHECKED

ZEROS = torch.zeros(2, 8, 12, dtype=torch.int64)
MASK = 255 * (torch.arange(2 * 8 * 12).view(2, 8, 12) % 3 == 0)  # 0 and 255


def of_range(shape: tuple[int, ...], first: int, last: int) -> torch.Tensor:
    return (first + torch.arange(torch.Size(shape).numel()) % (last + 1 - first)).view(shape)


@pytest.mark.parametrize("name", OF_LABELS | OF_SIGMOIDS)
def test_labels_out_of_range(name: str):
    """An error on request, or they are ignored; of the last image too."""
    call, k = (OF_LABELS | OF_SIGMOIDS)[name], 2 if name in OF_SIGMOIDS else 4
    labels = of_range((2, 8, 12), 0, k + 1)
    labels[0] = 1
    call(k, labels)
    message = rf"^{name.split()[0]}: labels: expected values in \[0, {k}\) or .* = 255"
    with pytest.raises(ValueError, match=rf"{message}, got \[{k}, {k + 1}\]$"):
        call(k, labels, check_labels=True)
    for right, ignored in ((labels.clamp(max=k), k), (labels.where(labels < k, 255), 255)):
        call(k, right, check_labels=True, ignore_index=ignored)


@pytest.mark.parametrize(
    ("values", "dtype", "num_classes", "options", "got"),
    [
        *(
            (range(6), dtype, 4, {}, r"\[4, 5\]")
            for dtype in (torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64)
        ),
        ([-1], torch.int8, 6, {}, r"\[-1\]"),  # as int8, 255 would be −1
        ([255], torch.uint8, 6, {"ignore_index": -1}, r"\[255\]"),  # as uint8, −1 would be 255
        (range(80), torch.int64, 6, {}, r"\[6, 7, 8, 9, 10, 11, 12, 13, '…'\]"),
    ],
    ids=str,
)
def test_values_are_compared_not_bits(values, dtype, num_classes: int, options, got: str):
    labels = torch.tensor([*values] * 192)[:192].view(2, 8, 12).to(dtype)
    with pytest.raises(ValueError, match=f"got {got}$"):
        OF_LABELS["class_moments"](num_classes, labels, check_labels=True, **options)


@pytest.mark.parametrize("name", OF_LABELS | OF_SIGMOIDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_masks_of_0_and_255(name: str, dtype: torch.dtype) -> None:
    """An error with check_labels alone: background and void without an object are right labels."""
    call, mask = (OF_LABELS | OF_SIGMOIDS)[name], MASK.to(dtype)
    call(2, mask)
    message = r"labels: expected a label 1 beside 0 .*\(mask > 0\).*a crop of .*, got \[0, 255\]$"
    with pytest.raises(ValueError, match=rf"^{name.split()[0]}: {message}"):
        call(2, mask, check_labels=True)
    one = mask.clone()
    one[0, 0, 0] = 1
    for right in (one, (MASK > 0).to(dtype), torch.zeros_like(mask), torch.full_like(mask, 255)):
        call(2, right, check_labels=True)
    call(2, 2 * (MASK > 0).to(dtype), check_labels=True, ignore_index=2)
    if name in OF_LABELS:  # more classes may lack class 1
        call(3, mask, check_labels=True)


def test_predictions_that_are_no_class_hide_no_label() -> None:
    """They are ignored, but a label 1 there shows that the labels are right."""
    labels, predictions = torch.tensor([[[[0, 1, 255]]]]), torch.tensor([[[[0, 7, 0]]]])
    ao.MeanIoU(1, sigmoid=True, check_labels=True).update(predictions, labels)


@pytest.mark.parametrize("name", [x for x in OF_LABELS | UNCHECKED if x != "Combined"])
def test_the_default_ignore_index_never_is_a_class(name: str):
    call, function = (OF_LABELS | UNCHECKED)[name], name.split()[0]
    call(255, ZEROS)
    none = r"a value where num_classes > 255 .*, got none, with .* = 256$"
    with pytest.raises(ValueError, match=rf"^{function}: ignore_index: expected {none}"):
        call(256, ZEROS)
    for ignored in (-1, 255):  # a class is ignored if it is given explicitly
        call(256, ZEROS, ignore_index=ignored)


def test_class_255_counts():
    features, labels = torch.zeros(2, 3, 4, 6), torch.full_like(ZEROS, 255)
    for ignored, count in ((-1, 48), (255, 0)):
        moments = ao.ops.class_moments(features, labels, 256, ignore_index=ignored)
        assert moments.counts[255] == count
    both = ao.Combined(ao.OCCL(256, 3, ignore_index=-1), ao.SAR(256, 3, ignore_index=-1))
    assert both.ignore_index == -1
    both(features, labels, torch.randn(256, 3))
    assert both.terms["occl.present"] == 1
