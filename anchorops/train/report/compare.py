"""Comparison of runs: their figures over seeds."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..options import FREE, flat
from ..run import DATA, METRICS, read_config, read_metrics, read_yaml

WORDS = ("run", "network", "methods")
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
    settings = {name: x for name, x in options.items() if name not in (*FREE, "seed")}
    if options["data.dataset"] != "digits":  # whose images depend on the seed
        settings["found"] = read_yaml(run / DATA)
    return {
        "directory": run,
        "run": re.sub(r"-seed\d+$", "", run.resolve().name),
        "network": options["model.network"],
        "methods": "+".join(options["model.methods"]) or "plain",
        "seed": options["seed"],
        "settings": settings,
        "seconds_per_step": fmean(seconds) if seconds else None,
        "memory_mb": max(memory, default=None),
        "parameters": last.get("cost/trained_parameters"),
        **{name: last.get(f"val/{name}") for name in MEASURES.values()},
    }


def comparison(results: Sequence[dict[str, Any]]) -> str:
    """A table with a row for each run: mean ± standard deviation in % over its seeds. Directories
    of one name, except for its end -seedN, are one run.

    Raises ValueError if these differ in more than the seed, or not in the seed.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        group = groups.setdefault(result["run"], [])
        for other in group:
            differ = [name for name in ("settings", "seed") if other[name] != result[name]]
            if differ != ["seed"]:
                raise ValueError(
                    "compare: expected directories of one name to have the same options and "
                    f"different seeds, got {other['directory']} and {result['directory']}"
                )
        group.append(result)
    rows = [[*WORDS, "seeds", *MEASURES, "M params", "s/step", "MB"]]
    for runs in groups.values():
        rows.append([*(runs[0][name] for name in WORDS), str(len(runs))])
        rows[-1] += [_mean(runs, name, "{:.1f}", 100, spread=True) for name in MEASURES.values()]
        rows[-1] += [
            _mean(runs, "parameters", "{:.2f}", 1e-6),
            _mean(runs, "seconds_per_step", "{:.3f}"),
            _mean(runs, "memory_mb", "{:.0f}"),
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = ["<"] * len(WORDS) + [">"] * (len(widths) - len(WORDS))
    header, *lines = (
        "  ".join(
            f"{x:{align}{width}}" for x, align, width in zip(row, aligns, widths, strict=True)
        )
        for row in rows
    )
    return "\n".join([header, "-" * len(header), *lines])


def _mean(
    runs: Sequence[dict[str, Any]], name: str, form: str, unit: float = 1.0, spread: bool = False
) -> str:
    known = [unit * run[name] for run in runs if run[name] is not None]
    deviation = f" ± {form.format(stdev(known))}" if spread and len(known) > 1 else ""
    return form.format(fmean(known)) + deviation if known else "–"
