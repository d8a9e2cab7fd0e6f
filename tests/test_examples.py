"""The examples run with the commands in their docstrings."""

import contextlib
import json
import os
import re
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F

from tests.helpers import mmseg_stand_in

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
    assert len(same) == 8 and all(share > 99.9 for share in same) and differ < 5
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


@pytest.fixture
def mmsegmentation(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of the example, with a stand-in for mmsegmentation."""
    mmseg_stand_in.install(monkeypatch)
    return runpy.run_path(str(EXAMPLES / "mmsegmentation_heads.py"))


def test_mmsegmentation_heads(mmsegmentation: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    mmsegmentation["main"]()
    printed = re.findall(r"(\w+) head, (\w+): (.*)", capsys.readouterr().out)
    assert [line[:2] for line in printed] == [
        (role, name) for role in ("decode", "auxiliary") for name in ("before", "after")
    ]
    for before, after in (printed[:2], printed[2:]):
        numbers = [[float(x) for x in re.findall(r" (\d+\.\d+)", y[2])] for y in (before, after)]
        assert len(numbers[0]) == 2 and numbers[0] == pytest.approx(numbers[1], rel=1e-4)


def mmsegmentation_head(names: dict[str, Any], kind: str, loss: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = {"type": kind, "in_channels": 4, "channels": 4, "num_classes": 3, "loss_decode": loss}
    return names["MODELS"].build(config | options)


@pytest.mark.parametrize("class_weight", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_mmsegmentation_losses(
    class_weight: list[float] | None, avg_non_ignore: bool, mmsegmentation: dict[str, Any]
):
    """Two losses of one name are added. Values and gradients are those of mmsegmentation."""
    features = [torch.randn(2, 4, 5, 5)]
    labels = torch.randint(0, 3, (2, 1, 16, 17))
    if class_weight is None:  # where mmsegmentation fails
        labels[:, :, :3] = 255
    samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=x)) for x in labels]
    options = {"avg_non_ignore": avg_non_ignore}
    theirs = {"type": "CrossEntropyLoss", "class_weight": class_weight, **options}
    ours = {"type": "AnchoropsLoss", "weight": class_weight, **options}
    terms, gradients = [], []
    for kind, loss in (("FCNHead", theirs), ("LowResolutionFCNHead", ours)):
        losses: list[dict[str, Any]] = [loss, loss | {"loss_weight": 0.4}]
        corners = {"align_corners": True}
        if kind != "FCNHead":
            losses = [x | corners for x in losses]
        head = mmsegmentation_head(mmsegmentation, kind, losses, **corners)
        terms.append(head.loss(features, samples, train_cfg={}))
        terms[-1]["loss_ce"].backward()
        gradients.append(head.conv_seg.weight.grad)
    assert terms[0].keys() == terms[1].keys() == {"loss_ce", "acc_seg"}
    torch.testing.assert_close(terms[1], terms[0])
    torch.testing.assert_close(*gradients)


def test_mmsegmentation_binary_head(mmsegmentation: dict[str, Any]):
    loss = {"type": "AnchoropsLoss", "loss": "BinaryCrossEntropy", "loss_name": "loss_bce"}
    head = mmsegmentation_head(mmsegmentation, "LowResolutionFCNHead", loss, out_channels=1)
    logits, labels = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 1, 16, 16))
    samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=x)) for x in labels]
    terms = head.loss_by_feat(logits, samples)
    full = F.interpolate(logits, (16, 16), mode="bilinear")
    torch.testing.assert_close(
        terms["loss_bce"], F.binary_cross_entropy_with_logits(full, labels.float())
    )
    hits = ((full > 0) == labels).float().mean()
    torch.testing.assert_close(terms["acc_seg"], 100 * hits)


def test_mmsegmentation_binary_loss_of_all_pixels(mmsegmentation: dict[str, Any]):
    logits, labels = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 4, 4))
    labels[:, :2] = 255
    loss = mmsegmentation["AnchoropsLoss"]("BinaryCrossEntropy", avg_non_ignore=False)
    pixels = F.binary_cross_entropy_with_logits(
        logits[:, 0], labels.clamp(max=1).float(), reduction="none"
    )
    torch.testing.assert_close(loss(logits, labels), (pixels * (labels != 255)).mean())
    for kind in ("Dice", "CrossEntropyDice"):
        with pytest.raises(ValueError, match=rf"avg_non_ignore: expected True, .* got '{kind}'"):
            mmsegmentation["AnchoropsLoss"](kind, avg_non_ignore=False)
    with pytest.raises(ValueError, match=r"avg_non_ignore: expected True, .* without OHEM"):
        mmsegmentation["AnchoropsLoss"](avg_non_ignore=False, ohem_threshold=0.7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"align_corners": True}, "expected align_corners=True, as the head, got False"),
        ({"ignore_index": 0}, "expected ignore_index=0, as the head, got 255"),
        ({"loss": {"type": "CrossEntropyLoss"}}, "expected AnchoropsLoss and no sampler"),
    ],
)
def test_mmsegmentation_head_refuses(
    wrong: dict[str, Any], message: str, mmsegmentation: dict[str, Any]
):
    options = {"loss": {"type": "AnchoropsLoss"}} | wrong
    head = mmsegmentation_head(mmsegmentation, "LowResolutionFCNHead", **options)
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=labels))]
    with pytest.raises(ValueError, match=f"LowResolutionFCNHead: .*{message}"):
        head.loss_by_feat(torch.randn(1, 3, 4, 4), samples)


def test_semi_supervised(printed_by: Callable[..., str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its tensors are small: on a busy machine threads wait for each other
    try:
        printed = printed_by("semi_supervised")
    finally:
        torch.set_num_threads(threads)
    alone, with_unlabelled = (float(x) for x in re.findall(r"mIoU (\S+)", printed))
    assert alone > 0.4 and with_unlabelled > alone + 0.02


def run_rank(rank: int, ports: list[int], folder: str) -> None:
    """Run a process with the variables of torchrun; the second time with --fsdp."""
    for port, options in zip(ports, ([], ["--fsdp"]), strict=True):
        settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in settings.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        sys.argv = ["ddp_and_fsdp.py", "--steps", "2", *options]
        with (
            open(f"{folder}/{rank}{''.join(options)}.txt", "w") as printed,
            contextlib.redirect_stdout(printed),
        ):
            runpy.run_path(str(EXAMPLES / "ddp_and_fsdp.py"), run_name="__main__")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in (one, other)]
    multiprocessing.spawn(run_rank, (ports, str(tmp_path)), nprocs=2)  # pyright: ignore
    printed = [(tmp_path / name).read_text() for name in ("0.txt", "0--fsdp.txt")]
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
    assert "centroid to anchor" in capsys.readouterr().out


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
