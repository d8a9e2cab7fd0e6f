"""MeanIoU, compared with torchmetrics."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import anchorops as ao

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
from torchmetrics import ClasswiseWrapper, JaccardIndex, MetricCollection

K = 6


def batches(shape: tuple[int, ...] = (5, 7), size: tuple[int, ...] = (20, 21)) -> list:
    """Logits and labels; class K − 1 occurs nowhere, class K − 2 in the predictions alone."""
    made = []
    for images in (2, 3):
        logits = 2 * torch.randn(images, K, *shape)
        logits[:, K - 1] = -100
        labels = torch.randint(0, K - 2, (images, *size))
        labels[:, :3] = 255
        made.append((logits, labels))
    return made


AVERAGES = ("macro", "micro", "weighted", "none", None)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("ignore_index", [*range(K), K, 255, -1, -100])
def test_every_average_and_ignored_label(ignore_index: int, average: str | None) -> None:
    """An ignored label may be a class: it has no IoU, but wrong predictions of it count. Class
    K − 1 occurs nowhere, and in the first batch neither does class 0. test_volumes.py has aligned
    corners."""
    options: dict[str, Any] = {"average": average, "ignore_index": ignore_index}
    theirs = JaccardIndex(task="multiclass", num_classes=K, **options)
    ours, of_logits = ao.MeanIoU(K, **options), ao.MeanIoU(K, **options)
    for first, (logits, labels) in zip((1, 0), batches(), strict=True):
        labels = labels.clamp(min=first).where(labels != 255, ignore_index)
        full = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        ours.update(full.argmax(1), labels)
        of_logits.update(logits, labels)
        theirs.update(full.argmax(1), labels)
        torch.testing.assert_close(ours.compute(), theirs.compute())
        assert torch.equal(of_logits.compute(), ours.compute())
        each, seen = ours.per_class(), ours.confusion.sum(0) + ours.confusion.sum(1) > 0
        without = [k for k in range(K) if k == ignore_index or not seen[k]]
        assert K - 1 in without and each.isnan().nonzero().flatten().tolist() == without
        if average in ("none", None):
            assert torch.equal(ours.compute(), each.nan_to_num(nan=0.0))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("ignore_index", [255, -1])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_average_of_sigmoids(channels: int, ignore_index: int, average: str | None) -> None:
    """The last channel occurs neither in the labels nor in the predictions."""
    options: dict[str, Any] = {"average": average, "ignore_index": ignore_index}
    theirs = JaccardIndex(task="multilabel", num_labels=channels + 1, **options)
    ours, from_classes = (ao.MeanIoU(channels + 1, sigmoid=True, **options) for _ in range(2))
    logits = torch.randn(2, channels + 1, 4, 5)
    labels = torch.randint(0, 2, (2, channels + 1, 8, 10))
    labels[:, :, 0] = ignore_index
    logits[:, -1], labels[:, -1] = -1, 0
    full = F.interpolate(logits, (8, 10), mode="bilinear")
    ours.update(logits, labels)
    from_classes.update(full > 0, labels)
    theirs.update(full.sigmoid(), labels)
    torch.testing.assert_close(ours.compute(), theirs.compute())
    assert torch.equal(ours.confusion, from_classes.confusion)
    assert ours.per_class().isnan().tolist() == [False] * channels + [True]


def test_classes_by_name() -> None:
    """For loggers, alone and in a collection beside the mean, with which it shares the counts."""
    names = [f"class{k}" for k in range(K)]
    each, mean = ao.MeanIoU(K, average="none"), ao.MeanIoU(K)
    alone = ClasswiseWrapper(ao.MeanIoU(K, average="none"), labels=names, prefix="iou_")
    both = MetricCollection({"mean": mean, "each": each})
    for logits, labels in batches():
        alone.update(logits, labels)
        both.update(logits, labels)
    values, expected = both.compute(), each.per_class().nan_to_num(nan=0.0)
    assert torch.equal(values["each"], expected) and values["mean"].dim() == 0
    assert alone.compute() == {f"iou_{name}": x for name, x in zip(names, expected, strict=True)}
    assert set(alone(*batches()[0])) == {f"iou_{name}" for name in names}


@pytest.mark.parametrize("average", AVERAGES)
def test_without_pixels_and_reset(average: str | None) -> None:
    """Alone, and in a collection, whose metrics have one state from the second batch on."""
    metric, other = ao.MeanIoU(K, average=average), ao.MeanIoU(K, average=average)
    collection = MetricCollection({"one": metric, "two": other})
    for _ in range(2):
        collection.update(torch.randn(1, K, 2, 2), torch.full((1, 4, 4), 255))
    assert all((value == 0).all() for value in collection.compute().values())
    assert metric.per_class().isnan().all()
    metric.update(torch.randn(1, K, 2, 2), torch.zeros(1, 4, 4).long())
    assert metric.confusion.sum() == 16
    metric.reset()
    assert metric.confusion.sum() == 0
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute().isnan().all()


def test_pixels_that_another_rank_or_a_run_before_has_counted() -> None:
    metric = ao.MeanIoU(K)
    metric.confusion = torch.eye(K, dtype=torch.int64)
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute() == 1


def test_as_a_metric() -> None:
    """forward, collections, copies, checkpoints; the counts are integers in every dtype."""
    (logits, labels), (other, other_labels) = batches()
    metric = ao.MeanIoU(K)
    alone = ao.MeanIoU(K)
    alone.update(other, other_labels)
    metric.update(logits, labels)
    torch.testing.assert_close(metric(other, other_labels), alone.compute())  # of this batch
    for moved in (metric.float(), metric.double(), metric.half(), metric.set_dtype(torch.half)):
        assert moved.confusion.dtype == torch.int64
    both = ao.MeanIoU(K)
    for batch in ((logits, labels), (other, other_labels)):
        both.update(*batch)
    assert torch.equal(metric.confusion, both.confusion)
    metric.persistent(True)
    restored = ao.MeanIoU(K)
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    assert torch.equal(copy.deepcopy(restored).compute(), both.compute())
    collection = MetricCollection({"miou": ao.MeanIoU(K), "copy": ao.MeanIoU(K)})
    assert collection(logits, labels)["miou"] == collection.compute()["copy"]


@pytest.mark.parametrize("shape", [(2, 8, 9), (2, 1, 8, 9), (2, 3, 4, 5), (2, 1, 3, 4, 5)])
def test_one_sigmoid_with_and_without_its_axis(shape: tuple[int, ...]):
    predictions, labels = torch.randint(0, 2, shape), torch.randint(0, 2, shape)
    hits = ((predictions == 1) & (labels == 1)).sum()
    union = ((predictions == 1) | (labels == 1)).sum()
    for classes in (predictions, predictions.bool()):
        metric = ao.MeanIoU(1, sigmoid=True)
        metric.update(classes, labels)
        torch.testing.assert_close(metric.compute(), hits / union)
    if shape[1] > 1:
        metric.update(predictions, labels.unsqueeze(1))
        torch.testing.assert_close(metric.compute(), hits / union)


def test_labels_with_a_channel_beside_predictions_without():
    predictions, labels = torch.randint(0, K, (2, 8, 9)), torch.randint(0, K, (2, 1, 8, 9))
    metrics = [ao.MeanIoU(K), ao.MeanIoU(K)]
    for metric, metric_labels in zip(metrics, (labels, labels[:, 0]), strict=True):
        metric.update(predictions, metric_labels)
    assert torch.equal(metrics[0].confusion, metrics[1].confusion)
    assert torch.equal(ao.confusion(predictions, labels, K), metrics[0].confusion)


def test_a_sigmoid_prediction_that_is_no_class_is_ignored():
    metric = ao.MeanIoU(1, sigmoid=True)
    metric.update(torch.tensor([[[[1, 0, 255, 255]]]]), torch.tensor([[[[1, 0, 1, 0]]]]))
    assert metric.confusion.tolist() == [[[1, 0], [0, 1]]]
