"""The data, the network and the losses of a run, from its configuration."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Config, setting_options
from ..data.counts import check_classes, check_one_size, class_counts, describe_counts
from ..data.loading import Segmentation, build_datasets
from ..networks.learner import Learner, build_loss, build_regularizer, class_weights, with_copies
from ..networks.models import Segmenter, build_model, upsample_late
from .ranks import Ranks
from .state import DataSummary

MOST_ABSENT = 10  # names of absent classes in a message
RANDOM_WEIGHTS = (
    "WARNING: the network starts from random weights; trained ones are usually much better. "
    "--pretrained starts its backbone from ImageNet's (a download), --weights FILE from a file"
)


@dataclass(frozen=True)
class Parts:
    config: Config
    ranks: Ranks
    training_set: Segmentation
    validation_set: Segmentation
    data_summary: DataSummary
    """What a checkpoint must have been written with."""
    frequencies: Tensor
    """float64 [K], each class's share of the training pixels."""
    prior: Tensor
    """float32 [K], of the training images that contain each class, with sum 1: CeCo's π."""
    learner: Learner
    """On its device; not wrapped for several ranks."""
    layout: torch.memory_format
    """The memory format of images, features and weights."""

    @property
    def model(self) -> Segmenter:
        return self.learner.model

    @property
    def num_classes(self) -> int:
        return len(self.training_set.classes)


def build_parts(config: Config, ranks: Ranks, *, from_checkpoint: bool, new: bool = False) -> Parts:
    """from_checkpoint: a checkpoint will be loaded, so initial weights are not needed. new: the run
    has not begun, so it has no copies of vectors. Raises ValueError if the data or the options are
    wrong."""
    running = config.running
    if running.threads:
        torch.set_num_threads(running.threads)
    if running.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    splits = build_datasets(config.data, running.seed)
    classes = splits[0].classes
    place = f" in {config.data.root}" if config.data.root else ""
    _say(
        ranks,
        f"run in {config.run}",
        f"data set {config.data.dataset}{place}: {len(splits[0])} training and {len(splits[1])} "
        f"validation images, {len(classes)} classes",
    )
    # this reads every mask, so errors in masks are found now
    training, validation = ranks.from_first(
        lambda: [class_counts(split, running.out / "class-counts") for split in splits]
    )
    absent = check_classes(classes, training.pixels, validation.pixels)
    if running.eval_batch_size > 1:
        check_one_size(validation)
    _say(ranks, *describe_counts(classes, training, validation))
    if absent:
        more = f" and {len(absent) - MOST_ABSENT} more" if len(absent) > MOST_ABSENT else ""
        _say(ranks, f"no training pixels: {', '.join(absent[:MOST_ABSENT])}{more}")
    random = not (config.model.pretrained or config.model.weights or from_checkpoint)
    if random and config.data.dataset != "digits":
        _say(ranks, RANDOM_WEIGHTS)
    frequencies = training.pixels / training.pixels.sum()
    prior = training.images / training.images.sum().clamp(min=1)
    layout = torch.channels_last if running.channels_last else torch.preserve_format
    if not new:
        config = config.replace(method_options=with_copies(config))
    learner = _build_learner(
        config,
        splits[0],
        frequencies=frequencies,
        prior=prior,
        from_checkpoint=from_checkpoint,
    ).to(ranks.device)
    learner.to(memory_format=layout)  # pyright: ignore
    images = torch.zeros(1, splits[0].channels, *config.data.crop, device=ranks.device)
    upsample_late(learner.model, images)
    data_summary = DataSummary(
        len(splits[0]), len(splits[1]), list(classes), training.pixels.tolist()
    )
    return Parts(config, ranks, *splits, data_summary, frequencies, prior, learner, layout)


def _say(ranks: Ranks, *lines: str) -> None:
    if ranks.first:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _build_learner(
    config: Config,
    training_set: Segmentation,
    *,
    frequencies: Tensor,
    prior: Tensor,
    from_checkpoint: bool,
) -> Learner:
    num_classes, options = len(training_set.classes), config.optimization
    torch.manual_seed(config.running.seed)
    model = build_model(
        config.model.model,
        num_classes,
        channels=training_set.channels,
        pretrained=config.model.pretrained and not from_checkpoint,
        weights=None if from_checkpoint else config.model.weights,
        auxiliary=config.model.auxiliary_weight > 0,
        dropout=config.model.dropout,
        classifier_std=config.model.classifier_std,
    )
    regularizer = build_regularizer(
        config.model.methods,
        setting_options(config.model.setting, config.model.methods) | config.model.method_options,
        num_classes,
        model.classifier.in_channels,
        prior=prior,
    )
    weights = class_weights(options.class_weights, frequencies)
    if values := options.given_class_weights:
        if len(values) != num_classes:
            raise ValueError(
                f"--given-class-weights: expected {num_classes} values, got {len(values)}"
            )
        weights = torch.tensor(values)
        if not (weights * frequencies).any():
            raise ValueError("--given-class-weights: every class with training pixels has weight 0")
    loss = build_loss(options, weights)
    return Learner(model, regularizer, loss, config.model.auxiliary_weight)
