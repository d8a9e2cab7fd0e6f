"""Predictions from several scales and mirror images."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import TINY
from torch import Tensor, nn

from anchorops.train.report.evaluate import predict
from anchorops.train.run import loop

Size = tuple[int, int]


@pytest.mark.parametrize(
    ("image_size", "size", "window", "flip"),
    [
        ((64, 128), (64, 128), None, True),
        ((64, 128), (130, 140), None, False),
        ((64, 128), (64, 128), (64, 64), True),
    ],
)
def test_mean_of_probabilities(image_size: Size, size: Size, window: Size | None, flip: bool):
    """The same as mmsegmentation: logits are upsampled to the image's size, then to the labels'
    size."""
    torch.manual_seed(0)
    model, images = nn.Conv2d(3, 5, 4, 4), torch.randn(2, 3, *image_size)
    scales = (0.5, 1.0, 2.0)

    def logits(images: Tensor) -> Tensor:
        rows, columns = window or images.shape[2:]
        total, times = torch.zeros(()), torch.zeros(images.shape[2:])
        for top in starts(images.shape[2], rows):
            for left in starts(images.shape[3], columns):
                part = images[..., top : top + rows, left : left + columns]
                right = images.shape[3] - left - part.shape[3]
                below = images.shape[2] - top - part.shape[2]
                up = F.interpolate(model(part), part.shape[2:], mode="bilinear")
                total = total + F.pad(up, (left, right, top, below))
                times += F.pad(torch.ones(part.shape[2:]), (left, right, top, below))
        return F.interpolate(total / times, size, mode="bilinear")

    def starts(length: int, window: int) -> list[int]:
        stride = window * 2 // 3
        return [
            *range(0, max(1, length - window), stride),
            *([length - window] * (length > window)),
        ]

    total = torch.zeros(2, 5, *size)
    with torch.no_grad():
        for scale in scales:
            sides = [round(scale * side) for side in image_size]
            scaled = F.interpolate(images, sides, mode="bilinear", antialias=scale != 1)
            total += logits(scaled).softmax(1)
            if flip:
                total += logits(scaled.flip(3)).softmax(1).flip(3)
        predicted = predict(model, images, size, window, scales=scales, flip=flip)
    chosen = total.gather(1, predicted[:, None])[:, 0]
    torch.testing.assert_close(chosen, total.amax(1))


def test_a_symmetric_network_is_not_changed_by_mirrors():
    torch.manual_seed(0)
    model, images = nn.Conv2d(3, 5, 1), torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        plain, mirrored = (predict(model, images, (32, 64), flip=flip) for flip in (False, True))
    assert torch.equal(plain, mirrored)


def test_scales_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: set[int] = set()
    evaluation = loop.validate

    def watched(parts, before_batch):
        hook = parts.model.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[2]))
        results = evaluation(parts, before_batch)
        hook.remove()
        return results

    monkeypatch.setattr(loop, "validate", watched)
    config = TINY.replace(out=tmp_path, name="run", steps=1, methods=(), eval_every=0)
    config = config.replace(eval_scales=(1.0, 2.0), eval_flip=True)
    assert loop.start(config)["miou"] > 0
    assert seen == {32, 64}
    with pytest.raises(ValueError, match="--eval-scales: expected one scale or more, above 0"):
        config.replace(eval_scales=(1.0, 0.0))
