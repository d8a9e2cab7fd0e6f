"""What the methods cost in time and memory, their gradients on the features relative to that of the
loss of the logits, and the network's size and speed, as papers print them."""

import copy
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import anchorops as ao

from ...losses import Regularizer
from ...measure import duration
from ..networks.learner import Learner
from .evaluate import predict

if TYPE_CHECKING:
    from ..module import SegmentationModule

REPEATS = 7  # of a training pass, and of a prediction


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
    return [
        ao.diagnostics.gradient_ratio(
            features, method(features, labels, attachment.classifier), loss
        ).item()
        for method in methods
    ]


def cost_of_methods(module: "SegmentationModule") -> dict[str, float]:
    """Median seconds, and peak memory of a GPU in MB, of one forward and backward pass of a
    training batch without and with the methods; empty without methods. All ranks measure together,
    because methods may call collectives, like synchronised batch norm."""
    assert module.learner is not None
    if module.learner.attachment is None:
        return {}
    images, labels = (x.to(module.device) for x in module.data.first_batch())
    images = images.to(memory_format=module.layout)
    learner = copy.deepcopy(module.learner).train()
    plain = Learner(learner.model, None, learner.pixel_loss, learner.auxiliary_weight)
    values: dict[str, float] = {}
    with torch.enable_grad():
        for name, candidate in (("plain", plain), ("methods", learner)):

            def run(candidate: Learner = candidate) -> None:
                learner.zero_grad()
                with module.trainer.precision_plugin.forward_context():
                    loss, _ = candidate(images, labels)
                loss.backward()

            if images.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            values[f"cost/seconds_{name}"] = _median_seconds(run, images.is_cuda)
            if images.is_cuda:
                values[f"cost/memory_mb_{name}"] = torch.cuda.max_memory_allocated() / 2**20
    return values


def _median_seconds(run: Callable[[], object], on_gpu: bool) -> float:
    def finished() -> None:
        run()
        if on_gpu:
            torch.cuda.synchronize()

    finished()
    return statistics.median(duration(finished) for _ in range(REPEATS))


@torch.inference_mode()
def measure_complexity(module: "SegmentationModule") -> dict[str, float]:
    """The size and speed of the network, for an image of the size of a crop: parameters that
    predictions use, and all that were trained; FLOPs (a multiplication and an addition are 2),
    counted on a copy without data, of matrix products, convolutions and attention; images per
    second, one by one."""
    model = module.network
    size, channels = module.data.options.crop, module.data.options.channels
    left_out = [m for m in model.modules() if isinstance(m, Regularizer)]
    left_out += [] if model.auxiliary is None else [model.auxiliary]
    extra = {parameter for part in left_out for parameter in part.parameters()}
    abstract = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter:
        abstract(torch.empty(1, channels, *size, device="meta"))
    image = torch.zeros(1, channels, *size, device=module.device)
    image = image.to(memory_format=module.layout)
    seconds = _median_seconds(lambda: predict(model, image, size), image.is_cuda)
    return {
        "cost/parameters": sum(p.numel() for p in model.parameters() if p not in extra),
        "cost/trained_parameters": sum(p.numel() for p in model.parameters()),
        "cost/flops": counter.get_total_flops(),
        "cost/images_per_second": 1 / seconds,
    }
