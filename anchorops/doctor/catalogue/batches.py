"""What `anchorops-doctor --benchmark` times: batches as in training, whose labels are all classes,
and the usual formulas."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import anchorops as ao

from ...measure import example_labels
from . import usual
from .entry import Entry, Inputs, Sample
from .inputs import normal

CLASSES_OF_FEATURES = 19


class Logits(NamedTuple):
    """size: of the logits of an image or a volume (K, h, w); one channel is a sigmoid. ratio: size
    of the labels / size of the logits. sharp: in regions, one class is 20 above the others, as of a
    trained network, and labels in one twentieth are others; otherwise random numbers."""

    size: tuple[int, ...]
    ratio: int
    sharp: bool
    teacher: bool = False

    def __call__(self, n: float, random: Generator) -> Inputs:
        channels, *space = self.size
        space = [max(1, round(n * x)) for x in space]
        batch, num_classes = 2 if n > 1 else 1, max(channels, 2)
        plane = example_labels((batch, *space[-2:]), num_classes, "coherent").clamp(min=0)
        classes = plane.view(batch, *[1] * (len(space) - 2), *space[-2:]).expand(batch, *space)
        # Without wrong pixels, the loss of sharp logits would be the rounding error of float32.
        errors = classes.narrow(1, 0, 1 + classes.shape[1] // 20)
        labels = torch.cat([(errors + 1) % num_classes, classes[:, errors.shape[1] :]], 1)
        inputs = {"logits": self._logits(classes, random)}
        if self.teacher:
            inputs["teacher"] = self._logits(labels, random)
        for axis in range(1, labels.dim()):
            labels = labels.repeat_interleave(self.ratio, axis)
        return inputs | {"labels": labels if channels > 1 else labels[:, None]}

    def _logits(self, classes: Tensor, random: Generator) -> Tensor:
        """Logits [B, K, …] of the classes [B, …]. At the border of two sharp regions, neighbours
        differ by about 20, in a sigmoid too."""
        channels = self.size[0]
        flat = normal(len(classes), channels, *classes.shape[1:], random=random)
        one_hot = F.one_hot(classes, max(channels, 2)).movedim(-1, 1)[:, -channels:]
        return 20.0 * one_hot - 10 + 0.3 * flat if self.sharp else flat


def features(kind: str, n: float, random: Generator) -> Inputs:
    """kind: labels in rectangles (coherent), or random."""
    height, width = (max(1, round(n * x)) for x in (128, 256))
    x = normal(2 if n > 1 else 1, 256, height, width, random=random)
    labels = example_labels((len(x), height, width), CLASSES_OF_FEATURES, kind).clamp(min=0)
    return {"features": x, "labels": labels, "anchors": centroids(n, random)["keys"]}


def centroids(n: float, random: Generator) -> Inputs:
    unit = [F.normalize(normal(CLASSES_OF_FEATURES, 256, random=random)) for _ in range(2)]
    return {"queries": unit[0], "keys": unit[1]}


def of_logits(name: str, *size: int, ratio: int = 4, teacher: bool = False) -> tuple[Sample, ...]:
    return tuple(
        Sample(f"{name}, {kind}", Logits(size, ratio, kind == "sharp", teacher), {}, ("bench",))
        for kind in ("flat", "sharp")
    )


def of_features(name: str) -> tuple[Sample, ...]:
    return tuple(
        Sample(f"{name}, {kind}", partial(features, kind), {}, ("bench",))
        for kind in ("coherent", "random")
    )


def class_centroids(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    return (ao.class_centroids(features, labels, len(anchors))[0] * anchors).mean()


MOMENTS, FEATURES = ("softmax_moments",), ("class_moments",)
ENTRIES = [
    Entry(
        "cross-entropy",
        MOMENTS,
        ao.pixel_cross_entropy,
        usual.cross_entropy,
        (
            *of_logits("cross-entropy, K 19, ratio 4", 19, 64, 128),
            *of_logits("cross-entropy, K 19, ratio 1", 19, 256, 512, ratio=1),
            *of_logits("cross-entropy, K 150, ratio 4", 150, 64, 64),
            *of_logits("cross-entropy, K 150, ratio 1", 150, 256, 256, ratio=1),
            *of_logits("cross-entropy of a volume", 4, 8, 32, 32),
        ),
    ),
    Entry(
        "cross-entropy + Dice",
        MOMENTS,
        lambda **inputs: ao.CrossEntropyDice(dice=ao.Dice(absent="keep"))(**inputs),
        usual.cross_entropy_dice,
        of_logits("cross-entropy + Dice", 19, 64, 128),
    ),
    Entry(
        "binary cross-entropy",
        MOMENTS,
        ao.pixel_binary_cross_entropy,
        usual.binary_cross_entropy,
        of_logits("binary cross-entropy", 1, 64, 128),
    ),
    Entry(
        "divergence",
        ("pixel_kl_divergence",),
        lambda logits, labels, teacher: ao.pixel_kl_divergence(logits, teacher, labels.shape[1:]),
        usual.mean_kl_divergence,
        of_logits("pixel_kl_divergence", 19, 64, 128, teacher=True),
    ),
    Entry(
        "class moments",
        FEATURES,
        class_centroids,
        usual.class_centroids,
        of_features("class moments"),
    ),
    Entry(
        "pixel-to-anchor MSE",
        FEATURES,
        ao.pixel_to_anchor_mse,
        usual.pixel_to_anchor_mse,
        of_features("pixel-to-anchor MSE"),
    ),
    Entry(
        "centroid InfoNCE",
        ("centroid_info_nce",),
        ao.ops.centroid_info_nce,
        usual.centroid_info_nce,
        (Sample("centroid InfoNCE, centroids", centroids, {}, ("bench",)),),
    ),
]
