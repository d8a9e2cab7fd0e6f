"""What each method adds to a training step, with our kernels and with the reference formulas.

    python bench/training_step.py [--minutes 3] [--out bench/results/training_step.json]

HRNet-W48 at 512×1024, batch 8, 19 classes, and SegFormer-B5 at 512×512, batch 16, 150 classes;
bf16 autocast. A step is forward, backward and optimizer. The candidates take turns, a few steps
each, for as many rounds as the time allows; a candidate's time is compared with the plain network's
of the same round. Without a GPU, or with --dry-run, small networks on small images take two steps
each: that shows that every path runs, and nothing else.
"""

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from conftest import commit
from torch import Tensor

import anchorops as ao
from anchorops import Attachment
from anchorops._measure import duration, environment, example_labels
from anchorops.train.learner import (
    PixelCrossEntropy,
    build_optimizer,
    build_regularizer,
    parameter_groups,
)
from anchorops.train.models import Segmenter, build_model
from anchorops.train.presets import PRESETS

METHODS = (("cr",), ("sar",), ("cbp",), ("occl",), ("cbp", "occl"), ("ceco",), ("mvsc",))
BACKENDS = ("auto", "reference")
WARM_UP, STEPS = 1, 4  # of a turn on a GPU


class Setting(NamedTuple):
    """A network and its images, with the optimizer and the memory layout of a preset."""

    preset: str
    model: str
    size: tuple[int, int]
    batch: int
    num_classes: int

    @property
    def layout(self) -> torch.memory_format:
        last = PRESETS[self.preset][1].running.channels_last
        return torch.channels_last if last else torch.preserve_format

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.model} {height}×{width} batch {self.batch} K{self.num_classes}"


FULL = (
    Setting("cityscapes-hrnet-w48", "hrnet-w48", (512, 1024), 8, 19),
    Setting("ade20k-segformer-b5", "segformer-b5", (512, 512), 16, 150),
)
SMALL = (
    Setting("cityscapes-hrnet-w48", "hrnet-w18-small", (32, 64), 2, 19),
    Setting("ade20k-segformer-b0", "segformer-b0", (32, 32), 2, 21),
)


class Candidate(NamedTuple):
    methods: tuple[str, ...]
    backend: str


class Turn(NamedTuple):
    """Seconds of each step and the peak of the GPU's memory in bytes (None on CPU)."""

    seconds: list[float]
    peak_bytes: int | None


def images_and_labels(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    height, width = setting.size
    images = torch.randn(setting.batch, 3, height, width)
    coarse = (setting.batch, height // 4, width // 4)
    labels = example_labels(coarse, setting.num_classes, "coherent")
    labels = torch.where(labels < 0, 255, labels).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return images.to(device, memory_format=setting.layout), labels.to(device)


def step_of(
    setting: Setting,
    model: Segmenter,
    regularizer: Attachment | None,
    images: Tensor,
    labels: Tensor,
) -> Callable[[], None]:
    """One training step, as the training program makes it."""
    options = PRESETS[setting.preset][1].optimization
    groups = parameter_groups(model, options.lr, options.weight_decay, options.head_lr_factor)
    optimizer = build_optimizer(options.optimizer, groups)
    cross_entropy = PixelCrossEntropy()

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = cross_entropy(model(images), labels)
            if regularizer is not None:
                loss = loss + regularizer(labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def take_turn(
    setting: Setting,
    model: Segmenter,
    candidate: Candidate,
    images: Tensor,
    labels: Tensor,
) -> Turn:
    """A few steps of the candidate; the model is without its methods afterwards."""
    if images.is_cuda:
        gc.collect()  # cycles of the last turn hold memory
    torch.manual_seed(0)
    dim = model.classifier.in_channels
    regularizer = build_regularizer(candidate.methods, {}, setting.num_classes, dim)
    attached = None
    if regularizer is not None:
        attached = ao.attach(model, regularizer.to(images.device))
    try:
        step = step_of(setting, model, attached, images, labels)
        with ao.use_backend(candidate.backend):
            return timed(step, images.device)
    finally:
        if attached is not None:
            attached.detach()


def timed(step: Callable[[], None], device: torch.device) -> Turn:
    if device.type == "cpu":
        return Turn([duration(step) for _ in range(2)], None)
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    return Turn(seconds, torch.cuda.max_memory_allocated())


def rows_of(setting: Setting, device: torch.device, minutes: float) -> Iterator[dict[str, Any]]:
    """A row for the plain network, then for each method and backend."""
    torch.manual_seed(0)
    model = build_model(setting.model, setting.num_classes).to(device)
    model = model.to(memory_format=setting.layout).train()  # pyright: ignore
    images, labels = images_and_labels(setting, device)
    candidates = [
        Candidate((), "auto"),
        *map(Candidate._make, itertools.product(METHODS, BACKENDS)),
    ]
    rounds: list[list[Turn]] = []
    deadline, last = time.monotonic() + 60 * minutes, 0.0
    while len(rounds) < 2 or time.monotonic() + last < deadline:
        begin, first = time.monotonic(), len(rounds) % len(candidates)
        order = candidates[first:] + candidates[:first]
        turns = {x: take_turn(setting, model, x, images, labels) for x in order}
        rounds.append([turns[candidate] for candidate in candidates])
        last = time.monotonic() - begin
    del rounds[0]  # kernels were compiled and chosen in it
    for number, (methods, backend) in enumerate(candidates):
        own, plain = ([turns[i] for turns in rounds] for i in (number, 0))
        seconds = sorted(itertools.chain.from_iterable(turn.seconds for turn in own))
        q1, middle, q3 = quantiles(seconds, n=4, method="inclusive")
        added = [median(a.seconds) / median(b.seconds) - 1 for a, b in zip(own, plain, strict=True)]
        memory, plain_memory = own[-1].peak_bytes, plain[-1].peak_bytes
        yield {
            "network": str(setting),
            "methods": "+".join(methods) or "plain",
            "backend": backend,
            "seconds": {"median": middle, "q1": q1, "q3": q3, "best": seconds[0]},
            "rounds": len(rounds),
            "added_time": median(added),
            "added_time_of_rounds": added,
            "peak_bytes": memory,
            "added_memory": memory / plain_memory - 1 if memory and plain_memory else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="for all (default 3)")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--dry-run", action="store_true", help="small networks on the CPU")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available() and not arguments.dry_run
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.set_num_threads(1)
    settings = FULL if cuda else SMALL
    run = {**environment(device), "commit": commit(), "dry_run": not cuda, "rows": []}
    print(f"{run['device']}, torch {run['torch']}, commit {run['commit']}")
    for setting in settings:
        print(f"\n{setting}\n{'':<24}      ms   q1–q3            added     MB   added")
        for row in rows_of(setting, device, arguments.minutes / len(settings)):
            run["rows"].append(row)
            print(line(row), flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(run, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    q1, middle, q3 = (1e3 * row["seconds"][name] for name in ("q1", "median", "q3"))
    name = f"{row['methods']} {row['backend'] if row['methods'] != 'plain' else ''}"
    text = f"{name:<24}{middle:8.1f}   {q1:.1f}–{q3:.1f}".ljust(50) + f"{row['added_time']:+8.1%}"
    if row["peak_bytes"] is None:
        return text
    return text + f"{row['peak_bytes'] / 2**20:9.0f} {row['added_memory']:+8.1%}"


if __name__ == "__main__":
    main()
