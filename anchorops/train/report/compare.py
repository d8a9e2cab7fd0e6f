"""Comparison of runs: their figures over seeds."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..options import FREE, flat
from ..run import DATA, METRICS, read_config, read_metrics

NAMES = ("dataset", "model", "methods")
MEASURES = {"mIoU": "miou", "head": "head", "body": "body", "tail": "tail", "mAcc": "macc"}


class NotEnded(ValueError):
    """The run was stopped or killed, or a limit ended it early, or it goes on at the moment."""


def load_results(run: Path) -> dict[str, Any]:
    """The results of a run: the last figures in its metrics.csv. Raises NotEnded, or ValueError if
    it was never validated."""
    options, path = flat(read_config(run)), run / METRICS
    lines = read_metrics(path) if path.exists() else {}
    step, steps = max(lines, default=0), options["data.steps"]
    if "val/miou" not in lines.get(steps, {}):
        raise NotEnded(f"{run} has not ended: {step} of {steps} steps are in its {METRICS}")
    last = lines[steps]
    seconds, memory = (
        [line[name] for line in lines.values() if name in line]
        for name in ("seconds_per_step", "memory_mb")
    )
    settings = {name: str(x) for name, x in options.items() if name not in (*FREE, "seed")}
    if options["data.dataset"] != "digits":  # whose data depend on the options alone
        settings["data"] = hashlib.sha256((run / DATA).read_bytes()).hexdigest()[:8]
    return {
        "run": str(run),
        "dataset": options["data.dataset"],
        "model": options["model.network"],
        "methods": "+".join(options["model.methods"]) or "plain",
        "seed": options["seed"],
        "settings": settings,
        "steps": steps,
        "seconds_per_step": fmean(seconds) if seconds else None,
        "memory_mb": max(memory, default=None),
        "parameters": last.get("cost/trained_parameters"),
        **{name: last.get(f"val/{name}") for name in MEASURES.values()},
    }


def comparison(results: Sequence[dict[str, Any]]) -> str:
    """A table with a row for each data set, network and methods: mean ± standard deviation in %
    over the seeds. Runs that differ in other settings (if "settings" is given) have separate rows,
    which show these settings."""
    header = ["data", "network", "methods", "seeds", *MEASURES, "M params", "s/step", "MB"]
    rows = [header]
    for key, runs in grouped(results).items():
        rows.append(
            [
                *key,
                str(len(runs)),
                *(_percent([run[name] for run in runs]) for name in MEASURES.values()),
                _mean([run["parameters"] for run in runs], "{:.2f}", 1e6),
                _mean([run["seconds_per_step"] for run in runs], "{:.3f}"),
                _mean([run["memory_mb"] for run in runs], "{:.0f}"),
            ]
        )
    return text_table(rows, words=len(NAMES))


def grouped(results: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Repetitions of a run, which differ only in their seeds. The key is (data set, network,
    methods). If runs on the same data set and network differ in other settings, the methods are
    followed by these settings.

    Raises ValueError if two repetitions have the same seed: they are no sample of the seeds.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in results:
        dataset, model, methods = (result[name] for name in NAMES)
        key = dataset, model, f"{methods} {_differing(result, results)}".rstrip()
        group = groups.setdefault(key, [])
        for other in group:
            if other["seed"] == result["seed"]:
                raise ValueError(
                    f"compare: expected each seed once, got {other['run']} and {result['run']} "
                    f"with the same settings and seed {result['seed']}"
                )
        group.append(result)
    return groups


def text_table(rows: Sequence[Sequence[str]], *, words: int) -> str:
    """Rows as aligned columns; the first row is the header. The first `words` columns contain words
    and are aligned to the left, the others contain numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _differing(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """The settings that differ between results on the same data set and network."""
    alike = [
        other.get("settings", {})
        for other in results
        if all(other[name] == result[name] for name in ("dataset", "model"))
    ]
    settings = {x: value for x, value in result.get("settings", {}).items() if x != "model.methods"}
    names = [name for name in settings if any(other.get(name) != settings[name] for other in alike)]
    return " ".join(f"{name}={settings[name]}" for name in names)


def _mean(values: list[float | None], form: str, unit: float = 1.0) -> str:
    known = [value / unit for value in values if value is not None]
    return form.format(fmean(known)) if known else "–"


def _percent(values: list[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {stdev(known):.1f}" if len(known) > 1 else ""
    return f"{fmean(known):.1f}{spread}"
