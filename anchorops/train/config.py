"""Every option of a training run; its help is the text under each field."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from .checkpoint import save_atomically
from .settings import PUBLISHED, SETTINGS, setting_options

# what does not make results incomparable
OF_ONE_RUN = (
    *("out", "name", "overwrite", "seed", "device", "threads", "workers"),
    *("save_every", "log_every", "gradient_ratio_every", "tensorboard", "eval_batch_size"),
)
IGNORED = -1  # the label of a pixel without one: no class, however many there are
LARGEST = 2**31 - 1
LARGEST_SEED = 2**63 - 1  # torch's generators take no more
MULTIPLE = 32  # the coarsest stride of the networks: image sides are multiples of it


@dataclass(frozen=True)
class Data:
    dataset: Literal[
        "digits",
        "folder",
        "cityscapes",
        "ade20k",
        "pascal-context",
        "coco-stuff-10k",
        "coco-stuff-164k",
    ] = "digits"
    """digits: scenes of handwritten digits, made on the fly, no files needed. folder: images/train,
    images/val, masks/train, masks/val and classes.txt under --root. Others: as downloaded."""
    root: Path | None = None
    """Where the data set lies."""
    train_images: int = 20_000
    """digits: scenes in the training split."""
    val_images: int = 200
    """digits: scenes in the validation split."""
    zipf: float = 1.0
    """digits: exponent of their frequencies in the training split, digit d as (d + 1)^−zipf;
    in the validation split it is 1."""
    data_seed: int | None = None
    """digits: seed of the training scenes; --seed if not given."""
    crop: tuple[int, int] = (64, 64)
    """Height and width of a training image (digits: of every scene), multiples of 32."""
    image_suffix: str | None = None
    """folder: ending of image names (_rgb.tif); any known one if not given."""
    mask_suffix: str | None = None
    """folder: ending of mask names (_labels.png)."""
    num_classes: int | None = None
    """folder: number of classes where there is no classes.txt."""
    label_map: dict[int, int] = field(default_factory=dict)
    """folder: values in the masks and their classes, or −1 for ignored: --label-map 128 1 7 -1.
    With at most 255 classes 255 is ignored, too."""
    channels: int = 3
    """folder: channels of the images."""
    short_side: int | None = None
    """Images are scaled to this short side, aspect kept; None: as they are."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of a further random scale of training images, which are then cropped or padded."""
    flip: bool = False
    """Mirror half of the training images."""
    cat_max_ratio: float = 1.0
    """A crop in which one class has this share of the valid pixels or more is drawn again, up to
    ten times; 1: never."""
    photometric: bool = False
    """Distort brightness, contrast, saturation and hue of training images."""
    head_tail: tuple[float, float] = (0.01, 0.001)
    """Head classes have at least the first share of the training pixels, tail classes less than
    the second."""
    workers: int = 0
    """Processes that prepare images, per rank; the images do not depend on it."""


@dataclass(frozen=True)
class Model:
    model: str = "hrnet-w18-small"
    """hrnet-w18-small, hrnet-w18, hrnet-w48, …, segformer-b0 to segformer-b5, or
    ARCHITECTURE:ENCODER of segmentation-models-pytorch."""
    pretrained: bool = False
    """Start from ImageNet weights (downloaded)."""
    weights: Path | None = None
    """Start from the weights in this file."""
    auxiliary_weight: float = 0.0
    """Weight of the loss of an auxiliary head (3×3 convolution, classifier) on the last
    but one of the backbone's maps; 0: no such head. The field's is 0.4."""
    methods: tuple[Literal["cr", "sar", "cbp", "occl", "ceco", "mvsc"], ...] = ()
    """Regularisers beside the cross-entropy, any number of them."""
    setting: str = PUBLISHED
    """Arguments of the methods by name: published, their defaults; from-scratch, weaker OCCL and
    CeCo, for training from random weights."""
    method_options: dict[str, str] = field(default_factory=dict)
    """Further arguments of the methods, which go before those of the setting, as METHOD.ARGUMENT
    VALUE pairs: sar.momentum 0.99 occl.split images."""


