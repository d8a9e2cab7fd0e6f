"""The options of a run: their names, defaults and meanings, and which values they may have."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from . import MULTIPLE

PUBLISHED = "published"  # the methods' own defaults
Published = Literal[
    "cityscapes", "ade20k", "pascal-context", "coco-stuff-10k", "coco-stuff-164k", "camvid"
]


def expect(holds: bool, option: str, expected: str, got: object) -> None:
    """Raises ValueError, in one line, where it does not hold."""
    if not holds:
        raise ValueError(f"--{option}: expected {expected}, got {got}")


def expect_at_least(least: int, group: str, options: object, *names: str) -> None:
    """Raises ValueError for an option that is not null and below this, or not finite."""
    for name in names:
        value = getattr(options, name)
        holds = value is None or least <= value < math.inf
        expect(holds, f"{group}{name}", f"a finite number of at least {least}", value)


@dataclass
class Model:
    """The network, its losses and its optimizer.

    Args:
        network: hrnet-w18-small, hrnet-w18, hrnet-w48, …, segformer-b0 to segformer-b5, or
            ARCHITECTURE:ENCODER of segmentation-models-pytorch.
        pretrained: Start from ImageNet weights (downloaded).
        weights: Start from the weights in this file; with validate and predict, use them.
        backbone_weights: Start the backbone from the weights in this file, under the names of timm
            or of segmentation-models-pytorch; nothing is downloaded then.
        auxiliary_weight: Weight of the loss of an auxiliary head (3×3 convolution, classifier) on
            the second last map of the backbone; 0: no such head. The usual weight is 0.4.
        dropout: Share of the channels that are dropped before the classifier in training; the
            methods use all channels. mmsegmentation uses 0.1, except for HRNet. It replaces the
            own dropout of DeepLab, FPN and PSPNet, of channels that the methods use too, as DPT's
            always is.
        classifier_std: Standard deviation of the classifiers' initial weights, drawn from a normal
            distribution (mmsegmentation: 0.01); their biases are then 0. null: torch's default.
        channels_last: Use the channels-last memory layout for images, features and weights.
        compile: Compile the network and its losses with torch.compile.
        methods: Regularisers in addition to the cross-entropy; any number of them.
        setting: A named set of arguments of the methods. published: their defaults. from-scratch:
            smaller weights of OCCL and CeCo, for training from random weights. Arguments that it
            does not set are those that the preset's paper has for its network.
        paper_options: These arguments, of any methods, as METHOD.ARGUMENT: value.
        method_options: Additional arguments of the chosen methods, which override those of the
            setting: '{sar.momentum: 0.99, occl.split: images}'. sar.anchors, cr.anchors and
            cbp.init accept "@FILE.npy", an array [K, D] of numpy.save.
        loss: The loss of the logits at full resolution: cross-entropy, cross-entropy with the focal
            factor, Dice, or the sum of cross-entropy and Dice.
        focal_gamma: Exponent of the focal factor, with the loss focal.
        ohem_threshold: Online hard example mining: the cross-entropy uses only pixels whose true
            class has at most this probability.
        ohem_min_kept: At least this number of pixels is used in each batch: the hardest. Without
            ohem_threshold only these are used.
        optimizer: sgd has momentum 0.9.
        lr: Learning rate after warm-up.
        weight_decay: Weight decay; not applied to biases and normalisation layers.
        head_lr_factor: Learning rate of everything except the backbone and the methods, relative
            to lr.
        warmup: Steps of linear warm-up.
        power: Exponent of the polynomial decay to zero.
        evaluation: Predict whole images, or overlapping windows of the size of a crop.
        window_stride: With sliding windows: rows and columns from one to the next; two thirds of a
            crop if not given.
        eval_scales: Scales of the images in an evaluation, for example [0.5, 0.75, 1, 1.25]. There
            is one pass for each scale; the probabilities are averaged.
        eval_flip: Also average with the probabilities of the mirrored images: twice as many passes.
    """

    network: str = "hrnet-w18-small"
    pretrained: bool = False
    weights: str | None = None
    backbone_weights: str | None = None
    auxiliary_weight: float = 0.0
    dropout: float = 0.0
    classifier_std: float | None = None
    channels_last: bool = False
    compile: bool = False
    methods: Sequence[Literal["cr", "sar", "cbp", "occl", "ceco", "mvsc"]] = ()
    setting: Literal["published", "from-scratch"] = PUBLISHED
    paper_options: dict[str, bool | int | float | str | None] | None = None
    method_options: dict[str, bool | int | float | str | None] | None = None
    loss: Literal["ce", "focal", "dice", "ce+dice"] = "ce"
    focal_gamma: float = 2.0
    ohem_threshold: float | None = None
    ohem_min_kept: int | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    weight_decay: float = 5e-4
    head_lr_factor: float = 1.0
    warmup: int = 0
    power: float = 0.9
    evaluation: Literal["whole", "sliding"] = "whole"
    window_stride: tuple[int, int] | None = None
    eval_scales: Sequence[float] = (1.0,)
    eval_flip: bool = False

    def __post_init__(self) -> None:
        positive = ("auxiliary_weight", "focal_gamma", "lr", "weight_decay", "head_lr_factor")
        expect_at_least(0, "model.", self, *positive, "warmup", "power", "classifier_std")
        expect_at_least(1, "model.", self, "ohem_min_kept")
        threshold = self.ohem_threshold
        share = threshold is None or 0 < threshold <= 1
        expect(share, "model.ohem_threshold", "above 0, at most 1", threshold)
        expect(0 <= self.dropout < 1, "model.dropout", "at least 0, below 1", self.dropout)
        once, scales = len({*self.methods}) == len(self.methods), self.eval_scales
        expect(once, "model.methods", "each at most once", self.methods)
        in_range = len(scales) > 0 and all(0 < scale < math.inf for scale in scales)
        expect(in_range, "model.eval_scales", "finite numbers above 0, at least one", scales)
        both = self.weights and self.backbone_weights  # the first replaces the backbone too
        expect(not both, "model.backbone_weights", "no --model.weights beside it", self.weights)
        no_map = self.auxiliary_weight > 0 and self.network.startswith("dpt:")
        expect(not no_map, "model.auxiliary_weight", "0 for DPT", self.auxiliary_weight)
        hard = (threshold, self.ohem_min_kept) != (None, None)
        mined = "ce, focal or ce+dice with --model.ohem_threshold or --model.ohem_min_kept"
        expect(self.loss != "dice" or not hard, "model.loss", mined, self.loss)
        focal = self.loss == "focal" or self.focal_gamma == 2
        expect(focal, "model.focal_gamma", "2 without --model.loss focal", self.focal_gamma)


@dataclass
class Data:
    """The images, their masks, and the length of a run.

    Args:
        dataset: digits: scenes of handwritten digits, generated while training; needs no files.
            folder: images/train, images/val, masks/train, masks/val and classes.txt under root.
            Others: a published data set, with its files as downloaded.
        root: Directory of the data set.
        steps: Optimizer steps of the run. The learning rate is 0 after the last one.
        batch_size: Images per step, over all ranks and accumulated batches.
        eval_batch_size: Images per batch of a validation; with more than 1, all images must have
            the same size.
        workers: Number of processes that load images, per rank; it does not affect the images.
        crop: Height and width of a training image (digits: of every scene), multiples of 32.
        flip: Mirror half of the training images.
        photometric: Distort brightness, contrast, saturation and hue of training images.
        split: The split of a validation. A training is validated on val, which selects the best
            weights; test is for `validate`, after it (folder: images/test, masks/test).
        head_tail: Head classes have at least the first share of the training pixels, tail classes
            less than the second.
        train_images: digits: scenes in the training split.
        val_images: digits: scenes in the validation split.
        zipf: digits: exponent of the frequencies in the training split: digit d has
            (d + 1)^−zipf; in the validation split the exponent is 1.
        data_seed: digits: seed of the training scenes; that of the run if not given.
        image_suffix: folder: ending of image names (_rgb.tif); any known one if not given.
        mask_suffix: folder: ending of mask names (_labels.png).
        label_map: folder: values in the masks and their classes, or −1 for ignored:
            '{128: 1, 7: -1}'. With at most 255 classes, 255 is also ignored. Or the colours in the
            masks, all of them: '{"128,64,0": 1, "0,0,0": -1}'.
        channels: folder: channels of the images.
        short_side: Images are scaled to this short side, keeping their aspect ratio.
        long_side: Images are scaled to this long side; with short_side, so that neither is
            exceeded.
        scale: Range of an additional random scale of training images, which are then cropped, or
            padded with the mean colour.
        cat_max_ratio: If one class has this share of the valid pixels of a crop or more, the crop
            is drawn again, up to ten times; 1: never.
    """

    dataset: Literal["digits", "folder", Published] = "digits"
    root: str | None = None
    steps: int = 500
    batch_size: int = 8
    eval_batch_size: int = 1
    workers: int = 0
    crop: tuple[int, int] = (64, 64)
    flip: bool = False
    photometric: bool = False
    split: Literal["val", "test"] = "val"
    head_tail: tuple[float, float] = (0.01, 0.001)
    train_images: int = 20_000
    val_images: int = 200
    zipf: float = 1.0
    data_seed: int | None = None
    image_suffix: str | None = None
    mask_suffix: str | None = None
    label_map: dict[int, int] | dict[str, int] | None = None
    channels: int = 3
    short_side: int | None = None
    long_side: int | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    cat_max_ratio: float = 1.0

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "eval_batch_size", "train_images", "val_images")
        expect_at_least(1, "data.", self, *counts, "channels", "short_side", "long_side")
        expect_at_least(0, "data.", self, "workers", "zipf", "data_seed")
        multiples = all(side > 0 and side % MULTIPLE == 0 for side in self.crop)
        expect(multiples, "data.crop", f"two multiples of {MULTIPLE}", self.crop)
        (head, tail), (least, greatest) = self.head_tail, self.scale
        expect(1 >= head >= tail >= 0, "data.head_tail", "1 ≥ head ≥ tail ≥ 0", self.head_tail)
        share = self.cat_max_ratio
        expect(0 < share <= 1, "data.cat_max_ratio", "above 0, at most 1", share)
        finite = 0 < least <= greatest < math.inf
        expect(finite, "data.scale", "finite numbers, 0 < least ≤ greatest", self.scale)
        for option in fields(self):  # which other data sets would ignore
            kinds = USED_BY.get(option.name, (self.dataset,))
            if self.dataset not in kinds and getattr(self, option.name) != option.default:
                expected = f"--data.dataset among {', '.join(kinds)}"
                expect(False, f"data.{option.name}", expected, self.dataset)


_WITH_FILES = ("folder", *Published.__args__)
# the data sets that use an option; those that are not here are used by all
USED_BY: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("train_images", "val_images", "zipf", "data_seed"), ("digits",)),
    **dict.fromkeys(("image_suffix", "mask_suffix", "label_map", "channels"), ("folder",)),
    **dict.fromkeys(("root", "short_side", "long_side", "scale", "cat_max_ratio"), _WITH_FILES),
}


@dataclass
class Options:
    """How a run is trained.

    Args:
        model: The network, its losses and its optimizer.
        data: The images, their masks, and the length of a run.
        seed: Random seed of the run.
        device: auto: GPUs if there are any. Each process of torchrun has its own GPU.
        precision: Of the forward pass, by autocast; weights are float32.
        accumulate: Batches of a step, one after another, whose gradients are added.
        clip: Largest norm of the gradients of a step.
        ema: Also average the weights over the steps, with this decay (0.999 for thousands of steps,
            0.98 for hundreds); the averaged weights are validated, and saved as the best ones.
        deterministic: Use only deterministic algorithms: on a GPU a run then has the same bits as
            another one.
        val_every: Steps between two validations; there is one at the end, too.
        log_every: Steps between two lines of the log.
        save_every: Steps between two states of the run on the disk.
        max_steps: End early, after this step. The run can go on with a larger limit.
        max_hours: End early, after the first step that ends later than this; the clock starts when
            the masks have been read. A validation is completed. The run can go on, with a new
            clock.
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    deterministic: bool = False
    val_every: int = 1_000
    log_every: int = 10
    save_every: int = 500
    max_steps: int | None = None
    max_hours: float | None = None

    def __post_init__(self) -> None:
        counts = ("accumulate", "val_every", "log_every", "save_every", "max_steps")
        expect_at_least(1, "", self, *counts)
        expect_at_least(0, "", self, "max_hours")
        expect(0 <= self.seed < 2**32, "seed", "0 to 4294967295", self.seed)
        clips = self.clip is None or 0 < self.clip < math.inf
        expect(clips, "clip", "a finite number above 0", self.clip)
        expect(self.ema is None or 0 <= self.ema < 1, "ema", "at least 0, below 1", self.ema)
        window, stride = self.data.crop, self.model.window_stride
        if stride is not None and self.model.evaluation == "sliding":
            fits = all(1 <= step <= side for side, step in zip(window, stride, strict=True))
            expect(fits, "model.window_stride", f"1 to the crop's {window}", stride)


# options on which no number of a run depends; they may differ where it goes on
FREE = ["data.root", "data.workers", "data.eval_batch_size"]
FREE += ["save_every", "max_steps", "max_hours"]


def config_of(options: Options) -> dict[str, Any]:
    """The options as in a file."""
    return json.loads(json.dumps(asdict(options)))


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """{"data.root": …} of {"data": {"root": …}}."""
    flattened: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flattened |= {f"{name}.{option}": x for option, x in value.items()}
        else:
            flattened[name] = value
    return flattened
