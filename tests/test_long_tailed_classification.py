"""The example of long-tailed classification on tiny data: a folder of images, and an archive like
that of CIFAR-100."""

import json
import pickle
import re
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import anchorops as ao
from anchorops.train import saving

for package in ("sklearn", "timm", "torchvision"):
    pytest.importorskip(package, reason="it is not installed")
SCRIPT = Path(__file__).parents[1] / "examples/long_tailed_classification.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three colours, eight training images each."""
    from PIL import Image

    for split, images in (("train", 8), ("val", 2)):
        for name, color in (("a", (255, 0, 0)), ("b", (0, 255, 0)), ("c", (0, 0, 255))):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (40, 36), color).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, root: Path, *options: str) -> None:
    arguments = ["--root", str(root), "--seeds", "1", "--batch-size", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments, *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_an_interrupted_run_continues(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With mixup, on the small network of CIFAR; of the last class a quarter of the images."""
    options = ["--setting", "cifar-100-lt", "--imbalance", "4", "--epochs", "2", "--size", "16"]
    options += ["--groups", "1", "1", "--out"]
    run(monkeypatch, folder, *options, str(folder / "straight"))
    printed = capsys.readouterr().out
    assert "3 classes with 8 to 2 images" in printed
    assert re.search(r"plain  all [\d.]+ %, head [\d.]+ %, body .* tail ", printed)
    assert "SAR    all" in printed

    def stop_after_saving(state: Any, path: Path) -> None:
        save_atomically(state, path)
        if path.name == "SAR-seed0.pt":
            raise KeyboardInterrupt

    save_atomically = saving.save_atomically
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(saving, "save_atomically", stop_after_saving)
        run(patched, folder, *options, str(folder / "stopped"))
    assert torch.load(folder / "stopped/SAR-seed0.pt")["epochs"] == 1
    run(monkeypatch, folder, *options, str(folder / "stopped"))
    for name in ("plain", "SAR"):
        states = [
            torch.load(folder / out / f"{name}-seed0.pt")["model"]
            for out in ("straight", "stopped")
        ]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    results = [(folder / out / "results.json").read_text() for out in ("straight", "stopped")]
    assert results[0] == results[1] and json.loads(results[0])[1]["method"] == "SAR"
    with pytest.raises(SystemExit, match="is of a run with other options"):
        run(monkeypatch, folder, *options, str(folder / "stopped"), "--lr", "1")
    with pytest.raises(SystemExit, match="contains files of another program"):
        run(monkeypatch, folder, *options, str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--imbalance", "0"], "--imbalance: expected at least 1, got 0.0"),
        (["--setting", "folder"], "expected the directory train or cifar-100-python"),
    ],
)
def test_wrong_options(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, *options)
    assert message in capsys.readouterr().err


def test_archive_of_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    archive = tmp_path / "cifar-100-python"
    archive.mkdir()
    labels = [0, 1, 2] * 4
    data = np.zeros((len(labels), 3072), np.uint8)
    for name in ("train", "test"):
        (archive / name).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    (archive / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b", "c"]}))
    options = ["--setting", "cifar-100", "--network", "cifar-resnet32", "--epochs", "1"]
    run(monkeypatch, tmp_path, *options)
    assert "3 classes with 4 to 4 images" in capsys.readouterr().out


def test_data_of_the_paper(example: dict[str, Any]):
    """CIFAR-100-LT has 10,847 images; the ResNet-32 for CIFAR-10 464,154 parameters."""
    labels = torch.arange(100).repeat_interleave(500)
    assert len(example["kept"](labels, labels.bincount(), 100.0)) == 10_847
    network = example["build_network"]("cifar-resnet32", 10)
    assert sum(p.numel() for p in network.parameters()) == 464_154
    large = example["build_network"]("cifar-resnet18", 10).forward_features(torch.zeros(2, 3, 8, 8))
    assert large.shape == (2, 512, 1, 1)  # stride 8, as in MMPretrain


def test_learning_rates(example: dict[str, Any]):
    """MiSLAS: five epochs of warm-up, a tenth after 160, a hundredth after 180."""
    options = Namespace(epochs=200, gamma=0.1, **{"milestones": [160, 180], "warmup": 5})
    factors = [example["lr_factor"](options, epoch) for epoch in (0, 4, 159, 160, 180)]
    assert factors == pytest.approx([0.2, 1, 1, 0.1, 0.01])
    cosine = Namespace(epochs=100, milestones=None, warmup=0)
    factors = [example["lr_factor"](cosine, epoch) for epoch in (0, 50, 100)]
    assert factors == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_mixed_images_are_attracted_by_both_anchors(example: dict[str, Any]):
    """By each in the share of its image; here every anchor is recognised, so the gate is open."""
    torch.manual_seed(0)
    classifier = nn.Linear(4, 3)
    model = nn.Sequential(nn.Linear(6, 4), classifier)
    sar = ao.attach(model, ao.SAR(3, 4, layers=2, anchors=10 * torch.eye(3, 4)))
    images, labels = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    method = sar.regularizer
    assert isinstance(method, ao.SAR)
    method.embedding = nn.Sequential()
    nn.init.eye_(classifier.weight)
    method.semantic_anchors.normal_()
    seen: dict[str, Any] = {}
    torch.manual_seed(1)
    share = float(torch.distributions.Beta(0.5, 0.5).sample())
    order = torch.randperm(5)
    model[0].register_forward_hook(lambda _, args, features: seen.update(features=features))
    torch.manual_seed(1)
    loss = example["loss_of_batch"](model, sar, images, labels, 0.5)
    features, others = seen["features"], labels[order]
    logits = classifier(features)
    ce = nn.functional.cross_entropy
    expected = share * ce(logits, labels) + (1 - share) * ce(logits, others) + sar.terms["aux"]
    for part, y in ((share, labels), (1 - share, others)):
        distance = (features - method.semantic_anchors[y]).square().mean()
        expected = expected + part * method.loss_weight * distance
    assert sar.terms["gate"] == 1
    torch.testing.assert_close(loss, expected)
