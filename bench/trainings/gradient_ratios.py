"""The methods' gradients on the features, relative to that of the loss of the logits, as values of
the training program's log: bench/evidence.py uses it.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import anchorops as ao
from anchorops.losses import Regularizer
from anchorops.train.networks.learner import Learner


def measure(
    methods: Sequence[str], step: int, learner: Learner, images: Tensor, labels: Tensor
) -> dict[str, float]:
    """METHOD.gradient_ratio, every 100 steps: the norm of each method's gradient on the features,
    relative to that of the loss of the logits. The run does not change. A measurement takes less
    time than a step, and needs memory for a second copy of the weights."""
    if step % 100:
        return {}
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        ratios = zip(methods, gradient_ratios(learner, images, labels), strict=True)
    # a batch without a valid pixel has no gradients, and no ratio
    return {f"{name}.gradient_ratio": ratio for name, ratio in ratios if math.isfinite(ratio)}


def gradient_ratios(learner: Learner, images: Tensor, labels: Tensor) -> list[float]:
    """For each method, the norm of its gradient on the features divided by that of the loss of the
    logits (`anchorops.diagnostics.gradient_ratio`), in this rank's batch.

    It is computed on a copy that is not compiled, so the learner does not change. It needs a copy
    of the model, a forward pass and the backward passes down to the features. With several ranks,
    all of them must call it.
    """
    if learner.attachment is None:
        return []
    learner = copy.deepcopy(learner).train()
    attachment = learner.attachment
    assert attachment is not None
    combined = attachment.regularizer
    methods: list[Regularizer] = list(getattr(combined, "methods", [combined]))
    loss = learner.pixel_loss(learner.model(images), labels)
    features = attachment.features
    assert features is not None
    attachment.forget()  # or the cycles of the copy keep the graph until Python collects them
    return [
        ao.diagnostics.gradient_ratio(
            features, method(features, labels, attachment.classifier), loss
        ).item()
        for method in methods
    ]
