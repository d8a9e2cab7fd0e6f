"""Frozen backbones: probes of timm's, and those of other networks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from anchorops.train import networks
from anchorops.train.commands import load, predict_masks, validate
from anchorops.train.networks import build_model
from anchorops.train.options import Model
from anchorops.train.train import Record
from tests.helpers.image_files import image, write
from tests.helpers.tiny_runs import TINY, assert_same_run, figures, fitted, state

NAME = "test_efficientnet.r160_in1k"
PROBE = f"{TINY} --model.methods [] --model.network probe:{NAME} --ema 0.9"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("name", "levels", "multiple"),
    [
        ("test_vit.r160_in1k", [-1], 16),
        ("test_vit.r160_in1k", [0, -1], 16),
        ("test_efficientnet.r160_in1k", [-1, 3], 32),
        ("test_efficientnet.r160_in1k", [0], 2),
        ("hrnet_w18_small", [0], 2),  # whose later levels do not fit each other at such sizes
    ],
)
def test_a_probe(name: str, levels: list[int], multiple: int):
    """As written with torch and timm: in training, and in evaluation at another size."""
    model = build_model(Model(f"probe:{name}", probe_levels=levels), 5)
    assert model.multiple == multiple
    backbone: Any = timm.create_model(name, num_classes=0).eval()
    norm, images = nn.BatchNorm2d(model.classifier.in_channels), torch.randn(2, 3, 160, 160)
    backbone.load_state_dict(model.backbone.state_dict())
    maps = backbone.forward_intermediates(images, levels, norm=True, intermediates_only=True)
    up = [F.interpolate(x, maps[0].shape[2:], mode="bilinear") for x in maps]
    logits = model(images)
    torch.testing.assert_close(logits, model.classifier(norm(torch.cat(up, 1))))
    logits.sum().backward()
    trained = {name for name, x in model.named_parameters() if x.grad is not None}
    assert trained == {"classifier.weight", "classifier.bias"}
    side = 3 * multiple
    stride = images.shape[-1] // logits.shape[-1]
    found = model.eval()(torch.randn(1, 3, side, 3 * side)).shape[2:]
    assert tuple(found) == (side // stride, 3 * side // stride)


def test_patches_of_14_pixels(refused: Callable[..., str]):
    with torch.device("meta"):
        model = build_model(Model("probe:vit_small_patch14_dinov2"), 5)
        assert model(torch.empty(2, 3, 28, 42)).shape == (2, 5, 2, 3)
    assert model.moments == tuple([255 * x for x in values] for values in IMAGENET)
    refused(f"{fit_of('vit_tiny_patch16_224')} --data.crop [24,32]", "crop: expected two .* of 16")
    refused(f"{fit_of('test_vit')} --model.probe_levels [9]", "levels: expected those of 6, got .9")
    refused(f"{fit_of('test_vit')} --model.freeze true", "freeze: expected another --model.network")
    refused(f"{fit_of('test_vit')} --model.methods [cbp]", "expected a network with weights to tr")
    refused(f"fit {TINY} --model.probe_levels [1]", "levels: expected --model.network probe:NAME")


def fit_of(name: str) -> str:
    return f"fit {TINY} --model.network probe:{name}"


def test_a_run_of_a_probe_as_written_with_torch(tmp_path: Path, monkeypatch, capsys):
    """The same weights after six steps on the same batches."""
    taken = list[Tensor]()
    forward = networks.Learner.forward
    monkeypatch.setattr(
        networks.Learner, "forward", lambda *x: [forward(*x), taken.extend(x[1:])][0]
    )
    run = fitted(f"{TINY} --model.methods [] --model.network probe:{NAME} --run {tmp_path}")
    assert "the frozen backbone has random weights: give" in capsys.readouterr().err
    torch.manual_seed(0)
    classifier = build_model(Model(f"probe:{NAME}"), 11).classifier
    backbone: Any = timm.create_model(NAME, num_classes=0).eval()
    backbone.load_state_dict(torch.load(run / "frozen.ckpt"))
    norm = nn.BatchNorm2d(classifier.in_channels, affine=False)
    groups = [{"params": [classifier.weight]}, {"params": [classifier.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    for step, (images, labels) in enumerate(zip(taken[::2], taken[1::2], strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = 0.004 * (1 - step / 6) ** 0.9
        (x,) = backbone.forward_intermediates(images, [-1], norm=True, intermediates_only=True)
        logits = F.interpolate(classifier(norm(x.detach())), labels.shape[1:], mode="bilinear")
        F.cross_entropy(logits, labels.long(), ignore_index=-1).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = state(run)["model"]
    torch.testing.assert_close(found["classifier.weight"], classifier.weight.detach())
    torch.testing.assert_close(found["body.norm.running_var"], norm.running_var)
    assert len(taken) == 12


def test_runs_of_a_probe(tmp_path: Path, refused: Callable[..., str], monkeypatch, capsys):
    """Its backbone, whose weights are not those of the seed, stays, statistics too; it is written
    once, and found beside the weights. Its mean is its own. A run goes on with equal bits, and not
    with another backbone."""
    backbone = timm.create_model(NAME, num_classes=0)
    torch.save(given := backbone.state_dict(), tmp_path / "given")
    saved = Record.save

    def save(record: Record, step: int) -> None:
        for model in record.stateful["model"], record.stateful["average"].module:
            assert all(torch.equal(model.backbone.state_dict()[x], given[x]) for x in given)
        saved(record, step)

    monkeypatch.setattr(Record, "save", save)
    words = f"{PROBE} --model.backbone_weights {tmp_path}/given --run {tmp_path}"
    run, parts = fitted(f"{words}/run"), fitted(f"{words}/parts --max_steps 3")
    assert_same_run(run, fitted(f"--run {parts} --resume --max_steps null"))
    frozen = torch.load(run / "frozen.ckpt")
    assert all(torch.equal(frozen[name], x) for name, x in given.items())
    assert not any("backbone" in x for x in state(run)["model"] | state(run)["average"])
    model, options = load(run)
    assert all(torch.equal(x, given[name]) for name, x in model.backbone.state_dict().items())
    known = yaml.safe_load((run / "data.yaml").read_text())["channels"]
    assert options.data.mean == known["mean"] == [255 * x for x in IMAGENET[0]]
    monkeypatch.chdir(run.parent)
    found = validate(
        ["--run", "run", "--model.weights", "run/best.ckpt", "--model.evaluation", "sliding"]
    )
    best = state(run, "best")["step"]
    assert found["val/miou"] == pytest.approx(figures(run)[best]["val/miou"], abs=1e-6)
    assert (run / "confusion.csv").exists()
    write(tmp_path / "a.png", image(40, 50))
    predict_masks(f"--run {run} --images {tmp_path}/a.png --out {tmp_path}/masks".split())
    capsys.readouterr()
    words = f"{PROBE} --run {tmp_path}/next --seed 1 --max_steps 1"
    fitted(f"{words} --model.weights {run}/best.ckpt --data.train_images 32")
    assert "random" not in capsys.readouterr().err
    assert (tmp_path / "next/frozen.ckpt").read_bytes() == (run / "frozen.ckpt").read_bytes()

    changed = Path(shutil.copytree(run, tmp_path / "changed"))
    torch.save({name: x + 1 for name, x in frozen.items()}, changed / "frozen.ckpt")
    refused(f"fit --run {changed} --resume", "frozen weights: CRC-32 .* has CRC-32 .*")
    (changed / "frozen.ckpt").unlink()
    refused(f"validate --run {changed}", "best.ckpt: expected frozen.ckpt beside it, of its back")
    refused(f"fit --run {changed} --resume", "frozen.ckpt does not exist$")


def test_a_frozen_backbone_of_another_network(tmp_path: Path):
    model = build_model(Model("hrnet-w18-small", freeze=True), 5).train()
    before = {name: x.clone() for name, x in model.backbone.state_dict().items()}
    logits = model(torch.randn(2, 3, 64, 64))
    logits.sum().backward()
    assert all(x.grad is None for x in model.backbone.parameters())
    assert all(x.grad is not None for x in model.body.mix.parameters())  # pyright: ignore
    assert all(torch.equal(x, before[name]) for name, x in model.backbone.state_dict().items())
    whole = build_model(Model("hrnet-w18-small"), 5)
    torch.save({"model": whole.state_dict()}, tmp_path / "weights")
    model = build_model(Model("hrnet-w18-small", freeze=True, weights=f"{tmp_path}/weights"), 5)
    for name, x in model.backbone.state_dict().items():
        assert torch.equal(x, whole.backbone.state_dict()[name])
    torch.save({"model": model.state_dict()}, tmp_path / "best.ckpt")
    torch.save(model.backbone.state_dict(), tmp_path / "frozen.ckpt")
    later = build_model(Model("hrnet-w18-small", weights=f"{tmp_path}/best.ckpt"), 9)
    assert all(x.requires_grad for x in later.parameters())
    assert later.left_out == ["classifier.weight", "classifier.bias"]
    for name, x in later.backbone.state_dict().items():
        assert torch.equal(x, whole.backbone.state_dict()[name])
