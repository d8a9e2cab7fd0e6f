"""Class dependency across seeds: whether repetitions of a run place the classes in the same way.
SAR's Fig. 1 compares this for class centroids and for its semantic anchors."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

from ..losses import Regularizer
from .analysis import Features
from .checkpoint import checkpoints, save_atomically
from .compare import grouped, load_results, text_table

FILE = "centroids.npz"
KINDS = {"centroids": "class centroids", "anchors": "semantic anchors"}


def save_centroids(run: Path, features: Features, regularizer: Regularizer | None) -> None:
    """Write the centroids [K, D] and numbers of pixels [K] of the classes into the run's directory.
    If SAR's average has started for every class, its anchors [K, D] are written too."""
    arrays: dict[str, Any] = {
        "centroids": features.centroids.numpy(),
        "counts": features.counts.numpy(),
    }
    methods = [] if regularizer is None else regularizer.modules()
    for method in methods:
        if isinstance(method, ao.SAR) and method.embed and method.started.all():
            arrays["anchors"] = method.semantic_anchors.cpu().numpy()
    file = io.BytesIO()
    np.savez(file, **arrays)
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
        found = [result["vectors"] for result in group]
        present = torch.stack([vectors["counts"] > 0 for vectors in found]).all(0)
        for kind, name in KINDS.items():
            if all(kind in vectors for vectors in found):
                cosines = [_cosines(vectors[kind][present]) for vectors in found]
                rows.append([*key, name, str(len(cosines)), *_figures(cosines)])
    return text_table(rows, words=4)


def _load(run: Path) -> dict[str, Tensor]:
    path = run / FILE
    if not path.exists():
        advice = f": `anchorops-train resume {run}` makes it" if checkpoints(run) else ""
        raise ValueError(f"{path} does not exist{advice}")
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
