"""The directory of a run: its configuration, its checkpoints, and whether a run goes on with the
same options."""

import fcntl
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

CONFIG, LOCK, LAST, BEST = "config.yaml", "run.lock", "last.ckpt", "best.ckpt"
WEIGHTS = frozenset(("state_dict", "global_step", "channels"))  # in a checkpoint
WHOLE = WEIGHTS | {"callbacks", "loops", "optimizer_states"}  # in one from which a run goes on
# options on which no number of a run depends; they may differ where it goes on
FREE = (
    *("run", "ckpt_path", "weights_only", "saving.every"),
    *("data.root", "data.workers", "data.eval_batch_size", "data.images", "data.allow_changes"),
    *("trainer.logger", "trainer.log_every_n_steps", "trainer.profiler", "trainer.max_steps"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.max_time"),
    "trainer.default_root_dir",
)
# nor on these callbacks of Lightning; others may change the numbers, as averages of weights do
FREE_CALLBACKS = (
    *("DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "Timer"),
    *("RichModelSummary", "RichProgressBar", "TQDMProgressBar", "ThroughputMonitor"),
)


OWN_RUN = (
    "give this run its own directory with --run (the default name has the preset, the methods and "
    "the seed, no other option)"
)


@contextmanager
def only_process(run: Path, advice: str = OWN_RUN) -> Iterator[None]:
    """Raises ValueError, with advice, if another process trains in the directory. A killed process
    holds nothing, nor do its workers, which end later than it: they would inherit what flock
    gives."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process trains in {run}: {advice}") from None
        except OSError as error:
            print(f"{run} cannot be locked ({error}): start no second process", file=sys.stderr)
        yield


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data.root": …} of {"data": {"root": …}}, for the first two levels."""
    flattened: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and not prefix:
            flattened |= flat(value, f"{name}.")
        else:
            flattened[prefix + name] = value
    return flattened


def flat_config(run: Path) -> dict[str, Any]:
    """The configuration of a run. Raises ValueError if it has none, or a damaged one."""
    path = run / CONFIG
    if not path.exists():
        raise ValueError(f"{run}: expected the directory of a run, with its {CONFIG}")
    try:
        options = flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({_line(error)})") from None
    for name in ("data.steps", "model.network", "trainer.max_steps", "seed_everything"):
        if name not in options:
            raise ValueError(f"{path} is damaged (it has no {name})")
    return options


def bound(options: Mapping[str, Any]) -> dict[str, Any]:
    """The flat options on which the numbers of a run depend."""
    kept = {name: value for name, value in options.items() if name not in FREE}
    callbacks = kept.get("trainer.callbacks") or []
    callbacks = [callbacks] if isinstance(callbacks, Mapping) else callbacks
    others = [x for x in callbacks if x["class_path"].rpartition(".")[2] not in FREE_CALLBACKS]
    return kept | {"trainer.callbacks": others or None}


def _line(error: Exception) -> str:
    line, *_ = str(error).splitlines() or [type(error).__name__]
    return line


def read_checkpoint(
    path: Path, weights_only: bool | None = None, needed: frozenset[str] = WEIGHTS
) -> dict[str, Any]:
    """Its tensors stay in the file. Raises ValueError if it is damaged or has not what is needed.
    weights_only: of torch.load."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        missing = needed - state.keys()
    except Exception as error:
        raise ValueError(f"checkpoint {path} is damaged ({_line(error)})") from error
    if missing:
        raise ValueError(f"checkpoint {path} is of another kind: it has no {min(missing)}")
    return state


def check_same(run: Path, options: Mapping[str, Any]) -> None:
    """Raises ValueError if a run would go on with other numbers."""
    saved, now = bound(flat_config(run)), bound(flat(options))
    for name in now:
        if name in saved and saved[name] != now[name]:
            raise ValueError(
                f"--{name} is {now[name]}, {run / CONFIG} has {saved[name]}: the numbers would not "
                "be those of the run without a stop. Leave the option as it was, or start a run "
                "in another directory (--run, of a demo --out; with --model.weights from this "
                "one's weights)"
            )
