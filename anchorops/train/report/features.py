"""Statistics and samples of a network's features, and CeCo's measures of neural collapse, which are
computed at each evaluation."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

from ..config import IGNORED
from ..data.loading import batches_of
from ..networks.models import Segmenter
from ..run.parts import Parts
from .evaluate import pad_to_multiple, validation_loader

SAMPLES = 2_000  # pixels shown in two dimensions
# names of the measures in the journal; the report draws them
CENTROIDS, CLASSIFIER = "centroids", "classifier"
EQUIANGULARITY, MAXIMAL_ANGLE = "equiangularity", "maximal_angle"
ACCURACY_AND_PIXELS = "accuracy_and_pixels"
ACCURACY_AND_IMAGES = "accuracy_and_images"
COLLAPSE = (
    *(f"{x}.{y}" for x in (CENTROIDS, CLASSIFIER) for y in (EQUIANGULARITY, MAXIMAL_ANGLE)),
    *(ACCURACY_AND_PIXELS, ACCURACY_AND_IMAGES),
)


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
            indices = torch.nonzero(keys == k).flatten()
            # spread over the batch, so that a single object does not fill the quota
            indices = indices[:: max(1, len(indices) // 40)][: quota - int(taken[k])]
            samples.append(pixels[indices].cpu())
            sampled_labels.append(torch.full((len(indices),), k))
            taken[k] += len(indices)
    assert sums is not None and example is not None
    centroids = sums.cpu() / counts.clamp(min=1)[:, None]
    return Features(centroids, counts, (torch.cat(samples), torch.cat(sampled_labels)), example)


@torch.inference_mode()
def collapse_measures(parts: Parts, classes: list[dict[str, Any]]) -> dict[str, float]:
    """The measures by name, on the first --collapse-images validation images. Each rank processes
    its share of them.

    EQUIANGULARITY of the class centroids and of the classifier's rows is in CeCo's Fig. 2,
    MAXIMAL_ANGLE of both in its Fig. 5. Fig. 7 has the correlation of the classes' accuracy with
    their numbers of training pixels and training images. Measures that are not defined (for a
    single class) are omitted.

    classes: as returned by `summarize`.
    """
    model, ranks, running = parts.model, parts.ranks, parts.config.running
    weight = model.classifier.weight
    geometry = ao.diagnostics.CentroidGeometry(
        parts.num_classes, weight.shape[1], ignore_index=IGNORED
    ).to(ranks.device)
    passes = math.ceil(running.collapse_images / (running.eval_batch_size * ranks.world))
    training = model.training
    model.eval()
    with batches_of(validation_loader(parts, ranks.rank, ranks.world)) as batches:
        for images, labels in itertools.islice(batches, passes):
            geometry.update(*features_and_labels(model, images, labels, ranks.device))
    model.train(training)
    centroid_measures = geometry.compute()
    measured = {f"{CENTROIDS}.{x}": centroid_measures[x] for x in (EQUIANGULARITY, MAXIMAL_ANGLE)}
    measured |= {
        f"{CLASSIFIER}.{EQUIANGULARITY}": ao.diagnostics.equiangularity(weight),
        f"{CLASSIFIER}.{MAXIMAL_ANGLE}": ao.diagnostics.maximal_angle(weight),
    }
    accuracy = torch.tensor([math.nan if c["accuracy"] is None else c["accuracy"] for c in classes])
    known = accuracy.isfinite()
    for name, counts in (
        (ACCURACY_AND_PIXELS, parts.frequencies),
        (ACCURACY_AND_IMAGES, parts.prior),
    ):
        measured[name] = ao.diagnostics.pearson(accuracy[known], counts[known])
    values = {name: float(value) for name, value in measured.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
