"""Processes that reduce statistics with each other."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run_ranks(ranks: int, run: Callable[..., None], *arguments: Any) -> None:
    """Call run(rank, *arguments) in one new process for each rank."""
    multiprocessing.spawn(_run, (run, *arguments), nprocs=ranks)  # pyright: ignore


def _run(rank: int, run: Callable[..., None], *arguments: Any) -> None:
    run(rank, *arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # without the end of the interpreter: a thread of gloo that waits for it then calls abort, and
    # FSDP keeps its process group, thus the threads (github.com/pytorch/pytorch/issues/190489)
    os._exit(0)


@contextmanager
def process_group(folder: Path | str, rank: int = 0, ranks: int = 1) -> Iterator[None]:
    """This process is one of these ranks, which meet in a file of the folder."""
    torch.set_num_threads(1)
    place, timeout = f"file://{folder}/rendezvous", timedelta(seconds=100)
    dist.init_process_group("gloo", place, timeout, world_size=ranks, rank=rank)
    try:
        yield
    finally:
        dist.destroy_process_group()
