"""Parts of the training program: scenes, order, networks, losses, figures, options."""

from pathlib import Path

import pytest
import torch
from torchvision import tv_tensors

import anchorops as ao
from anchorops.train.data.counts import class_counts
from anchorops.train.data.digits import DigitScenes
from anchorops.train.data.loading import BatchSampler, Draws, PhotometricDistort, VariedCrop
from anchorops.train.data.module import SegmentationData
from anchorops.train.module import SegmentationModule
from anchorops.train.networks.learner import (
    SETTINGS,
    Learner,
    arguments_of,
    build_regularizer,
)
from anchorops.train.networks.models import build_model
from anchorops.train.report.evaluate import class_groups, summarize


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
    assert class_groups(shares, (0.025, 0.011)).count("tail") == 3


def test_long_tailed_frequencies_and_a_seed():
    train, val = SegmentationData(zipf=3.0, data_seed=5, crop=(32, 32), seed=1).splits()
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
    with pytest.raises(
        ValueError, match=r"--data.batch_size: expected a multiple of .* = 3, got 8"
    ):
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
    with pytest.raises(ValueError, match=r"--model.setting: expected one of published, from-scr"):
        SegmentationModule(setting="scratch")


def test_loss_and_method_ignore_the_same_label():
    model = build_model("hrnet-w18-small", 11)
    sar = build_regularizer(["sar"], {"sar.ignore_index": 0}, 11, 240)
    with pytest.raises(ValueError, match="regularizer: expected ignore_index = -1, as pixel_loss"):
        Learner(model, sar)
    Learner(model, sar, ao.CrossEntropy(ignore_index=0))


def test_method_options():
    sar = build_regularizer(["sar"], {"sar.delta": 0.5, "sar.gate": "per_class"}, 11, 240)
    assert isinstance(sar, ao.SAR) and (sar.delta, sar.gate) == (0.5, "per_class")
    with pytest.raises(ValueError, match=r"sar has .*delta"):
        build_regularizer(["sar"], {"sar.detla": 0.5}, 11, 240)
    with pytest.raises(ValueError, match=r"SAR: momentum: expected .* got 'foo'"):
        build_regularizer(["sar"], {"sar.momentum": "foo"}, 11, 240)
    with pytest.raises(ValueError, match=r"METHOD among --model.methods \['sar'\]"):
        build_regularizer(["sar"], {"occl.temperature": 1}, 11, 240)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "--model.lr: expected a finite number, at least 0, got -1.0"),
        ({"lr": float("nan")}, "--model.lr: expected a finite number"),
        ({"ohem": 7.0}, "--model.ohem: expected a share"),
        (
            {"ohem": 0.7, "loss": "dice"},
            r"--model.ohem: expected --model.loss ce or focal or ce\+dice with it, got dice",
        ),
        ({"ohem_kept": 5}, "--model.ohem_kept: expected --model.ohem with it, got None"),
        ({"dropout": 1.0}, "--model.dropout: expected a share below 1, got 1.0"),
        ({"eval_scales": [1.0, 0.0]}, "--model.eval_scales: expected one scale or more, above 0"),
        ({"eval_scales": []}, "--model.eval_scales: expected one scale or more"),
        ({"focal_gamma": 3.0}, "--model.focal_gamma: expected --model.loss focal with it, got ce"),
        ({"given_class_weights": [-1.0, 2.0]}, "--model.given_class_weights: expected no value"),
        (
            {"class_weights": "inverse", "given_class_weights": [1.0, 2.0]},
            "--model.given_class_weights: expected --model.class_weights none with it, got inverse",
        ),
        ({"methods": ["sar", "sar"]}, "--model.methods: expected each at most once"),
        ({"window_stride": (32, 32)}, "--model.window_stride: expected --model.evaluation sliding"),
    ],
)
def test_options_of_the_model_that_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SegmentationModule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_batch_size": 0}, "--data.eval_batch_size: expected at least 1, got 0"),
        ({"crop": (50, 64)}, r"--data.crop: expected two multiples of 32, got \(50, 64\)"),
        ({"dataset": "folder", "scale": (2.0, 0.5)}, "--data.scale: expected"),
        ({"head_tail": (0.1, 0.5)}, "--data.head_tail: expected"),
        ({"dataset": "folder", "cat_max_ratio": 0.0}, "--data.cat_max_ratio: expected a share"),
        ({"dataset": "folder", "num_classes": 1}, "--data.num_classes: expected at least 2"),
        ({"root": "data"}, "--data.root: expected --data.dataset folder or .* with it, got digits"),
        ({"num_classes": 3}, "--data.num_classes: expected --data.dataset folder with it"),
        (
            {"dataset": "folder", "train_images": 9},
            "--data.train_images: expected --data.dataset digits with it, got folder",
        ),
        ({"dataset": "ade20k", "label_map": {0: 1}}, "--data.label_map: expected --data.dataset"),
    ],
)
def test_options_of_the_data_that_are_refused(options: dict, message: str):
    """A folder that is given to the preset digits is not trained on, for example."""
    with pytest.raises(ValueError, match=message):
        SegmentationData(**options)
