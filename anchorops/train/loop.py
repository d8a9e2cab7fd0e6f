"""A training run from its configuration to its results, with interruptions in between."""

import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate

from .analysis import Cost, collect_features, measure_cost
from .checkpoint import latest_checkpoint, load_checkpoint, save_atomically, save_checkpoint
from .config import Config
from .data import (
    BatchSampler,
    Draws,
    Training,
    augmentation,
    build_datasets,
    check_classes,
    class_counts,
    evaluation_loader,
    evaluation_transform,
    mixed_seed,
    training_loader,
)
from .directory import held, make_directory
from .evaluate import evaluate
from .journal import Averages, Journal, peak_memory_mb
from .learner import (
    Learner,
    build_loss,
    build_optimizer,
    build_regularizer,
    class_weights,
    parameter_groups,
)
from .metrics import summarize
from .models import build_model
from .pictures import choose_images, draw_predictions
from .ranks import Ranks, start_ranks, stop_ranks
from .report import write_report
from .signals import Interrupted, StopSignals
from .workers import batches_of

PICTURES = 8  # validation images in predictions.png
ANALYSED = 200  # validation images whose features the report shows


def start(config: Config) -> dict[str, Any]:
    """Begin a run and train it to its end; the results.

    Raises ValueError where the configuration cannot be, OSError where files cannot be read or
    written, Interrupted after SIGTERM or Ctrl-C.
    """
    ranks = start_ranks(config.running.device)
    try:
        ranks.from_first(lambda: make_directory(config))
        return _train(config, ranks)
    finally:
        stop_ranks()


def resume(run: Path) -> dict[str, Any]:
    """Continue an interrupted run from its last checkpoint, as if it had never stopped."""
    if not (run / "config.json").exists():
        raise ValueError(f"resume {run}: expected the directory of a run, with its config.json")
    config = Config.load(run / "config.json").replace(out=run.parent, name=run.name)
    ranks = start_ranks(config.running.device)
    try:
        return _train(config, ranks)
    finally:
        stop_ranks()


def _train(config: Config, ranks: Ranks) -> dict[str, Any]:
    with held(config.run) if ranks.first else nullcontext():
        return _Run(config, ranks).train()


