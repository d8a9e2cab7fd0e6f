"""The options of a run: their names, defaults and meanings, and which values they may have."""

# pyright: reportAssignmentType=false, reportInvalidTypeForm=false

import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from ..losses import METHODS

CLASSES = {"cr": "SAR"} | {name.lower(): name for name in METHODS}  # of the methods
Method = Literal[tuple(CLASSES)]
# also "nan", which jsonargparse takes for a text where a float is expected
Number = restricted_number_type("Number", float, [("==", 0), ("!=", 0)], join="or")
# as it, read by our loader alone: for jsonargparse 1:30 is 90
Integer = restricted_number_type("Integer", int, [("==", 0), ("!=", 0)], join="or")
Published = Literal[
    "cityscapes", "ade20k", "pascal-context", "coco-stuff-10k", "coco-stuff-164k", "camvid"
]


@dataclass
class Model:
    """The network, its losses and its optimizer.

    Args:
        network: hrnet-w18-small to -w64, segformer-b0 to -b5, smp's ARCHITECTURE:ENCODER, or
            probe:NAME, a frozen backbone of timm with batch norm and a classifier.
        probe_levels: Of a probe's backbone; with several, their maps are joined.
        freeze: Keep the backbone's weights and statistics; those of a probe are always kept.
        pretrained: Start from ImageNet weights (downloaded).
        weights: Start from the weights in this file; with validate and predict, use them.
        backbone_weights: Start the backbone from this file, with the names of timm or smp.
        auxiliary_weight: Weight of the loss of an auxiliary head, usually 0.4; 0: no such head.
        dropout: Share of the channels dropped before the classifier; the methods use all.
        classifier_std: Draw the classifiers' weights from N(0, std²), not as torch does.
        channels_last: Keep weights and features in the channels-last memory layout.
        methods: Regularisers in addition to the loss, any number of them.
        paper_options: Arguments of any methods that a preset has, as METHOD.ARGUMENT.
        method_options: Arguments of the chosen methods, before those of a preset.
        loss: The loss of the logits at full resolution.
        class_weights: One for each class, of the cross-entropy; balanced: 1 / (K·s) of a class that
            has the share s of the training pixels, with K such classes; 0 of one without pixels.
        label_smoothing: Share of the cross-entropy's targets that all classes have alike.
        focal_gamma: Exponent of the focal factor, with the loss focal.
        ohem_threshold: Use only pixels whose true class has at most this probability.
        ohem_min_kept: Use at least this number of a batch's pixels, the hardest.
        optimizer: sgd has momentum 0.9.
        lr: Learning rate after warm-up.
        weight_decay: Weight decay; not applied to biases and normalisation layers.
        head_lr_factor: Relative learning rate of all but the backbone and the methods.
        warmup: Steps of linear warm-up.
        power: Exponent of the polynomial decay to zero.
        evaluation: Predict whole images, or overlapping windows of the size of a crop.
        window_stride: Rows and columns from one window to the next; if not given, 2/3 of a crop.
        eval_scales: Average the probabilities of the images in these scales.
        eval_flip: Average with the probabilities of the mirrored images, too.
    """

    network: str = "hrnet-w18-small"
    probe_levels: Sequence[Integer] = (-1,)
    freeze: bool = False
    pretrained: bool = False
    weights: str | None = None
    backbone_weights: str | None = None
    auxiliary_weight: NonNegativeFloat = 0.0
    dropout: ClosedUnitInterval = 0.0
    classifier_std: NonNegativeFloat | None = None
    channels_last: bool = False
    methods: Sequence[Method] = ()
    paper_options: dict[str, bool | int | float | str | None] | None = None
    method_options: dict[str, bool | int | float | str | None] | None = None
    loss: Literal["ce", "focal", "dice", "ce+dice"] = "ce"
    class_weights: Literal["balanced"] | Sequence[NonNegativeFloat] | None = None
    label_smoothing: ClosedUnitInterval = 0.0
    focal_gamma: NonNegativeFloat = 2.0
    ohem_threshold: ClosedUnitInterval | None = None
    ohem_min_kept: PositiveInt | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 0.01
    weight_decay: NonNegativeFloat = 5e-4
    head_lr_factor: NonNegativeFloat = 1.0
    warmup: NonNegativeInt = 0
    power: NonNegativeFloat = 0.9
    evaluation: Literal["whole", "sliding"] = "whole"
    window_stride: tuple[PositiveInt, PositiveInt] | None = None
    eval_scales: Sequence[PositiveFloat] = (1.0,)
    eval_flip: bool = False

    @property
    def probe(self) -> str | None:
        """The backbone of a probe."""
        kind, _, name = self.network.partition(":")
        return name if kind == "probe" else None

    @property
    def frozen(self) -> bool:
        return self.freeze or self.probe is not None


