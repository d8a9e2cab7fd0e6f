"""Training: read it from top to bottom."""

import gc
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import imagecodecs
import numpy as np
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import anchorops as ao

from . import ranks
from .data.loading import CHANNELS, Splits, mixed_seed, open_split, open_splits, training_batches
from .evaluation import check_sizes, draw_predictions, evaluate, figures_of, pad_to_multiple
from .networks import (
    FROZEN,
    Learner,
    Segmenter,
    autocast,
    build_optimizer,
    read_checkpoint,
    set_learning_rates,
)
from .options import Options, expect
from .run import (
    BEST,
    DATA,
    GO_ON,
    LAST,
    Log,
    Stop,
    check_run,
    describe,
    only_process,
    read_yaml,
    save_atomically,
)


def train(options: Options, run: Path, resume: bool, advice: str = GO_ON) -> None:
    """Train in the directory of a run, or go on in it: from its last state, if it has one. advice:
    how to go on, for messages. Raises ValueError for what cannot be trained, and Stopped."""
    expect(options.data.split == "val", "--data.split", "val for fit", options.data.split)
    in_utf8 = str(run).encode(errors="replace").decode() == str(run)
    expect(in_utf8, "--run", "a path in UTF-8, for TensorBoard", ascii(str(run)))
    device = ranks.start(options.device)
    batches, images = options.accumulate * ranks.world(), options.data.batch_size
    multiple = f"a multiple of --accumulate × ranks = {batches}"
    expect(images % batches == 0, "--data.batch_size", multiple, images)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with only_process(run):
        of_network = None
        ranks.check_alike(options, run / LAST, run / FROZEN)
        if ranks.on_first(lambda: check_run(run, options, resume)):
            ranks.on_each(lambda: read_checkpoint(run / LAST, "optimizer"))
            ranks.on_each(lambda: (run / BEST).exists() and read_checkpoint(run / BEST, "miou"))
            if known := ranks.on_first(lambda: read_yaml(run / DATA)).get(CHANNELS):
                of_network = known["mean"], known["std"]
        else:  # what is wrong with any data is found before they are read
            split = ranks.on_first(lambda: open_split(options.data, "train", options.seed))
            learner = ranks.on_each(lambda: build(options, len(split.classes), device))
            of_network = learner.model.moments
            del learner
            gc.collect()  # this network, whose modules refer to each other
        data = open_splits(options.data, options.seed, of_network=of_network)
        with Stop(advice) as stop:
            last = fit(options, run, data, device, stop)
    steps = options.data.steps
    limit = f"a limit ended the run after step {last} of {steps}; {advice} --max_steps null"
    ranks.say(f"{run}: {limit}" if last < steps else f"{run} has ended, after step {steps}")


