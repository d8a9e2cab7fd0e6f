"""The files that a run writes at its end."""

import itertools
import json
import math
from typing import Any

from ..data.loading import batches_of, evaluation_transform
from ..run.checkpoint import save_atomically
from ..run.journal import attempt, peak_memory_mb
from ..run.parts import Parts
from ..run.state import Progress
from .compare import FILE as DEPENDENCY
from .compare import save_centroids
from .cost import cost_of_regularizer, measure_complexity
from .evaluate import validation_loader
from .features import Features, collect_features
from .page import choose_images, draw_predictions, write_report

RESULTS = "results.json"
PICTURES = 8  # validation images in predictions.png
ANALYSED = 200  # validation images whose features the report shows


def finish(parts: Parts, progress: Progress, summary: dict[str, Any]) -> dict[str, Any]:
    """Write results.json, then the pictures and the report, which may fail. Returns the results."""
    results = _results(parts, progress, summary)
    run = parts.config.run
    if parts.ranks.first:
        save_atomically(json.dumps(results, indent=2) + "\n", run / RESULTS)
    costs = attempt("the cost of the regulariser", lambda: cost_of_regularizer(parts))
    if not parts.ranks.first:
        return results
    picture = attempt("predictions.png", lambda: _save_predictions(parts, results))
    size = attempt("size and speed of the network", lambda: measure_complexity(parts))
    features = attempt("the picture of the features", lambda: _collect_features(parts))
    if features:
        attempt(DEPENDENCY, lambda: save_centroids(run, features, parts.learner.regularizer))
    weight = parts.model.classifier.weight.detach().flatten(1).cpu()
    attempt(
        "report.html", lambda: write_report(run, results, picture, features, weight, costs, size)
    )
    return results


def _save_predictions(parts: Parts, results: dict[str, Any]) -> bytes:
    run = parts.config.run
    picture = draw_predictions(
        parts.model,
        parts.validation_set,
        choose_images(parts.validation_set, PICTURES),
        transform=evaluation_transform(parts.config.data, parts.validation_set.channels),
        title=f"{run.name}: mIoU {100 * results['miou']:.1f} %",
        device=parts.ranks.device,
        **parts.config.prediction,
    )
    save_atomically(picture, run / "predictions.png")
    return picture


def _collect_features(parts: Parts) -> Features:
    count = math.ceil(ANALYSED / parts.config.running.eval_batch_size)
    with batches_of(validation_loader(parts, rank=0, world=1)) as batches:
        return collect_features(
            parts.model, itertools.islice(batches, count), parts.num_classes, parts.ranks.device
        )


def _results(parts: Parts, progress: Progress, summary: dict[str, Any]) -> dict[str, Any]:
    config, device = parts.config, parts.ranks.device
    return {
        "run": str(config.run),
        "dataset": config.data.dataset,
        "model": config.model.model,
        "methods": "+".join(config.model.methods) or "plain",
        "seed": config.running.seed,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "steps": progress.step,
        "seconds_per_step": progress.seconds / progress.step,
        "gpu_memory_mb": peak_memory_mb(device) if device.type == "cuda" else None,
        "best_miou": progress.best,
        **summary,
    }
