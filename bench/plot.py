"""Draws the rows of a machine, or counted memory:

    python bench/plot.py bench/results/amd-epyc-avx512-2-threads.json

With --table it prints the main tables instead. The pictures are written next to the rows:

….png                 operators compared with formulas that people write, in milliseconds; of
                      counted-memory.json the memory of training steps
…-training-steps.png  time and memory of a step with each method
…-options.png         every option of the pixel losses
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import charts
import matplotlib.pyplot as plt
import plot_counted_memory
import plot_operators
import plot_options
import plot_training_step
from matplotlib.figure import Figure

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


class Section(NamedTuple):
    """How a section of a file of rows is shown. suffix: the end of the picture's name."""

    suffix: str
    draw: Callable[[dict], Figure | None]
    caption: Callable[[dict], str]
    table: Callable[[dict], str] | None


SECTIONS = {
    "operators": Section(
        *("", plot_operators.headlines, plot_operators.caption, plot_operators.table)
    ),
    "training_steps": Section(
        *("-training-steps", plot_training_step.draw, charts.medians, plot_training_step.table)
    ),
    "options": Section("-options", plot_options.draw, charts.medians, None),
    "rows": Section(
        *("", plot_counted_memory.draw, plot_counted_memory.caption, plot_counted_memory.table)
    ),
}


def draw(path: Path) -> None:
    """The pictures of the sections that the file has."""
    run = json.loads(path.read_text())
    for name, section in SECTIONS.items():
        figure = section.draw(run) if name in run else None
        if figure is None:  # no such rows
            continue
        figure.supxlabel(section.caption(run), fontsize=7.5, color=charts.GREY, ha="left", x=0.01)
        picture = path.with_name(path.stem + section.suffix + ".png")
        figure.savefig(picture, dpi=150)
        plt.close(figure)
        print(picture)


def tables(run: dict) -> str:
    """The main tables."""
    made = [part.table(run) for name, part in SECTIONS.items() if part.table and name in run]
    return "\n\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(tables(json.loads(options.rows.read_text())))
    else:
        draw(options.rows)


if __name__ == "__main__":
    main()
