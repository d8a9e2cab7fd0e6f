"""Anchors and initial vectors from files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import TINY

import anchorops as ao
from anchorops.train.commands import main
from anchorops.train.networks.learner import build_regularizer
from anchorops.train.run import loop
from anchorops.train.run.checkpoint import checkpoints, load_checkpoint

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
    cbp = build_regularizer(["cbp"], {"cbp.init": f"@{rows}", "cbp.length": "1"}, K, D)
    assert isinstance(cbp, ao.CBP)
    basis, first = cbp.basis, torch.from_numpy(np.load(rows)[0]).float()
    torch.testing.assert_close(basis[0], first / first.norm())
    torch.testing.assert_close(basis @ basis.T, torch.eye(K))


def test_a_run_keeps_a_copy(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A run resumes without the file. Another run may start from the copy, even in the same
    directory."""
    monkeypatch.chdir(tmp_path)
    tiny = "--crop 32 32 --train-images 8 --val-images 2 --batch-size 2 --eval-batch-size 2"
    tiny += " --steps 2 --save-every 1 --device cpu --name run --methods sar --method-options"
    main([*tiny.split(), "sar.anchors", "@clip.npy"])
    run, anchors = tmp_path / "runs/run", torch.from_numpy(np.load(rows)).float()
    rows.unlink()
    checkpoints(run)[-1].unlink()
    assert loop.resume(run)["steps"] == 2
    key = "regularizer.anchors"
    assert torch.equal(load_checkpoint(checkpoints(run)[-1])["model"][key], anchors)
    copy = run / "vectors-sar.anchors.npy"
    main([*tiny.split(), "sar.anchors", f"@{copy}", "--overwrite"])
    assert "vectors-sar.anchors.npy" in capsys.readouterr().err
    assert torch.equal(torch.from_numpy(np.load(copy)), anchors)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((K, D + 1)),
            r"sar.anchors: expected a file with a row of 240 .* 11 classes, got shape \(11, 241",
        ),
        (np.zeros((K, D), int), r"clip.npy: expected one array .*, got int64 of shape \(11, 240\)"),
        (np.zeros(K), r"expected one array .*, got float64 of shape \(11,\)"),
        (np.full((K, D), np.nan), r"clip.npy: expected one array .*, got NaN, infinity or"),
        (np.full((K, D), 1e300), r"clip.npy: expected one array .*, got .* too large for float32"),
        (np.array([[{}]]), r"--method-options sar.anchors: .*clip.npy cannot be read: .*pickle"),
    ],
)
def test_files_that_do_not_fit(array: np.ndarray, message: str, tmp_path: Path):
    np.save(tmp_path / "clip.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        build_regularizer(["sar"], {"sar.anchors": f"@{tmp_path / 'clip.npy'}"}, K, D)


def test_files_that_are_none(rows: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere.npy cannot be read: .*No such file"):
        build_regularizer(["sar"], {"sar.anchors": "@nowhere.npy"}, K, D)
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(ValueError, match=r"two.npz: expected one array .*, got several arrays"):
        build_regularizer(["sar"], {"sar.anchors": f"@{tmp_path / 'two.npz'}"}, K, D)
    with pytest.raises(ValueError, match=r"sar.tau: expected no file; .* sar.anchors, cr.anchors"):
        build_regularizer(["sar"], {"sar.tau": f"@{rows}"}, K, D)


def test_a_start_that_fails_can_be_repeated(rows: Path, tmp_path: Path):
    options = {"cbp.init": f"@{rows}"}
    config = TINY.replace(
        out=tmp_path, name="run", steps=1, methods=("cbp",), method_options=options
    )
    good = np.load(rows)
    np.save(rows, good[:5])
    with pytest.raises(ValueError, match=r"--method-options cbp.init: expected a file with a row"):
        loop.start(config)
    np.save(rows, 1e300 * good)
    with pytest.raises(ValueError, match=r"clip.npy: expected one array"):  # not the run's copy
        loop.start(config)
    np.save(rows, good)
    assert loop.start(config)["steps"] == 1
