"""The processes that torchrun starts, which are the ranks of a run; one without torchrun."""

import os
import socket
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .options import Options, as_in_file, expect, flat, same

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
    """What each rank makes. If this fails, the first rank on which it does tells why, and the
    others end without a word."""
    made, error = None, None
    try:
        made = make()
    except BaseException as raised:  # also Ctrl-C, or the others would wait for this rank
        error = raised
    first = -largest(-(world() if error is None else rank()))
    if error is not None and first == rank():
        raise error
    if first < world():
        sys.exit(1)
    return made  # pyright: ignore[reportReturnType]


def on_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on all ranks."""
    made: list[Any] = [on_each(lambda: make() if rank() == 0 else None)]
    if world() > 1:
        dist.broadcast_object_list(made)
    return made[0]


def checksum(path: Path) -> str:
    crc = 0
    with open(path, "rb") as file:
        while part := file.read(2**20):
            crc = zlib.crc32(part, crc)
    return f"CRC-32 {crc:08x}"


def check_alike(options: Options, *paths: Path) -> None:
    """Raises ValueError if a rank has another option than the first rank, except --data.workers, or
    if it does not find the same files there, or none where the first rank finds none."""
    if world() == 1:
        return
    own = flat(as_in_file(options)) | {"--data.workers": None}
    for path in paths:
        own[str(path)] = on_each(lambda path=path: checksum(path) if path.exists() else "no file")
    firsts = on_first(lambda: [*own.values()])

    def compare() -> None:
        for (name, value), first in zip(own.items(), firsts, strict=True):
            place = f"{name} on {socket.gethostname()}"
            expect(same(value, first), place, f"{first} as on the first rank", value)

    on_each(compare)


def largest(value: int) -> int:
    """Of the ranks' values."""
    values = torch.tensor(value)
    if world() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)
