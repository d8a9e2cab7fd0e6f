"""Time and memory of every case of cases/listed.py: our backends and the alternatives take turns.

    python bench/operator_times.py --case 'cross-entropy, *SegFormer*' [--rows ROWS.json]

Rows are written after each group of implementations, so an interrupted run keeps them. On the CPU
each group has a process of its own, but for a dry run, since the time of torch's formulas depends
on the state in which earlier calls have left malloc.
"""

import contextlib
import ctypes
import fnmatch
import gc
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from cases.listed import BACKWARD, FORWARD, Case, cases_on
from cases.operations import OPERATIONS, Library, alternatives_of, counted_bytes
from record import by_case, head_of, ours_and_other, parser_of, save
from torch import Tensor

import anchorops as ao
from anchorops._backend import CUDA_MAX_KEYS, OPERATORS
from anchorops._libraries import TRITON_ON_HOST
from anchorops.doctor.catalogue import Inputs
from anchorops.doctor.catalogue.entry import tensors_of
from anchorops.measure import DISTURBED, Run, in_turns, peak_extra_bytes, summary

LESS_EXACT = 10  # alternatives, as those that upsample in bfloat16
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-2}  # also of expanded squares
# Rows are measured again if other processes disturbed them, or if the times of ours differ by more
# than this: a virtual machine may have given unused memory back to its host, and new pages are
# slow. The steadiest measurement is kept.
MOST_TRIES, MOST_SPREAD = 3, 2.0
SECONDS = 0.6  # of timing: at least
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's <malloc.h>


class Implementation(NamedTuple):
    """What a row is about. backend: of ours."""

    name: str
    formula: Any
    backend: str | None = None
    compiled: bool = False


def usable(device: torch.device) -> list[str]:
    kinds = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}[device.type]
    return [kind for kind in kinds if ao.backends()[kind] is None and not TRITON_ON_HOST]


def implementations(device: str, case: Case, kinds: Sequence[str]) -> list[Implementation]:
    """Ours first: by the backends of these kinds that have the operation, the fastest first."""
    operation = OPERATIONS[case.operation]
    keys = case.shape.num_classes * (4 if "4 groups" in case.operation else 1)
    kinds = [x for x in kinds if x in OPERATORS[operation.operator]]
    kinds = [x for x in kinds if x != "cuda" or keys <= CUDA_MAX_KEYS] or ["reference"]
    alternatives = alternatives_of(case, libraries=device == "cuda").items()
    return [
        *(Implementation(f"anchorops ({kind})", operation.ours, kind) for kind in kinds),
        *(Implementation(name, x, None, name.startswith("compiled ")) for name, x in alternatives),
    ]


def keep_pages() -> None:
    """From now on malloc returns no memory to the operating system. Otherwise page faults take
    about half of the time of the usual formulas of pixel losses, which allocate new memory in each
    call."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def run_of(formula: Callable[..., Any], inputs: Inputs, direction: str) -> Run:
    """The results, or where they have gradients that of the first input."""
    name, x = next(iter(inputs.items()))
    leaf = x.detach().requires_grad_(direction != FORWARD)
    inputs = inputs | {name: leaf}
    weights: list[Tensor] = []

    def gradients(results: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        if not weights:
            for y in results:
                sizes = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device)
                weights.append(sizes.view(y.shape))
        return torch.autograd.grad(results, leaf, weights, **options)

    def run() -> Sequence[Tensor]:
        with contextlib.nullcontext() if direction != FORWARD else torch.no_grad():
            results = tensors_of(formula(**inputs))
        return gradients(results) if results[0].requires_grad else results

    if direction != BACKWARD:
        return run
    made = tensors_of(formula(**inputs))
    return lambda: gradients(made, retain_graph=True)


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest ‖result − exact‖ / ‖exact‖."""
    pairs = [(x.detach().float(), y.float()) for x, y in zip(results, exact, strict=True)]
    return max(float((x - y).norm() / y.norm().clamp(min=1e-30)) for x, y in pairs)


def exact_results(case: Case, inputs: Inputs) -> list[Tensor]:
    """Those of the first alternative in float32."""
    formula = next(iter(OPERATIONS[case.operation].alternatives.values()))
    wide = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    run: Any = run_of(formula, wide, case.direction)
    return [x.detach() for x in run()]


class WrongResults(Exception):
    """They are not timed."""