@dataclass
class Data:
    """The images, their masks, and the length of a run.

    Args:
        dataset: digits needs no files, folder is your own images; others: as downloaded.
        root: Directory of the data set.
        steps: Optimizer steps of the run. The learning rate is 0 after the last one.
        batch_size: Images per step, over all ranks and accumulated batches.
        eval_batch_size: Images per batch of a validation; above 1 only for images of one size.
        workers: Processes that load images, per rank; they do not affect the images.
        crop: Height and width of a training image (digits: of every scene).
        flip: Mirror half of the training images.
        photometric: Distort brightness, contrast, saturation and hue of training images.
        split: The split of `validate`; a training is validated on val.
        head_tail: Least share of the training pixels of a head class, and of a body class.
        train_images: digits: scenes in the training split.
        val_images: digits: scenes in the validation split.
        zipf: digits: training frequencies are (d + 1)^−zipf of digit d; in the validation, 1.
        data_seed: digits: seed of the training scenes, if not that of the run.
        image_suffix: folder: ending of image names (_rgb.tif), if not any known one.
        mask_suffix: folder: ending of mask names (_labels.png).
        label_map: folder: classes of all values '{128: 1, 7: -1}' or colours '{"128,64,0": 1}'.
        channels: folder: channels of the images.
        mean: Of each channel, in values of the files (8 bits: 0 to 255). If not given, that of the
            training images, if they are not of 8 bits; else that of a probe's backbone, or
            ImageNet's, for 3 channels, or 127.5.
        std: Standard deviation of each channel, chosen as the mean is; with 127.5 it is 63.75.
        nodata: Ignore pixels with this value in a channel; also nan, --data.nodata=-3.4e38.
        short_side: Scale images to this short side, keeping their aspect ratio.
        long_side: Scale images to this long side; with short_side, so that neither is exceeded.
        scale: Range of an additional random scale of training images.
        cat_max_ratio: Draw a crop again in which a class has this share or more; 1: never.
    """

    dataset: Literal["digits", "folder", Published] = "digits"
    root: str | None = None
    steps: PositiveInt = 500
    batch_size: PositiveInt = 8
    eval_batch_size: PositiveInt = 1
    workers: NonNegativeInt = 0
    crop: tuple[PositiveInt, PositiveInt] = (64, 64)
    flip: bool = False
    photometric: bool = False
    split: Literal["val", "test"] = "val"
    head_tail: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.01, 0.001)
    train_images: PositiveInt = 20_000
    val_images: PositiveInt = 200
    zipf: NonNegativeFloat = 1.0
    data_seed: NonNegativeInt | None = None
    image_suffix: str | None = None
    mask_suffix: str | None = None
    label_map: dict[int, Integer] | dict[str, Integer] | None = None
    channels: PositiveInt = 3
    mean: Sequence[Number] | None = None
    std: Sequence[PositiveFloat] | None = None
    nodata: Number | None = None
    short_side: PositiveInt | None = None
    long_side: PositiveInt | None = None
    scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    cat_max_ratio: ClosedUnitInterval = 1.0