@dataclass(frozen=True)
class Optimization:
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 8
    """Images per step, over all ranks and accumulated passes."""
    accumulate: int = 1
    """Passes per step over which gradients are accumulated."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has momentum 0.9."""
    lr: float = 0.01
    """Learning rate after warm-up."""
    weight_decay: float = 5e-4
    """Not applied to biases and normalisation layers."""
    head_lr_factor: float = 1.0
    """Learning rate of everything but the backbone, relative to lr."""
    warmup: int = 0
    """Steps of linear warm-up."""
    power: float = 0.9
    """Exponent of the polynomial decay to zero."""
    clip: float | None = None
    """Largest norm of the gradient."""
    class_weights: Literal["none", "inverse-sqrt", "inverse"] = "none"
    """Weights of the loss from class frequencies f: 1/√f or 1/f, mean 1."""
    given_class_weights: tuple[float, ...] = ()
    """Weights of the loss, one per class."""
    loss: Literal["ce", "focal", "dice", "ce+dice"] = "ce"
    """Of the logits, upsampled to the labels' size: cross-entropy, without or with the focal
    factor, Dice, or the sum of cross-entropy and Dice."""
    focal_gamma: float = 2.0
    """Exponent of the focal factor."""
    ohem: float | None = None
    """Online hard example mining: the cross-entropy counts only pixels whose true class has at most
    this probability."""
    ohem_kept: int = 100_000
    """The hardest pixels that are kept in each pass however easy they are."""


