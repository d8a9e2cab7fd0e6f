"""CUDA: calls that it leaves to Triton raise, where it was chosen by name."""

from collections.abc import Callable

import pytest
import torch

import anchorops as ao

pytestmark = pytest.mark.on("emulator")
LOGITS, LABELS = torch.randn(2, 5, 4, 6), torch.randint(0, 5, (2, 8, 12))
FEWER, CLASSIFIER = LABELS[:, :7], torch.nn.Conv2d(12, 5, 1)
CALLS: dict[str, Callable[[], object]] = {
    "rows upsampled less than twice": lambda: ao.ops.softmax_moments(LOGITS, FEWER),
    "columns upsampled less than twice": lambda: ao.CrossEntropy()(LOGITS, LABELS[..., :11]),
    "labels of the logits' size": lambda: ao.Dice()(LOGITS, LABELS[:, :4, :6]),
    "points": lambda: ao.pixel_cross_entropy(LOGITS[0, :, 0], LABELS[0, 0, :5]),
    "sigmoids": lambda: ao.pixel_binary_cross_entropy(LOGITS[:, :1], FEWER.clamp(max=1)),
    "volumes": lambda: ao.pixel_cross_entropy(LOGITS[:, :, None], LABELS[:, None, :7]),
    "predictions": lambda: ao.pixel_argmax(LOGITS, (8, 11)),
    "confusion": lambda: ao.confusion(LABELS, LABELS, 5),
    "pixel_confusion": lambda: ao.pixel_confusion(LOGITS, LABELS),
    "CeCo": lambda: ao.CeCo(5, 12)(torch.randn(2, 12, 4, 6), LABELS, CLASSIFIER),
    "a teacher": lambda: ao.pixel_kl_divergence(LOGITS, LOGITS, (8, 12)),
    "a focal factor": lambda: ao.CrossEntropy(focal_gamma=2.0)(LOGITS, LABELS),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_raises(call: Callable[[], object], backend: str):
    message = r'backend cuda does not support this call: .*choose "triton" or "auto"$'
    with pytest.raises(ValueError, match=message):
        call()


def test_with_aligned_corners_sizes_are_smaller_by_one(backend: str):
    """Its kernels serve 4 to 7 rows."""
    actual = ao.pixel_argmax(LOGITS, (7, 11), align_corners=True)
    with ao.use_backend("reference"):
        assert torch.equal(actual, ao.pixel_argmax(LOGITS, (7, 11), align_corners=True))
