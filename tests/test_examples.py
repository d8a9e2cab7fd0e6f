"""The examples run as their first lines say."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="it is not installed")
    arguments = ["--steps", "1", "--methods", "CBP + OCCL", "SAR", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["every_method.py", *arguments])
    runpy.run_path(str(EXAMPLES / "every_method.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "CBP + OCCL attached to segmentation_head.0" in printed
    assert "step   1: ce" in printed and "occl.centroid" in printed and "equiangularity" in printed
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"classifier.png", "centroids.png", "features.png", "similarity.png"}


@pytest.mark.parametrize(
    ("name", "packages", "expected"),
    [
        ("torchvision_deeplab", ["torchvision"], "from logits of (4, 4)"),
        ("smp_segformer", ["segmentation_models_pytorch"], "step 1: "),
        ("huggingface_trainer", ["transformers", "accelerate"], "eval_miou"),
    ],
)
def test_framework(
    name: str,
    packages: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in packages:
        pytest.importorskip(package, reason="it is not installed")
    arguments = [f"{name}.py", "--steps", "1", "--size", "64"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert expected in printed
    if name == "smp_segformer":
        before, after = (
            float(text) for text in re.findall(r"(\d+\.\d+) (?:before|after)", printed)
        )
        assert before == pytest.approx(after, rel=1e-4)
