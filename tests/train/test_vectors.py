"""Anchors and initial vectors from files."""

from pathlib import Path

import numpy as np
import pytest
import torch

import anchorops as ao
from anchorops.train.commands import fit
from anchorops.train.networks.learner import build_regularizer
from tests.helpers.tiny_runs import TINY, state

K, D = 11, 240


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "clip.npy"
    np.save(path, np.random.default_rng(0).normal(size=(K, D)))
    return path


@pytest.mark.parametrize("method", ["sar", "cr"])
def test_anchors(method: str, rows: Path):
    regularizer = build_regularizer([method], {f"{method}.anchors": f"@{rows}"}, K, D)
    assert regularizer is not None
    expected = torch.from_numpy(np.load(rows)).float()
    assert torch.equal(regularizer.get_buffer("anchors"), expected)


def test_initial_vectors(rows: Path):
    """The vectors are orthogonalised, so the first row keeps its direction."""
    cbp = build_regularizer(["cbp"], {"cbp.init": f"@{rows}", "cbp.length": 1}, K, D)
    assert isinstance(cbp, ao.CBP)
    basis, first = cbp.basis, torch.from_numpy(np.load(rows)[0]).float()
    torch.testing.assert_close(basis[0], first / first.norm())
    torch.testing.assert_close(basis @ basis.T, torch.eye(K))


def test_a_run_goes_on_without_the_file(rows: Path, tmp_path: Path):
    words = [*TINY, "--data.steps", "3", "--run", str(tmp_path / "run")]
    words += ["--model.method_options", f"{{sar.anchors: '@{rows}'}}"]
    fit([*words, "--max_steps", "1"])
    anchors = torch.from_numpy(np.load(rows)).float()
    rows.unlink()
    kept = state(fit([*words, "--resume"]))["model"]["regularizer.anchors"]
    assert torch.equal(kept, anchors)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((K, D + 1)), r"expected floating numbers of shape \[11, 240\] .* \[11, 241\]"),
        (np.zeros((K, D), int), r"clip.npy: expected floating numbers .*, got torch.int64"),
        (np.full((K, D), np.nan), "clip.npy: expected finite numbers"),
        (np.full((K, D), 1e300), "clip.npy: expected finite numbers"),  # too large for float32
        (np.array([[{}]]), r"sar.anchors: .*clip.npy cannot be read: .*pickle"),
    ],
)
def test_files_that_do_not_fit(array: np.ndarray, message: str, tmp_path: Path):
    np.save(tmp_path / "clip.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        build_regularizer(["sar"], {"sar.anchors": f"@{tmp_path / 'clip.npy'}"}, K, D)


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere.npy cannot be read: .*No such file"):
        build_regularizer(["sar"], {"sar.anchors": "@nowhere.npy"}, K, D)
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(ValueError, match=r"two.npz cannot be read"):
        build_regularizer(["sar"], {"sar.anchors": f"@{tmp_path / 'two.npz'}"}, K, D)
