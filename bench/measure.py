"""Time and memory of a function on the CPU."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def read_ratio(run: Callable[[], object], read: Callable[[], object], rounds: int = 21) -> float:
    """Median of read time / run time, each pair back to back: a machine's bandwidth drifts."""
    return median(seconds(read) / seconds(run) for _ in range(rounds))


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """How far the process grows above its present size while the function runs (Linux)."""
    function()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    before = status("VmRSS")
    function()
    return status("VmHWM") - before
