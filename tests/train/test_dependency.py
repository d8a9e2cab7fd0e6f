"""Class dependency across seeds."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import anchorops as ao
from anchorops.train.cli import main
from anchorops.train.report.compare import class_dependency, save_centroids


def finished(out: Path, method: str, seed: int) -> Path:
    """The directory of a finished run, with the files that are needed here."""
    run = out / f"{method}-{seed}"
    run.mkdir()
    methods = f"[{method}]" if method else "[]"
    (run / "config.yaml").write_text(
        f"seed_everything: {seed}\nmodel: {{network: m, methods: {methods}}}\n"
        "data: {dataset: digits, steps: 5}\n"
    )
    (run / "metrics.csv").write_text("step,val/miou\n5,0.5\n")
    return run


def test_strength_and_agreement_by_hand(tmp_path: Path):
    """Only classes with pixels in both runs count: the first four of five. All runs have anchors,
    so there is a row for them."""
    rows = np.random.default_rng(0).normal(size=(2, 5, 8))
    runs = [finished(tmp_path, "sar", seed) for seed in range(2)]
    for run, centroids, last in zip(runs, rows, (7, 0), strict=True):
        np.savez(
            run / "centroids.npz", centroids=centroids, counts=[5, 5, 5, 5, last], anchors=rows[0]
        )
    cosines = []
    for centroids in rows[:, :4]:
        unit = centroids - centroids.mean(0)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosines.append((unit @ unit.T)[np.triu_indices(4, 1)])
    strengths = [abs(x).mean() for x in cosines]
    _, _, centroids, anchors = (line.split() for line in class_dependency(runs).splitlines())
    assert centroids[:6] == ["digits", "m", "sar", "class", "centroids", "2"]
    assert float(centroids[6]) == pytest.approx(np.mean(strengths), abs=6e-4)
    assert float(centroids[8]) == pytest.approx(np.std(strengths, ddof=1), abs=6e-4)
    assert float(centroids[9]) == pytest.approx(np.corrcoef(*cosines)[0, 1], abs=6e-4)
    assert anchors[3:6] == ["semantic", "anchors", "2"] and anchors[8:] == ["0.000", "1.000"]


def test_seeds_that_agree(tmp_path: Path):
    """A rotation does not change cosines."""
    generator = np.random.default_rng(0)
    rows, rotation = generator.normal(size=(5, 8)), np.linalg.qr(generator.normal(size=(8, 8)))[0]
    runs = [finished(tmp_path, "", seed) for seed in range(2)]
    for run, centroids in zip(runs, (rows, rows @ rotation), strict=True):
        np.savez(run / "centroids.npz", centroids=centroids, counts=np.ones(5, int))
    assert class_dependency(runs).splitlines()[-1].split()[-1] == "1.000"
    assert class_dependency(runs[:1]).splitlines()[-1].split()[-1] == "–"


@pytest.mark.parametrize("started", [True, False])
def test_anchors_are_kept_once_every_class_has_one(started: bool, tmp_path: Path):
    sar = ao.SAR(3, 4)
    sar.semantic_anchors += torch.ones(3, 4)
    sar.semantic_anchors[0] *= started
    module: Any = Namespace(network=nn.Sequential(ao.Combined(ao.OCCL(3, 4), sar)))
    save_centroids(tmp_path, (torch.zeros(3, 4), torch.ones(3)), module)
    with np.load(tmp_path / "centroids.npz") as arrays:
        expected = {"centroids", "counts", "anchors"} if started else {"centroids", "counts"}
        assert set(arrays.files) == expected


def test_from_a_run(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with np.load(straight / "centroids.npz") as arrays:
        assert arrays["centroids"].shape == (11, 240) and arrays["counts"].sum() > 0
    main(["compare", str(straight), "--dependency"])
    printed = capsys.readouterr().out
    assert "mIoU" in printed and "agreement" in printed and "class centroids" in printed
    run = finished(tmp_path, "", 0)
    with pytest.raises(ValueError, match=r"centroids.npz does not exist: it is written at the end"):
        class_dependency([run])
