"""Runs the cases of the catalogue on each usable backend, compares, and reports.

A case calls public functions, on tensors that lie between NaN, and compares values and gradients
with torch's functions in float64, within the error budget (catalogue/budget.py). A second call must
give the same bits. The methods alone are compared with themselves, by the backend `reference`. What
is wrong can be taken out of "auto": `report` prints how.
"""

import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import anchorops as ao

from .._backend import OPERATORS, excluded, not_auto_line
from .._libraries import TRITON_ON_HOST, unusable
from ..measure import cuda_graph, environment
from .catalogue import Case, Inputs, cases
from .catalogue.entry import evaluate, random_of
from .catalogue.pixels import BASE

COMPOSITION = "composition"  # of several operators, or of torch's functions
MOST_WORKERS = 8  # processes that compile Triton's kernels


class Row(NamedTuple):
    """What a check found. `error` and `limit` are relative to the largest number."""

    operator: str  # or COMPOSITION, or "environment"
    backend: str
    check: str
    error: float = 0.0
    limit: float = 0.0
    right: bool | None = None  # not checked, for the reason in `note`, or not served by the backend
    note: str = ""
    seconds: float = 0.0
    parts: tuple[str, ...] = ()  # the operators that it calls

    @property
    def is_fault(self) -> bool:
        return self.right is False or (self.right is None and self.note != "")

    def __str__(self) -> str:
        unchecked = "not checked" if self.note else "not served"
        found = {True: "ok", False: "WRONG", None: unchecked}[self.right]
        numbers = " " * 18 if self.right is None else f"{self.error:9.1e}{self.limit:9.1e}"
        start = f"{self.operator:<23}{self.backend:<10}{self.check:<52}"
        return f"{start}{numbers}  {self.note + ' ' if self.note else ''}{found}"


