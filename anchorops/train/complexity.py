"""The network's size and speed, as papers print them."""

import copy
import statistics
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..losses import Regularizer
from ..measure import duration
from .parts import Parts
from .predict import predict

REPEATS = 9


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
    return statistics.median(duration(run) for _ in range(REPEATS))