@dataclass
class Options:
    """How a run is trained.

    Args:
        seed: Random seed of the run.
        device: auto: GPUs if there are any. Each process of torchrun has its own GPU.
        precision: Of the forward pass, by autocast; weights are float32.
        accumulate: Batches of a step, one after another, whose gradients are added.
        clip: Largest norm of the gradients of a step.
        ema: Average the weights with this decay; the averages are validated, and the best ones.
        deterministic: Use only deterministic algorithms: a run then has the same bits on a GPU.
        val_every: Steps between two validations; there is one at the end, too.
        log_every: Steps between two lines of the log.
        save_every: Steps between two states of the run on the disk.
        max_steps: End early, after this step. The run can go on with a larger limit.
        max_hours: End early, after the first step that ends later than this.
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: PositiveInt = 1
    clip: PositiveFloat | None = None
    ema: OpenUnitInterval | None = None
    deterministic: bool = False
    val_every: PositiveInt = 1_000
    log_every: PositiveInt = 10
    save_every: PositiveInt = 500
    max_steps: PositiveInt | None = None
    max_hours: PositiveFloat | None = None

    @property
    def last_step(self) -> int:
        """At which a run ends, or is ended by its limit."""
        return min(self.data.steps, self.max_steps or self.data.steps)

    def __post_init__(self) -> None:
        model, data, crop = self.model, self.data, self.data.crop
        stride = model.window_stride or (1, 1)
        fits = stride[0] <= crop[0] and stride[1] <= crop[1]
        expect(fits, "--model.window_stride", f"at most the crop's {crop}", stride)
        scales = model.eval_scales
        finite = len(scales) > 0 and max(scales) < math.inf
        expect(finite, "--model.eval_scales", "finite numbers, at least one", scales)
        three = data.channels == 3
        expect(three or data.dataset != "digits", "--data.channels", "3 for digits", data.channels)
        expect(three or not data.photometric, "--data.photometric", "3 channels", data.channels)
        for name, values in (("--data.mean", data.mean), ("--data.std", data.std)):
            fits = (data.mean is None) == (data.std is None)
            fits &= values is None or len(values) == data.channels
            fits &= all(map(math.isfinite, values or ()))
            expected = f"--data.mean and --data.std, each of {data.channels} numbers"
            expect(fits, name, expected, values)
        ordered = data.scale[0] <= data.scale[1] < math.inf
        expect(ordered, "--data.scale", "least ≤ greatest, finite", data.scale)
        weights = model.class_weights
        if weights is not None and not isinstance(weights, str):
            finite = 0 < sum(weights) < math.inf
            expect(finite, "--model.class_weights", "finite numbers, one above 0", weights)
        methods = model.methods
        expect(len({*methods}) == len(methods), "--model.methods", "each at most once", methods)
        expect(self.seed < 2**63, "--seed", "below 2^63", self.seed)
        expect(data.cat_max_ratio > 0, "--data.cat_max_ratio", "above 0", 0)
        head, tail = data.head_tail
        expect(tail <= head, "--data.head_tail", "that of head first", data.head_tail)
        for name, value in flat(asdict(self)).items():
            finite = not isinstance(value, float) or math.isfinite(value)
            expect(finite or name == "--data.nodata", name, "a finite number", value)
        no_map = (model.network.startswith("dpt:") or model.probe) and model.auxiliary_weight > 0
        none = "0 for DPT and probes"
        expect(not no_map, "--model.auxiliary_weight", none, model.auxiliary_weight)
        expect(len(model.probe_levels) > 0, "--model.probe_levels", "at least one", "none")


# options on which a command depends that does not train
PREDICT = """model.network model.probe_levels model.weights model.channels_last model.evaluation
    model.window_stride model.eval_scales model.eval_flip data.crop data.channels data.short_side
    data.long_side data.mean data.std data.nodata data.dataset device precision"""
VALIDATE = f"""{PREDICT} data.root data.workers data.eval_batch_size data.split
    data.head_tail data.val_images data.image_suffix data.mask_suffix data.label_map"""
COUNTED = "seed data.data_seed data.train_images data.zipf"  # if there is no run whose data it has
USED = {"predict": PREDICT, "predict --run": PREDICT}
USED |= {"validate": f"{VALIDATE} {COUNTED}", "validate --run": VALIDATE}


def check_effects(
    options: Options, command: str, words: Container[str], files: Container[str]
) -> None:
    """Raises ValueError for an option that acts on nothing: of the command's words, or of the
    user's files, in which it may have its default. command: with --run, if this is given."""
    model, data = options.model, options.data
    on_disk, weights = data.dataset != "digits", model.weights or model.backbone_weights
    of_ce = "model.class_weights model.label_smoothing model.ohem_threshold model.ohem_min_kept"
    paper = model.paper_options if "--model.paper_options" in words else {}
    of_chosen = all(name.partition(".")[0] in model.methods for name in paper or ())
    scenes = "data.train_images data.val_images data.zipf data.data_seed"
    suffixes = "data.image_suffix data.mask_suffix"
    needs = [  # options, what they need, and whether it is there
        ("model.pretrained", "no file of weights", not weights),
        ("model.probe_levels", "--model.network probe:NAME", model.probe is not None),
        ("model.freeze", "another --model.network than a probe", model.probe is None),
        ("model.focal_gamma", "--model.loss focal", model.loss == "focal"),
        (of_ce, "another --model.loss than dice", model.loss != "dice"),
        ("model.paper_options", "METHOD.ARGUMENT of chosen --model.methods", of_chosen),
        ("model.window_stride", "--model.evaluation sliding", model.evaluation == "sliding"),
        (scenes, "--data.dataset digits", not on_disk),
        ("data.root data.label_map data.nodata", "another --data.dataset than digits", on_disk),
        (suffixes, "--data.dataset folder", data.dataset == "folder"),
    ]
    default, used = flat(asdict(Options())), USED.get(command, "").split()
    if used and on_disk and model.evaluation == "whole":
        used.remove("data.crop")
    for name, value in flat(asdict(options)).items():
        bare, got = name.removeprefix("--"), f"{value}, which acts on nothing"
        known = not used or bare in used or name not in words
        expect(known, name, f"an option that {command} uses", got)
        chosen = name in words and value is not None and value is not False
        if chosen or (name in files and value != default[name]):
            for names, need, met in needs:
                expect(met or bare not in names.split(), name, need, got)


# options on which no number of a run depends; they may differ where it goes on
FREE = ["--max_steps", "--max_hours", "--save_every"]
FREE += ["--data.root", "--data.workers", "--data.eval_batch_size"]


def expect(holds: bool, of: object, expected: str, got: object) -> None:
    """Raises ValueError, in one line, where it does not hold. of: the option or the file."""
    if not holds:
        raise ValueError(f"{of}: expected {expected}, got {got}")


def same(value: object, other: object) -> bool:
    """Whether two values of an option are equal; NaN is equal to NaN."""
    return value == other or (value != value and other != other)


def as_in_file(options: Options) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(options)))


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """{"--data.root": …} of {"data": {"root": …}}."""
    flattened: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flattened |= {f"--{name}.{option}": x for option, x in value.items()}
        else:
            flattened[f"--{name}"] = value
    return flattened
