"""The network's size and speed, as papers print them."""

import copy
import statistics
import time
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..losses import Regularizer
from .parts import Parts
from .predict import predict

REPEATS = 5


class Complexity(NamedTuple):
    """parameters: of the network alone, as it predicts; trained: with those of the methods and of
    an auxiliary head. flops: of one image (height, width), a multiplication and an addition
    counting 2. frames_per_second: of single images of that size, median."""

    parameters: int
    trained: int
    size: tuple[int, int]
    flops: int
    frames_per_second: float


@torch.inference_mode()
def measure_complexity(parts: Parts) -> Complexity:
    """Of an image of the size of a crop. FLOPs are counted on a copy without data, of matrix
    products, convolutions and attention."""
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
        1 / statistics.median(_seconds(parts, size, channels)),
    )


def _seconds(parts: Parts, size: tuple[int, int], channels: int) -> list[float]:
    """Of `predict`, classes at the image's size, pass by pass; the first one warms up."""
    device = parts.ranks.device
    image = torch.zeros(1, channels, *size, device=device).to(memory_format=parts.layout)
    seconds = []
    for _ in range(1 + REPEATS):
        if image.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        predict(parts.model, image, size)
        if image.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]
