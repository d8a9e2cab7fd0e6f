"""Parts of the training program: scenes, order, networks, losses, figures, options."""

import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from torchvision import tv_tensors

import anchorops as ao
from anchorops.train.data.counts import class_counts
from anchorops.train.data.digits import DigitScenes
from anchorops.train.data.loading import PhotometricDistort, VariedCrop, draws
from anchorops.train.data.splits import open_split
from anchorops.train.evaluation import class_groups, summarize
from anchorops.train.networks.learner import (
    SETTINGS,
    Learner,
    arguments_of,
    build_loss,
    build_regularizer,
)
from anchorops.train.networks.models import build_model
from anchorops.train.options import Data, Model, Options


def test_scene_is_a_function_of_seed_split_and_index():
    scenes, again = (DigitScenes("train", 50, (48, 64), seed=3) for _ in range(2))
    image, labels = scenes[7]
    scenes[8]
    assert image.shape == (3, 48, 64) and labels.shape == (48, 64)
    assert torch.equal(image, again[7][0]) and torch.equal(labels, again[7][1])
    for other in (
        DigitScenes("train", 50, (48, 64), seed=4),
        DigitScenes("val", 9, (48, 64), seed=3),
    ):
        assert not torch.equal(image, other[7][0])
    assert set(labels.unique().tolist()) <= {*range(11), -1}
    with pytest.raises(IndexError):
        scenes[50]


def test_digits_of_train_and_val_are_disjoint():
    from anchorops.train.data.digits import _digit_images

    train, val = (
        {image.tobytes() for images in _digit_images(split) for image in images}
        for split in ("train", "val")
    )
    assert train and val and not train & val


def test_digit_frequencies_have_a_long_tail():
    pixels, images, _ = class_counts(DigitScenes("train", 2000, (64, 64), seed=0))
    shares = pixels / pixels.sum()
    assert images[0] == 2000 and images[1] > 2 * images[10]
    assert shares[1] > 2 * shares[3] > 3 * shares[8]
    assert class_groups(shares, (0.025, 0.011)).count("tail") == 3


def test_long_tailed_frequencies_and_a_seed():
    options = Data(zipf=3.0, data_seed=5, crop=(32, 32))
    train, val = (open_split(options, name, seed=1) for name in ("train", "val"))
    assert torch.equal(train[3][1], DigitScenes("train", 9, (32, 32), seed=5, exponent=3.0)[3][1])
    assert torch.equal(val[3][1], DigitScenes("val", 9, (32, 32), seed=0)[3][1])


