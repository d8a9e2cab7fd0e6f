"""The tables of docs/cost.md. They are made from committed rows, and replace the comments
`<!-- rows: … -->`."""

import json
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results"
sys.path.insert(0, str(ROOT / "bench"))

import plot_operators  # noqa: E402
import plot_training_step  # noqa: E402

MARKER = re.compile(r"<!-- rows: (\w+) -->")
RUNS = ("cpu-pixel-losses", "cpu")
TRAINING_STEP = "training-step-cpu"


def runs() -> list[dict]:
    """Those of pixel losses and of class moments."""
    return [json.loads((RESULTS / f"{name}.json").read_text()) for name in RUNS]


def headlines() -> str:
    """The README's tables."""
    return "\n\n".join(plot_operators.table(run) for run in runs())


def milliseconds(row: dict) -> str:
    return plot_operators.number(row["median"] * 1e3)


def mebibytes(row: dict) -> str:
    return "" if row["extra_bytes"] is None else plot_operators.number(row["extra_bytes"] / 2**20)


def cases() -> str:
    """Every case: ours and the fastest other implementation."""
    lines = [
        "| operation | sizes | anchorops, ms | MiB | fastest other | ms | × | MiB |",
        "|---|---|--:|--:|---|--:|--:|--:|",
    ]
    groups = [
        group
        for run in runs()
        for group in plot_operators.grouped(plot_operators.quick(run)).items()
    ]
    for key, rows in groups:
        own = next((row for row in rows if row["ours"]), None)
        other = next((row for row in rows if not row["name"].startswith("anchorops")), None)
        if own is None or other is None or key[2] in plot_operators.GROWTH:
            continue
        ratio = f"{other['median'] / own['median']:.1f}"
        cells = [
            *plot_operators.title(own).split("\n"),
            milliseconds(own),
            mebibytes(own),
            other["name"],
            milliseconds(other),
            ratio,
            mebibytes(other),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def training_steps() -> str:
    rows, picture = (RESULTS / f"{TRAINING_STEP}{suffix}" for suffix in (".json", ".png"))
    if not rows.exists():
        return "There are no committed rows of training steps yet."
    text = plot_training_step.table(json.loads(rows.read_text()))
    if picture.exists():
        text += f"\n\n![Time and memory of a training step](../bench/results/{picture.name})"
    return text


TABLES = {"headlines": headlines, "cases": cases, "training_steps": training_steps}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in RESULTS.glob(f"{TRAINING_STEP}.*"):
        name = path.relative_to(ROOT).as_posix()
        if files.get_file_from_path(name) is None:
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return MARKER.sub(lambda marker: TABLES[marker[1]](), markdown)
