"""All options of a training run. The text under each field is its help."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type
from tyro.conf import OmitArgPrefixes

from .run.checkpoint import save_atomically

PUBLISHED = "published"  # the methods' own defaults

# The published weights of OCCL and CeCo are for a backbone from ImageNet. With random weights their
# gradient on the features is several times that of the cross-entropy (docs/methods.md).
SETTINGS: Mapping[str, Mapping[str, str]] = {
    PUBLISHED: {},
    "from-scratch": {
        "occl.centroid_weight": "0.1",
        "occl.category_weight": "0.03",
        "ceco.loss_weight": "0.2",
    },
}


def setting_options(setting: str, methods: Sequence[str]) -> dict[str, str]:
    """METHOD.ARGUMENT and its value, for the chosen methods."""
    options = SETTINGS[setting].items()
    return {name: value for name, value in options if name.partition(".")[0] in methods}


# options that do not affect the results
OF_ONE_RUN = (
    *("out", "name", "overwrite", "seed", "device", "threads", "workers"),
    *("save_every", "log_every", "gradient_ratio_every", "collapse_images", "tensorboard"),
    "eval_batch_size",
)
# what may differ when a run is resumed: also the place of the data, but not the seed
OF_ONE_PROCESS = {*OF_ONE_RUN, "root"} - {"seed"}
IGNORED = -1  # the label of ignored pixels: never a class, for any number of classes
LARGEST = 2**31 - 1
LARGEST_SEED = 2**63 - 1  # the largest of torch's generators
MULTIPLE = 32  # the coarsest stride of the networks: image sides are multiples of it


class Expected(NamedTuple):
    """A constraint on the values of an option, except None."""

    text: str
    holds: Callable[[Any], bool]

    def check(self, name: str, default: Any, options: Mapping[str, Any]) -> None:
        if options[name] is not None and not self.holds(options[name]):
            raise _wrong(name, self.text, options[name])


class With(NamedTuple):
    """An option that has an effect only with another one: with one of these values of it, or with
    any but None and 0. Otherwise it would be ignored without a word, so it must have its default.
    """

    option: str
    values: tuple[str, ...] = ()

    def check(self, name: str, default: Any, options: Mapping[str, Any]) -> None:
        other = options[self.option]
        has_effect = other in self.values if self.values else other
        if not has_effect and options[name] != default:
            needed = f"{_flag(self.option)} {' or '.join(self.values)}".rstrip()
            raise _wrong(name, f"{needed} with it", other)


T = TypeVar("T")
AtLeast0 = Annotated[T, Expected("at least 0", lambda x: x >= 0)]
AtLeast1 = Annotated[T, Expected("at least 1", lambda x: x >= 1)]
Above0 = Annotated[T, Expected("more than 0", lambda x: x > 0)]
Published = Literal["cityscapes", "ade20k", "pascal-context", "coco-stuff-10k", "coco-stuff-164k"]
DigitsOnly = Annotated[T, With("dataset", ("digits",))]
FolderOnly = Annotated[T, With("dataset", ("folder",))]
FilesOnly = Annotated[T, With("dataset", ("folder", *get_args(Published)))]


@dataclass(frozen=True)
class Data:
    dataset: Literal["digits", "folder", Published] = "digits"
    """digits: scenes of handwritten digits, generated while training; needs no files. folder:
    images/train, images/val, masks/train, masks/val and classes.txt under --root. Others: a
    published data set, with its files as downloaded."""
    root: FilesOnly[Path | None] = None
    """Directory of the data set."""
    train_images: DigitsOnly[AtLeast1[int]] = 20_000
    """digits: scenes in the training split."""
    val_images: DigitsOnly[AtLeast1[int]] = 200
    """digits: scenes in the validation split."""
    zipf: DigitsOnly[AtLeast0[float]] = 1.0
    """digits: exponent of the frequencies in the training split: digit d has (d + 1)^−zipf; in the
    validation split the exponent is 1."""
    data_seed: DigitsOnly[AtLeast0[int | None]] = None
    """digits: seed of the training scenes; --seed if not given."""
    crop: Annotated[
        tuple[int, int],
        Expected(
            f"two multiples of {MULTIPLE}",
            lambda sides: min(sides) > 0 and not any(side % MULTIPLE for side in sides),
        ),
    ] = (64, 64)
    """Height and width of a training image (digits: of every scene), multiples of 32."""
    image_suffix: FolderOnly[str | None] = None
    """folder: ending of image names (_rgb.tif); any known one if not given."""
    mask_suffix: FolderOnly[str | None] = None
    """folder: ending of mask names (_labels.png)."""
    num_classes: FolderOnly[Annotated[int | None, Expected("at least 2", lambda x: x >= 2)]] = None
    """folder: number of classes, if there is no classes.txt."""
    label_map: FolderOnly[dict[int, int]] = field(default_factory=dict)
    """folder: values in the masks and their classes, or −1 for ignored: --label-map 128 1 7 -1.
    With at most 255 classes, 255 is also ignored."""
    channels: FolderOnly[AtLeast1[int]] = 3
    """folder: channels of the images."""
    short_side: FilesOnly[AtLeast1[int | None]] = None
    """Images are scaled to this short side, keeping their aspect ratio; None: not scaled."""
    long_side: FilesOnly[AtLeast1[int | None]] = None
    """Images are scaled to this long side; with --short-side, so that neither is exceeded."""
    scale: FilesOnly[
        Annotated[
            tuple[float, float],
            Expected("0 < smallest <= largest", lambda x: 0 < x[0] <= x[1]),
        ]
    ] = (1.0, 1.0)
    """Range of an additional random scale of training images, which are then cropped, or padded
    with the mean colour."""
    flip: bool = False
    """Mirror half of the training images."""
    cat_max_ratio: FilesOnly[
        Annotated[float, Expected("a share above 0", lambda share: 0 < share <= 1)]
    ] = 1.0
    """If one class has this share of the valid pixels of a crop or more, the crop is drawn again,
    up to ten times; 1: never."""
    photometric: bool = False
    """Distort brightness, contrast, saturation and hue of training images."""
    head_tail: Annotated[
        tuple[float, float],
        Expected("two shares, that of the head first", lambda x: 1 >= x[0] >= x[1] >= 0),
    ] = (0.01, 0.001)
    """Head classes have at least the first share of the training pixels, tail classes less than
    the second."""
    workers: AtLeast0[int] = 0
    """Number of processes that load images, per rank; it does not affect the images."""


@dataclass(frozen=True)
class Model:
    model: str = "hrnet-w18-small"
    """hrnet-w18-small, hrnet-w18, hrnet-w48, …, segformer-b0 to segformer-b5, or
    ARCHITECTURE:ENCODER of segmentation-models-pytorch. With heads as mmsegmentation's:
    mmseg-fcn:BACKBONE, mmseg-ocrnet:BACKBONE, mmseg-segformer:BACKBONE, of one of the HRNets,
    mit_b0 to mit_b5, or tu-NAME of timm (ResNets)."""
    pretrained: bool = False
    """Start from ImageNet weights (downloaded)."""
    weights: Path | None = None
    """Start from the weights in this file."""
    auxiliary_weight: AtLeast0[float] = 0.0
    """Weight of the loss of an auxiliary head (3×3 convolution, classifier) on the second last map
    of the backbone, or of OCRNet's regions; 0: no auxiliary head. The usual weight is 0.4."""
    dropout: Annotated[float, Expected("a share below 1", lambda share: 0 <= share < 1)] = 0.0
    """Share of the channels that are dropped before the classifier in training; the methods use
    all channels. mmsegmentation uses 0.1, except for HRNet. It replaces DeepLab's own dropout."""
    classifier_std: Above0[float | None] = None
    """Standard deviation of the classifiers' initial weights, drawn from a normal distribution
    (mmsegmentation: 0.01); their biases are then 0. None: torch's default."""
    methods: Annotated[
        tuple[Literal["cr", "sar", "cbp", "occl", "ceco", "mvsc"], ...],
        Expected("each at most once", lambda methods: len({*methods}) == len(methods)),
    ] = ()
    """Regularisers in addition to the cross-entropy; any number of them."""
    setting: Annotated[
        str, Expected(f"one of {', '.join(SETTINGS)}", lambda name: name in SETTINGS)
    ] = PUBLISHED
    """A named set of arguments of the methods. published: their defaults. from-scratch: smaller
    weights of OCCL and CeCo, for training from random weights. Arguments that it does not set are
    those that the preset's paper has for its network."""
    method_options: dict[str, str] = field(default_factory=dict)
    """Additional arguments of the methods, which override those of the setting, as METHOD.ARGUMENT
    VALUE pairs: sar.momentum 0.99 occl.split images. sar.anchors, cr.anchors and cbp.init accept
    @FILE.npy, an array [K, D] of numpy.save; the run keeps a copy."""


