"""Helpers for the tests of kernels: layouts in memory, and numbers of threads."""

from collections.abc import Callable

import torch
from torch import Tensor


def in_layout(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The values in this layout, and their buffer, which is NaN around them.

    "contiguous", "channels_last", "transposed"; "cropped" and "every other" are views inside of a
    larger buffer, "cropped aligned" and "misaligned" ones that begin at 16 bytes and that do not;
    "expanded" batch, channels, rows or pixels. "channels_last" may come first.
    """
    size, dims = values.shape, range(values.dim())
    order = list(dims)
    if layout.startswith("channels_last"):
        order = [0, *dims[2:], 1]
    elif layout.startswith("transposed"):
        order.reverse()
    if layout.startswith("expanded"):
        axis = {"batch": 0, "channels": 1, "rows": 2, "pixels": -1}[layout.split()[1]]
        buffer = values.narrow(axis, 0, 1)
        return buffer.expand(size), buffer
    if layout.endswith("misaligned"):
        buffer = torch.full([values.numel() + 1], torch.nan, dtype=values.dtype)
        view, step, margin = buffer[1:].view([size[i] for i in order]), 1, 0
    else:
        step, margin = (2, 2) if layout == "every other" else (1, 1)
        if layout in ("contiguous", "channels_last", "transposed dense"):
            margin = 0
        elif layout.endswith("aligned"):
            margin = 8
        around = [step * size[i] + 3 * margin for i in order]
        buffer = view = torch.full(around, torch.nan, dtype=values.dtype)
    view = view.permute([order.index(i) for i in dims])
    view = view[tuple(slice(margin, margin + step * n, step) for n in size)]
    return view.copy_(values), buffer


def same_for_all_threads(run: Callable[[], list[Tensor] | tuple[Tensor, ...]]) -> None:
    """Assert equal bits with 1 to 8 threads, and from run to run."""
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
