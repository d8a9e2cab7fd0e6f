"""The methods' gradients on the features, relative to that of the loss of the logits, as a callback
of the training program:

    anchorops-train fit … --trainer.callbacks '[{class_path: gradient_ratios.GradientRatios}]'

with PYTHONPATH=bench. bench/evidence.py uses it.
"""

import copy
import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import anchorops as ao
from anchorops.losses import Regularizer
from anchorops.train.module import SegmentationModule
from anchorops.train.networks.learner import Learner


class GradientRatios(Callback):
    """Logs METHOD.gradient_ratio: the norm of each method's gradient on the features, relative to
    that of the loss of the logits. The run does not change. A measurement takes less time than a
    step, and needs memory for a second copy of the weights.

    Args:
        every: Steps between measurements.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = every

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, SegmentationModule) and pl_module.learner is not None
        begins = batch_idx % trainer.accumulate_grad_batches == 0
        if not (begins and trainer.global_step % self.every == 0):
            return
        images, labels = batch
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
            pl_module.seed_step()
            images = images.to(memory_format=pl_module.layout)
            ratios = gradient_ratios(pl_module.learner, images, labels)
        named = zip(pl_module.options.methods, ratios, strict=True)
        # a batch without a valid pixel has no gradients, and no ratio
        known = {f"{name}.gradient_ratio": x for name, x in named if math.isfinite(x)}
        for logger in trainer.loggers:
            if known:
                logger.log_metrics(known, trainer.global_step)


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
