"""The network's size and speed, as papers print them."""

import copy
import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...losses import Regularizer
from ...measure import duration
from ..evaluation import as_weights, predict
from ..networks.models import Segmenter
from ..options import Options

REPEATS = 7  # of a prediction


@torch.no_grad()
def measure_complexity(model: Segmenter, options: Options) -> dict[str, float]:
    """The size and speed of the network, for an image of the size of a crop: parameters that
    predictions use, and all that were trained; FLOPs (a multiplication and an addition are 2),
    counted on a copy without data, of matrix products, convolutions and attention; images per
    second, one by one."""
    size = options.data.crop
    left_out = [m for m in model.modules() if isinstance(m, Regularizer)]
    left_out += [] if model.auxiliary is None else [model.auxiliary]
    extra = {parameter for part in left_out for parameter in part.parameters()}
    zeros = torch.zeros(1, options.data.channels, *size)
    image = as_weights(model, zeros, options.model.channels_last)
    abstract = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter:
        abstract(image.to("meta"))

    def run() -> None:
        predict(model, image, size)
        if image.is_cuda:
            torch.cuda.synchronize()

    run()
    seconds = statistics.median(duration(run) for _ in range(REPEATS))
    return {
        "cost/parameters": sum(p.numel() for p in model.parameters() if p not in extra),
        "cost/trained_parameters": sum(p.numel() for p in model.parameters()),
        "cost/flops": counter.get_total_flops(),
        "cost/images_per_second": 1 / seconds,
    }
