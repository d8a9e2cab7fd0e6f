"""`anchorops-doctor --benchmark`: losses and operators beside torch's own formulas."""

from collections.abc import Callable, Iterator
from itertools import groupby
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

Run = Callable[[], tuple[Tensor, ...]]  # the result, and the gradient of a floating first input
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


class Call(NamedTuple):
    """A case of the catalogue, by a backend of ours or by torch's formula ("torch")."""

    case: Case
    backend: str

    def __str__(self) -> str:
        return f"{self.case}, {self.backend}"

    def inputs(self, n: float, device: torch.device) -> Inputs:
        """On a GPU images are bfloat16; on a CPU all is float32."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return {
            name: x.to(device, dtype if x.is_floating_point() and x.dim() > 2 else x.dtype)
            for name, x in self.case.sample.inputs(n).items()
        }

    def step(self, inputs: Inputs) -> Run:
        """Forward and backward; to be called with this backend."""
        loss = self.case.formula if self.backend == "torch" else self.case.ours
        first, x = next(iter(inputs.items()))

        def run() -> tuple[Tensor, ...]:
            leaf = x.detach().requires_grad_(x.is_floating_point())
            value = loss(**inputs | {first: leaf})
            gradients = torch.autograd.grad(value, leaf) if value.requires_grad else ()
            return value.detach(), *gradients

        return run


def calls(device: torch.device) -> Iterator[Call]:
    """Of each case torch's formula, and every fused backend that is usable and has it, or the
    reference where there is none."""
    fused = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    usable = [name for name in fused if unusable()[name] is None and not TRITON_ON_HOST]
    for case in cases("bench"):
        ours = [name for name in usable if name in case.entry.backends]
        for backend in ("torch", *(ours or ["reference"])):
            yield Call(case, backend)


class Cost(NamedTuple):
    seconds: float
    peak: int | None
    host: float


def _cost(run: Run, tiny_run: Run, device: torch.device, seconds: float) -> Cost:
    """tiny_run: of tiny inputs, for which the time on a CPU is nearly that of the host."""
    peak = peak_extra_bytes(run, device)
    measured, _ = measure(run, 0, device, seconds=seconds)
    times = []
    threads = torch.get_num_threads()
    # Threads of small operators wait for each other.
    torch.set_num_threads(1)
    try:
        for _ in range(20):
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(duration(run if device.type == "cuda" else tiny_run))
    finally:
        torch.set_num_threads(threads)
    return Cost(measured.median, peak, median(times))


def _error(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The larger ‖ours − exact‖ / ‖exact‖ of loss and gradient."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, exact, strict=True)]
    errors = [(a - b).norm() / b.norm() for a, b in pairs]
    return float(torch.stack(errors).max())  # NaN if one is


def benchmark(size: float | None = None, seconds: float = 0.2) -> bool:
    """Prints errors and costs of every usable fused backend; True if all results are correct.

    Args:
        size: factor of the height and width of each batch; by default 1 on a CPU, 2 on a GPU.
        seconds: for about how long each call is repeated.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    host = "until the calls return" if cuda else "of tiny inputs, with one thread"
    print(f"\n{environment(device)['device']}, {'bfloat16' if cuda else 'float32'}")
    print(LEGEND.format(host=host))
    print(
        f"{'backend':<10}{'call':<31}{'input':<10}{'ms':>9}{'torch':>9}{'faster':>8}"
        f"{'MB':>7}{'torch':>7}{'µs':>7}{'torch':>7}{'error':>8}"
    )
    right, processes = True, OtherProcesses(device)
    tolerance = 1e-2 if cuda else 1e-4  # a gradient in bfloat16 is rounded
    for case, (formula, *ours) in groupby(calls(device), lambda call: str(call.case)):
        n = size or (2 if cuda else 1)
        inputs, tiny = (formula.inputs(x, device) for x in (n, TINY * n))
        wide = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
        exact = formula.step(wide)()
        theirs = _cost(formula.step(inputs), formula.step(tiny), device, seconds)
        name, _, kind = case.rpartition(", ")
        for call in ours:
            run, tiny_run = (call.step(x) for x in (inputs, tiny))
            with use_backend(call.backend):
                error = _error(run(), exact)
                cost = _cost(run, tiny_run, device, seconds)
            right &= error <= tolerance
            print(
                f"{call.backend:<10}{name:<31}{kind:<10}{cost.seconds * 1e3:>9.3f}"
                f"{theirs.seconds * 1e3:>9.3f}{theirs.seconds / cost.seconds:>8.1f}"
                f"{_megabytes(cost.peak):>7}{_megabytes(theirs.peak):>7}"
                f"{cost.host * 1e6:>7.0f}{theirs.host * 1e6:>7.0f}{error:>8.0e}"
                f"{'' if error <= tolerance else '  WRONG'}",
                flush=True,
            )
    if (busy := processes.cores() or 0) > DISTURBED:
        print(f"disturbed: other processes kept {busy:.1f} cores busy at the same time")
    return right


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f}"
