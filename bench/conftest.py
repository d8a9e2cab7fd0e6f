"""Checks, measures, records and prints each benchmark, with its alternatives and its machine."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import pytest
import torch
from cases import Case, backends, relative_error
from record import DEVICE, GRAPH, add_ratios, by_case, head_of, save, spread
from torch import Tensor
from torch.utils._pytree import tree_leaves

import anchorops as ao
from anchorops.measure import (
    DISTURBED,
    Measurement,
    Run,
    bandwidth,
    cuda_graph,
    in_turns,
    measure,
    peak_extra_bytes,
)

TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}  # also of expanded squares and bfloat16 sums
NATURAL = {"cpu": "fp32", "cuda": "bf16"}  # the default dtype of a case
# A row is measured again if other processes disturbed it, or if its times differ by more than this:
# a virtual machine may have given unused memory back to its host, and new pages are slow. The
# steadiest measurement is kept.
MOST_TRIES, MOST_SPREAD = 3, 2.0
WARM_UP = 2  # calls of the runs that take turns
ROWS: pytest.StashKey["Rows"] = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("anchorops")
    group.addoption("--full", action="store_true", help="the full grid of cases, not the quick one")
    group.addoption("--device", default=DEVICE)
    group.addoption("--rows", type=Path, help="write the results to this JSON file")
    group.addoption("--threads", type=int, default=2, help="of torch on the CPU (default 2)")
    group.addoption("--seconds", type=float, default=0.6, help="of timing for each row")
    group.addoption("--rounds", type=int, default=10, help="at least, of timing (default 10)")
    group.addoption("--eager", action="store_true", help="options without torch.compile")
    group.addoption("--tiny", action="store_true", help="tiny tensors, only to test the code")


def pytest_configure(config):
    config.option.benchmark_quiet = True  # one table is enough
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    ranks = "0 for quick cases, 1 for those of --full alone, 2 for options"
    config.addinivalue_line("markers", f"rank(n): {ranks}")
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[ROWS] = Rows(config)


def pytest_generate_tests(metafunc):
    quick, full, names = getattr(metafunc.function, "grid", ([], [], None))
    if names is None:
        return
    config = metafunc.config
    device = torch.device(config.getoption("--device"))
    cases: dict[Case, tuple[Case, int]] = {}
    for rank, some in enumerate((quick, full if config.getoption("--full") else [])):
        for case in some:
            case = case._replace(dtype=case.dtype or NATURAL[device.type])
            cases.setdefault(case._replace(compiled=False), (case, rank))
    pairs = [(case, name, rank) for case, rank in cases.values() for name in names(case, device)]
    metafunc.parametrize(
        ("case", "name"),
        [pytest.param(case, name, marks=pytest.mark.rank(rank)) for case, name, rank in pairs],
        ids=[f"{case}, {name}" for case, name, _ in pairs],
    )


def pytest_collection_modifyitems(items):
    """The quick cases of every file come first, so an interrupted run has them."""
    items.sort(key=lambda item: item.get_closest_marker("rank").args[0])


class Rows:
    """The rows of a run. They are written after each row, so an interrupted run keeps them."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = torch.device(str(config.getoption("--device")))
        self.path, self.tiny = config.getoption("--rows"), config.getoption("--tiny")
        self.operators, self.options = [], []

    @cached_property
    def head(self) -> dict:
        return head_of(self.device)

    def add_operator(self, row: dict) -> None:
        if not self.operators:
            size = 2**16 if self.tiny else 2**28 if self.device.type == "cuda" else 2**26
            self.head.update(bandwidth(torch.randn(size, device=self.device)))
        self.operators.append(row)
        add_ratios(self.operators)
        self._save("operators", self.operators)

    def add_option(self, row: dict) -> None:
        self.options.append(row)
        self._save("options", self.options)

    def _save(self, section: str, rows: list[dict]) -> None:
        if self.path:
            save(self.path, section, self.head, rows)


def unsteadiness(measured: Measurement) -> tuple[bool, float]:
    """Whether other processes disturbed it, and by which factor its times differ."""
    return (measured.others or 0) > DISTURBED, measured.q80 / measured.q20


