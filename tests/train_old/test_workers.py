"""Processes that load images: they end when the training process no longer needs them."""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_runs import TINY
from torch.utils.data import DataLoader

from anchorops.train.data.digits import DigitScenes
from anchorops.train.data.loading import (
    BatchSampler,
    Draws,
    batches_of,
    evaluation_loader,
    training_loader,
)


class Broken(DigitScenes):
    def __getitem__(self, index: int):
        if index == 20:
            raise ValueError("image 20 is broken")
        return super().__getitem__(index)


def loader(scenes: type[DigitScenes] = DigitScenes) -> DataLoader:
    """Batches of one image, from one worker."""
    dataset, config = scenes("val", 40, (32, 32), seed=0), TINY.replace(workers=1).data
    return evaluation_loader(dataset, config, batch_size=1, rank=0, world=1)


def test_iterators_draw_no_random_numbers():
    """Steps draw torch's random numbers, and a resumed run creates its iterator before another
    step. So iterators must not draw any."""
    config = TINY.replace(workers=0).data
    scenes = DigitScenes("val", 4, (32, 32), seed=0)
    draws = Draws(len(scenes), seed=0)
    sampler = BatchSampler(
        draws, batch_size=2, accumulate=1, rank=0, world=1, first_step=0, steps=1
    )
    before = torch.get_rng_state()
    for loader in (
        training_loader(scenes, config, sampler, seed=0, pin_memory=False),
        evaluation_loader(scenes, config, batch_size=1, rank=0, world=1),
    ):
        with batches_of(loader) as batches:
            next(batches)
        assert torch.equal(torch.get_rng_state(), before)


def worker() -> Any:
    (process,) = [p for p in multiprocessing.active_children() if p.is_alive()]
    return process


def leave(batches: Iterator[Any]) -> None:
    next(batches)
    assert worker()


def fail(batches: Iterator[Any]) -> None:
    next(batches)
    raise KeyError("of the training")


def read_all(batches: Iterator[Any]) -> None:
    list(batches)


@pytest.mark.parametrize(
    ("use", "scenes", "error"),
    [(leave, DigitScenes, None), (fail, DigitScenes, KeyError), (read_all, Broken, ValueError)],
)
def test_workers_end_with_the_block(
    use: Callable[[Iterator[Any]], None],
    scenes: type[DigitScenes],
    error: type[Exception] | None,
):
    """Workers end with the block, even while an exception exists whose frames refer to torch's
    iterator."""
    caught = None
    try:
        with batches_of(loader(scenes)) as batches:
            use(batches)
    except (KeyError, ValueError) as raised:
        caught = raised
    assert type(caught) is (error or type(None))
    assert not multiprocessing.active_children()


def test_worker_that_is_killed():
    with batches_of(loader()) as batches:
        next(batches)
        worker().kill()
        with pytest.raises(ValueError, match=r"too little memory .* fewer --workers"):
            list(batches)
    assert not multiprocessing.active_children()
