"""Time and memory of a training step with our losses, compared with the plain step with torch's.

    python bench/training_step.py [--rounds 10] [--minutes 3] [--out ROWS.json]

The candidates: the network with F.interpolate and F.cross_entropy; with our cross-entropy; with our
cross-entropy and each method. On a GPU HRNet-W48 at 512×1024, batch 8, 19 classes, and SegFormer-B5
at 512×512, batch 16, 150 classes, bf16 autocast; on the CPU HRNet-W18-small and SegFormer-B0 with
batch 2 in float32. A step is forward, backward and optimizer. The candidates take turns, a few
steps each, in a round that is not counted and then in --rounds rounds, or in more if --minutes
allow them. A ratio is the time of the steps, their median and quartiles, divided by the median of
the first candidate.
--dry-run uses small images; it only tests the code.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import IGNORE_INDEX
from record import head_of, save
from torch import Tensor

import anchorops as ao
from anchorops import Attachment
from anchorops.measure import OtherProcesses, duration, example_labels, peak_extra_bytes
from anchorops.train.networks.learner import (
    build_optimizer,
    build_regularizer,
    parameter_groups,
)
from anchorops.train.networks.models import Segmenter, build_model
from anchorops.train.presets import PRESETS

METHODS = (("cr",), ("sar",), ("cbp",), ("occl",), ("cbp", "occl"), ("ceco",), ("mvsc",))
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


ON_GPU = (
    Setting("cityscapes-hrnet-w48", "hrnet-w48", (512, 1024), 8, 19),
    Setting("ade20k-segformer-b5", "segformer-b5", (512, 512), 16, 150),
)
ON_CPU = (
    Setting("cityscapes-hrnet-w48", "hrnet-w18-small", (512, 1024), 2, 19),
    Setting("ade20k-segformer-b0", "segformer-b0", (512, 512), 2, 150),
)
DRY_RUN = tuple(setting._replace(size=(32, 64), num_classes=21) for setting in ON_CPU)


class Candidate(NamedTuple):
    """cross_entropy: "torch" or "anchorops"."""

    cross_entropy: str
    methods: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'+'.join(self.methods) or 'plain'}, {self.cross_entropy}"


CANDIDATES = (
    Candidate("torch", ()),
    Candidate("anchorops", ()),
    *(Candidate("anchorops", methods) for methods in METHODS),
)


class Turn(NamedTuple):
    """Seconds of each step; peak memory in bytes: on a GPU all memory of torch's tensors, on the
    CPU the additional memory of a step (None if the system does not report it)."""

    seconds: list[float]
    peak_bytes: int | None


def images_and_labels(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    height, width = setting.size
    images = torch.randn(setting.batch, 3, height, width)
    coarse = (setting.batch, height // 4, width // 4)
    labels = example_labels(coarse, setting.num_classes, "coherent")
    labels = (
        torch.where(labels < 0, IGNORE_INDEX, labels)
        .repeat_interleave(4, 1)
        .repeat_interleave(4, 2)
    )
    return images.to(device, memory_format=setting.layout), labels.to(device)


def cross_entropy_of_torch(logits: Tensor, labels: Tensor) -> Tensor:
    logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)


def step_of(
    setting: Setting,
    model: Segmenter,
    candidate: Candidate,
    regularizer: Attachment | None,
    images: Tensor,
    labels: Tensor,
) -> Callable[[], None]:
    """One training step, as in the training program."""
    options = PRESETS[setting.preset][1].optimization
    groups = parameter_groups(model, options.lr, options.weight_decay, options.head_lr_factor)
    optimizer = build_optimizer(options.optimizer, groups)
    ours = candidate.cross_entropy == "anchorops"
    cross_entropy = ao.CrossEntropy(ignore_index=IGNORE_INDEX) if ours else cross_entropy_of_torch

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
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
    *,
    memory: bool,
) -> Turn:
    """A few steps of the candidate; the model is without its methods afterwards."""
    gc.collect()  # reference cycles of the last turn keep memory
    torch.manual_seed(0)
    dim = model.classifier.in_channels
    options = {f"{method}.ignore_index": str(IGNORE_INDEX) for method in candidate.methods}
    regularizer = build_regularizer(candidate.methods, options, setting.num_classes, dim)
    attached = None
    if regularizer is not None:
        attached = ao.attach(model, regularizer.to(images.device))
    try:
        step = step_of(setting, model, candidate, attached, images, labels)
        return timed(step, images.device, memory)
    finally:
        if attached is not None:
            attached.detach()


def timed(step: Callable[[], None], device: torch.device, memory: bool) -> Turn:
    if device.type == "cpu":
        seconds = [duration(step) for _ in range(2)]
        return Turn(seconds[1:], peak_extra_bytes(step, device) if memory else None)
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


def rows_of(
    setting: Setting, device: torch.device, least: int, minutes: float
) -> Iterator[dict[str, Any]]:
    """A row for each candidate, of `least` rounds or as many as the minutes allow."""
    torch.manual_seed(0)
    model = build_model(setting.model, setting.num_classes).to(device)
    model = model.to(memory_format=setting.layout).train()  # pyright: ignore
    images, labels = images_and_labels(setting, device)
    rounds: list[list[Turn]] = []
    processes = OtherProcesses(device)
    deadline, last = time.monotonic() + 60 * minutes, 0.0
    while len(rounds) < 1 + least or time.monotonic() + last < deadline:
        begin, first = time.monotonic(), len(rounds) % len(CANDIDATES)
        order = CANDIDATES[first:] + CANDIDATES[:first]
        turns = {
            candidate: take_turn(setting, model, candidate, images, labels, memory=not rounds)
            for candidate in order
        }
        rounds.append([turns[candidate] for candidate in CANDIDATES])
        last = time.monotonic() - begin
    warm_up, others = rounds.pop(0), processes.cores()  # kernels were compiled in it
    memory_of = warm_up if device.type == "cpu" else rounds[-1]
    plain = median(itertools.chain.from_iterable(turns[0].seconds for turns in rounds))
    for number, candidate in enumerate(CANDIDATES):
        seconds = spread(itertools.chain.from_iterable(turns[number].seconds for turns in rounds))
        yield {
            "network": str(setting),
            "cross_entropy": candidate.cross_entropy,
            "methods": "+".join(candidate.methods) or "plain",
            "seconds": seconds,
            "rounds": len(rounds),
            "ratio": {name: value / plain for name, value in seconds.items()},
            "peak_bytes": memory_of[number].peak_bytes,
            "others": others,
        }


def spread(values: Iterable[float]) -> dict[str, float]:
    """Minimum, quartiles and median."""
    values = sorted(values)
    q1, middle, q3 = quantiles(values if len(values) > 1 else 2 * values, n=4, method="inclusive")
    return {"minimum": values[0], "q1": q1, "median": middle, "q3": q3}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="at least (default 10)")
    parser.add_argument("--minutes", type=float, default=0.0, help="for all, if more (default 0)")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--dry-run", action="store_true", help="small images on the CPU")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available() and not arguments.dry_run
    device = torch.device("cuda" if cuda else "cpu")
    settings = DRY_RUN if arguments.dry_run else ON_GPU if cuda else ON_CPU
    head, rows = {**head_of(device), "dry_run": arguments.dry_run}, []
    print(f"{head['device']}, torch {head['torch']}, commit {head['commit']}")
    for setting in settings:
        print(f"\n{setting}\n{'':<24}      ms   q1–q3         to plain, torch   q1–q3      MiB")
        for row in rows_of(setting, device, arguments.rounds, arguments.minutes / len(settings)):
            rows.append(row)
            print(line(row), flush=True)
        if arguments.out:
            save(arguments.out, "training_steps", head, rows)


def line(row: dict[str, Any]) -> str:
    q1, middle, q3 = (1e3 * row["seconds"][name] for name in ("q1", "median", "q3"))
    name, ratio = f"{row['methods']}, {row['cross_entropy']}", row["ratio"]
    text = f"{name:<24}{middle:8.1f}   {q1:.1f}–{q3:.1f}".ljust(52)
    text += f"{ratio['median']:8.1%}   {ratio['q1']:.1%}–{ratio['q3']:.1%}".ljust(26)
    return text + (f"{row['peak_bytes'] / 2**20:9.0f}" if row["peak_bytes"] else "")


if __name__ == "__main__":
    main()
