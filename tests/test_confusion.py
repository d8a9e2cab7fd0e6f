"""pixel_argmax, confusion and pixel_confusion, compared with torch and torchmetrics."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

import anchorops as ao

BACKENDS = ["cpu", "reference"]


def expected_confusion(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return multiclass_confusion_matrix(
        predictions, labels, num_classes, ignore_index=255, validate_args=False
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("size", "label_size", "num_classes", "dtype"),
    [
        ((9, 20), (36, 80), 19, torch.float32),
        ((9, 20), (72, 160), 21, torch.float64),
        ((17, 17), (129, 129), 5, torch.float64),
        ((13, 10), (31, 29), 150, torch.float32),
        ((9, 20), (9, 20), 7, torch.bfloat16),
        ((9, 20), (5, 13), 7, torch.float16),
        ((2, 3), (100, 70), 300, torch.float64),
        ((1, 1), (3, 4), 2, torch.float32),
    ],
)
def test_predictions_and_their_confusion(
    size, label_size, num_classes, dtype, align_corners, backend
):
    logits = torch.randn(2, num_classes, *size).to(dtype)
    labels = torch.randint(0, num_classes, (2, *label_size))
    labels[torch.rand(labels.shape) < 0.2] = 255
    options = {"align_corners": align_corners, "ignore_index": 255}
    with ao.use_backend(backend):
        predictions = ao.pixel_argmax(logits, label_size, align_corners=align_corners)
        matrix = ao.pixel_confusion(logits, labels, **options)
        hits = ao.ops.softmax_moments(logits, labels, **options).hits
    z = F.interpolate(logits.double(), label_size, mode="bilinear", align_corners=align_corners)
    assert predictions.shape == (2, *label_size) and predictions.dtype == torch.int64
    # the largest, except for rounding
    found, largest = z.gather(1, predictions[:, None])[:, 0], z.amax(1)
    coordinates = 1e-5 if dtype != torch.float64 else 1e-12
    assert (largest - found <= coordinates * z.abs().max()).all()
    assert torch.equal(matrix, expected_confusion(predictions, labels, num_classes))
    assert torch.equal(matrix.diagonal(), hits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_equal_ones_and_nan(backend: str):
    logits = torch.zeros(1, 6, 4, 20)
    logits[0, 2:, :2] = 3.0
    logits[0, 4, 2:, :3] = torch.nan
    logits[0, 5, 2:, :3] = torch.nan
    logits[0, :, :, 19] = -torch.inf
    with ao.use_backend(backend):
        predictions = ao.pixel_argmax(logits, (4, 20))
        upsampled = ao.pixel_argmax(logits, (16, 80))
    assert torch.equal(predictions, logits.argmax(1))
    assert (upsampled[0, 10:, :10] == 4).all() and (upsampled[0, :4, 14:60] == 2).all()
    with ao.use_backend("reference"):
        assert torch.equal(upsampled, ao.pixel_argmax(logits, (16, 80)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "num_classes"), [((70_000,), 3), ((2, 300), 300), ((2, 17, 23), 19), ((0, 3, 4), 5)]
)
def test_confusion(shape: tuple[int, ...], num_classes: int, backend: str):
    predictions = torch.randint(0, num_classes, shape)
    labels = torch.randint(0, num_classes, shape)
    labels[torch.rand(shape) < 0.2] = 255
    labels[torch.rand(shape) < 0.1] = -1
    valid = (labels >= 0) & (labels != 255)
    expected = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    expected.index_put_(
        (labels[valid], predictions[valid]), torch.ones(int(valid.sum()), dtype=torch.int64), True
    )
    with ao.use_backend(backend):
        found = ao.confusion(predictions, labels, num_classes, ignore_index=255)
        assert torch.equal(found, expected)
        transposed = ao.confusion(
            predictions.t() if len(shape) == 2 else predictions,
            labels.t() if len(shape) == 2 else labels,
            num_classes,
            ignore_index=255,
        )
        assert torch.equal(transposed, expected)
        predictions[..., ::2] = num_classes  # no class
        half = ao.confusion(predictions, labels, num_classes, ignore_index=255)
    expected = valid & (torch.arange(shape[-1]) % 2 == 1)
    assert half.sum() == expected.sum()


def test_confusion_is_deterministic_by_itself():
    predictions, labels = torch.randint(0, 19, (2, 64, 64)), torch.randint(0, 19, (2, 64, 64))
    expected = expected_confusion(predictions, labels, 19)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(ao.confusion(predictions, labels, 19), expected)
    finally:
        torch.use_deterministic_algorithms(False)
