"""The methods' gradients on the features, relative to that of the loss of the logits, as values of
the training program's log: bench/evidence.py uses it.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import anchorops as ao
from anchorops.train.networks.learner import Learner


def measure(
    methods: Sequence[str], step: int, learner: Learner, images: Tensor, labels: Tensor
) -> dict[str, float]:
    """METHOD.gradient_ratio, every 100 steps: the norm of each method's gradient on the features,
    divided by that of the loss of the logits, in this rank's batch. With several ranks, all of them
    must call it.

    It is computed on a copy that is not compiled, so the run does not change. A measurement takes
    less time than a step, and needs memory for a second copy of the weights.
    """
    if step % 100 or learner.attachment is None:
        return {}
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        learner = copy.deepcopy(learner).train()
        attachment = learner.attachment
        assert attachment is not None
        loss = learner.pixel_loss(learner.model(images), labels)
        features = attachment.features
        assert features is not None
        attachment.forget()  # or the cycles of the copy keep the graph until Python collects them
        combined, ratios = attachment.regularizer, {}
        for name, method in zip(methods, getattr(combined, "methods", [combined]), strict=True):
            added = method(features, labels, attachment.classifier)
            ratio = ao.diagnostics.gradient_ratio(features, added, loss).item()
            if math.isfinite(ratio):  # a batch without a valid pixel has no gradients
                ratios[f"{name}.gradient_ratio"] = ratio
    return ratios
