"""CeCo's measures of neural collapse during training."""

from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, metrics

import anchorops as ao
from anchorops.train.config import IGNORED
from anchorops.train.report.features import COLLAPSE, collapse_measures
from anchorops.train.run.loop import resume, start
from anchorops.train.run.parts import build_parts
from anchorops.train.run.ranks import start_ranks

FEW = TINY.replace(
    crop=(32, 64),
    train_images=8,
    val_images=4,
    batch_size=2,
    eval_batch_size=2,
    steps=4,
    eval_every=2,
    methods=(),
)


def test_measures():
    """The measures on the first two of four images, compared with direct computations."""
    parts = build_parts(FEW.replace(collapse_images=2), start_ranks("cpu"), from_checkpoint=True)
    classes = [{"accuracy": x} for x in (0.9, None, *(0.1 * k for k in range(9)))]
    measures = collapse_measures(parts, classes)
    assert measures.keys() == set(COLLAPSE) and parts.model.training
    images, labels = zip(*(parts.validation_set[i] for i in range(2)), strict=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        features = parts.model.eval().body((torch.stack(images) / 255 - mean) / std)
    centroids, counts = ao.class_centroids(
        features, torch.stack(labels).long(), 11, ignore_index=IGNORED
    )
    centered = centroids[counts > 0] - centroids[counts > 0].mean(0)
    i, j = torch.triu_indices(len(centered), len(centered), 1)
    cosines = torch.cosine_similarity(centered[i], centered[j])
    assert measures["centroids.equiangularity"] == pytest.approx(
        float(cosines.std(correction=0)), 1e-3
    )
    expected = float((cosines + 1 / (len(centered) - 1)).abs().mean())
    assert measures["centroids.maximal_angle"] == pytest.approx(expected, 1e-3)
    known = [k for k in range(11) if classes[k]["accuracy"] is not None]
    accuracy = torch.tensor([classes[k]["accuracy"] for k in known]).double()
    for name, counted in (("pixels", parts.frequencies), ("images", parts.prior)):
        pair = torch.stack([accuracy, counted[known].double()])
        expected = float(torch.corrcoef(pair)[0, 1])
        assert measures[f"accuracy_and_{name}"] == pytest.approx(expected, 1e-6)


def test_curves_in_journal_and_report(tmp_path: Path):
    """Measuring does not change the run, and a resumed run has the same measures."""
    with_measures, without = (
        FEW.replace(out=tmp_path, name=f"run-{count}", collapse_images=count) for count in (3, 0)
    )
    assert start(with_measures)["miou"] == start(without)["miou"]
    run = with_measures.run
    straight = metrics(run, "val_miou")
    assert [line["step"] for line in straight] == [2, 4]
    assert all(set(COLLAPSE) >= line.keys() & set(COLLAPSE) != set() for line in straight)
    assert "<h2>Neural collapse</h2>" in (run / "report.html").read_text()
    assert "<h2>Neural collapse</h2>" not in (without.run / "report.html").read_text()
    (run / "checkpoint-00000004.pt").unlink()
    resume(run)
    assert metrics(run, "val_miou") == straight
