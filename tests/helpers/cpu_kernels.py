"""Helpers for the tests of every CPU kernel: layouts in memory, instruction sets, threads."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def in_layout(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The values in this layout, and their buffer, which is NaN around them."""
    size, dims = values.shape, range(values.dim())
    order = list(dims)
    if layout.startswith("channels_last"):
        order = [0, *dims[2:], 1]
    elif layout == "transposed":
        order.reverse()
    if layout.startswith("expanded"):
        axis = ("batch", "channels", "pixels").index(layout.split()[1])
        buffer = values.narrow(axis, 0, 1)
        return buffer.expand(size), buffer
    step, margin = (2, 2) if layout == "every other" else (1, 1)
    if layout in ("contiguous", "channels_last"):
        margin = 0
    buffer = torch.full([step * size[i] + 2 * margin for i in order], torch.nan, dtype=values.dtype)
    view = buffer.permute([order.index(i) for i in dims])
    view = view[tuple(slice(margin, margin + step * n, step) for n in size)]
    return view.copy_(values), buffer


def passes_with(instructions: str, file: str, tests: str) -> None:
    """The tests of this file pass in a process with a lower instruction set than the processor."""
    known = ["default", "avx2", "avx512"]
    here = torch.backends.cpu.get_cpu_capability().lower()
    if here not in known or known.index(here) <= known.index(instructions):
        pytest.skip(f"{here} is the best here: the other tests use no more than {instructions}")
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", file, "-k", tests]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def same_for_all_threads(run: Callable[[], list[Tensor] | tuple[Tensor, ...]]) -> None:
    """The same bits with 1 to 8 threads, and from run to run."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3, 5, 8):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
