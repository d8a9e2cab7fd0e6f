"""Whether repetitions of a run place the classes in the same way, as in SAR's Fig. 1.

    python bench/class_dependency.py runs/digits-sar-seed0 runs/digits-sar-seed1

The paper prints no formula. Here the dependency of two classes is the cosine between their
centroids, after subtracting the mean of all centroids. Centroids are mean features of the best
weights over the first validation images, and the classes are those with pixels there in every run.
"strength" is the mean absolute dependency over the pairs of classes (mean ± standard deviation over
the seeds). "agreement" is Pearson's correlation between the dependencies of two seeds over these
pairs, averaged over pairs of seeds. It is 1 if every seed places the classes in the same way.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao
from anchorops.train import IGNORED
from anchorops.train.cli import Program, with_presets
from anchorops.train.report.compare import grouped, load_results, text_table
from anchorops.train.report.features import features_and_labels

IMAGES = 200


@torch.inference_mode()
def class_centroids(run: Path, images: int = IMAGES) -> tuple[Tensor, Tensor]:
    """The mean feature [K, D] of each class over the first validation images, and the numbers of
    its pixels [K]."""
    module = Program(*with_presets(["validate", "--run", str(run)])).model.eval()
    num_classes = module.network.classifier.out_channels
    parts = [
        ao.ops.class_moments(features, labels, num_classes, ignore_index=IGNORED)
        for features, labels in features_and_labels(module, images)
    ]
    counts = torch.stack([part.counts for part in parts]).sum(0)
    sums = torch.stack([part.sums for part in parts]).sum(0)
    return sums / counts.clamp(min=1)[:, None], counts


def cosines(vectors: Tensor) -> Tensor:
    """The dependency of each pair of classes: [K(K−1)/2]."""
    centered = vectors.double() - vectors.double().mean(0)
    i, j = torch.triu_indices(len(centered), len(centered), 1)
    return F.cosine_similarity(centered[i], centered[j])


def figures(dependencies: Sequence[Tensor]) -> tuple[str, str]:
    """Strength and agreement of one row's runs."""
    strengths = [float(x.abs().mean()) for x in dependencies]
    if len(strengths) == 1:
        return f"{strengths[0]:.3f}", "–"
    pairs = itertools.combinations(dependencies, 2)
    agreement = fmean(float(ao.diagnostics.pearson(x, y)) for x, y in pairs)
    return f"{fmean(strengths):.3f} ± {stdev(strengths):.3f}", f"{agreement:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    rows = [["data", "network", "methods", "seeds", "strength", "agreement"]]
    for key, group in grouped([load_results(run) for run in parser.parse_args().runs]).items():
        centroids, counts = zip(*(class_centroids(Path(x["run"])) for x in group), strict=True)
        present = (torch.stack(counts) > 0).all(0)
        strength, agreement = figures([cosines(x[present]) for x in centroids])
        rows.append([*key, str(len(group)), strength, agreement])
    print(text_table(rows, words=3))


if __name__ == "__main__":
    main()