def test_draws_do_not_depend_on_ranks_or_interruptions():
    def drawn(world: int, accumulate: int, steps: range) -> list[tuple[int, int]]:
        data = Data(batch_size=8, steps=steps.stop)
        options = Options(data=data, accumulate=accumulate, seed=1)
        batches = [draws(10, options, steps.start, rank, world) for rank in range(world)]
        return sorted(item for batch in chain(*batches) for item in batch)

    everything = drawn(1, 1, range(0, 5))
    assert everything == drawn(2, 2, range(0, 5)) == drawn(4, 1, range(0, 5))
    assert everything == sorted(drawn(1, 1, range(0, 2)) + drawn(1, 1, range(2, 5)))
    # each of the four passes over the data shows every image once
    by_draw = [image for _, image in sorted((draw, image) for image, draw in everything)]
    assert all(sorted(by_draw[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))


def test_batch_size_that_ranks_cannot_share():
    with pytest.raises(
        ValueError, match=r"--data.batch_size: expected a multiple of .* = 3, got 8"
    ):
        next(draws(4, Options(), 0, 0, 3))


def test_summary_of_a_confusion_matrix():
    confusion = torch.tensor([[8, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    shares = torch.tensor([0.9, 0.05, 0.0005, 0.0495])
    summary = summarize(confusion, "abcd", shares, (0.06, 0.001))
    assert summary["miou"] == pytest.approx((8 / 11 + 3 / 6) / 2)
    assert summary["macc"] == pytest.approx((8 / 10 + 3 / 4) / 2)
    assert summary["accuracy"] == pytest.approx(11 / 14)
    assert summary["head"] == pytest.approx(8 / 11) and summary["body"] == pytest.approx(0.5)
    assert "tail" not in summary and summary["iou/b"] == pytest.approx(0.5)
    assert class_groups(shares, (0.06, 0.001)) == ["head", "body", "tail", "body"]


def test_class_predicted_but_never_true_counts_as_zero():
    summary = summarize(torch.tensor([[1, 1], [0, 0]]), "ab", torch.tensor([1.0, 0.0]), (0.1, 0.01))
    assert summary["miou"] == pytest.approx(0.25) and summary["macc"] == pytest.approx(0.5)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_weights_start_a_model_with_other_classes(auxiliary: bool, tmp_path: Path):
    """Those of a run. An auxiliary head comes and goes; the vectors of a method and the class
    weights stay behind."""
    name, path = "hrnet-w18-small", tmp_path / "weights.pt"
    source = build_model(name, 5, auxiliary=auxiliary)
    loss = build_loss(Model(), torch.ones(5))
    run = Learner(source, build_regularizer(["sar"], {}, 5, 240), loss)
    state = {f"learner.{key}": value for key, value in run.state_dict().items()}
    assert "learner.pixel_loss.weight" in state
    torch.save({"state_dict": state}, path)
    model = build_model(name, 9, auxiliary=not auxiliary, weights=path)
    assert torch.equal(next(model.parameters()), next(source.parameters()))
    with pytest.raises(ValueError, match=r"weights .*weights.pt are not those of this .*: missing"):
        build_model("segformer-b0", 5, weights=path)


def test_weights_that_are_none(tmp_path: Path):
    torch.save([1, 2], tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt is damaged"):
        build_model("hrnet-w18-small", 5, weights=tmp_path / "weights.pt")


@pytest.mark.parametrize("source", ["timm", "half precision", "smp", "safetensors"])
def test_weights_of_a_backbone(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Under the names of timm, or of smp, here with the rest of its network. A head is not used;
    batch norm's counters may be missing."""
    name, encoder = "fpn:tu-mobilenetv3_small_050", "mobilenetv3_small_050"
    given = timm.create_model(encoder).state_dict()
    expected = given["blocks.1.0.conv_pw.weight"].clone()
    if source == "smp":
        name = "fpn:mit_b0"
        given = smp.create_model("fpn", "mit_b0", encoder_weights=None).state_dict()
        expected = given["encoder.block1.0.attn.q.weight"].clone()
    elif source == "half precision":
        given = {key: value.half() for key, value in given.items() if value.dim()}
        expected = expected.half().float()
    path = tmp_path / ("x.safetensors" if source == "safetensors" else "x.pth")
    if source == "safetensors":
        save_file(given, path)
    else:
        torch.save({"state_dict": given}, path)
    backbone = build_model(name, 5, backbone_weights=path).backbone.state_dict()
    key = "block1.0.attn.q.weight" if source == "smp" else "model.blocks.1.0.conv_pw.weight"
    assert torch.equal(backbone[key], expected) and backbone[key].dtype == torch.float32
    taken = sum(source != "half precision" or value.dim() > 0 for value in backbone.values())
    said = f"backbone: {taken} tensors of {path} taken, {len(given) - taken} not used"
    assert said in capsys.readouterr().err


def test_weights_of_a_backbone_that_numbers_its_stages_otherwise(tmp_path: Path):
    given = timm.create_model("convnext_atto").state_dict()
    torch.save(given, tmp_path / "x.pth")
    model = build_model("fpn:tu-convnext_atto", 5, backbone_weights=tmp_path / "x.pth")
    taken = model.backbone.state_dict()["model.stages_1.blocks.0.mlp.fc1.weight"]
    assert torch.equal(taken, given["stages.1.blocks.0.mlp.fc1.weight"])


def test_weights_of_another_backbone(tmp_path: Path):
    path = tmp_path / "x.pth"
    torch.save(timm.create_model("resnet18").state_dict(), path)
    name = "fpn:tu-mobilenetv3_small_050"
    with pytest.raises(ValueError, match=r"--model\.backbone_weights: .*x.pth .* size mismatch"):
        build_model(name, 5, backbone_weights=path)
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"x.pth is of another network: \d+ tensors of the"):
        build_model(name, 5, backbone_weights=path)
    torch.save(timm.create_model("mobilenetv3_small_050", in_chans=4).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"size mismatch for model.conv_stem.weight: .*16, 4, 3, 3"
    ):
        build_model(name, 5, backbone_weights=path)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"--model\.backbone_weights: .*x.pth cannot be loaded: "):
        build_model(name, 5, backbone_weights=path)
    with pytest.raises(
        ValueError, match=r"--model\.backbone_weights: expected no --model\.weights"
    ):
        build_model(name, 5, backbone_weights=path, weights=path)


def test_crop_that_shows_one_class_is_drawn_again():
    labels = torch.zeros(1, 8, 64, dtype=torch.int16)
    labels[..., 40:] = 1
    labels[..., 60:] = -1
    mask = tv_tensors.Mask(labels)

    def shares(cat_max_ratio: float) -> list[float]:
        torch.manual_seed(0)
        crop = VariedCrop((8, 16), cat_max_ratio)
        crops = [crop(mask) for _ in range(50)]
        assert all(cropped.shape == (1, 8, 16) for cropped in crops)
        counts = [torch.bincount(cropped[cropped >= 0]) for cropped in crops]
        return [float(c.max() / c.sum()) for c in counts]

    assert shares(0.75) == shares(0.75)
    plain, varied = shares(1.0), shares(0.75)
    assert sum(share == 1 for share in plain) > 25
    # one of eleven draws fails with probability (1 − 9/49)^11 = 0.11
    assert sum(share < 0.75 for share in varied) > 35
    small = VariedCrop((16, 96), 0.75)(tv_tensors.Mask(torch.zeros(1, 8, 8, dtype=torch.int16)))
    assert small.shape == (1, 8, 8)  # only one class: it stops after some repetitions


def test_photometric_distortion_keeps_the_order_of_channels():
    red = tv_tensors.Image(torch.tensor([200, 60, 20], dtype=torch.uint8).view(3, 1, 1))
    distort = PhotometricDistort()
    seen = torch.stack([distort(red).flatten() for _ in range(100)])
    assert (seen[:, 0] == seen.amax(1)).all() and len(seen.unique(dim=0)) > 50
    with pytest.raises(ValueError, match=r"--data.photometric: expected .* 0 to 1, got 0 to 5"):
        distort(tv_tensors.Image(torch.tensor([0.0, 5.0, 1.0]).view(3, 1, 1)))


@pytest.mark.parametrize("methods", [("cr",), ("cbp", "occl"), ("ceco",), ("sar", "mvsc")])
def test_every_method_takes_a_step(methods: tuple[str, ...]):
    model = build_model("hrnet-w18-small", 11)
    learner = Learner(model, build_regularizer(methods, {}, 11, 240))
    labels = torch.randint(11, (2, 32, 32))
    loss, terms = learner(torch.randn(2, 3, 32, 32), labels)
    loss.backward()
    assert {"loss", "ce"} < terms.keys() and all(value.isfinite() for value in terms.values())
    assert all(p.grad is not None for p in model.body.parameters())
    assert len(learner.state_dict()) == len(model.state_dict())  # each entry once


def test_settings():
    """The named arguments of the chosen methods; options override them, and they override those of
    the preset's paper."""
    paper = {"occl.category_weight": 0.1, "cbp.length": 2, "ceco.loss_weight": 0.5}
    assert arguments_of(["sar", "ceco"], "from-scratch", paper, {}) == {"ceco.loss_weight": 0.2}
    options = {"ceco.loss_weight": 0.3}
    assert arguments_of(["sar", "ceco"], "from-scratch", paper, options) == options
    assert arguments_of(["cbp", "occl"], "published", paper, {}) == {
        "occl.category_weight": 0.1,
        "cbp.length": 2,
    }
    for setting, arguments in SETTINGS.items():
        methods = sorted({name.partition(".")[0] for name in arguments})
        assert setting == "published" or build_regularizer(methods, arguments, 11, 240)


def test_method_options():
    sar = build_regularizer(["sar"], {"sar.delta": 0.5, "sar.gate": "per_class"}, 11, 240)
    assert isinstance(sar, ao.SAR) and (sar.delta, sar.gate) == (0.5, "per_class")
    with pytest.raises(ValueError, match=r"sar has .*delta"):
        build_regularizer(["sar"], {"sar.detla": 0.5}, 11, 240)
    with pytest.raises(ValueError, match=r"SAR: momentum: expected .* got 'foo'"):
        build_regularizer(["sar"], {"sar.momentum": "foo"}, 11, 240)
    with pytest.raises(ValueError, match=r"METHOD among --model.methods \['sar'\]"):
        build_regularizer(["sar"], {"occl.temperature": 1}, 11, 240)


def test_workers_end_with_python():
    """An iterator that still exists then, as after an error in a worker, does not keep them."""
    script = """
from anchorops.train.data.loading import Loader
iterator = iter(Loader(range(100), workers=1))
next(iterator)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
