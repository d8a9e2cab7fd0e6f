"""Class dependency across seeds."""

from pathlib import Path

import class_dependency
import numpy as np
import pytest
import torch


def test_strength_and_agreement_by_hand():
    rows = np.random.default_rng(0).normal(size=(2, 4, 8))
    cosines = []
    for centroids in rows:
        unit = centroids - centroids.mean(0)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosines.append((unit @ unit.T)[np.triu_indices(4, 1)])
    dependencies = [class_dependency.cosines(torch.from_numpy(x)) for x in rows]
    for dependency, expected in zip(dependencies, cosines, strict=True):
        torch.testing.assert_close(dependency, torch.from_numpy(expected))
    strengths = [abs(x).mean() for x in cosines]
    strength, agreement = class_dependency.figures(dependencies)
    mean, _, spread = strength.split()
    assert float(mean) == pytest.approx(np.mean(strengths), abs=6e-4)
    assert float(spread) == pytest.approx(np.std(strengths, ddof=1), abs=6e-4)
    assert float(agreement) == pytest.approx(np.corrcoef(*cosines)[0, 1], abs=6e-4)


def test_seeds_that_agree():
    """A rotation does not change cosines."""
    generator = np.random.default_rng(0)
    rows, rotation = generator.normal(size=(5, 8)), np.linalg.qr(generator.normal(size=(8, 8)))[0]
    dependencies = [class_dependency.cosines(torch.from_numpy(x)) for x in (rows, rows @ rotation)]
    assert class_dependency.figures(dependencies)[1] == "1.000"
    assert class_dependency.figures(dependencies[:1])[1] == "–"


def test_from_a_run(straight: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.argv", ["class_dependency.py", str(straight)])
    class_dependency.main()
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:4] == ["digits", "hrnet-w18-small", "sar", "1"] and 0 < float(row[4]) <= 1