@dataclass(frozen=True)
class Optimization:
    steps: AtLeast1[int] = 500
    """Optimizer steps."""
    batch_size: AtLeast1[int] = 8
    """Images per step, over all ranks and accumulated passes."""
    accumulate: AtLeast1[int] = 1
    """Passes per step over which gradients are accumulated."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd has momentum 0.9."""
    lr: AtLeast0[float] = 0.01
    """Learning rate after warm-up."""
    weight_decay: AtLeast0[float] = 5e-4
    """Weight decay; not applied to biases and normalisation layers."""
    head_lr_factor: AtLeast0[float] = 1.0
    """Learning rate of everything except the backbone and the methods, relative to lr."""
    regularizer_lr_factor: AtLeast0[float] = 1.0
    """Learning rate of the methods' own parameters, relative to lr."""
    warmup: AtLeast0[int] = 0
    """Steps of linear warm-up."""
    power: AtLeast0[float] = 0.9
    """Exponent of the polynomial decay to zero."""
    clip: Above0[float | None] = None
    """The gradient is clipped to this norm."""
    class_weights: Literal["none", "inverse-sqrt", "inverse"] = "none"
    """Weights of the loss from class frequencies f: 1/√f or 1/f, mean 1."""
    given_class_weights: Annotated[
        tuple[float, ...],
        Expected("no value below 0, and one above", lambda x: not x or min(x) >= 0 < max(x)),
        With("class_weights", ("none",)),
    ] = ()
    """Weights of the loss, one per class."""
    loss: Literal["ce", "focal", "dice", "ce+dice"] = "ce"
    """The loss of the logits at full resolution: cross-entropy, cross-entropy with the focal
    factor, Dice, or the sum of cross-entropy and Dice."""
    focal_gamma: Annotated[AtLeast0[float], With("loss", ("focal",))] = 2.0
    """Exponent of the focal factor."""
    ohem: Annotated[
        float | None,
        Expected("a probability above 0", lambda share: 0 < share <= 1),
        With("loss", ("ce", "focal", "ce+dice")),
    ] = None
    """Online hard example mining: the cross-entropy uses only pixels whose true class has at most
    this probability."""
    ohem_kept: Annotated[AtLeast1[int], With("ohem")] = 100_000
    """With --ohem, at least this number of pixels is used in each pass: the hardest ones."""


