"""Which values the options may have. Any other ends with one line that names the option."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import MULTIPLE


class Allowed(NamedTuple):
    """What an option may be, in words and as a function of its value; and what to do instead."""

    expected: str
    holds: Callable[[Any], bool]
    instead: str = ""


def optional(allowed: Allowed) -> Allowed:
    return Allowed(f"{allowed.expected}, or null", lambda x: x is None or allowed.holds(x))


def pair(expected: str, holds: Callable[[Any, Any], bool]) -> Allowed:
    return Allowed(expected, lambda x: len(x) == 2 and holds(*x))


NUMBER = Allowed("an int of at least 0", lambda x: isinstance(x, int) and x >= 0)
COUNT = Allowed("an int of at least 1", lambda x: isinstance(x, int) and x >= 1)
NOT_NEGATIVE = Allowed("a finite number of at least 0", lambda x: 0 <= x < math.inf)
UP_TO_ONE = Allowed("a number above 0, at most 1", lambda x: 0 < x <= 1)

MODEL: Mapping[str, Allowed] = {
    "auxiliary_weight": NOT_NEGATIVE,
    "dropout": Allowed("a number of at least 0, below 1", lambda x: 0 <= x < 1),
    "classifier_std": optional(NOT_NEGATIVE),
    "methods": Allowed("each at most once", lambda x: len({*x}) == len(x)),
    "focal_gamma": NOT_NEGATIVE,
    "ohem_threshold": optional(UP_TO_ONE),
    "ohem_min_kept": optional(COUNT),
    "lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "head_lr_factor": NOT_NEGATIVE,
    "warmup": NUMBER,
    "power": NOT_NEGATIVE,
    "window_stride": optional(pair("two ints of at least 1", lambda x, y: x >= 1 and y >= 1)),
    "eval_scales": Allowed(
        "finite numbers above 0, at least one",
        lambda x: len(x) > 0 and all(0 < scale < math.inf for scale in x),
    ),
}
DATA: Mapping[str, Allowed] = {
    "steps": COUNT,
    "batch_size": COUNT,
    "eval_batch_size": COUNT,
    "workers": NUMBER,
    "crop": pair(
        f"two multiples of {MULTIPLE}",
        lambda *x: all(side >= MULTIPLE and side % MULTIPLE == 0 for side in x),
    ),
    "head_tail": pair("two shares, 1 ≥ head ≥ tail ≥ 0", lambda x, y: 1 >= x >= y >= 0),
    "train_images": COUNT,
    "val_images": COUNT,
    "zipf": NOT_NEGATIVE,
    "data_seed": optional(NUMBER),
    "channels": COUNT,
    "short_side": optional(COUNT),
    "long_side": optional(COUNT),
    "scale": pair("two finite numbers, 0 < least ≤ greatest", lambda x, y: 0 < x <= y < math.inf),
    "cat_max_ratio": UP_TO_ONE,
}
# A run is one epoch, which it saves and shares among the ranks by itself. Other options of the
# trainer are checked by Lightning.
TRAINER: Mapping[str, Allowed] = {
    "num_nodes": COUNT,
    "fast_dev_run": Allowed(
        "false", lambda x: not x, "for a try, give --data.steps 2 and another --run"
    ),
    "max_epochs": Allowed("1", lambda x: x == 1, "--data.steps sets the length of a run"),
    "min_epochs": Allowed("0, 1 or null", lambda x: x in (0, 1, None), "a run is one epoch"),
    "max_steps": Allowed("an int of at least 1, or -1", lambda x: x >= 1 or x == -1),
    "min_steps": optional(NUMBER),
    "limit_train_batches": Allowed(
        "1.0 or null",
        lambda x: x is None or (x == 1 and isinstance(x, float)),
        "--trainer.max_steps ends a run early",
    ),
    "overfit_batches": Allowed(
        "0", lambda x: x == 0, "give few images, with --data.train_images or --data.root"
    ),
    "val_check_interval": Allowed(
        "an int of at least 1, which counts steps, a share of the run (0.5), or null",
        lambda x: x is None or (0 < x <= 1 if isinstance(x, float) else COUNT.holds(x)),
    ),
    "check_val_every_n_epoch": Allowed(
        "1 or null",
        lambda x: x in (1, None),
        "a run is one epoch; give --trainer.val_check_interval",
    ),
    "num_sanity_val_steps": optional(Allowed("an int of at least -1", lambda x: x >= -1)),
    "log_every_n_steps": optional(COUNT),
    "enable_checkpointing": Allowed(
        "true", lambda x: x in (True, None), "--saving.every sets how often a run saves its state"
    ),
    "accumulate_grad_batches": COUNT,
    "gradient_clip_val": optional(NOT_NEGATIVE),
    "use_distributed_sampler": Allowed("false", lambda x: not x, "the ranks share the images"),
    "sync_batchnorm": Allowed("false", lambda x: not x, "on GPUs batch norm is synchronised"),
    "barebones": Allowed("false", lambda x: not x, "a run logs and saves"),
    "default_root_dir": Allowed("null", lambda x: x is None, "--run is the directory of a run"),
}

WITH_FILES = "with files"
# the data sets that use an option; those that are not here are used by all
USED_BY: Mapping[str, str] = {
    **dict.fromkeys(("train_images", "val_images", "zipf", "data_seed"), "digits"),
    **dict.fromkeys(("image_suffix", "mask_suffix", "label_map", "channels"), "folder"),
    **dict.fromkeys(("root", "short_side", "long_side", "scale", "cat_max_ratio"), WITH_FILES),
}


def check(group: str, options: Mapping[str, Any], table: Mapping[str, Allowed]) -> None:
    """Raises ValueError for the first option --GROUP.NAME that the table does not allow."""
    for name, allowed in table.items():
        value = options[name]
        try:
            holds = allowed.holds(value)
        except TypeError:  # of a comparison: a text, or None
            holds = False
        if not holds:
            instead = f": {allowed.instead}" if allowed.instead else ""
            raise ValueError(f"--{group}.{name}: expected {allowed.expected}, got {value}{instead}")


def check_used(options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raises ValueError for an option of the data that the data set would ignore, if it differs
    from its default, that of the function's argument."""
    dataset, defaults = options["dataset"], inspect.signature(function).parameters
    kinds = (dataset,) if dataset == "digits" else (dataset, WITH_FILES)
    for name, kind in USED_BY.items():
        if kind not in kinds and options[name] != defaults[name].default:
            raise ValueError(f"--data.{name}: expected a --data.dataset {kind}, got {dataset}")
