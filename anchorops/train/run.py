"""The directory of a run: its configuration, and whether a run goes on with the same one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIG = "config.yaml"
# options on which no number of a run depends; they may differ where it goes on
FREE = (
    *("run", "ckpt_path", "weights_only", "saving.every", "collapse.images"),
    *("data.root", "data.workers", "data.eval_batch_size", "data.images"),
    *("trainer.logger", "trainer.log_every_n_steps", "trainer.profiler", "trainer.callbacks"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.max_steps"),
    *("trainer.max_time", "trainer.default_root_dir"),
)


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
    """The configuration of a run. Raises ValueError if it has none."""
    path = run / CONFIG
    if not path.exists():
        raise ValueError(f"{run}: expected the directory of a run, with its {CONFIG}")
    with open(path, encoding="utf-8") as file:
        return flat(yaml.safe_load(file))


def check_same(run: Path, options: Mapping[str, Any]) -> None:
    """Raises ValueError if a run would go on with other numbers."""
    saved, now = flat_config(run), flat(options)
    for name in now:
        if name not in FREE and name in saved and saved[name] != now[name]:
            raise ValueError(
                f"--{name} is {now[name]}, {run / CONFIG} has {saved[name]}: the numbers would not "
                "be those of the run without a stop. Leave the option as it was, or start a new "
                "run with --model.weights"
            )