@dataclass(frozen=True)
class Running:
    out: Path = Path("runs")
    """Directory of all runs."""
    name: str | None = None
    """Directory of this run inside --out; DATASET-MODEL-METHODS-seedN if not given."""
    overwrite: bool = False
    """Delete the files of an earlier run of the same name."""
    seed: Annotated[
        int, Expected(f"0 to {LARGEST_SEED}", lambda seed: 0 <= seed <= LARGEST_SEED)
    ] = 0
    """Random seed of the weights, and of the order and changes of the training images."""
    device: str | None = None
    """Device; if not given, cuda if there is a GPU, otherwise cpu."""
    threads: AtLeast1[int | None] = None
    """CPU threads of torch, per rank."""
    bf16: bool = False
    """bfloat16 autocast."""
    channels_last: bool = False
    """Use the channels-last memory layout for images, features and weights."""
    sync_bn: bool = True
    """Batch norm uses the statistics of all ranks (torch supports this on GPUs only)."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Use torch's deterministic algorithms, and a fixed order of sums over the ranks. Resuming bit
    for bit needs this on a GPU, or with more than two ranks."""
    evaluation: Literal["whole", "sliding"] = "whole"
    """Predict whole images, or overlapping windows of the size of a crop."""
    window_stride: Annotated[tuple[int, int] | None, With("evaluation", ("sliding",))] = None
    """With --evaluation sliding: rows and columns from one window to the next; two thirds of a crop
    if not given."""
    eval_scales: Annotated[
        tuple[float, ...],
        Expected("one scale or more, above 0", lambda scales: scales and min(scales) > 0),
    ] = (1.0,)
    """Scales of the images in an evaluation, for example 0.5 0.75 1 1.25 1.5 1.75. There is one
    pass for each scale; the probabilities are averaged."""
    eval_flip: bool = False
    """Also average with the probabilities of the mirrored images: twice as many passes."""
    eval_batch_size: AtLeast1[int] = 1
    """Images per pass of an evaluation; with more than 1, all images must have the same size."""
    eval_every: AtLeast0[int] = 0
    """Steps between evaluations; 0: only at the end."""
    collapse_images: AtLeast0[int] = 0
    """Number of validation images on which neural collapse is measured at each evaluation, rounded
    up to whole batches of all ranks: how equal and how wide the angles are between class centroids
    and between the classifier's rows. 0: not measured."""
    patience: Annotated[AtLeast1[int | None], With("eval_every")] = None
    """Stop after this number of evaluations without a better mIoU."""
    save_every: AtLeast1[int] = 500
    """Steps between checkpoints; another one is written before each evaluation."""
    log_every: AtLeast1[int] = 10
    """Steps between log lines."""
    gradient_ratio_every: AtLeast0[int] = 100
    """Steps between measurements of each method's gradient on the features, relative to that of the
    loss of the logits; 0: none. They do not change the run. A measurement takes less time than a
    step, and needs memory for a second copy of the weights."""
    tensorboard: bool = False
    """Write TensorBoard events in addition to metrics.jsonl."""


