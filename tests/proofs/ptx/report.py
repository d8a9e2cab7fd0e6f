"""What ran in the machine: a plugin of pytest (tests/conftest.py) that prints a table after the
tests. Where tests/test_verify.py ran whole, it is an error if no check of `anchorops-doctor
--verify` runs a branch of kernels/ that some test compiled; where all cases of CUDA ran, if none of
them runs a line of csrc/ from which nvcc made a block of PTX."""

import ast
import os
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from . import triton_launches
from .text import Instruction, Unsupported

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "kernels"
BACKEND = os.environ.get("PTX_BACKEND", "triton")


Lines = dict[str, set[int]]  # by file


class Row(NamedTuple):
    operator: str
    dtype: str


class Record:
    """Results of all tests; pytest-xdist's processes send them with the reports."""

    def __init__(self) -> None:
        self.cases: dict[Row, Counter[str]] = defaultdict(Counter)  # forward, backward, findings
        self.errors: dict[Row, tuple[float, float]] = {}  # the largest and its limit
        self.skipped: Counter[str] = Counter()  # by what the machine does not know
        self.compiled: Lines = defaultdict(set)
        self.ran: Lines = defaultdict(set)  # Triton: by a check

    def add(self, report: pytest.TestReport) -> None:
        found: dict[str, Any] = dict(report.user_properties)
        for name, dtype in found["calls"]:
            operator, backward, _ = name.partition("_backward")
            cases = self.cases[Row(operator, dtype)]
            cases["backward" if backward else "forward"] += 1
            cases["findings"] += "Finding: " in report.longreprtext
        if "check" not in found:
            return
        operator, dtype, error, limit = found["check"]
        worst, its_limit = self.errors.get(Row(operator, dtype), (0.0, 1.0))
        if error / limit >= worst / its_limit:
            self.errors[Row(operator, dtype)] = error, limit

    def add_lines(self, report: pytest.TestReport) -> None:
        found: dict[str, Any] = dict(report.user_properties)
        _add(found["compiled"], self.compiled)
        if BACKEND == "cuda" or "check" in found:
            _add(found["ran"], self.ran)

    def table(self) -> Iterator[str]:
        arch = os.environ["PTX_ARCH"]
        yield f"What ran as compiled for sm_{arch}, backend {BACKEND}, in cases of each direction,"
        yield "and of the checks of --verify the largest error and its limit:"
        line = "{:<24}{:<10}{:>8}{:>9}{:>9}{:>9}{:>9}".format
        yield line("operator", "dtype", "forward", "backward", "error", "limit", "findings")
        for row, cases in sorted(self.cases.items()):
            numbers = [f"{x:.1e}" for x in self.errors.get(row, ())] or ["", ""]
            counts = [cases[what] for what in ("forward", "backward", "findings")]
            yield line(*row, *counts[:2], *numbers, counts[2])
        yield from (f"skipped: {n} cases: {reason}" for reason, n in self.skipped.items())


def _add(places: list[str], lines: Lines) -> None:
    for place in places:
        file, _, number = place.partition(":")
        lines[file].add(int(number))


def _never_run(body: list[ast.stmt], compiled: set[int], ran: set[int]) -> Iterator[int]:
    """The first compiled line of each function, branch or loop of which no line ran."""
    if not body:
        return
    lines = set(range(body[0].lineno, (body[-1].end_lineno or 0) + 1))
    if lines & compiled and not lines & ran:
        yield min(lines & compiled)
        return
    for statement in body:
        if isinstance(statement, ast.If | ast.For | ast.While):
            yield from _never_run(statement.body, compiled, ran)
            yield from _never_run(statement.orelse, compiled, ran)


def never_run(compiled: Lines, ran: Lines) -> Iterator[str]:
    """kernels/file:line."""
    for path in sorted(KERNELS.glob("*.py")):
        name = f"kernels/{path.name}"
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                lines = _never_run(node.body, compiled[name], ran[name])
                yield from (f"{name}:{line}" for line in lines)


def lines_run_by(instructions: list[Instruction]) -> set[str]:
    """file:line of instructions, and of the lines into which they were inlined: in another program
    such a line may have an instruction of its own."""
    return {place for i in instructions for place in (i.source, i.caller) if place}


_lines: dict[str, list[set[str]]] = {}  # file:line of each block of code, by program


def _new_lines() -> tuple[list[str], list[str]]:
    """Source lines of programs that are new, and of the blocks that ran, since the last call."""
    compiled: set[str] = set()
    ran: set[str] = set()
    for key, program in triton_launches.programs.items():
        if key not in _lines:
            blocks = [block.instructions for block in program.kernel.blocks]
            _lines[key] = [lines_run_by(instructions) for instructions in blocks]
            compiled |= {i.source for instructions in blocks for i in instructions if i.source}
        if any(program.hits):
            ran.update(
                *(lines for lines, hits in zip(_lines[key], program.hits, strict=True) if hits)
            )
            program.hits = [0] * len(program.hits)
    return sorted(compiled), sorted(ran)


record = Record()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    triton_launches.calls.clear()
    try:
        return (yield)
    except Unsupported as error:
        pytest.skip(str(error))
    finally:
        compiled, ran = _new_lines()
        calls = sorted(triton_launches.calls)
        item.user_properties += [("calls", calls), ("compiled", compiled), ("ran", ran)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        record.add_lines(report)
    if report.when == "call" and not report.skipped:
        record.add(report)
    elif report.skipped and isinstance(report.longrepr, tuple):
        _, _, reason = report.longrepr
        if "the PTX machine" in reason:
            record.skipped[reason.removeprefix("Skipped: ")] += 1


def _missing(config: pytest.Config) -> list[str]:
    """What nothing runs, if everything ran that must run it."""
    if not _has_all_cases(config):
        return []
    if BACKEND == "cuda":
        return _lines_without_a_case()
    places = never_run(record.compiled, record.ran)
    return [f"no check runs {place}" for place in places]


def _has_all_cases(config: pytest.Config) -> bool:
    from tests.helpers.simulated_gpu import CASES_OF_CUDA

    files = CASES_OF_CUDA if BACKEND == "cuda" else [ROOT / "tests/test_verify.py"]
    chosen = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    return not (config.option.keyword or config.option.markexpr) and all(
        any(file.is_relative_to(path) for path in chosen) for file in files
    )


def _lines_without_a_case() -> list[str]:
    ours = {path.name for path in (ROOT / "csrc").rglob("*.*")}
    return [
        f"no case runs {Path(file).name}:{line}"
        for file, compiled in sorted(record.compiled.items())
        for line in sorted(compiled - record.ran[file] - {0})
        if Path(file).name in ours
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _missing(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("the PTX machine")
    lines = [*record.table(), *_missing(terminalreporter.config)]
    terminalreporter.write_line("\n".join(lines))
