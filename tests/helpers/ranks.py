"""Processes that reduce statistics with each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


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
