"""The methods' gradients on the features, relative to that of the loss of the logits, in the log of
the training program: bench/evidence.py trains with it.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor

import anchorops as ao
from anchorops.train.networks import Learner
from anchorops.train.options import Model


class MeasuringLearner(Learner):
    """Its terms also have METHOD.gradient_ratio in every 100th batch: the norm of the method's
    gradient on the features, divided by that of the loss of the logits, in this rank's batch.
    """

    def __init__(self, options: Model, *others: Any) -> None:
        super().__init__(options, *others)
        self.methods = options.methods

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # the batches before this one, also of a run that goes on: batch norm counts them
        tracked = (x for name, x in self.model.named_buffers() if name.endswith("batches_tracked"))
        ratios = self.ratios(images, labels) if next(tracked) % 100 == 99 else {}
        loss, terms = super().forward(images, labels)
        return loss, {**terms, **ratios}

    def ratios(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """It is computed on a copy, so the run does not change. It takes less time than a step, and
        needs memory for a second copy of the weights."""
        if self.attachment is None:
            return {}
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            learner = copy.deepcopy(self).train()
            attachment = learner.attachment
            assert attachment is not None
            loss = learner.pixel_loss(learner.model(images), labels)
            features = attachment.features
            assert features is not None
            attachment.forget()  # or the cycles of the copy keep the graph until Python collects
            combined, ratios = attachment.regularizer, {}
            methods = getattr(combined, "methods", [combined])
            for name, method in zip(self.methods, methods, strict=True):
                added = method(features, labels, attachment.classifier)
                ratio = ao.diagnostics.gradient_ratio(features, added, loss)
                if math.isfinite(ratio):  # a batch without a valid pixel has no gradients
                    ratios[f"{name}.gradient_ratio"] = ratio
        return ratios
