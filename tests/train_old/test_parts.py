"""Parts of the training program: scenes, order, networks, losses, figures, options."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import tv_tensors

import anchorops as ao
from anchorops.train.config import SETTINGS, Config, Data, setting_options
from anchorops.train.data.counts import class_counts
from anchorops.train.data.digits import DigitScenes
from anchorops.train.data.loading import (
    BatchSampler,
    Draws,
    PhotometricDistort,
    VariedCrop,
    build_datasets,
)
from anchorops.train.networks.learner import Learner, build_regularizer
from anchorops.train.networks.models import build_model
from anchorops.train.presets import DIGITS, PRESETS
from anchorops.train.report.evaluate import class_groups, frequency_groups, summarize
from anchorops.train.run.parts import build_parts
from anchorops.train.run.ranks import Ranks, start_ranks


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
    pixels, images, *_ = class_counts(DigitScenes("train", 2000, (64, 64), seed=0), Path())
    shares = pixels / pixels.sum()
    assert images[0] == 2000 and images[1] > 2 * images[10]
    assert shares[1] > 2 * shares[3] > 3 * shares[8]
    assert class_groups(shares, DIGITS.data.head_tail).count("tail") == 3


def test_long_tailed_frequencies_and_a_seed():
    train, val = build_datasets(Data(zipf=3.0, data_seed=5, crop=(32, 32)), seed=1)
    assert torch.equal(train[3][1], DigitScenes("train", 9, (32, 32), seed=5, exponent=3.0)[3][1])
    assert torch.equal(val[3][1], DigitScenes("val", 9, (32, 32), seed=0)[3][1])


def test_draws_do_not_depend_on_ranks_or_interruptions():
    def drawn(world: int, accumulate: int, steps: range) -> list[tuple[int, int]]:
        options = {"batch_size": 8, "accumulate": accumulate, "world": world}
        options |= {"first_step": steps.start, "steps": steps.stop}
        samplers = [BatchSampler(Draws(10, seed=1), rank=r, **options) for r in range(world)]
        return sorted(item for sampler in samplers for batch in sampler for item in batch)

    everything = drawn(1, 1, range(0, 5))
    assert everything == drawn(2, 2, range(0, 5)) == drawn(4, 1, range(0, 5))
    assert everything == sorted(drawn(1, 1, range(0, 2)) + drawn(1, 1, range(2, 5)))
    # each of the four passes over the data shows every image once
    by_draw = [image for _, image in sorted((draw, image) for image, draw in everything)]
    assert all(sorted(by_draw[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))


def test_batch_size_that_ranks_cannot_share():
    with pytest.raises(ValueError, match=r"--batch-size: expected a multiple of .* = 3, got 8"):
        BatchSampler(
            Draws(4, 0), batch_size=8, accumulate=1, rank=0, world=3, first_step=0, steps=1
        )


def test_summary_of_a_confusion_matrix():
    confusion = torch.tensor([[8, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    shares = torch.tensor([0.9, 0.05, 0.0005, 0.0495])
    summary = summarize(confusion, "abcd", shares, (0.06, 0.001))
    assert summary["miou"] == pytest.approx((8 / 11 + 3 / 6) / 2)
    assert summary["macc"] == pytest.approx((8 / 10 + 3 / 4) / 2)
    assert summary["accuracy"] == pytest.approx(11 / 14)
    assert summary["head"] == pytest.approx(8 / 11) and summary["body"] == pytest.approx(0.5)
    assert summary["tail"] is None
    assert [c["group"] for c in summary["classes"]] == ["head", "body", "tail", "body"]
    assert [c["f1"] for c in summary["classes"]][1:3] == [pytest.approx(6 / 9), None]
    assert summary["f1_by_frequency"] == [pytest.approx(16 / 19), pytest.approx(6 / 9), None, None]


def test_groups_by_frequency():
    values, shares = torch.arange(31.0), torch.arange(31.0)
    values[0] = torch.nan
    groups = frequency_groups(values, shares)
    assert len(groups) == 15 and groups[0] == 29 and groups[-2:] == [2.5, 1.0]


def test_class_predicted_but_never_true_counts_as_zero():
    summary = summarize(torch.tensor([[1, 1], [0, 0]]), "ab", torch.tensor([1.0, 0.0]), (0.1, 0.01))
    assert summary["miou"] == pytest.approx(0.25) and summary["classes"][1]["accuracy"] is None


@pytest.mark.parametrize(
    ("name", "dim", "auxiliary", "later"),
    [
        ("hrnet-w18-small", 240, True, False),
        ("hrnet-w18-small", 240, False, True),
        ("mmseg-ocrnet:hrnet-w18-small", 512, True, True),
    ],
)
def test_weights_start_a_model_with_other_classes(
    name: str, dim: int, auxiliary: bool, later: bool, tmp_path: Path
):
    """An auxiliary head comes and goes; the vectors of a method, and OCRNet's regions, stay
    behind."""
    source, path = build_model(name, 5, auxiliary=auxiliary), tmp_path / "weights.pt"
    Learner(source, build_regularizer(["sar"], {}, 5, dim))
    torch.save(source.state_dict(), path)
    model = build_model(name, 9, auxiliary=later, weights=path)
    assert torch.equal(next(model.parameters()), next(source.parameters()))
    with pytest.raises(
        ValueError, match=r"weights .*weights.pt are of another model: missing body"
    ):
        build_model("segformer-b0", 5, weights=path)


@pytest.mark.parametrize("content", [[1, 2], {"model": [1]}, {"a": 1}])
def test_weights_that_are_none(content: object, tmp_path: Path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights .*weights.pt cannot be read: expected tensors"):
        build_model("hrnet-w18-small", 5, weights=tmp_path / "weights.pt")


def test_configuration_that_is_damaged(tmp_path: Path):
    path = tmp_path / "config.json"
    DIGITS.save(path)
    whole = path.read_bytes()
    wrong_seed = whole.replace(b'"seed": 0', b'"seed": -1')
    for content in (wrong_seed, b"[]", b"[" * 100_000, whole[:50], whole + b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"config.json is damaged, or of another version"):
            Config.load(path)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("optimization", "steps", 6.5, "steps: float is not an instance of int"),
        ("optimization", "loss", "lovasz", "loss: str is not any of .*'ce', 'focal'"),
        ("running", "evaluation", "crops", "evaluation: str is not any of .*'whole'"),
        ("data", "head_tail", [0.1], r"head_tail: tuple has wrong number of elements"),
        ("data", "label_map", [1], "label_map: tuple is not a dict"),
        ("model", "methods", ["sar", "foo"], "methods: item 1 of tuple is not any of"),
        ("model", "method_options", {"sar.momentum": 0.5}, "method_options: value of key"),
    ],
)
def test_configuration_that_was_edited(
    section: str, name: str, value: Any, message: str, tmp_path: Path
):
    """No value that the command line would refuse: an unknown loss was the cross-entropy."""
    path = tmp_path / "config.json"
    DIGITS.save(path)
    saved = json.loads(path.read_text())
    saved[section][name] = value
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=rf"config.json is damaged, .*{message}"):
        Config.load(path)


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


def test_settings(tmp_path: Path):
    """The named arguments of the chosen methods; options override them."""
    config = DIGITS.replace(methods=("sar", "ceco"), setting="from-scratch", out=tmp_path)
    assert config.run.name == "digits-hrnet-w18-small-sar+ceco-from-scratch-seed0"
    assert setting_options("from-scratch", ("sar", "ceco")) == {"ceco.loss_weight": "0.2"}
    config = config.replace(train_images=8, val_images=8, device="cpu")
    for options, weight in (({}, 0.2), ({"ceco.loss_weight": "0.3"}, 0.3)):
        config = config.replace(method_options=options)
        parts = build_parts(config, Ranks(0, 1, torch.device("cpu")), from_checkpoint=False)
        attachment: Any = parts.learner.attachment
        sar, ceco = attachment.regularizer.methods
        assert ceco.loss_weight == weight and sar.loss_weight == 0.1
    for setting, arguments in SETTINGS.items():
        methods = sorted({name.partition(".")[0] for name in arguments})
        assert setting == "published" or build_regularizer(methods, arguments, 11, 240)
    with pytest.raises(ValueError, match="--setting: expected one of published, from-scratch, got"):
        DIGITS.replace(setting="scratch")


def test_loss_and_method_ignore_the_same_label():
    model = build_model("hrnet-w18-small", 11)
    sar = build_regularizer(["sar"], {"sar.ignore_index": "0"}, 11, 240)
    with pytest.raises(ValueError, match="regularizer: expected ignore_index = -1, as pixel_loss"):
        Learner(model, sar)
    Learner(model, sar, ao.CrossEntropy(ignore_index=0))


def test_method_options():
    sar = build_regularizer(["sar"], {"sar.delta": "0.5", "sar.gate": "per_class"}, 11, 240)
    assert isinstance(sar, ao.SAR) and (sar.delta, sar.gate) == (0.5, "per_class")
    with pytest.raises(ValueError, match=r"sar has .*delta"):
        build_regularizer(["sar"], {"sar.detla": "0.5"}, 11, 240)
    with pytest.raises(ValueError, match=r"SAR: momentum: expected .* got 'foo'"):
        build_regularizer(["sar"], {"sar.momentum": "foo"}, 11, 240)
    with pytest.raises(ValueError, match="METHOD among --methods sar"):
        build_regularizer(["sar"], {"occl.temperature": "1"}, 11, 240)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_batch_size": 0}, "--eval-batch-size: expected at least 1, got 0"),
        ({"patience": 0}, "--patience: expected at least 1"),
        ({"patience": 2, "eval_every": 0}, "--patience: expected --eval-every with it, got 0"),
        (
            {"class_weights": "inverse", "given_class_weights": (1.0, 2.0)},
            "--given-class-weights: expected --class-weights none with it, got inverse",
        ),
        ({"lr": -1.0}, "--lr: expected at least 0"),
        ({"crop": (50, 64)}, r"--crop: expected two multiples of 32, got \(50, 64\)"),
        ({"scale": (2.0, 0.5)}, "--scale: expected"),
        ({"head_tail": (0.1, 0.5)}, "--head-tail: expected"),
        ({"cat_max_ratio": 0.0}, "--cat-max-ratio: expected a share above 0"),
        ({"clip": 0.0}, "--clip: expected more than 0"),
        ({"ohem": 7.0}, "--ohem: expected a probability"),
        (
            {"ohem": 0.7, "loss": "dice"},
            r"--ohem: expected --loss ce or focal or ce\+dice with it, got dice",
        ),
        ({"ohem_kept": 5}, "--ohem-kept: expected --ohem with it, got None"),
        ({"dropout": 1.0}, "--dropout: expected a share below 1, got 1.0"),
        ({"eval_scales": ()}, "--eval-scales: expected one scale or more, above 0, got"),
        ({"eval_scales": (1.0, 0.0)}, "--eval-scales: expected one scale or more, above 0"),
        ({"focal_gamma": 3.0}, "--focal-gamma: expected --loss focal with it, got ce"),
        ({"lr": float("nan")}, "--lr: expected a finite value, got nan"),
        ({"scale": (1.0, float("inf"))}, "--scale: expected a finite value"),
        ({"seed": -1}, "--seed: expected 0 to 9223372036854775807, got -1"),
        ({"seed": 2**64}, "--seed: expected 0 to"),
        ({"steps": 2**40}, "--steps: expected at most 2147483647"),
        ({"val_images": 0}, "--val-images: expected at least 1"),
        ({"channels": 0}, "--channels: expected at least 1"),
        ({"num_classes": 1}, "--num-classes: expected at least 2"),
        ({"head_tail": (2.0, 0.1)}, "--head-tail: expected two shares"),
        ({"given_class_weights": (0.0, 0.0)}, "--given-class-weights: expected .* one above, got"),
        ({"given_class_weights": (-1.0, 2.0)}, "--given-class-weights: expected no value below 0"),
        ({"methods": ("sar", "sar")}, "--methods: expected each at most once"),
        (
            {"window_stride": (32, 32)},
            "--window-stride: expected --evaluation sliding with it, got whole",
        ),
        (
            {"window_stride": (32, 65), "evaluation": "sliding"},
            r"--window-stride: expected 1 to the rows and columns of --crop \(64, 64\), got",
        ),
        ({"window_stride": (0, 32), "evaluation": "sliding"}, "--window-stride: expected 1 to"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DIGITS.replace(**options)


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_device_that_cannot_be_used(device: str):
    with pytest.raises(ValueError, match=f"--device {device} cannot be used"):
        start_ranks(device)


def test_repetitions_may_save_and_log_as_they_like():
    other = DIGITS.replace(seed=1, log_every=7, save_every=3, eval_batch_size=1, workers=2)
    assert other.settings == DIGITS.settings != DIGITS.replace(lr=1.0).settings


CONVOLUTIONAL = {
    config.model.model for _, config in PRESETS.values() if "segformer" not in config.model.model
}


@pytest.mark.parametrize("model", sorted(CONVOLUTIONAL))
def test_networks_of_presets(model: str):
    with torch.device("meta"):
        network = build_model(model, 19, auxiliary=True)
        assert network(torch.empty(2, 3, 64, 96)).shape[:2] == (2, 19)
        assert network.auxiliary_head and network.auxiliary_head.logits().shape[:2] == (2, 19)


@pytest.mark.parametrize("name", PRESETS)
def test_configuration_survives_its_file(name: str, tmp_path: Path):
    config = PRESETS[name][1].replace(methods=("sar", "occl"), method_options={"sar.tau": "1"})
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config
