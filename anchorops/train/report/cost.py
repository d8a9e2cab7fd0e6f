"""What the methods cost in time and memory, their gradients on the features relative to that of the
loss of the logits, and the network's size and speed, as papers print them."""

import copy
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import anchorops as ao

from ...losses import Regularizer
from ...measure import duration
from ..data.loading import Training, augmentation
from ..networks.learner import Learner
from ..run.parts import Parts
from .evaluate import predict

REPEATS = 7  # of a training pass
CALLS = 9  # of `predict`


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


class Cost(NamedTuple):
    """Seconds and GPU memory in MB (None on CPU) of one forward and backward."""

    seconds: float
    memory_mb: float | None


def cost_of_regularizer(parts: Parts) -> tuple[Cost, Cost] | None:
    """The cost of a training batch without and with the regulariser; None if there is none. All
    ranks measure together, because it may call collectives, like synchronised batch norm."""
    config, ranks = parts.config, parts.ranks
    if not config.model.methods:
        return None
    training = Training(
        parts.training_set,
        augmentation(config.data, parts.training_set.channels),
        config.running.seed,
    )
    options = config.optimization
    size = options.batch_size // (options.accumulate * ranks.world)
    draws = range(ranks.rank * size, (ranks.rank + 1) * size)
    images, labels = default_collate(
        [training[draw % len(parts.training_set), draw] for draw in draws]
    )
    return measure_cost(
        parts.learner,
        images.to(ranks.device, memory_format=parts.layout),
        labels.to(ranks.device),
        bf16=config.running.bf16,
    )


def measure_cost(
    learner: Learner, images: Tensor, labels: Tensor, *, bf16: bool
) -> tuple[Cost, Cost]:
    """Without and with the regulariser, on a copy of the learner: medians of alternating passes."""
    learner = copy.deepcopy(learner).train()
    plain = Learner(learner.model, None, learner.pixel_loss, learner.auxiliary_weight)
    seconds: dict[Learner, list[float]] = {plain: [], learner: []}
    memory: dict[Learner, float] = {}
    for repeat in range(REPEATS + 1):
        for candidate, measured in seconds.items():
            learner.zero_grad()
            if images.is_cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                loss, _ = candidate(images, labels)
            loss.backward()
            if images.is_cuda:
                torch.cuda.synchronize()
                memory[candidate] = torch.cuda.max_memory_allocated() / 2**20
            if repeat > 0:  # the first pass warms up
                measured.append(time.perf_counter() - begin)
    first, second = (
        Cost(sorted(seconds[x])[REPEATS // 2], memory.get(x)) for x in (plain, learner)
    )
    return first, second


class Complexity(NamedTuple):
    """parameters: those that predictions use. trained: also those of the methods and of an
    auxiliary head. size: (height, width) of an image. flops: for one image of this size; a
    multiplication and an addition count as 2. frames_per_second: single images of this size,
    median."""

    parameters: int
    trained: int
    size: tuple[int, int]
    flops: int
    frames_per_second: float


@torch.inference_mode()
def measure_complexity(parts: Parts) -> Complexity:
    """The size and speed of the network, for an image of the size of a crop. FLOPs are counted on a
    copy without data; they include matrix products, convolutions and attention."""
    model = parts.model.eval()
    size, channels = parts.config.data.crop, parts.training_set.channels
    left_out = [m for m in model.modules() if isinstance(m, Regularizer)]
    left_out += [] if model.auxiliary is None else [model.auxiliary]
    extra = {parameter for module in left_out for parameter in module.parameters()}
    abstract = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter:
        abstract(torch.empty(1, channels, *size, device="meta"))
    return Complexity(
        sum(p.numel() for p in model.parameters() if p not in extra),
        sum(p.numel() for p in model.parameters()),
        size,
        counter.get_total_flops(),
        1 / _seconds(parts, size, channels),
    )


def _seconds(parts: Parts, size: tuple[int, int], channels: int) -> float:
    """The median time of a call of `predict` for one image. (torch.utils.benchmark imports what
    builds C++ extensions, which warns at every start if there is nvcc but no GPU.)"""
    image = torch.zeros(1, channels, *size, device=parts.ranks.device)
    image = image.to(memory_format=parts.layout)

    def run() -> None:
        predict(parts.model, image, size)
        if image.is_cuda:
            torch.cuda.synchronize()

    run()
    return statistics.median(duration(run) for _ in range(CALLS))
