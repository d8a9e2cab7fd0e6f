"""Time and memory of a training step with our losses and late_upsampling, compared with the plain
step with torch's; time of inference.

    python bench/training_step.py [--rounds 10] [--minutes 3] [--out ROWS.json]

The candidates: the network with F.interpolate and F.cross_entropy, in eager mode and compiled; with
late_upsampling, if it finds something to move; with our cross-entropy; with both; with both and
each method. For inference: the network, with late_upsampling, and that exported. On a GPU HRNet-W48
at 512×1024, batch 8, 19 classes, and SegFormer-B5 at 512×512, batch 16, 150 classes, bf16 autocast;
on the CPU HRNet-W18-small and SegFormer-B0 with batch 2 in float32. A step is forward, backward and
optimizer.
The candidates take turns, a few steps each, in a round that is not counted and then in --rounds
rounds, or in more if --minutes allow them. A ratio is the time of the steps, their median and
quartiles, divided by the median of the first candidate.
--dry-run uses small images; it only tests the code.
"""

import argparse
import copy
import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import yaml
from bench_pixel_losses import cross_entropy
from cases import IGNORE_INDEX, labels_of
from record import DEVICE, STEP_NAMES, head_of, save, spread
from torch import Tensor, nn

import anchorops as ao
from anchorops import Attachment
from anchorops.measure import OtherProcesses, duration, peak_extra_bytes
from anchorops.train.cli import PRESETS
from anchorops.train.module import SegmentationModule
from anchorops.train.networks.learner import (
    CLASSES,
    build_optimizer,
    build_regularizer,
    parameter_groups,
)
from anchorops.train.networks.models import Segmenter, build_model

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
    def options(self) -> Any:
        """Those of the model in the preset."""
        preset = yaml.safe_load((PRESETS / f"{self.preset}.yaml").read_text())
        return SegmentationModule(**preset["model"]).options

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.options.channels_last else torch.preserve_format

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
    """cross_entropy: "torch" or "anchorops". late: with late_upsampling."""

    cross_entropy: str
    methods: tuple[str, ...] = ()
    late: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        if self.methods:
            names = CLASSES | {"cr": "CR"}
            methods = " + ".join(names[method] for method in self.methods)
            return f"{methods}, {'both' if self.late else 'ours'}"
        if self.compiled:
            return "baseline, torch.compile"
        return STEP_NAMES[self.cross_entropy, self.late]


