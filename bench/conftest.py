"""The options of `pytest bench`, and its rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases_on
from record import DEVICE, by_case, head_of, ours_and_other, save

from anchorops.measure import DISTURBED

ROWS: pytest.StashKey["Rows"] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("anchorops")
    group.addoption("--device", default=DEVICE)
    group.addoption("--cases-of", help="a type of device (default: that of --device)")
    group.addoption("--case", action="append", help="only the case of this name")
    group.addoption("--rows", type=Path, help="write the results to this JSON file")
    group.addoption("--threads", type=int, default=2, help="of torch on the CPU (default 2)")
    group.addoption("--seconds", type=float, default=0.6, help="of timing for each case")
    group.addoption("--rounds", type=int, default=10, help="at least, of timing (default 10)")
    group.addoption("--tiny", action="store_true", help="tiny tensors, only to test the code")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # one table is enough
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    torch.set_num_threads(config.option.threads)
    if config.option.tiny:
        config.option.seconds, config.option.rounds = 0.0, 3
    config.stash[ROWS] = Rows(config.option)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    cases = cases_on(options.cases_of or torch.device(options.device).type, options.tiny)
    chosen = [case for case in cases if not options.case or str(case) in options.case]
    metafunc.parametrize("case", chosen, ids=str)


class Rows:
    """The rows of a run. They are written at once, so an interrupted run keeps them."""

    def __init__(self, options: Any) -> None:
        self.path, self.device = options.rows, torch.device(options.device)
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        if self.path:
            case = [row for row in self.rows if row["case"] == rows[0]["case"]]
            save(self.path, "operators", head_of(self.device), case)


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> Rows:
    return pytestconfig.stash[ROWS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows, write = config.stash[ROWS].rows, terminalreporter.write_line
    for case in by_case(rows):
        ours, _ = ours_and_other(case)
        write(f"\n{case[0]['case']} ({case[0]['sizes']})")
        for row in case:
            write(line(row, ours))
    for row in rows:
        if "absent" in row:
            write(f"{row['case']}: {row['name']}: {row['absent']}")


def line(row: dict[str, Any], ours: dict[str, Any] | None) -> str:
    text = f"  {row['name']:<34}{row['median'] * 1e3:>10.3f} ms"
    text += f"  [{row['q20'] * 1e3:.3f}, {row['q80'] * 1e3:.3f}]".ljust(22)
    text += f"{row['median'] / ours['median']:>7.1f}×" if ours else " " * 8
    text += f"{row['bytes'] / row['median'] / 1e9:>8.1f} GB/s {row['copy_share']:>5.0%} of copy"
    if row["extra_bytes"] is not None:
        text += f"  +{row['extra_bytes'] / 2**20:,.0f} MiB"
    if (row["others"] or 0) > DISTURBED:
        text += f"  disturbed: {row['others']:.1f} cores busy with other processes"
    return text
