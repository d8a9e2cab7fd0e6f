"""The time and memory that the regulariser needs."""

import copy
import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from .data import Training, augmentation
from .learner import Learner
from .parts import Parts

REPEATS = 7


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