@dataclass(frozen=True)
class Config:
    """Train a segmentation network."""

    data: OmitArgPrefixes[Data] = field(default_factory=Data)
    model: OmitArgPrefixes[Model] = field(default_factory=Model)
    optimization: OmitArgPrefixes[Optimization] = field(default_factory=Optimization)
    running: OmitArgPrefixes[Running] = field(default_factory=Running)

    def __post_init__(self) -> None:
        """Raises ValueError for a value that does not satisfy the constraints in its type."""
        options = _flat(dataclasses.asdict(self))
        for section in (self.data, self.model, self.optimization, self.running):
            defaults = vars(type(section)())
            for option in dataclasses.fields(section):
                _check_numbers(option.name, options[option.name])
                for constraint in getattr(option.type, "__metadata__", ()):
                    constraint.check(option.name, defaults[option.name], options)
        stride, crop = self.running.window_stride, self.data.crop
        if stride and not all(1 <= s <= side for s, side in zip(stride, crop, strict=True)):
            raise _wrong("window_stride", f"1 to the rows and columns of --crop {crop}", stride)

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
        """A copy with absolute paths, which can be used from any working directory."""
        root, weights = self.data.root, self.model.weights
        options = {
            option: f"@{Path(text[1:]).absolute()}" if text.startswith("@") else text
            for option, text in self.model.method_options.items()
        }
        return self.replace(
            root=root and root.absolute(),
            weights=weights and weights.absolute(),
            method_options=options,
        )

    @property
    def prediction(self) -> dict[str, Any]:
        """How images are predicted: arguments of `predict`."""
        running = self.running
        return {
            "window": self.data.crop if running.evaluation == "sliding" else None,
            "stride": running.window_stride,
            "scales": running.eval_scales,
            "flip": running.eval_flip,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in which repetitions of a run agree; they may differ in their seeds."""
        options = _flat(dataclasses.asdict(self))
        return {name: str(value) for name, value in options.items() if name not in OF_ONE_RUN}

    @property
    def decisive(self) -> dict[str, Any]:
        """The options on which the numbers of a run depend, as config.json stores them."""
        options = _flat(json.loads(self.to_json()))
        return {name: x for name, x in options.items() if name not in OF_ONE_PROCESS}

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(dataclasses.asdict(self), default=str, indent=2) + "\n"

    def save(self, path: Path) -> None:
        save_atomically(self.to_json(), path)

    @staticmethod
    def load(path: Path) -> "Config":
        sections = {"data": Data, "model": Model, "optimization": Optimization, "running": Running}
        try:
            saved = json.loads(path.read_text())
            return Config(
                **{name: _typed(section, saved[name]) for name, section in sections.items()}
            )
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged, or of another version ({error!r})") from error


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for section in sections.values() for name, value in section.items()}


def _check_numbers(name: str, value: Any) -> None:
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
        raise _wrong(name, "a finite value", value)
    if name != "seed" and any(isinstance(x, int) and x > LARGEST for x in numbers):
        raise _wrong(name, f"at most {LARGEST}", value)


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _wrong(option: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{_flag(option)}: expected {expected}, got {value}")


def _typed(section: Any, saved: dict[str, Any]) -> Any:
    """A section from its values in JSON, which cannot represent tuples, paths and integer keys.
    Raises ValueError for a value that the command line would not accept: the file may have been
    edited."""
    values = dict(saved)
    for name, value in saved.items():
        if isinstance(value, list):
            values[name] = tuple(value)
        elif name in ("out", "root", "weights") and value is not None:
            values[name] = Path(value)
        elif name == "label_map":
            values[name] = {int(key): label for key, label in (value or {}).items()}
    hints = get_type_hints(section)
    for name, value in values.items():
        strategy = CollectionCheckStrategy.ALL_ITEMS
        try:
            check_type(value, hints.get(name, Any), collection_check_strategy=strategy)
        except TypeCheckError as error:
            raise ValueError(f"{name}: {error}") from error
    return section(**values)
