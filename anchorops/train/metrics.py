"""The usual measures, from a confusion matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FREQUENCY_GROUPS = 15  # as CBP+OCCL reports them
GROUPS = ("head", "body", "tail")


def class_groups(frequencies: Tensor, head_tail: tuple[float, float]) -> list[str]:
    """ "head", "body" or "tail" of each class, by its share [K] of the training pixels."""
    head, tail = head_tail
    return [
        "head" if share >= head else "tail" if share < tail else "body"
        for share in frequencies.tolist()
    ]


def summarize(
    confusion: Tensor, classes: Sequence[str], frequencies: Tensor, head_tail: tuple[float, float]
) -> dict[str, Any]:
    """Figures of a segmentation.

    Args:
        confusion: int64 [K, K], pixels of true class i predicted as j, without ignored pixels.
        classes: their names.
        frequencies: float [K], share of the training pixels.
        head_tail: see class_groups.

    Returns:
        miou, macc, accuracy, pixels (their number), miou of head, body and tail (None if a group
        has no class), f1_by_frequency (see frequency_groups), and "classes": name, group,
        frequency, iou, accuracy and f1 of each. A class that is neither in the truth nor predicted
        has None, and is omitted from every mean. A class that is not in the truth is also omitted
        from the mean of accuracies.
    """
    confusion = confusion.double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = hits / (truth + predicted - hits)
    accuracy = hits / truth
    f1 = 2 * hits / (truth + predicted)
    groups = class_groups(frequencies, head_tail)
    members = {g: torch.tensor([group == g for group in groups]) for g in GROUPS}
    figures = (map(_number, x) for x in (frequencies, iou, accuracy, f1))
    columns = zip(classes, groups, *figures, strict=True)
    names = ("name", "group", "frequency", "iou", "accuracy", "f1")
    return {
        "miou": _number(iou.nanmean()),
        "macc": _number(accuracy.nanmean()),
        "accuracy": _number(hits.sum() / truth.sum()),
        "pixels": int(truth.sum()),
        **{group: _number(iou[member].nanmean()) for group, member in members.items()},
        "f1_by_frequency": frequency_groups(f1, frequencies),
        "classes": [dict(zip(names, column, strict=True)) for column in columns],
    }


def frequency_groups(values: Tensor, frequencies: Tensor) -> list[float | None]:
    """Means of values [K] over up to 15 groups of classes, from the most frequent to the rarest;
    None if no class of a group has a value."""
    order = frequencies.argsort(descending=True, stable=True)
    groups = values[order].tensor_split(min(FREQUENCY_GROUPS, len(values)))
    return [_number(group.nanmean()) for group in groups]


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
