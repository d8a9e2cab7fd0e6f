"""The confusion matrix of a validation split."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

import anchorops as ao

from .config import IGNORED
from .predict import predict


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    window: tuple[int, int] | None = None,
    *,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Confusion matrix int64 [K, K] (truth × prediction) of the valid pixels, summed over all
    ranks; window, stride, scales, flip as in `predict`. Restores the mode of the model. Raises
    FloatingPointError on all ranks if a logit is NaN or infinite."""
    training = model.training
    model.eval()
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)  # forward passes

    def checked(images: Tensor) -> Tensor:
        logits = model(images)
        largest = torch.linalg.vector_norm(logits, math.inf)  # needs no memory, keeps NaN
        wrong.add_(~largest.isfinite())
        return logits

    for images, labels in batches:
        labels = labels.to(device)
        predictions = predict(
            checked,
            images.to(device),
            labels.shape[1:],
            window,
            stride=stride,
            scales=scales,
            flip=flip,
        )
        matrix += ao.confusion(predictions, labels, num_classes, ignore_index=IGNORED)
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(matrix)
        dist.all_reduce(wrong)
    if wrong:
        raise FloatingPointError("the logits of validation images")
    return matrix.cpu()
