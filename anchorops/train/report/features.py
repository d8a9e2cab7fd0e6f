"""CeCo's measures of neural collapse."""

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

from .. import IGNORED
from ..evaluation import pad_to_multiple

if TYPE_CHECKING:
    from ..module import SegmentationModule


def features_and_labels(
    module: "SegmentationModule", images: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For the first validation images, rounded up to whole batches of all ranks, of which this rank
    gets its share: features float32 (B, D, h, w) of whole images, and labels of the size of the
    padded images, for `class_moments`."""
    data = module.data
    batches = math.ceil(images / (data.options.eval_batch_size * module.trainer.world_size))
    for inputs, labels in itertools.islice(data.val_dataloader(), batches):
        inputs, labels = inputs.to(module.device), labels.to(module.device)
        resized = F.interpolate(labels[:, None].float(), inputs.shape[2:], mode="nearest")
        features = module.network.body(module.as_weights(pad_to_multiple(inputs)))
        yield features.float(), pad_to_multiple(resized[:, 0].long(), IGNORED)


@torch.inference_mode()
def collapse_measures(module: "SegmentationModule", images: int) -> dict[str, float]:
    """The measures by name, after a validation.

    Equiangularity of the class centroids and of the classifier's rows is in CeCo's Fig. 2, the
    maximal angle of both in its Fig. 5. Fig. 7 has the correlation of the classes' accuracy with
    their numbers of training pixels and training images. Measures that are not defined (for a
    single class) are omitted.
    """
    weight, measures = module.network.classifier.weight, ao.diagnostics
    geometry = measures.CentroidGeometry(*weight.shape[:2], ignore_index=IGNORED).to(module.device)
    training = module.training
    module.eval()
    for features, labels in features_and_labels(module, images):
        geometry.update(features, labels)
    module.train(training)
    centroids = geometry.compute()
    accuracies = [c["accuracy"] for c in module.results()["classes"]]
    accuracy = torch.tensor([math.nan if x is None else x for x in accuracies])
    known = accuracy.isfinite()
    pixels, frequency = module.data.frequencies, module.data.prior
    values = {
        "centroids.equiangularity": centroids["equiangularity"],
        "centroids.maximal_angle": centroids["maximal_angle"],
        "classifier.equiangularity": measures.equiangularity(weight),
        "classifier.maximal_angle": measures.maximal_angle(weight),
        "accuracy_and_pixels": measures.pearson(accuracy[known], pixels[known]),
        "accuracy_and_images": measures.pearson(accuracy[known], frequency[known]),
    }
    return {name: float(x) for name, x in values.items() if math.isfinite(float(x))}
