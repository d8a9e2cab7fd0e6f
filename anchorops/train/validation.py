"""The figures of a validation split."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from .data import evaluation_loader
from .evaluate import evaluate
from .metrics import summarize
from .parts import Parts
from .workers import batches_of


def validation_loader(parts: Parts, rank: int, world: int) -> DataLoader:
    return evaluation_loader(
        parts.validation_set,
        parts.config.data,
        batch_size=parts.config.running.eval_batch_size,
        rank=rank,
        world=world,
    )


def validate(parts: Parts, before_batch: Callable[[], None]) -> dict[str, Any]:
    """The result of `summarize` for the whole split; each rank evaluates its share of the images.
    `before_batch` may raise an exception to stop it."""

    def watched(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            before_batch()
            yield batch

    ranks = parts.ranks
    ranks.synchronize(parts.model)
    with batches_of(validation_loader(parts, ranks.rank, ranks.world)) as batches:
        confusion = evaluate(
            parts.model,
            watched(batches),
            parts.num_classes,
            ranks.device,
            parts.window,
            stride=parts.config.running.window_stride,
            scales=parts.config.running.eval_scales,
            flip=parts.config.running.eval_flip,
        )
    return summarize(
        confusion, parts.training_set.classes, parts.frequencies, parts.config.data.head_tail
    )