class Timer:
    """Measures the implementations of a case in groups that take turns: eager and compiled ones."""

    def __init__(self, case: Case, device: torch.device, tiny: bool):
        self.case, self.device, self.tiny = case, device, tiny
        operation = OPERATIONS[case.operation]
        self.seconds, self.rounds = (0.0, 3) if tiny else (SECONDS, operation.rounds)
        self.inputs = case.inputs(device)
        self.exact = exact_results(case, self.inputs) if operation.compares else None

    def rows(self, group: Sequence[Implementation]) -> list[dict[str, Any]]:
        """What fails, except ours, has a row that says why."""
        rows, runs = [], {}
        for one in group:
            row: dict[str, Any] = {**self.case.fields, "name": one.name}
            rows.append(row)
            try:
                runs[one.name] = self.checked(one, row)
            except Exception as error:
                if one.backend is not None:
                    raise
                first = next(iter(str(error).splitlines()), "")
                row["absent"] = f"{type(error).__name__}: {first[:200]}"
        if self.device.type == "cpu" and sys.platform == "linux":
            keep_pages()  # after the peaks of memory, to which unused pages would add
        measured = self.measured(runs) if runs else {}
        return [row | measured.get(row["name"], {}) for row in rows]

    def checked(self, one: Implementation, row: dict[str, Any]) -> Run:
        """Calls it: the first call compiles."""
        formula = one.formula.build() if isinstance(one.formula, Library) else one.formula
        if one.compiled:
            run_of(formula, self.inputs, self.case.direction)()  # what it imports is not traced
            backend = "eager" if self.tiny else "inductor"
            formula = torch.compile(formula, dynamic=False, backend=backend)
        with ao.use_backend(one.backend or "auto"):
            plain = run_of(formula, self.inputs, self.case.direction)

        def run() -> object:
            with ao.use_backend(one.backend or "auto"):
                return plain()

        results: Any = run()
        if self.exact is not None:
            row["error"] = relative_error(results, self.exact)
            limit = TOLERANCE[self.case.dtype] * (1 if one.backend else LESS_EXACT)
            different = isinstance(one.formula, Library)  # some losses of libraries are others
            if not different and not row["error"] <= limit:
                raise WrongResults(f"{row['case']}: {one.name}: error {row['error']:.2g}")
        del results
        row["extra_bytes"] = peak_extra_bytes(run, self.device)
        return run

    def measured(self, runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
        """Fields of the row of each run. A copy and a sum of the first input take turns with
        them."""
        x = next(iter(self.inputs.values())).detach()
        target = torch.empty_like(x)
        turns = [*runs.values(), lambda: target.copy_(x), lambda: x.sum()]
        counted = counted_bytes(self.case.operation, self.case.direction, self.inputs)
        tries = []
        for _ in range(1 if self.tiny else MOST_TRIES):
            gc.collect()
            times, others = in_turns(turns, self.device, seconds=self.seconds, rounds=self.rounds)
            *times, copies, reads = times
            rows = [summary(seconds, counted, x.nbytes, (copies, reads)) for seconds in times]
            unsteady = (others or 0) > DISTURBED, rows[0].q80 / rows[0].q20
            tries.append((unsteady, rows, others))
            if unsteady <= (False, MOST_SPREAD):
                break
        _, rows, others = min(tries, key=lambda one: one[0])
        fields = {"bytes": counted, "others": others}
        return {name: row._asdict() | fields for name, row in zip(runs, rows, strict=True)}


def lines_of(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table of the rows of a case, the fastest first."""
    yield f"\n{rows[0]['case']} ({rows[0]['sizes']})"
    for case in by_case(rows):
        ours, _ = ours_and_other(case)
        for row in case:
            low, middle, high = (1e3 * row[name] for name in ("q20", "median", "q80"))
            text = f"  {row['name']:<34}{middle:>10.3f} ms  [{low:.3f}, {high:.3f}]".ljust(70)
            text += f"{row['median'] / ours['median']:>7.1f}×" if ours else ""
            if row["extra_bytes"] is not None:
                text += f"  +{row['extra_bytes'] / 2**20:,.0f} MiB"
            yield text + "  disturbed" * ((row["others"] or 0) > DISTURBED)
    yield from (f"  {row['name']}: {row['absent']}" for row in rows if "absent" in row)


def rows_of(case: Case, compiled: bool, of: str, device: torch.device, tiny: bool) -> list[dict]:
    """Of the eager or of the compiled implementations. of: the type of the device of the cases."""
    every = implementations(of, case, usable(device))
    group = [one for one in every if one.compiled == compiled]
    if not group:
        return []
    torch.compiler.reset()  # otherwise a formula compiled for many shapes would run uncompiled
    return Timer(case, device, tiny).rows(group)


def in_own_process(function: Callable[..., Any], *inputs: Any) -> Any:
    """The result of a call. This process must not have run an operation of torch: its threads
    would be missing in the new one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *inputs).result()


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--case", action="append", help="of such a name, as 'Dice, *' (default: *)")
    parser.add_argument("--cases-of", choices=("cpu", "cuda"), help="(default: --device)")
    options = parser.parse_args()
    device, tiny = torch.device(options.device), options.dry_run
    on_gpu = device.type == "cuda"
    of, failed, names = options.cases_of or device.type, [], options.case or ["*"]
    chosen = [x for x in cases_on(of, tiny) if any(fnmatch.fnmatchcase(str(x), y) for y in names)]
    if not chosen:
        parser.error(f"--case: no case has the name {' or '.join(map(repr, names))}")
    for case in chosen:
        case = case._replace(shape=case.shape.on(device, tiny))
        rows: list[dict[str, Any]] = []
        try:
            for compiled in (False, True):
                inputs = case, compiled, of, device, tiny
                found = rows_of(*inputs) if on_gpu or tiny else in_own_process(rows_of, *inputs)
                rows += found
                if options.rows and found:
                    save(options.rows, "operators", head_of(device), rows)
            print(*lines_of(rows), sep="\n", flush=True)
        except Exception:  # the other cases are measured; the exit status tells of this one
            traceback.print_exc()
            failed.append(str(case))
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
