"""Prints each benchmark beside the bandwidth of its machine and beside its rivals."""

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--rows", type=Path, help="write the results to this JSON file")
    parser.addoption("--threads", type=int, default=2, help="of torch on the CPU (default 2)")


@pytest.fixture(scope="session", autouse=True)
def threads(request):
    torch.set_num_threads(request.config.getoption("--threads"))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _row(bench) -> dict:
    """Seconds; bytes and bytes per second."""
    stats = bench.stats
    times = {"median": stats.median, "best": stats.min, "q1": stats.q1, "q3": stats.q3}
    return {**bench.extra_info, **times, "rounds": stats.rounds}


def _write_rows(path: Path, rows: list[dict]) -> None:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, capture_output=True
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    run = {
        "device": f"{_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "rows": rows,
    }
    path.write_text(json.dumps(run, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benches = session.benchmarks if session else []
    rows = [_row(bench) for bench in benches if "case" in bench.extra_info]
    if not rows:
        return
    if config.getoption("--rows"):
        _write_rows(config.getoption("--rows"), rows)
    write = terminalreporter.write_line
    write("")
    write(f"{torch.get_num_threads()} threads, torch {torch.__version__}; times are medians")
    for case in dict.fromkeys(row["case"] for row in rows):
        group = sorted((r for r in rows if r["case"] == case), key=lambda row: row["median"])
        ours = next((row["median"] for row in group if row["name"] == "anchorops"), None)
        write("")
        write(case)
        for row in group:
            line = f"  {row['name']:<20} {row['median'] * 1e3:8.1f} ms"
            if ours:
                line += f"  {row['median'] / ours:5.1f} x ours"
            if "bytes" in row:
                line += f"  {row['bytes'] / row['median'] / 1e9:5.1f} GB/s"
                line += f"  {row['read_share']:4.0%} of read bandwidth"
                line += f"  memory {row['extra_bytes'] / row['feature_bytes']:+.1%} of the features"
            write(line)
