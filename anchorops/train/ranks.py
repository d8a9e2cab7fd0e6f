"""The processes that torchrun starts, which are the ranks of a run; one without torchrun."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .options import expect

T = TypeVar("T")


def start(device: str) -> torch.device:
    """The device of this rank. Ranks without GPUs communicate by gloo."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))  # on this machine
    gpus = torch.cuda.device_count()
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    expected = f"a GPU for each of {processes} processes (or cpu)"
    expect(not on_gpu or gpus >= processes, "--device", expected, gpus)
    chosen = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return chosen


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line: str) -> None:
    """Print a line to stderr, of the first rank."""
    if rank() == 0:
        print(line, file=sys.stderr)


def on_each(make: Callable[[], T]) -> T:
    """What each rank makes. If this fails on the first rank, the others end without a word."""
    failed = [True]
    try:
        made = make()
        failed = [False]
        return made
    finally:
        if world() > 1:
            dist.broadcast_object_list(failed)
            if failed[0] and rank() > 0:
                sys.exit(1)


def on_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on all ranks."""
    made: list[Any] = [on_each(lambda: make() if rank() == 0 else None)]
    if world() > 1:
        dist.broadcast_object_list(made)
    return made[0]


def largest(value: int) -> int:
    """Of the ranks' values."""
    values = torch.tensor(value)
    if world() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)
