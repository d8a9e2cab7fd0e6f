"""Statistics and samples of a trained network's features."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

from .config import IGNORED
from .models import Segmenter
from .predict import pad_to_multiple

SAMPLES = 2_000  # pixels shown in two dimensions


class Features(NamedTuple):
    """centroids [K, D] and counts [K] of the classes; samples: the features [n, D] of some pixels
    and their labels [n]; example: the first image (C, H, W), its features (D, h, w), labels [h·w].
    """

    centroids: Tensor
    counts: Tensor
    samples: tuple[Tensor, Tensor]
    example: tuple[Tensor, Tensor, Tensor]


def _resized(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels (B, H, W) resized by nearest-neighbour interpolation, as in the operators."""
    return F.interpolate(labels[:, None].float(), tuple(size), mode="nearest")[:, 0].long()


def features_and_labels(
    model: Segmenter, images: Tensor, labels: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features float32 (B, D, h, w) of whole images, and labels of the size of the padded images,
    for `class_moments`."""
    labels = _resized(labels.to(device), images.shape[2:])
    features = model.body(pad_to_multiple(images.to(device)))
    return features.float(), pad_to_multiple(labels, IGNORED)


@torch.inference_mode()
def collect_features(
    model: Segmenter,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
) -> Features:
    """The mean feature of each class over the batches, and equally many sample pixels of each
    class, if there are enough."""
    model.eval()
    sums: Tensor | None = None
    counts = torch.zeros(num_classes, dtype=torch.int64)
    samples, sampled_labels, example = [], [], None
    quota = SAMPLES // num_classes
    taken = torch.zeros(num_classes, dtype=torch.int64)
    for images, labels in batches:
        features, labels = features_and_labels(model, images, labels, device)
        moments = ao.ops.class_moments(features, labels, num_classes, ignore_index=IGNORED)
        sums = moments.sums if sums is None else sums + moments.sums
        counts += moments.counts.cpu()
        pixels = features.flatten(2).transpose(1, 2).flatten(0, 1)
        keys = _resized(labels, features.shape[2:]).flatten(1)
        image = pad_to_multiple(images[0])
        example = example or (image, features[0].cpu(), keys[0].cpu())
        keys = keys.flatten()
        for k in torch.nonzero(taken < quota).flatten().tolist():
            found = torch.nonzero(keys == k).flatten()
            # spread over the batch, so that a single object does not fill the quota
            found = found[:: max(1, len(found) // 40)][: quota - int(taken[k])]
            samples.append(pixels[found].cpu())
            sampled_labels.append(torch.full((len(found),), k))
            taken[k] += len(found)
    assert sums is not None and example is not None
    centroids = sums.cpu() / counts.clamp(min=1)[:, None]
    return Features(centroids, counts, (torch.cat(samples), torch.cat(sampled_labels)), example)