def _between_nan(x: Tensor, device: torch.device) -> Tensor:
    """x, with its strides, on the device; before, after and between its numbers are NaN or 0."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    fill = torch.nan if x.is_floating_point() else 0
    buffer = torch.full((extent + 128,), fill, dtype=x.dtype, device=device)
    return buffer.as_strided(x.shape, x.stride(), 64).copy_(x)


def _compare(case: Case, backend: str, device: torch.device) -> tuple[float, float, str]:
    """Error, limit, and what else is wrong."""
    inputs = {name: _between_nan(x, device) for name, x in case.sample.inputs().items()}
    with ao.use_backend(backend):
        ours, again = (evaluate(case.ours, inputs) for _ in range(2))
    pairs = zip(*([x for x in found if x is not None] for found in (ours, again)), strict=True)
    for pair in pairs:
        if not torch.equal(*(x.flatten().contiguous().view(torch.uint8) for x in pair)):
            return torch.inf, 0.0, "a second call gives other bits"
    error, limit = max(case.errors_and_limits(inputs, ours), key=lambda x: x[0] / x[1])
    wrong = "a gradient is missing, a number not finite, or a shape wrong"
    return error, limit, "" if error < torch.inf else wrong


def _alive(device: torch.device) -> bool:
    """After an illegal access, every call on a GPU fails until the process ends."""
    try:
        return bool(torch.ones(1, device=device).sum() == 1)
    except RuntimeError:
        return False


def _checked(
    row: Row, device: torch.device, compare: Callable[[], tuple[float, float, str]]
) -> Row:
    """What `compare` finds. Everything that it raises is a result, which the user must see."""
    start, error, limit = time.monotonic(), torch.inf, 0.0
    right, note = None, "the GPU failed in an earlier check:"
    if _alive(device):
        try:
            error, limit, note = compare()
            right = error <= limit
        except Exception as raised:
            note = f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
            if "does not support this call" in note:
                note = ""
            elif not isinstance(raised, torch.OutOfMemoryError) and "unavailable" not in note:
                right = False
    found = {"error": error, "limit": limit, "right": right, "note": note}
    return row._replace(**found, seconds=time.monotonic() - start)


def _row_of(case: Case, backend: str) -> Row:
    operators = case.entry.operators
    operator = operators[0] if len(operators) == 1 else COMPOSITION
    return Row(operator, backend, str(case), parts=operators)


def run(case: Case, backend: str, device: torch.device) -> Row:
    """One case, by this backend on this device."""
    return _checked(_row_of(case, backend), device, partial(_compare, case, backend, device))


def device_of(backend: str) -> torch.device:
    """Where a backend runs: kernels without a GPU read tensors of the CPU."""
    simulated = backend == "triton" and TRITON_ON_HOST
    on_gpu = backend != "cpu" and torch.cuda.is_available() and not simulated
    return torch.device("cuda" if on_gpu else "cpu")


def environment_rows(backend: str, device: torch.device) -> Iterator[Row]:
    """Ways to call a loss, of which the first gives what the others must give. They say nothing
    about an operator."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        if backend == "cuda":  # it has no pixel losses
            _, sums, _ = ao.ops.class_moments(z, y, z.shape[1], ignore_index=-1)
            return sums.square().sum()
        return ao.pixel_cross_entropy(z, y, ignore_index=-1)

    def call(inputs: Inputs, function: Callable[..., Tensor] = loss) -> list[Tensor]:
        z = inputs["logits"].detach().requires_grad_()
        value = function(z, inputs["labels"])
        return [value.detach(), *torch.autograd.grad(value, z)]

    def autocast(inputs: Inputs) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            return call(inputs)

    def other_stream(inputs: Inputs) -> list[Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = call(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return results

    def without_synchronising(inputs: Inputs) -> list[Tensor]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def other_gpu(inputs: Inputs) -> list[Tensor]:
        results = call({name: x.to("cuda:1") for name, x in inputs.items()})
        return [x.to(device) for x in results]

    compiled = partial(torch.compile, loss, fullgraph=True, backend="aot_eager")
    ways: dict[str, Callable[[Inputs], Any]] = {
        "a plain call": call,
        "torch.compile, fullgraph": lambda inputs: call(inputs, compiled()),
        "autocast": autocast,
    }
    if device.type == "cuda":
        ways["another stream"] = other_stream
        ways["a CUDA graph"] = lambda inputs: cuda_graph(partial(call, inputs))()
        ways["no synchronisation"] = without_synchronising
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if len(names) > 1 and names[0] == names[1]:  # other GPUs may add in another order
            ways["GPU 1 while 0 is current"] = other_gpu
    expected: list[Tensor] = []

    def same(way: Callable[[Inputs], Any]) -> tuple[float, float, str]:
        made = BASE(1, random_of("environment"))
        inputs = {name: _between_nan(x, device) for name, x in made.items()}
        with ao.use_backend(backend):
            results = way(inputs)
        expected.extend(results if not expected else ())
        equal = all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
        return (0.0, 0.0, "") if equal else (torch.inf, 0.0, "other bits than a plain call")

    for name, way in ways.items():
        yield _checked(Row("environment", backend, name), device, partial(same, way))


def _run_number(number: int, backend: str) -> Row:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # of the formulas
    return run(cases("all")[number], backend, device_of(backend))


def verify(backend: str, everything: bool) -> Iterator[Row]:
    """All cases of a backend, `quick` ones alone of Triton's unless `everything`."""
    device = device_of(backend)
    torch.set_float32_matmul_precision("highest")
    if backend == "triton":
        yield from _in_processes(backend, everything)
    else:
        for case in cases("all"):
            yield run(case, backend, device)
    yield from environment_rows(backend, device)


def _in_processes(backend: str, everything: bool) -> Iterator[Row]:
    """Side by side, because Triton compiles each kernel at its first launch."""
    spawn = multiprocessing.get_context("spawn")
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        futures = {
            pool.submit(_run_number, number, backend): case
            for number, case in enumerate(cases("all"))
            if everything or "quick" in case.sample.tags
        }
        for future, case in futures.items():
            try:
                yield future.result()
            except BrokenProcessPool:
                yield _row_of(case, backend)._replace(note="a process that ran checks ended:")


def not_auto(rows: Sequence[Row]) -> list[str]:
    """The lines of a shell that take what is wrong out of "auto", besides what is excluded already.
    The first is for operators whose own check failed. For a composition without such an operator,
    one line follows for each of its parts."""
    faults = [row for row in rows if row.right is False and row.backend in excluded]
    wrong = {(row.backend, row.operator) for row in faults if row.operator in OPERATORS}

    lines = [not_auto_line(*wrong)] if wrong else []
    for row in faults:
        pairs = [(row.backend, part) for part in row.parts if row.backend in OPERATORS[part]]
        if wrong.isdisjoint(pairs):
            lines += [f"{not_auto_line(*wrong, x)}  # one of: {row.check}" for x in pairs]
    return lines


def _driver() -> str:
    """The version of the GPUs' driver."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with suppress(OSError):
            if match := re.search(r"\d+\.[\d.]+", Path(file).read_text()):
                return match[0]
    return "unknown"


def report(backend: str | None, everything: bool, path: Path | None) -> bool:
    """Verify a backend, or all that are usable here; print a line for each check, and a summary.
    True if everything that the backends serve was checked and is right."""
    reasons = unusable()
    if backend is not None and reasons[backend]:
        print(f"\n{backend} is not usable here: {reasons[backend]}")
        return False
    if path is not None:
        path.touch()  # an error before the checks, not after them
    print(f"\n{'operator':<23}{'backend':<10}{'check':<54}{'error':>7}{'limit':>9}")
    names = [name for name, reason in reasons.items() if not reason]
    summary, rows = [], []
    for name in names if backend is None else [backend]:
        start, backend_rows = time.monotonic(), []
        for row in verify(name, everything):
            print(row, flush=True)
            backend_rows.append(row)
        faults = [row for row in backend_rows if row.is_fault]
        right = sum(row.right is True for row in backend_rows)
        wrong = sum(row.right is False for row in backend_rows)
        refused = len(backend_rows) - right - len(faults)
        summary.append(
            f"{name}: {right} right, {wrong} WRONG, {len(faults) - wrong} not checked, "
            f"{refused} not served, {time.monotonic() - start:.0f} s"
        )
        summary += map(str, faults)
        rows += backend_rows
    versions = {**environment(device_of(rows[0].backend)), "driver": _driver()}
    print("\nPlease report this, for a GPU also if everything is right:\n")
    print(", ".join(f"{name} {value}" for name, value in versions.items()))
    print("\n".join(summary))
    if lines := not_auto(rows):
        print('\nWhat takes it out of "auto" (docs/install.md; in Python exclude_from_auto):\n')
        print("\n".join(lines))
    if path is not None:
        record = [row._replace(error=min(row.error, 1e300))._asdict() for row in rows]  # no ∞
        path.write_text(json.dumps({**versions, "rows": record}, indent=1))
    return not any(row.is_fault for row in rows)
