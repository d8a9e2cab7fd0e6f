"""`anchorops-doctor --benchmark`: losses and operators beside torch's own formulas."""

import contextlib
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import use_backend
from .._libraries import TRITON_ON_HOST, unusable
from ..measure import (
    DISTURBED,
    OtherProcesses,
    duration,
    environment,
    measure,
    peak_extra_bytes,
)
from .catalogue import Case, Inputs, cases

Run = Callable[[], tuple[Tensor, Tensor]]  # the loss and the gradient of its first input
TINY = 1 / 32  # of the height and the width of a batch
LEGEND = """\
input   logits flat (randn) or sharp (in regions, one class is 20 above the others, as of a trained
        network; labels in one twentieth are others); labels of features in rectangles or random
ms      median time of forward and backward pass, and of torch's formula in eager mode; on a CPU
        including its page faults, which the figures of the documentation do not include
faster  the second time divided by the first
MB      peak memory of both passes without inputs and gradient, and of torch's formula
µs      host time of both passes, and of torch's formula: {host}
error   of loss and gradient, relative to torch's formula in float32"""


def inputs_of(case: Case, n: float, device: torch.device) -> Inputs:
    """On a GPU images are bfloat16; on a CPU all is float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {
        name: x.to(device, dtype if x.is_floating_point() and x.dim() > 2 else x.dtype)
        for name, x in case.sample.inputs(n).items()
    }


def step_of(loss: Callable[..., Tensor], inputs: Inputs) -> Run:
    first, x = next(iter(inputs.items()))

    def run() -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        value = loss(**inputs | {first: leaf})
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return run


class Cost(NamedTuple):
    seconds: float
    peak: int | None
    host: float


def _cost(run: Run, tiny_run: Run, device: torch.device, seconds: float) -> Cost:
    """tiny_run: of tiny inputs, for which the time on a CPU is nearly that of the host."""
    peak = peak_extra_bytes(run, device)
    measured, _ = measure(run, 0, device, seconds=seconds)
    times = []
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize()
            times.append(duration(run))
        else:
            with _one_thread():
                times.append(duration(tiny_run))
    return Cost(measured.median, peak, median(times))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Threads of small operators wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _error(ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    """The larger ‖ours − exact‖ / ‖exact‖ of loss and gradient."""
    errors = [(a.float() - b).norm() / b.norm() for a, b in zip(ours, exact, strict=True)]
    return float(torch.stack(errors).max())  # NaN if one is


def benchmark(size: float | None = None, seconds: float = 0.2) -> bool:
    """Prints errors and costs of every usable fused backend; True if all results are correct.

    Args:
        size: of height and width of a batch on a CPU, 1 by default; on a GPU 2.
        seconds: for about how long each call is repeated.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    on_device = ("cuda", "triton") if cuda else ("cpu",)
    usable = [name for name in on_device if unusable()[name] is None and not TRITON_ON_HOST]
    host = "until the calls return" if cuda else "of tiny inputs, with one thread"
    print(f"\n{environment(device)['device']}, {'bfloat16' if cuda else 'float32'}")
    print(LEGEND.format(host=host))
    print(
        f"{'backend':<10}{'call':<31}{'input':<10}{'ms':>9}{'torch':>9}{'faster':>8}"
        f"{'MB':>7}{'torch':>7}{'µs':>7}{'torch':>7}{'error':>8}"
    )
    right, processes = True, OtherProcesses(device)
    tolerance = 1e-2 if cuda else 1e-4  # a gradient in bfloat16 is rounded
    for case in cases("bench"):
        n = size or (2 if cuda else 1)
        inputs, tiny = (inputs_of(case, x, device) for x in (n, TINY * n))
        wide = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
        exact = step_of(case.formula, wide)()
        theirs = _cost(step_of(case.formula, inputs), step_of(case.formula, tiny), device, seconds)
        call, _, kind = str(case).rpartition(", ")
        for backend in [x for x in usable if x in case.entry.backends] or ["reference"]:
            run, tiny_run = (step_of(case.ours, x) for x in (inputs, tiny))
            with use_backend(backend):
                error = _error(run(), exact)
                ours = _cost(run, tiny_run, device, seconds)
            right &= error <= tolerance
            print(
                f"{backend:<10}{call:<31}{kind:<10}{ours.seconds * 1e3:>9.3f}"
                f"{theirs.seconds * 1e3:>9.3f}{theirs.seconds / ours.seconds:>8.1f}"
                f"{_megabytes(ours.peak):>7}{_megabytes(theirs.peak):>7}"
                f"{ours.host * 1e6:>7.0f}{theirs.host * 1e6:>7.0f}{error:>8.0e}"
                f"{'' if error <= tolerance else '  WRONG'}",
                flush=True,
            )
    if (busy := processes.cores() or 0) > DISTURBED:
        print(f"disturbed: other processes kept {busy:.1f} cores busy at the same time")
    return right


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f}"
