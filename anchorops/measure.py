"""Time, memory and bandwidth of a call, as used by the benchmarks and `anchorops-doctor`.

device = torch.device("cpu")
loss = lambda: ao.pixel_cross_entropy(logits, labels)
loss()
measurement, seconds = measure(loss, logits.nbytes, device)
memory = peak_extra_bytes(loss, device)
"""

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ._checks import check_choice

Run = Callable[[], object]
MOST_WAIT = 0.02  # seconds that a GPU is kept busy before a timed call


class Measurement(NamedTuple):
    """The results of `measure`.

    Attributes:
        median: seconds, as are q20 and q80, the quantiles at 20 and 80 %, and the minimum.
        rounds: how often the call was timed.
        gbps: counted bytes per second, in GB/s.
        copy_share: that rate as a share of the rate of a copy in the same rounds; None if none was
            made.
        read_share: the same for a sum, which only reads.
        others: cores that other processes kept busy during the measurement; None on CUDA, where the
            system does not report this, and below 0.1 s.
    """

    median: float
    q20: float
    q80: float
    minimum: float
    rounds: int
    gbps: float
    copy_share: float | None = None
    read_share: float | None = None
    others: float | None = None


def example_labels(size: tuple[int, ...], num_classes: int, kind: str) -> Tensor:
    """Labels that are the same in every call. One of K + 1 is ignored (−1).

    Args:
        size: (N,), (B, N) or (B, H, W).
        num_classes: K, at least 1.
        kind: "coherent", rectangles of 24×37 pixels (runs of 37 points) at odd offsets, or
            "random", each pixel drawn independently.

    Returns:
        int64 labels of that size on the CPU.
    """
    check_choice("example_labels", "kind", kind, ("coherent", "random"))
    generator = torch.Generator().manual_seed(1)
    if kind == "random":
        labels = torch.randint(num_classes + 1, size, generator=generator)
    else:
        edges = {1: (37,), 2: (1, 37), 3: (1, 24, 37)}[len(size)]
        coarse = tuple(n // edge + 2 for n, edge in zip(size, edges, strict=True))
        labels = torch.randint(num_classes + 1, coarse, generator=generator)
        for axis, (n, edge) in enumerate(zip(size, edges, strict=True)):
            labels = labels.repeat_interleave(edge, axis).narrow(axis, edge // 3, n)
    return torch.where(labels == num_classes, -1, labels)


def _sample(runs: Sequence[Run], device: torch.device, rounds: int) -> list[list[float]]:
    """Of each round, the seconds of each run."""
    if device.type != "cuda":
        return [[duration(run) for run in runs] for _ in range(rounds)]
    with torch.cuda.device(device):  # whose stream records the events
        return _sample_cuda(runs, rounds)


def duration(run: Run) -> float:
    """Seconds of one call on the host. On CUDA it does not wait for the GPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _sample_cuda(runs: Sequence[Run], rounds: int) -> list[list[float]]:
    # Reading this buffer evicts the inputs from L2, and makes L2 write back the results of the call
    # before. The buffer is only read: written lines would be written back during the timed call.
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    clean = torch.zeros(min(2**30, memory // 16) // 4, dtype=torch.float32, device="cuda")

    def timed(run: Run, reads: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(reads):
            clean.sum()
        start.record()
        run()
        end.record()
        return start, end

    def seconds(events: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    # Reads also keep the GPU busy while the host launches the timed call, which may take longer
    # than the call itself: twice as long as the host needs, or MOST_WAIT.
    read = min(seconds(timed(clean.sum, 1)) for _ in range(3))
    reads = [1 + math.ceil(min(2 * duration(run), MOST_WAIT) / read) for run in runs]
    pairs = [list(map(timed, runs, reads)) for _ in range(rounds)]
    return [list(map(seconds, row)) for row in pairs]


def cuda_graph(run: Run) -> Run:
    """The run as a CUDA graph: the time of a replay is GPU time only."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> object:
        graph.replay()
        return outputs

    return replay


def in_turns(
    runs: Sequence[Run], device: torch.device, *, seconds: float = 0.5, rounds: int = 3
) -> tuple[list[list[float]], float | None]:
    """Times runs that take turns, because the speed of a machine drifts, and only measurements
    close in time can be compared. Each run must have been called before.

    Args:
        runs: the calls; their results are not kept.
        device: where they run.
        seconds, rounds: for about how long they are repeated, but at least so often, and at most
            1,000 times, on CUDA 100.

    Returns:
        The seconds of each run in each round, and `others` of `Measurement`.
    """
    # The loop runs until the time is over: the first calls of a run may take ten times as long as
    # later ones, while the system looks for huge pages. On CUDA the host must be ahead of the GPU.
    chunk, most = (10, 100) if device.type == "cuda" else (1, 1000)
    processes, start = OtherProcesses(device), time.perf_counter()
    times = _sample(runs, device, rounds)
    while len(times) < most and time.perf_counter() - start < seconds:
        times += _sample(runs, device, chunk)
    others = processes.cores()
    return [list(seconds) for seconds in zip(*times, strict=True)], others


def measure(
    run: Run,
    counted_bytes: int,
    device: torch.device,
    *,
    seconds: float = 0.5,
    rounds: int = 3,
) -> tuple[Measurement, list[float]]:
    """Times a run, as `in_turns`, at least twice. On CUDA the inputs are evicted from the L2 cache
    before each call, and the time is the GPU's.

    counted_bytes: bytes that it must move if each input is read and each output written once.
    Returns the measurement, and the seconds of every round.
    """
    rounds = max(rounds, 2)  # for quantiles
    (times,), cores = in_turns([run], device, seconds=seconds, rounds=rounds)
    return summary(times, counted_bytes, 0, [])._replace(others=cores), times


def summary(
    times: Sequence[float], counted_bytes: int, copied_bytes: int, beside: Sequence[Sequence[float]]
) -> Measurement:
    """The Measurement of a call, except `others`.

    Args:
        times: seconds of each round.
        counted_bytes: that the call moves at least.
        copied_bytes: of a tensor that was copied and summed in turns with the call.
        beside: seconds of each round of the copy and of the sum; or nothing, for no shares.
    """
    q20, *_, q80 = quantiles(times, n=5, method="inclusive")
    shares = []
    for moved, others in zip((2 * copied_bytes, copied_bytes), beside, strict=False):
        pairs = zip(times, others, strict=True)
        shares.append(median(counted_bytes / ours / (moved / other) for ours, other in pairs))
    middle = median(times)
    rate = counted_bytes / middle / 1e9
    return Measurement(middle, q20, q80, min(times), len(times), rate, *shares)


# If other processes use the cores, threads wait for each other in every small layer: SAR's
# embedding of 19 anchors then takes 500 ms instead of 2, unless OMP_WAIT_POLICY is passive.
DISTURBED = 0.2  # cores that other processes keep busy


class OtherProcesses:
    """What other processes do from now on, if the measured code runs on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.start = time.perf_counter()
        self.busy = None if device.type == "cuda" else _busy_seconds()

    def cores(self) -> float | None:
        """Cores that they kept busy since; None below 0.1 s, and where it is not known."""
        elapsed, busy = time.perf_counter() - self.start, _busy_seconds()
        if self.busy is None or busy is None or elapsed < 0.1:  # the system counts in 10 ms
            return None
        return max(0.0, busy - self.busy) / elapsed


def _busy_seconds() -> float | None:
    """Seconds that all cores spent on other processes since the system started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split()[1:11])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def peak_extra_bytes(run: Run, device: torch.device) -> int | None:
    """Peak memory of the run in bytes, without its inputs and outputs.

    None if the system does not report it: on the CPU only Linux does.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        outputs = _output_bytes(run())
        return max(0, torch.cuda.max_memory_allocated(device) - before - outputs)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise reused memory would not be counted
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
        before = _status("VmRSS")
        outputs = _output_bytes(run())
        return max(0, _status("VmHWM") - before - outputs)
    except (AttributeError, OSError, StopIteration):
        return None


def _output_bytes(outputs: object) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def environment(device: torch.device) -> dict[str, str | None]:
    """Hardware, threads and versions, for the header of a table."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        name = f"{gpu.name}, {gpu.multi_processor_count} multiprocessors"
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
        if "OMP_WAIT_POLICY" in os.environ:
            name += f" (OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']})"
    return {
        "device": name,
        "device_type": device.type,
        "anchorops": _package_version("anchorops"),
        "torch": torch.__version__,
        "triton": _package_version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
