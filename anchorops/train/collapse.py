"""CeCo's measures of neural collapse, computed at each evaluation."""

import itertools
import math
from typing import Any

import torch

import anchorops as ao

from .analysis import features_and_labels
from .config import IGNORED
from .parts import Parts
from .validation import validation_loader
from .workers import batches_of

# names of the measures in the journal; the report draws them
CENTROIDS, CLASSIFIER = "centroids", "classifier"
EQUIANGULARITY, MAXIMAL_ANGLE = "equiangularity", "maximal_angle"
ACCURACY_AND_PIXELS = "accuracy_and_pixels"
ACCURACY_AND_IMAGES = "accuracy_and_images"
COLLAPSE = (
    *(f"{x}.{y}" for x in (CENTROIDS, CLASSIFIER) for y in (EQUIANGULARITY, MAXIMAL_ANGLE)),
    *(ACCURACY_AND_PIXELS, ACCURACY_AND_IMAGES),
)


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
    of_centroids = geometry.compute()
    measured = {f"{CENTROIDS}.{x}": of_centroids[x] for x in (EQUIANGULARITY, MAXIMAL_ANGLE)}
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
