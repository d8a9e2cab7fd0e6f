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
    over the seeds. Runs that differ in other settings have separate rows, which show these
    settings."""
    rows = [["data", "network", "methods", "seeds", *MEASURES, "M params", "s/step", "MB"]]
    for key, runs in grouped(results).items():
        rows.append([*key, str(len(runs))])
        rows[-1] += [_mean(runs, name, "{:.1f}", 100, spread=True) for name in MEASURES.values()]
        rows[-1] += [
            _mean(runs, "parameters", "{:.2f}", 1e-6),
            _mean(runs, "seconds_per_step", "{:.3f}"),
            _mean(runs, "memory_mb", "{:.0f}"),
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = ["<"] * len(NAMES) + [">"] * (len(widths) - len(NAMES))
    header, *lines = (
        "  ".join(
            f"{x:{align}{width}}" for x, align, width in zip(row, aligns, widths, strict=True)
        )
        for row in rows
    )
    return "\n".join([header, "-" * len(header), *lines])


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


def _differing(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """The settings that differ between results on the same data set and network."""
    same = ("dataset", "model")
    alike = [x["settings"] for x in results if all(x[name] == result[name] for name in same)]
    return " ".join(
        f"{name}={value}"
        for name, value in result["settings"].items()
        if name != "model.methods" and any(other.get(name) != value for other in alike)
    )


def _mean(
    runs: Sequence[dict[str, Any]], name: str, form: str, unit: float = 1.0, spread: bool = False
) -> str:
    known = [unit * run[name] for run in runs if run[name] is not None]
    deviation = f" ± {form.format(stdev(known))}" if spread and len(known) > 1 else ""
    return form.format(fmean(known)) + deviation if known else "–"
