"""Prints each benchmark beside the bandwidth of its machine and beside its rivals."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def threads():
    torch.set_num_threads(2)


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in session.benchmarks if "case" in bench.extra_info] if session else []
    if not rows:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{torch.get_num_threads()} threads, torch {torch.__version__}; times are medians")
    for case in dict.fromkeys(row.extra_info["case"] for row in rows):
        group = [row for row in rows if row.extra_info["case"] == case]
        ours = [row.stats.median for row in group if row.extra_info["name"] == "anchorops"]
        write("")
        write(case)
        for row in sorted(group, key=lambda row: row.stats.median):
            info, median = row.extra_info, row.stats.median
            line = f"  {info['name']:<20} {median * 1e3:8.1f} ms"
            if ours:
                line += f"  {median / ours[0]:5.1f} x ours"
            if "bytes" in info:
                share = info["bytes"] / row.stats.min / info["read_bandwidth"]
                line += f"  {info['bytes'] / median / 1e9:5.1f} GB/s"
                line += f"  best {share:4.0%} of {info['read_bandwidth'] / 1e9:.1f} GB/s read"
            if "extra_bytes" in info:
                line += (
                    f"  memory +{info['extra_bytes'] / info['feature_bytes']:.1%} of the features"
                )
            write(line)