class Bench:
    """The fixture of a benchmark: call `check` first, then `record`."""

    def __init__(self, request: pytest.FixtureRequest, benchmark) -> None:
        config = request.config
        self._rows, self._benchmark, self._error = config.stash[ROWS], benchmark, None
        self.eager = bool(config.getoption("--eager"))
        marker = request.node.get_closest_marker("rank")
        self._test = request.node.nodeid  # with which run.py measures a row again
        self._quick = marker is not None and marker.args[0] == 0
        self.device, self.tiny = self._rows.device, self._rows.tiny
        self.seconds = 0.0 if self.tiny else float(config.getoption("--seconds") or 0)
        self.rounds = 3 if self.tiny else int(config.getoption("--rounds") or 0)

    def backend(self, name: str):
        chosen = backends(self.device).get(name.removesuffix(GRAPH))
        return ao.use_backend(chosen) if chosen else nullcontext()

    def check(self, outputs: Sequence[Tensor], exact: Sequence[Tensor], dtype: str) -> None:
        errors = [relative_error(*pair) for pair in zip(outputs, exact, strict=True)]
        assert max(errors) <= TOLERANCE[dtype], errors
        self._error = max(errors)

    def record(
        self, run: Run, case: Case, name: str, counted_bytes: int, beside: Tensor | None = None
    ) -> None:
        """Times the run, in turn with a copy and a sum of the tensor `beside`."""
        graph = name.endswith(GRAPH)
        if graph:
            eager, run = tree_leaves(run()), cuda_graph(run)
            torch.testing.assert_close(tree_leaves(run()), eager)
        tries = []
        for _ in range(1 if self.tiny else MOST_TRIES):
            tries.append(
                measure(
                    run,
                    counted_bytes,
                    self.device,
                    beside=beside,
                    seconds=self.seconds,
                    rounds=self.rounds,
                )
            )
            if unsteadiness(tries[-1][0]) <= (False, MOST_SPREAD):
                break
        measured, times = min(tries, key=lambda attempt: unsteadiness(attempt[0]))
        row = {
            "operation": case.operation,
            "direction": case.direction,
            "shape": case.shape.name,
            "sizes": case.shape.sizes,
            "num_classes": case.shape.num_classes,
            "dtype": case.dtype,
            "labels": case.labels,
            "name": name,
            **measured._asdict(),
            "bytes": counted_bytes,
            # a graph allocates when it is captured
            "extra_bytes": None if graph else peak_extra_bytes(run, self.device),
            "error": self._error,
            "quick": self._quick,
            "test": self._test,
        }
        self._rows.add_operator(row)
        self._report(row, times)

    def record_in_turns(self, runs: dict[str, Run], row: dict, rounds: int | None = None) -> None:
        """Times the runs, which take turns, and completes the row of an option. rounds: fewer than
        the command's."""
        for _ in range(WARM_UP):
            for run in runs.values():
                run()
        rounds = min(rounds or self.rounds, self.rounds)
        times, others = in_turns([*runs.values()], self.device, seconds=self.seconds, rounds=rounds)
        spreads = {name: spread(seconds) for name, seconds in zip(runs, times, strict=True)}
        row = {
            **row,
            "rounds": len(times[0]),
            "seconds": {name: seconds["median"] for name, seconds in spreads.items()},
            "quartiles": {name: [x["q1"], x["q3"]] for name, x in spreads.items()},
            "minimum": {name: seconds["minimum"] for name, seconds in spreads.items()},
            "others": others,
            "test": self._test,
        }
        self._rows.add_option(row)
        self._report(row, times[0])

    def _report(self, row: dict, times: Sequence[float]) -> None:
        """For --benchmark-json, --benchmark-compare and others of pytest-benchmark."""
        self._benchmark.extra_info.update(row)
        if self._benchmark.enabled:
            stats = self._benchmark._make_stats(1)
            for seconds in times:
                stats.update(seconds)


@pytest.fixture
def bench(request, benchmark) -> Bench:
    torch.compiler.reset()  # otherwise a formula compiled for many shapes would run uncompiled
    return Bench(request, benchmark)


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[ROWS]
    rows, options, write = results.operators, results.options, terminalreporter.write_line
    if not rows and not options:
        return
    head = results.head
    write(f"\n{head['device']}, torch {head['torch']}, commit {head['commit']}")
    if rows:
        write(f"bandwidth: copy {head['copy_gbps']:.0f} GB/s, read {head['read_gbps']:.0f} GB/s")
    for members in by_case(rows):
        first = members[0]
        write(
            f"\n{first['operation']}, {first['direction']}: {first['shape']} ({first['sizes']}), "
            f"{first['dtype']}, {first['labels']} labels"
        )
        for row in members:
            write(line(row))
    for row in options:
        times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in row["seconds"].items())
        write(f"{row['option']}, K{row['num_classes']}, 1:{row['ratio']}: {times}")
    if results.path:
        write(f"\nrows: {results.path}")


def line(row: dict) -> str:
    text = f"  {row['name']:<34}{row['median'] * 1e3:>10.3f} ms"
    text += f"  [{row['q20'] * 1e3:.3f}, {row['q80'] * 1e3:.3f}]".ljust(22)
    text += f"{row['ratio']:>7.1f}×" if row["ratio"] else " " * 8
    if row["copy_share"] is not None:
        text += f"{row['gbps']:>8.1f} GB/s {row['copy_share']:>5.0%} of copy"
        text += f" {row['read_share']:>5.0%} of read"
    if row["extra_bytes"] is not None:
        text += f"  +{row['extra_bytes'] / 2**20:,.0f} MiB"
    if (row["others"] or 0) > DISTURBED:
        text += f"  disturbed: {row['others']:.1f} cores busy with other processes"
    return text