class _Run:
    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks, self.run = config, ranks, config.run
        running, options = config.running, config.optimization
        if running.threads:
            torch.set_num_threads(running.threads)
        if running.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.training_set, self.validation_set = build_datasets(config.data, running.seed)
        self.num_classes = len(self.training_set.classes)
        cache = running.out / "class-counts"
        splits = (self.training_set, self.validation_set)
        # reads every mask: what is wrong with one shows now
        (pixels, images), (valid, _) = ranks.from_first(
            lambda: [class_counts(split, cache) for split in splits]
        )
        absent = check_classes(self.training_set.classes, pixels, valid)
        if absent and ranks.first:
            print(f"no training pixels: {', '.join(absent)}", file=sys.stderr)
        self.frequencies = pixels / pixels.sum()

        saved = ranks.from_first(lambda: latest_checkpoint(self.run))
        torch.manual_seed(running.seed)
        self.model = build_model(
            config.model.model,
            self.num_classes,
            channels=self.training_set.channels,
            pretrained=config.model.pretrained and saved is None,
            weights=config.model.weights if saved is None else None,
            auxiliary=config.model.auxiliary_weight > 0,
        )
        dim = self.model.classifier.in_channels
        regularizer = build_regularizer(
            config.model.methods,
            config.model.method_options,
            self.num_classes,
            dim,
            prior=images / images.sum().clamp(min=1),
        )
        weights = class_weights(options.class_weights, self.frequencies)
        if given := options.given_class_weights:
            if len(given) != self.num_classes:
                raise ValueError(
                    f"--given-class-weights: expected {self.num_classes} values, got {len(given)}"
                )
            weights = torch.tensor(given)
        learner: nn.Module = Learner(
            self.model, regularizer, build_loss(options, weights), config.model.auxiliary_weight
        ).to(ranks.device)
        self.layout = torch.channels_last if running.channels_last else torch.preserve_format
        learner.to(memory_format=self.layout)  # pyright: ignore
        groups = parameter_groups(
            self.model, options.lr, options.weight_decay, options.head_lr_factor
        )
        self.optimizer = build_optimizer(options.optimizer, groups)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.averages = Averages()
        self.step, self.evaluated, self.best, self.stale = 0, 0, -1.0, 0
        self.seconds, self.logged_seconds = 0.0, 0.0
        if saved:
            self._restore(saved)
        if running.sync_bn and ranks.world > 1 and ranks.device.type == "cuda":
            convert_sync_batchnorm(learner)
        if running.compile:
            learner.compile()
        self.learner = learner
        if ranks.world > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            # otherwise buckets are made anew after the first step of a process, and with them
            # the order in which three ranks or more are summed
            fixed_buckets = running.deterministic
            self.learner = DistributedDataParallel(
                learner, device_ids=devices, find_unused_parameters=fixed_buckets
            )

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up, then polynomial decay to zero."""
        options = self.config.optimization
        warmup = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
        return warmup * max(0.0, 1 - step / options.steps) ** options.power

    def _state(self) -> dict[str, Any]:
        # Random numbers and the position in the data are functions of (seed, step): see _train_step
        # and BatchSampler. The methods' state is in the model's.
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "averages": self.averages.state(),
            "evaluated": self.evaluated,
            "best": self.best,
            "stale": self.stale,
            "seconds": self.seconds,
            "logged_seconds": self.logged_seconds,
        }

    def _restore(self, path: Path) -> None:
        state = load_checkpoint(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.averages.restore(state["averages"])
        self.step, self.evaluated = state["step"], state["evaluated"]
        self.best, self.stale = state["best"], state["stale"]
        self.seconds, self.logged_seconds = state["seconds"], state["logged_seconds"]

    def _save(self) -> None:
        self._check_finite()
        if self.ranks.first:
            save_checkpoint(self.run, self.step, self._state())

    def train(self) -> dict[str, Any]:
        config, options = self.config, self.config.optimization
        sampler = BatchSampler(
            Draws(len(self.training_set), config.running.seed),
            batch_size=options.batch_size,
            accumulate=options.accumulate,
            rank=self.ranks.rank,
            world=self.ranks.world,
            first_step=self.step,
            steps=options.steps,
        )
        loader = training_loader(
            self.training_set,
            config.data,
            sampler,
            seed=config.running.seed,
            pin_memory=self.ranks.device.type == "cuda",
        )
        self.learner.train()
        with StopSignals() as signals, batches_of(loader) as batches, self._journal() as journal:
            summary = self._evaluate(journal, signals) if self._evaluation_due() else None
            while not self._finished():
                begin = time.perf_counter()
                self._train_step(batches)
                due = self._every(config.running.log_every)
                if due:
                    self._check_finite()  # waits for the device, for the clock too
                self.seconds += time.perf_counter() - begin
                if due:
                    self._log(journal)
                journal.step()
                stop = self.ranks.any(signals.received is not None)
                evaluation = self._evaluation_due()
                if stop or evaluation or self._every(config.running.save_every):
                    self._save()  # whoever stops in an evaluation has saved
                if stop:
                    raise self._interrupted(signals)
                if evaluation:
                    summary = self._evaluate(journal, signals)
            if summary is None:  # the run had come to its end
                summary = self._measure(signals)
            else:
                self._save()
        return self._finish(summary)

    def _interrupted(self, signals: StopSignals) -> Interrupted:
        return Interrupted(signals.received or signal.SIGTERM, self.run, self.step)

    def _evaluation_due(self) -> bool:
        last = self.step == self.config.optimization.steps
        due = last or self._every(self.config.running.eval_every)
        return due and self.evaluated < self.step

    def _every(self, steps: int) -> bool:
        return steps > 0 and self.step % steps == 0

    def _finished(self) -> bool:
        patience = self.config.running.patience
        return self.step == self.config.optimization.steps or (
            patience is not None and self.stale >= patience
        )

    def _journal(self) -> Journal:
        return Journal(
            self.run if self.ranks.first else None,
            self.step,
            self.config.optimization.steps,
            evaluated=self.evaluated,
            tensorboard=self.config.running.tensorboard,
        )

    def _train_step(self, batches: Any) -> None:
        options, running = self.config.optimization, self.config.running
        device = self.ranks.device
        # A stream of its own for every step and rank: an interruption leaves no trace in it.
        torch.manual_seed(mixed_seed("step", running.seed, self.step, self.ranks.rank))
        for number in range(options.accumulate):
            images, labels = next(batches)
            images = images.to(device, non_blocking=True, memory_format=self.layout)
            labels = labels.to(device, non_blocking=True)
            between = number + 1 < options.accumulate
            wait = self.learner.no_sync() if between and self.ranks.world > 1 else nullcontext()  # pyright: ignore
            with wait:
                with torch.autocast(device.type, torch.bfloat16, enabled=running.bf16):
                    loss, terms = self.learner(images, labels)
                (loss / options.accumulate).backward()
            self.averages.add(terms, options.accumulate)
        if options.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1

    def _check_finite(self) -> None:
        broken = self.averages.not_finite()
        if not nn.utils.get_total_norm(self.model.parameters()).isfinite():
            broken.append("the weights' norm")
        if self.ranks.any(bool(broken)):
            saved = latest_checkpoint(self.run)
            raise ValueError(
                f"not finite at step {self.step}: {', '.join(broken) or 'on another rank'}; "
                f"nothing of it was saved (last checkpoint: {saved or 'none'}). "
                "A smaller --lr, a --warmup or --clip may help"
            )

    def _log(self, journal: Journal) -> None:
        options = self.config.optimization
        terms, steps = self.averages.take(options.accumulate)
        images_per_second = steps * options.batch_size / (self.seconds - self.logged_seconds)
        self.logged_seconds = self.seconds
        values = {
            **terms,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": images_per_second,
            "memory_mb": peak_memory_mb(self.ranks.device),
        }
        journal.record(self.step, values)
        journal.show({name: values[name] for name in (*terms, "memory_mb")})

    @property
    def _window(self) -> tuple[int, int] | None:
        return self.config.data.crop if self.config.running.evaluation == "sliding" else None

    def _validation(self, rank: int, world: int) -> DataLoader:
        return evaluation_loader(
            self.validation_set,
            self.config.data,
            batch_size=self.config.running.eval_batch_size,
            rank=rank,
            world=world,
        )

    def _measure(self, signals: StopSignals) -> dict[str, Any]:
        """The figures of the validation split. Raises Interrupted where a signal asks for it."""

        def unless_asked(batches: Iterator[Any]) -> Iterator[Any]:
            for batch in batches:
                if signals.received is not None:
                    raise self._interrupted(signals)
                yield batch

        self.ranks.synchronize(self.model)
        loader = self._validation(self.ranks.rank, self.ranks.world)
        with batches_of(loader) as batches:
            confusion = evaluate(
                self.model,
                unless_asked(batches),
                self.num_classes,
                self.ranks.device,
                self._window,
            )
        return summarize(
            confusion, self.training_set.classes, self.frequencies, self.config.data.head_tail
        )

    def _evaluate(self, journal: Journal, signals: StopSignals) -> dict[str, Any]:
        summary = self._measure(signals)
        known = {k: v for k, v in summary.items() if isinstance(v, int | float)}
        journal.record(self.step, {f"val_{name}": value for name, value in known.items()})
        journal.write(f"step {self.step}: mIoU {100 * summary['miou']:.1f} %")
        self.evaluated = self.step
        self.stale += 1
        if summary["miou"] > self.best:
            self.best, self.stale = summary["miou"], 0
            if self.ranks.first:
                state = {"step": self.step, "model": self.model.state_dict()}
                save_atomically(state, self.run / "best.pt")
        return summary

    def _costs(self) -> tuple[Cost, Cost] | None:
        """Of the regulariser, in one training batch; of all ranks together, for it may have
        collectives, as synchronised batch norm has."""
        if not self.config.model.methods:
            return None
        options, ranks = self.config.optimization, self.ranks
        training = Training(
            self.training_set,
            augmentation(self.config.data, self.training_set.channels),
            self.config.running.seed,
        )
        size = options.batch_size // (options.accumulate * ranks.world)
        draws = range(ranks.rank * size, (ranks.rank + 1) * size)
        images, labels = default_collate(
            [training[draw % len(self.training_set), draw] for draw in draws]
        )
        return measure_cost(
            self.learner.module if ranks.world > 1 else self.learner,  # pyright: ignore
            images.to(ranks.device, memory_format=self.layout),
            labels.to(ranks.device).long(),
            bf16=self.config.running.bf16,
        )

    def _report(self, results: dict[str, Any], costs: tuple[Cost, Cost] | None) -> None:
        """report.html, with the features of the first validation images."""
        device = self.ranks.device
        loader = self._validation(rank=0, world=1)
        count = math.ceil(ANALYSED / self.config.running.eval_batch_size)
        with batches_of(loader) as batches:
            features = collect_features(
                self.model, itertools.islice(batches, count), self.num_classes, device
            )
        weight = self.model.classifier.weight.detach().flatten(1).cpu()
        write_report(self.run, results, features, weight, costs)

    def _finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        memory = peak_memory_mb(self.ranks.device)
        results = {
            "run": str(self.run),
            "dataset": self.config.data.dataset,
            "model": self.config.model.model,
            "methods": "+".join(self.config.model.methods) or "plain",
            "seed": self.config.running.seed,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "seconds_per_step": self.seconds / self.step,
            "gpu_memory_mb": memory if self.ranks.device.type == "cuda" else None,
            "best_miou": self.best,
            **summary,
        }
        if self.ranks.first:
            save_atomically(json.dumps(results, indent=2) + "\n", self.run / "results.json")
        costs = self._costs()
        if self.ranks.first:
            draw_predictions(
                self.model,
                self.validation_set,
                choose_images(self.validation_set, PICTURES),
                self.run / "predictions.png",
                transform=evaluation_transform(self.config.data, self.training_set.channels),
                window=self._window,
                title=f"{self.run.name}: mIoU {100 * results['miou']:.1f} %",
                device=self.ranks.device,
            )
            self._report(results, costs)
        return results