def fit(options: Options, run: Path, data: Splits, device: torch.device, stop: Stop) -> int:
    """Train from the last state or the start, to the end or a limit; returns the last step."""
    steps, classes = options.data.steps, len(data.training.classes)
    of_run = run if (run / LAST).exists() else None
    learner = ranks.on_each(lambda: build(options, classes, device, data, of_run))
    # with unused parameters DDP keeps its buckets, so that gradients are summed in one order, also
    # where a run goes on
    parallel = DDP(learner, find_unused_parameters=True) if ranks.world() > 1 else learner
    optimizer = build_optimizer(options.model, learner.model, options.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    stateful: dict[str, Any] = {"model": learner.model, "optimizer": optimizer, "scaler": scaler}
    validated = learner.model
    if options.ema is not None:
        average_of = get_ema_multi_avg_fn(options.ema)
        average = AveragedModel(learner.model, multi_avg_fn=average_of, use_buffers=True)
        stateful["average"] = average
        validated = average.module
    record = ranks.on_each(lambda: Record(options, run, data, stateful))
    step = record.step
    last = options.last_step
    end = time.monotonic() + 3600 * (options.max_hours or math.inf)
    batches = iter(training_batches(record.options, data.training, step))
    while True:
        if record.due(step):
            record.validate(step, validated, stop)
        if step >= last:
            return step
        torch.manual_seed(mixed_seed("step", options.seed, step, ranks.rank()))
        lr = set_learning_rates(optimizer, options.model, step, steps)
        for part in range(options.accumulate):
            images, labels = (x.to(device, non_blocking=True) for x in next(batches))
            adds = part + 1 < options.accumulate
            with parallel.no_sync() if adds and isinstance(parallel, DDP) else nullcontext():
                with autocast(options.precision, device):
                    loss, terms = parallel(images, labels)
                scaler.scale(loss / options.accumulate).backward()
        if options.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(learner.parameters(), options.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if "average" in stateful:
            stateful["average"].update_parameters(learner.model)
        step += 1
        record.log(step, lr, terms)
        stopped = stop.asked(late=time.monotonic() > end)
        if stopped or record.due(step) or step == last or step % options.save_every == 0:
            record.save(step)
        if stopped:
            raise stopped


def build(
    options: Options,
    classes: int,
    device: torch.device,
    data: Splits | None = None,
    of_run: Path | None = None,
) -> Learner:
    """The network with its methods and losses, on its device. data: None before they are read.
    of_run: the run whose state it gets then. Raises ValueError for a network, weights or arguments
    of methods that cannot be."""
    model = options.model
    sizes, shares = ((), ()) if data is None else (data.sizes, (data.prior, data.frequencies))
    if of_run:  # it has what the files of weights had
        frozen = str(of_run / FROZEN) if model.frozen else None
        model = replace(model, pretrained=False, weights=None, backbone_weights=frozen)
    torch.manual_seed(options.seed)
    learner = Learner(model, classes, options.data.channels, *shares)
    trains = any(x.requires_grad for x in learner.parameters())
    expect(trains, "--model.methods", "a network with weights to train", model.methods)
    if data is not None and of_run is None:
        if names := shorten(", ".join(learner.model.left_out), 300):
            ranks.say(f"{model.weights}: left out, because they do not fit: {names}")
        if model.frozen and not (model.pretrained or model.weights or model.backbone_weights):
            ranks.say("the frozen backbone has random weights: give --model.pretrained true")
    synchronised = ranks.world() if device.type == "cuda" else 1  # batch norm
    batch = options.data.batch_size // (options.accumulate * ranks.world())
    check_sizes(learner.model, options, sizes, batch * synchronised)
    place(learner, learner.model, options, device)
    if synchronised > 1:
        convert_sync_batchnorm(learner)
    return learner


def place(module: nn.Module, model: Segmenter, options: Options, device: torch.device) -> None:
    """On the device, in the memory layout; upsampling as late as the network allows."""
    layout = torch.channels_last if options.model.channels_last else torch.preserve_format
    module.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    with suppress(ValueError):  # there is nothing to move
        images = torch.zeros(1, options.data.channels, *options.data.crop, device=device)
        ao.late_upsampling(model, pad_to_multiple(images, model.multiple))


class Record:
    """What a run leaves: its state, log, best weights and pictures, written by the first rank."""

    def __init__(
        self, options: Options, run: Path, data: Splits, stateful: Mapping[str, Any]
    ) -> None:
        """stateful: by their names in the state, which is loaded, if there is one. Raises
        ValueError for other data than those of the run."""
        self.run, self.data, self.stateful, self.step = run, data, stateful, 0
        self.options = replace(options, data=data.options)  # with what was measured
        found = data.found | ranks.on_first(self._keep_frozen)
        ranks.on_first(lambda: describe(run, options, found))
        if (run / LAST).exists():
            state = read_checkpoint(run / LAST, "optimizer")
            for name, owner in stateful.items():
                owner.load_state_dict(state[name])
            self.step = state["step"]
            ranks.say(f"{run} goes on from step {self.step}")
        self.metrics = Log(run, self.step)
        shown = None if ranks.rank() == 0 else True  # None: on a terminal
        self.bar = tqdm(total=options.data.steps, initial=self.step, disable=shown)
        self._begin, self._from = time.perf_counter(), self.step

    def due(self, step: int) -> bool:
        """Whether the weights after this step are still to be validated."""
        planned = step % self.options.val_every == 0 or step == self.options.data.steps
        return step > 0 and planned and "val/miou" not in self.metrics.lines.get(step, {})

    def log(self, step: int, lr: float, terms: dict[str, Tensor]) -> None:
        """The losses of a step's last batch, the mean time of the steps since the last line or the
        last validation, and the peak memory in MB: of a GPU's tensors, or of the process."""
        self.bar.update()
        if step % self.options.log_every == 0:
            now = time.perf_counter()
            seconds = (now - self._begin) / (step - self._from)
            self._begin, self._from = now, step
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            if torch.cuda.is_initialized():
                memory = torch.cuda.max_memory_allocated() / 2**20
            loss, last = float(terms["loss"]), self.options.last_step
            values = {"loss": loss, "lr": lr, **terms}
            self.metrics.write(step, values | {"seconds_per_step": seconds, "memory_mb": memory})
            self.bar.set_postfix(loss=loss)
            if self.bar.disable:  # there is no terminal
                left = tqdm.format_interval(seconds * (last - step))
                ranks.say(f"step {step} of {last}: loss {loss:.4g}, lr {lr:.3g}, {left} left")

    def _keep_frozen(self) -> dict[str, str]:
        """Write the weights of a frozen backbone once; their checksum, which data.yaml has."""
        model, path = self.stateful["model"], self.run / FROZEN
        if not model.frozen:
            return {}
        if not (self.run / LAST).exists():
            save_atomically(model.backbone.state_dict(), path)
        return {"frozen weights": ranks.checksum(path)}

    def save(self, step: int) -> None:
        ranks.on_first(lambda: self._save(step))

    def _save(self, step: int) -> None:
        """Raises ValueError, and keeps the earlier state, if a weight is not finite."""
        state = {name: owner.state_dict() for name, owner in self.stateful.items()}
        numbers = [x for x in state["model"].values() if x.is_floating_point()]
        if not nn.utils.get_total_norm(numbers).isfinite():
            lr = self.options.model.lr
            raise ValueError(
                f"not finite at step {step}: the network has diverged. Start another --run, "
                f"with --model.lr {lr / 10:g} (now {lr:g}), --model.warmup 100 or --clip 1; or the "
                "data are wrong (values far from 0 to 1 in floating images)"
            )
        save_atomically({"step": step, **state}, self.run / LAST)

    def validate(self, step: int, model: nn.Module, stop: Stop) -> None:
        """Raises Stopped; then the validation is repeated when the run goes on."""
        matrix = evaluate(model.eval(), self.data, self.options, stop)
        figures = figures_of(matrix, self.data, self.options)
        ranks.on_first(lambda: self._keep(step, model, figures))
        model.train()
        self._begin, self._from = time.perf_counter(), step

    def _keep(self, step: int, model: nn.Module, figures: dict[str, float]) -> None:
        """The log comes last, because it tells that the step is validated."""
        line = f"step {step}: mIoU {100 * figures['val/miou']:.1f} %"
        self.bar.write(line, file=sys.stderr)  # which has no buffer, unlike stdout in a file
        best, miou = self.run / BEST, figures["val/miou"]
        if not best.exists() or miou > read_checkpoint(best, "miou")["miou"]:
            save_atomically({"model": model.state_dict(), "step": step, "miou": miou}, best)
        picture = draw_predictions(model, self.data.validation, self.options)
        png = imagecodecs.png_encode(np.asarray(picture))
        save_atomically(png, self.run / "predictions.png")
        self.metrics.write(step, figures)