@dataclass(frozen=True)
class Running:
    out: Path = Path("runs")
    """Directory of all runs."""
    name: str | None = None
    """Directory of this run inside --out; DATASET-MODEL-METHODS-seedN if not given."""
    overwrite: bool = False
    """Delete what an earlier run of the same name wrote."""
    seed: int = 0
    device: str | None = None
    """cuda if there is one, else cpu."""
    threads: int | None = None
    """CPU threads of torch, per rank."""
    bf16: bool = False
    """bfloat16 autocast."""
    channels_last: bool = False
    """Memory layout of images, features and weights."""
    sync_bn: bool = True
    """Batch statistics over all ranks (on GPUs only: torch has it there)."""
    compile: bool = False
    """torch.compile the model."""
    deterministic: bool = False
    """Deterministic algorithms where torch has them, and a fixed order of sums over the ranks:
    bit-for-bit resumption on a GPU, or with more than two ranks, needs them."""
    evaluation: Literal["whole", "sliding"] = "whole"
    """Predict from whole images, or from overlapping windows of the size of a crop."""
    eval_batch_size: int = 1
    """Images per pass of an evaluation; more than 1 needs images of one size."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end only."""
    patience: int | None = None
    """Stop after so many evaluations without a better mIoU."""
    save_every: int = 500
    """Steps between checkpoints; evaluations begin with another."""
    log_every: int = 10
    """Steps between log lines."""
    gradient_ratio_every: int = 100
    """Steps between measurements of each method's gradient on the features beside that of the
    loss of the logits, which change nothing in the run; 0: none. One takes less time than a
    step, and for that time the memory of a second copy of the weights."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""


@dataclass(frozen=True)
class Config:
    """Train a segmentation network."""

    data: OmitArgPrefixes[Data] = field(default_factory=Data)
    model: OmitArgPrefixes[Model] = field(default_factory=Model)
    optimization: OmitArgPrefixes[Optimization] = field(default_factory=Optimization)
    running: OmitArgPrefixes[Running] = field(default_factory=Running)

    def __post_init__(self) -> None:
        least = {
            2: "num_classes",
            1: "steps batch_size accumulate save_every log_every eval_batch_size threads patience "
            "short_side ohem_kept train_images val_images channels",
            0: "workers warmup eval_every power lr weight_decay head_lr_factor auxiliary_weight "
            "focal_gamma gradient_ratio_every zipf data_seed",
        }
        options = {
            name: value
            for section in dataclasses.fields(self)
            for name, value in vars(getattr(self, section.name)).items()
        }
        for bound, names in least.items():
            for name in names.split():
                if options[name] is not None and options[name] < bound:
                    raise _wrong(name, f"at least {bound}", options[name])
        for name, value in options.items():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
                raise _wrong(name, "a finite value", value)
            if name != "seed" and any(isinstance(x, int) and x > LARGEST for x in numbers):
                raise _wrong(name, f"at most {LARGEST}", value)
        if not 0 <= self.running.seed <= LARGEST_SEED:
            raise _wrong("seed", f"0 to {LARGEST_SEED}", self.running.seed)
        if (given := self.optimization.given_class_weights) and (min(given) < 0 or not any(given)):
            raise _wrong("given_class_weights", "no value below 0, and one above", given)
        methods = self.model.methods
        if len(set(methods)) < len(methods):
            raise _wrong("methods", "each at most once", methods)
        if self.model.setting not in SETTINGS:
            raise _wrong("setting", f"one of {', '.join(SETTINGS)}", self.model.setting)
        if min(self.data.crop) < MULTIPLE or any(side % MULTIPLE for side in self.data.crop):
            raise _wrong("crop", f"two multiples of {MULTIPLE}", self.data.crop)
        if not 0 < self.data.scale[0] <= self.data.scale[1]:
            raise _wrong("scale", "0 < smallest <= largest", self.data.scale)
        if not 0 < self.data.cat_max_ratio <= 1:
            raise _wrong("cat_max_ratio", "a share above 0", self.data.cat_max_ratio)
        if not 1 >= self.data.head_tail[0] >= self.data.head_tail[1] >= 0:
            raise _wrong("head_tail", "two shares, that of the head first", self.data.head_tail)
        if self.running.patience and not self.running.eval_every:
            raise _wrong("patience", "--eval-every beside it", self.running.patience)
        if self.optimization.given_class_weights and self.optimization.class_weights != "none":
            kind = self.optimization.class_weights
            raise _wrong("given_class_weights", "--class-weights none beside it", kind)
        if options["clip"] is not None and options["clip"] <= 0:
            raise _wrong("clip", "more than 0", options["clip"])
        if options["ohem"] is not None and not 0 < options["ohem"] <= 1:
            raise _wrong("ohem", "a probability above 0", options["ohem"])
        for name, used, needed in (
            ("ohem", self.optimization.loss != "dice", "a --loss with cross-entropy"),
            ("ohem_kept", options["ohem"] is not None, "--ohem"),
            ("focal_gamma", self.optimization.loss == "focal", "--loss focal"),
        ):
            if not used and options[name] != getattr(Optimization, name):
                raise _wrong(name, f"{needed} beside it", options[name])

    @property
    def run(self) -> Path:
        """Directory of the run."""
        methods = "+".join(self.model.methods) or "plain"
        if setting_options(self.model.setting, self.model.methods):
            methods += f"-{self.model.setting}"
        model = re.sub(r"[^\w.+-]", "-", self.model.model)
        name = f"{self.data.dataset}-{model}-{methods}-seed{self.running.seed}"
        return self.running.out / (self.running.name or name)

    def replace(self, **options: Any) -> "Config":
        """A copy with options of any section changed: config.replace(lr=0.1, methods=("sar",))."""
        sections = {}
        for section in dataclasses.fields(self):
            old = getattr(self, section.name)
            names = {field.name for field in dataclasses.fields(old)} & options.keys()
            changes = {name: options.pop(name) for name in names}
            sections[section.name] = dataclasses.replace(old, **changes)
        if options:
            raise TypeError(f"Config.replace: no such option: {', '.join(options)}")
        return Config(**sections)

    def anywhere(self) -> "Config":
        """A copy that means the same files in every working directory."""
        root, weights = self.data.root, self.model.weights
        return self.replace(root=root and root.absolute(), weights=weights and weights.absolute())

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two runs repetitions of each other, up to their seeds."""
        sections = dataclasses.asdict(self).values()
        options = {name: value for section in sections for name, value in section.items()}
        return {name: str(value) for name, value in options.items() if name not in OF_ONE_RUN}

    def save(self, path: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), default=str, indent=2)
        save_atomically(text + "\n", path)

    @staticmethod
    def load(path: Path) -> "Config":
        sections = {"data": Data, "model": Model, "optimization": Optimization, "running": Running}
        try:
            saved = json.loads(path.read_text())
            return Config(
                **{name: section(**_typed(saved[name])) for name, section in sections.items()}
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or of another version ({error!r})") from error


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")


def _typed(section: dict[str, Any]) -> dict[str, Any]:
    """Undo what JSON does to tuples, paths and integer keys."""
    values = dict(section)
    for name, value in section.items():
        if isinstance(value, list):
            values[name] = tuple(value)
        elif name in ("out", "root", "weights") and value is not None:
            values[name] = Path(value)
        elif name == "label_map":
            values[name] = {int(key): label for key, label in (value or {}).items()}
    return values
