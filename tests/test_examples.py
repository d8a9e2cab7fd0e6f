"""The examples run with the commands in their docstrings."""

import contextlib
import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.ranks import run_ranks

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def printed_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs an example with arguments, and returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_transformers_masks(printed_by: Callable[..., str]) -> None:
    pytest.importorskip("transformers", reason="it is not installed")
    printed = printed_by("transformers_masks")
    *same, differ = (float(share) for share in re.findall(r"(\d+\.\d+)%", printed))
    assert len(same) == 9 and all(share > 99.9 for share in same) and differ < 5
    assert "of 0 masks" not in printed


def test_every_method(tmp_path: Path, printed_by: Callable[..., str]) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="it is not installed")
    arguments = ["--steps", "1", "--methods", "CBP + OCCL", "SAR", "--out", str(tmp_path)]
    printed = printed_by("every_method", *arguments)
    assert "CBP + OCCL attached to segmentation_head.0" in printed
    assert "step   1: ce" in printed and "occl.centroid" in printed and "equiangularity" in printed
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"classifier.png", "centroids.png", "features.png", "similarity.png"}


SIZE = ["--steps", "1", "--size", "64"]
PROGRAMS: dict[str, tuple[list[str], list[str], list[str]]] = {  # packages, arguments, output
    "torchvision_deeplab": (["torchvision"], SIZE, ["from logits of (4, 4)"]),
    "smp_segformer": (["segmentation_models_pytorch"], SIZE, ["step 1: "]),
    "huggingface_trainer": (["transformers", "accelerate"], SIZE, ["eval_miou"]),
    "accelerate_loop": (["segmentation_models_pytorch", "accelerate"], SIZE, ["centroid "]),
    "lightning_module": (["segmentation_models_pytorch", "lightning"], SIZE, ["validation ce "]),
    "point_cloud": ([], ["--steps", "2"], ["step 2: ", "recall: ground "]),
    "long_tailed_classification": (["sklearn"], ["--epochs", "1"], ["plain all ", "SAR   all "]),
    "cosine_head": ([], ["--steps", "2"], ["text: loss ", "simplex: loss ", "means: loss "]),
    "few_shot": (["sklearn"], SIZE[:2], ["before training: 0.", "after 1 steps: 0."]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, printed_by: Callable[..., str]) -> None:
    packages, arguments, expected = PROGRAMS[name]
    for package in packages:
        pytest.importorskip(package, reason="it is not installed")
    printed = printed_by(name, *arguments)
    assert all(text in printed for text in expected)
    if name == "smp_segformer":
        before, after = map(float, re.findall(r"(\d+\.\d+) (?:before|after)", printed))
        assert before == pytest.approx(after, rel=1e-4)


def test_linear_probe(
    printed_by: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The mIoU is that of torch's formula, and images of a folder are read."""
    for package in ("timm", "sklearn"):
        pytest.importorskip(package, reason="it is not installed")
    from torchvision.transforms.functional import to_pil_image

    arguments = ["--steps", "4", "--views", "1", "--learning-rates", "1e-3", "1e-2"]
    printed = [printed_by("linear_probe", *arguments)]
    assert "features (32, 192, 8, 8): 1 MB" in printed[0] and " s for a step" in printed[0]

    def plain(logits: Tensor, labels: Tensor) -> Tensor:
        full = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        return F.cross_entropy(full, labels.long(), ignore_index=255)

    monkeypatch.setattr("anchorops.pixel_cross_entropy", plain)
    printed.append(printed_by("linear_probe", *arguments))
    ours, theirs = ([float(x) for x in re.findall(r"mIoU (\S+)", text)] for text in printed)
    assert len(ours) == 2 and ours == pytest.approx(theirs, abs=0.2)
    for split in ("train", "val"):
        for kind, channels, name in (("images", 3, "a.jpg"), ("masks", 1, "a.png")):
            (tmp_path / kind / split).mkdir(parents=True)
            pixels = torch.randint(2, (channels, 48, 64), dtype=torch.uint8)
            to_pil_image(pixels).save(tmp_path / kind / split / name)
    of_folder = ["--data", str(tmp_path), "--classes", "2", "--size", "64", "--steps", "1"]
    network = ["--backbone", "resnet18", "--level", "1"]
    assert "mIoU " in printed_by("linear_probe", *of_folder, *network)


class DecodeHead(nn.Module):
    """What the example reads of mmsegmentation's heads."""

    align_corners, ignore_index, sampler = False, 255, None

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__()
        self.loss_decode = nn.ModuleList(losses)

    def _stack_batch_gt(self, labels: Tensor) -> Tensor:
        return labels


def test_mmsegmentation_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmsegmentation does not support this torch; the loss and the mixin are of the example."""
    registry = SimpleNamespace(register_module=lambda **_: lambda kind: kind)
    names = SimpleNamespace(FCNHead=DecodeHead, MODELS=registry)
    for module in ("mmseg.registry", "mmseg.models.decode_heads"):
        monkeypatch.setitem(sys.modules, module, names)
    example = runpy.run_path(str(EXAMPLES / "mmsegmentation_heads.py"))
    head, loss = example["low_resolution_head"](DecodeHead), example["AnchoropsLoss"]
    logits, labels = torch.randn(2, 3, 5, 5), torch.randint(0, 3, (2, 16, 17))
    labels[:, :3] = 255
    weights = [1.0, 2.0, 0.5]
    losses = loss(weight=weights), loss(loss_weight=0.4, avg_non_ignore=False)
    terms = head(*losses).loss_by_feat(logits, labels[:, None])
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    weighted = F.cross_entropy(full, labels, torch.tensor(weights), ignore_index=255)
    of_all_pixels = F.cross_entropy(full, labels, ignore_index=255, reduction="none").mean()
    torch.testing.assert_close(terms["loss_ce"], weighted + 0.4 * of_all_pixels)
    right = (full.argmax(1) == labels)[labels != 255].float().mean()
    torch.testing.assert_close(terms["acc_seg"], 100 * right)
    for wrong, message in (
        (loss(align_corners=True), "expected align_corners=False, as the head, got True"),
        (nn.CrossEntropyLoss(), "expected AnchoropsLoss and no sampler"),
    ):
        with pytest.raises(ValueError, match=message):
            head(wrong).loss_by_feat(logits, labels)
    with pytest.raises(ValueError, match="avg_non_ignore: expected True"):
        loss("Dice", avg_non_ignore=False)


def test_semi_supervised(printed_by: Callable[..., str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its tensors are small: on a busy machine threads wait for each other
    try:
        printed = printed_by("semi_supervised")
    finally:
        torch.set_num_threads(threads)
    alone, with_unlabelled = (float(x) for x in re.findall(r"mIoU (\S+)", printed))
    assert alone > 0.4 and with_unlabelled > alone + 0.02


def run_rank(rank: int, folder: str) -> None:
    """One process as torchrun starts it, with and without --fsdp; the ranks meet in a file."""
    os.environ["LOCAL_RANK"] = str(rank)
    init = dist.init_process_group
    for name, options in (("ddp", []), ("fsdp", ["--fsdp"])):
        place = f"file://{folder}/{name}"
        dist.init_process_group = partial(init, init_method=place, rank=rank, world_size=2)
        sys.argv = ["ddp_and_fsdp.py", "--steps", "2", *options]
        with (
            open(f"{folder}/{name}{rank}.txt", "w") as printed,
            contextlib.redirect_stdout(printed),
        ):
            runpy.run_path(str(EXAMPLES / "ddp_and_fsdp.py"), run_name="__main__")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_ranks(2, run_rank, str(tmp_path))
    printed = [(tmp_path / name).read_text() for name in ("ddp0.txt", "fsdp0.txt")]
    for text, wrapper in zip(printed, ("DistributedDataParallel", "FSDPSequential"), strict=True):
        assert f"{wrapper}, step 2: " in text
    losses = [re.findall(r"(?:ce|aux) (\d+\.\d+)", text) for text in printed]
    assert len(losses[0]) == 4 and losses[0] == losses[1]  # the same training either way


def test_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed").use("Agg")
    path = EXAMPLES / "quickstart.ipynb"
    assert path.stat().st_size < 200_000
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [output for cell in cells for output in cell["outputs"] if "data" in output]
    assert sum("image/png" in output["data"] for output in pictures) == 3
    names: dict[str, Any] = {}
    for cell in cells:
        source = "".join(cell["source"])
        assert source.count("range(200)") == ("attach" in source)
        exec(compile(source.replace("range(200)", "range(60)"), str(path), "exec"), names)
    assert names["history"][-1]["ce"] < 0.5 * names["history"][0]["ce"]
    printed = capsys.readouterr().out
    assert "centroid to anchor" in printed
    assert len(re.findall(r"(?:torch|anchorops): \d+\.\d ms, \d+ MiB", printed)) == 2


@pytest.mark.slow
def test_notebook_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its programs, without the installation; of the backends it verifies one."""
    monkeypatch.chdir(EXAMPLES)
    path = EXAMPLES / "verify_gpu.ipynb"
    names: dict[str, Any] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        assert cell["cell_type"] == "markdown" or not cell["outputs"]
        if cell["cell_type"] == "code" and "pip" not in source:
            source = source.replace('"--verify"', '"--verify", "--backend", "cpu"')
            exec(compile(source, str(path), "exec"), names)
    report = capsys.readouterr().out.split("```")[-2]
    assert re.search(r"cpu: \d+ right, 0 WRONG", report)
    assert "cross-entropy, K 150, ratio 4" in report