CANDIDATES = (
    Candidate("torch"),
    Candidate("torch", compiled=True),
    Candidate("torch", late=True),
    Candidate("anchorops"),
    Candidate("anchorops", late=True),
    *(Candidate("anchorops", methods, late=True) for methods in METHODS),
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
    labels = labels_of(coarse, setting.num_classes, "coherent", device)
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return images.to(device, memory_format=setting.layout), labels


def cross_entropy_of_torch(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels)


def step_of(
    setting: Setting,
    model: Segmenter,
    candidate: Candidate,
    regularizer: Attachment | None,
    images: Tensor,
    labels: Tensor,
) -> Callable[[], None]:
    """One training step, as in the training program."""
    options = setting.options
    groups = parameter_groups(model, options.lr, options.weight_decay, options.head_lr_factor)
    optimizer = build_optimizer(options.optimizer, groups)
    ours = candidate.cross_entropy == "anchorops"
    loss_of = ao.CrossEntropy(ignore_index=IGNORE_INDEX) if ours else cross_entropy_of_torch

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            loss = loss_of(model(images), labels)
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
    options = {f"{method}.ignore_index": IGNORE_INDEX for method in candidate.methods}
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


def timed(step: Callable[[], object], device: torch.device, memory: bool) -> Turn:
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


def bytes_of(model: nn.Module) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def network_of(setting: Setting, device: torch.device) -> Segmenter:
    torch.manual_seed(0)
    model = build_model(setting.model, setting.num_classes).to(device)
    return model.to(memory_format=setting.layout).train()  # pyright: ignore


def runs_later(model: nn.Module, images: Tensor) -> bool:
    """late_upsampling of the model, if there is something to move."""
    try:
        ao.late_upsampling(model, images[:1])
    except ValueError:
        return False
    return True


def rounds_of(
    turns: list[Callable[[bool], Turn]], min_rounds: int, minutes: float
) -> Iterator[list[Turn]]:
    """The turns of each round; the first round, with memory, warms up: kernels are compiled."""
    deadline, last = time.monotonic() + 60 * minutes, 0.0
    for number in itertools.count():
        begin = time.monotonic()
        if number > min_rounds and begin + last > deadline:
            return
        first = number % len(turns)
        order = [*range(first, len(turns)), *range(first)]
        done = {turn: turns[turn](number == 0) for turn in order}
        yield [done[turn] for turn in range(len(turns))]
        last = time.monotonic() - begin


def times_of(
    turns: list[Callable[[bool], Turn]], device: torch.device, min_rounds: int, minutes: float
) -> Iterator[dict[str, Any]]:
    """Time and memory of each candidate."""
    processes = OtherProcesses(device)
    warm_up, *rounds = rounds_of(turns, min_rounds, minutes)
    others = processes.cores()
    memory_of = warm_up if device.type == "cpu" else rounds[-1]
    plain = median(itertools.chain.from_iterable(done[0].seconds for done in rounds))
    for number, measured in enumerate(memory_of):
        seconds = spread(itertools.chain.from_iterable(done[number].seconds for done in rounds))
        yield {
            "seconds": seconds,
            "rounds": len(rounds),
            "ratio": {name: value / plain for name, value in seconds.items()},
            "peak_bytes": measured.peak_bytes,
            "others": others,
        }


def rows_of(
    setting: Setting, device: torch.device, min_rounds: int, minutes: float, backend: str | None
) -> Iterator[dict[str, Any]]:
    """A row for each candidate, of `min_rounds` rounds or as many as the minutes allow. backend: of
    torch.compile; with None compiled candidates are left out."""
    images, labels = images_and_labels(setting, device)
    possible = runs_later(network_of(setting, device), images)
    candidates = dict.fromkeys(c._replace(late=c.late and possible) for c in CANDIDATES)
    candidates = [c for c in candidates if backend is not None or not c.compiled]
    models: dict[tuple[bool, bool], Segmenter] = {}
    for late, compiled in dict.fromkeys((c.late, c.compiled) for c in candidates):
        model = models[late, compiled] = network_of(setting, device)
        if late:
            ao.late_upsampling(model, images[:1])
        if compiled and backend is not None:
            model.compile(backend=backend)
    unused = bytes_of(next(iter(models.values()))) * (len(models) - 1)

    def turn(candidate: Candidate, memory: bool) -> Turn:
        model = models[candidate.late, candidate.compiled]
        done = take_turn(setting, model, candidate, images, labels, memory=memory)
        if device.type == "cpu" or done.peak_bytes is None:
            return done
        return done._replace(peak_bytes=done.peak_bytes - unused)

    turns = [functools.partial(turn, candidate) for candidate in candidates]
    measured = times_of(turns, device, min_rounds, minutes)
    for candidate, times in zip(candidates, measured, strict=True):
        yield {
            "network": str(setting),
            "name": candidate.name,
            "cross_entropy": candidate.cross_entropy,
            "methods": "+".join(candidate.methods) or "plain",
            "late": candidate.late,
            "compiled": candidate.compiled,
            **times,
        }


def inference_rows(
    setting: Setting, device: torch.device, min_rounds: int, export: bool
) -> Iterator[dict[str, Any]]:
    """Forward passes in evaluation mode without gradients."""
    images, _ = images_and_labels(setting, device)
    model = network_of(setting, device).eval()
    late = copy.deepcopy(model)
    networks: dict[str, nn.Module] = {"plain": model}
    if runs_later(late, images):
        networks["late"] = late
    if export:
        networks["late, exported"] = torch.export.export(late, (images,)).module()

    def turn(network: Callable[..., Tensor], memory: bool) -> Turn:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            return timed(lambda: network(images), device, memory)

    turns = [functools.partial(turn, network) for network in networks.values()]
    for name, times in zip(networks, times_of(turns, device, min_rounds, 0.0), strict=True):
        yield {"network": str(setting), "name": name, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="at least (default 10)")
    parser.add_argument("--minutes", type=float, default=0.0, help="for all, if more (default 0)")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)
    parser.add_argument("--eager", action="store_true", help="without torch.compile and export")
    parser.add_argument("--dry-run", action="store_true", help="small images")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    settings = ON_GPU if device.type == "cuda" else ON_CPU
    if arguments.dry_run:
        settings = DRY_RUN
    head, rows = {**head_of(device), "dry_run": arguments.dry_run}, []
    print(f"{head['device']}, torch {head['torch']}, commit {head['commit']}")
    inference: list[dict[str, Any]] = []
    backend = "eager" if arguments.dry_run else "inductor"  # which compiles for minutes
    backend = None if arguments.eager else backend
    for setting in settings:
        print(f"\n{setting}: ms, and as a share of the first")
        minutes = arguments.minutes / len(settings)
        steps = rows_of(setting, device, arguments.rounds, minutes, backend)
        passes = inference_rows(setting, device, arguments.rounds, not arguments.eager)
        for section, measured in ((rows, steps), (inference, passes)):
            for row in measured:
                section.append(row)
                middle, share = row["seconds"]["median"], row["ratio"]["median"]
                print(f"{row['name']:<32}{1e3 * middle:9.1f}{share:7.0%}", flush=True)
        if arguments.out:
            save(arguments.out, "training_steps", head, rows)
            save(arguments.out, "inference", head, inference)


if __name__ == "__main__":
    main()
