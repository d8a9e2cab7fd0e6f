"""The gradients of the methods on the features, relative to that of the loss of the logits."""

import copy

import torch
from torch import Tensor

import anchorops as ao

from ..losses import Regularizer
from .learner import Learner


def gradient_ratios(learner: Learner, images: Tensor, labels: Tensor, *, bf16: bool) -> list[float]:
    """For each method, the norm of its gradient on the features divided by that of the loss of the
    logits (`anchorops.diagnostics.gradient_ratio`), in this rank's batch.

    It is computed on a copy that is not compiled, and the random state is restored, so the
    learner's next step is the same, bit for bit. It needs a copy of the model, a forward pass and
    the backward passes down to the features. With several ranks, all of them must call it.
    """
    if learner.attachment is None:
        return []
    learner = copy.deepcopy(learner).train()
    attachment = learner.attachment
    assert attachment is not None
    combined = attachment.regularizer
    methods: list[Regularizer] = list(getattr(combined, "methods", [combined]))
    with (
        torch.random.fork_rng([images.device] if images.is_cuda else []),
        torch.autocast(images.device.type, torch.bfloat16, enabled=bf16),
    ):
        loss = learner.pixel_loss(learner.model(images), labels)
        features = attachment.features
        assert features is not None
        return [
            ao.diagnostics.gradient_ratio(
                features, method(features, labels, attachment.classifier), loss
            ).item()
            for method in methods
        ]
