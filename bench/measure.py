"""Time and memory of a function on the CPU."""

import time
from collections.abc import Callable
from pathlib import Path


def best_seconds(function: Callable[[], object], rounds: int = 15) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


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
