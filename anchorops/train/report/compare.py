"""Comparison of runs: their figures over seeds, and class dependency, whether repetitions of a run
place the classes in the same way. SAR's Fig. 1 compares this for class centroids and for its
semantic anchors."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

from ..metrics import METRICS, read_metrics
from ..run import FREE, flat_config
from ..saving import save_atomically

if TYPE_CHECKING:
    from ..module import SegmentationModule

NAMES = ("dataset", "model", "methods")
MEASURES = {"mIoU": "miou", "head": "head", "body": "body", "tail": "tail", "mAcc": "macc"}
FILE = "centroids.npz"
SEEDS = ("seed_everything", "data.seed", "model.seed")
KINDS = {"centroids": "class centroids", "anchors": "semantic anchors"}


def load_results(run: Path) -> dict[str, Any]:
    """The results of a run: the last figures in its metrics.csv. Raises ValueError if it has not
    finished."""
    options, path = flat_config(run), run / METRICS
    lines = read_metrics(path) if path.exists() else {}
    steps = options["data.steps"]
    validated = [step for step, line in lines.items() if "val/miou" in line]
    ended = any("cost/parameters" in line for line in lines.values())  # perhaps by EarlyStopping
    if not validated or not (ended or max(validated) == steps):
        raise ValueError(f"{run}: expected a finished run of {steps} steps, with its {METRICS}")
    last = lines[max(validated)]
    seconds, memory = (
        [line[name] for line in lines.values() if name in line]
        for name in ("seconds_per_step", "memory_mb")
    )
    settings = {name: str(x) for name, x in options.items() if name not in (*FREE, *SEEDS)}
    return {
        "run": str(run),
        "dataset": options["data.dataset"],
        "model": options["model.network"],
        "methods": "+".join(options["model.methods"]) or "plain",
        "seed": options["seed_everything"],
        "settings": settings,
        "steps": max(validated),
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
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


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


def save_centroids(
    run: Path, centroids: tuple[Tensor, Tensor], module: "SegmentationModule"
) -> None:
    """Write the centroids [K, D] and numbers of pixels [K] of the classes into the run's directory.
    If SAR's average has started for every class, its anchors [K, D] are written too."""
    arrays: dict[str, Any] = dict(zip(("centroids", "counts"), centroids, strict=True))
    for method in module.network.modules():
        if isinstance(method, ao.SAR) and method.embed and method.started.all():
            arrays["anchors"] = method.semantic_anchors.cpu()
    file = io.BytesIO()
    np.savez(file, **{name: x.numpy() for name, x in arrays.items()})
    save_atomically(file.getvalue(), run / FILE)


def class_dependency(runs: Sequence[Path]) -> str:
    """A table with a row for each data set, network and methods, and a second row if SAR has
    anchors.

    The paper prints no formula. Here the dependency of two classes is the cosine between their
    vectors, after subtracting the mean of all vectors. It is computed for the classes that have
    validation pixels in every run of the row. "strength" is the mean absolute dependency over the
    pairs of classes (mean ± standard deviation over the seeds). "agreement" is Pearson's
    correlation between the dependencies of two seeds over these pairs, averaged over pairs of
    seeds. It is 1 if every seed places the classes in the same way.

    Raises ValueError if a run has not finished, or if its file of centroids is missing or damaged.
    """
    rows = [["data", "network", "methods", "vectors", "seeds", "strength", "agreement"]]
    results = [{**load_results(run), "vectors": _load(run)} for run in runs]
    for key, group in grouped(results).items():
        run_vectors = [result["vectors"] for result in group]
        present = torch.stack([vectors["counts"] > 0 for vectors in run_vectors]).all(0)
        for kind, name in KINDS.items():
            if all(kind in vectors for vectors in run_vectors):
                cosines = [_cosines(vectors[kind][present]) for vectors in run_vectors]
                rows.append([*key, name, str(len(cosines)), *_figures(cosines)])
    return text_table(rows, words=4)


def _load(run: Path) -> dict[str, Tensor]:
    path = run / FILE
    if not path.exists():
        raise ValueError(f"{path} does not exist: it is written at the end of a run")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _cosines(vectors: Tensor) -> Tensor:
    """The dependency of each pair of classes: [K(K−1)/2]."""
    centered = vectors.double() - vectors.double().mean(0)
    i, j = torch.triu_indices(len(centered), len(centered), 1)
    return F.cosine_similarity(centered[i], centered[j])


def _figures(cosines: Sequence[Tensor]) -> list[str]:
    strengths = [float(x.abs().mean()) for x in cosines]
    if len(cosines) == 1:
        return [f"{strengths[0]:.3f}", "–"]
    pairs = itertools.combinations(cosines, 2)
    agreement = fmean(float(ao.diagnostics.pearson(x, y)) for x, y in pairs)
    return [f"{fmean(strengths):.3f} ± {stdev(strengths):.3f}", f"{agreement:.3f}"]
