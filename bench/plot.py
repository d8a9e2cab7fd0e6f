"""Draws the rows of a machine: python bench/plot.py bench/results/intel-xeon-avx512-2-threads.json
With --table it prints the README's tables instead. The pictures are written next to the rows:

….png                 operators compared with formulas that people write, in milliseconds
…-training-steps.png  time and memory of a step with each method
…-options.png         every option of the pixel losses
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import plot_operators
import plot_options
import plot_training_step
from matplotlib.figure import Figure

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
PICTURES: dict[str, tuple[str, Callable[[dict], Figure | None]]] = {
    "": ("operators", plot_operators.headlines),
    "-training-steps": ("training_steps", plot_training_step.draw),
    "-options": ("options", plot_options.draw),
}


def draw(path: Path) -> None:
    """The pictures of the sections that the file has."""
    run = json.loads(path.read_text())
    for suffix, (section, of) in PICTURES.items():
        figure = of(run) if section in run else None
        if figure is None:  # no such rows
            continue
        figure.supxlabel(
            caption(run, section == "operators"), fontsize=7.5, color="#555555", ha="left", x=0.01
        )
        picture = path.with_name(path.stem + suffix + ".png")
        figure.savefig(picture, dpi=150)
        plt.close(figure)
        print(picture)


def caption(run: dict, with_rates: bool) -> str:
    text = f"{plot_operators.machine(run)}; medians"
    if with_rates and "copy_gbps" in run:
        text += f"; copies {run['copy_gbps']:,.0f} GB/s, reads {run['read_gbps']:,.0f} GB/s"
    return text


def tables(run: dict) -> str:
    """The README's tables."""
    sections = {"operators": plot_operators.table, "training_steps": plot_training_step.table}
    return "\n\n".join(of(run) for section, of in sections.items() if section in run)


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
