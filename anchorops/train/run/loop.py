"""A training run from its configuration to its results; it can be interrupted and resumed."""

import signal
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import Config
from ..data.loading import BatchSampler, Draws, batches_of, mixed_seed, training_loader
from ..networks.learner import build_optimizer, parameter_groups
from ..report.cost import gradient_ratios
from ..report.evaluate import validate
from ..report.features import collapse_measures
from ..report.finish import RESULTS, finish
from ..signals import Interrupted, StopSignals, end_at_once
from .checkpoint import latest_checkpoint, save_atomically
from .directory import CONFIG, begin_run, held, new_run
from .journal import RATIO, WRONG_LABELS, Journal, peak_memory_mb
from .parts import build_parts
from .ranks import Ranks, start_ranks, stop_ranks
from .state import Schedule, State


def start(config: Config) -> dict[str, Any]:
    """Start a run and train it to its end. Returns the results.

    Raises ValueError if the configuration is wrong, OSError if files cannot be read or written, and
    Interrupted after SIGTERM or Ctrl-C.
    """
    config = config.anywhere()
    return _train(config, new_run(config), new=True)


def resume(
    run: Path, *, root: Path | None = None, allow_other_ranks: bool = False
) -> dict[str, Any]:
    """Continue an interrupted run from its last checkpoint, as if it had never stopped.

    Args:
        run: directory of the run.
        root: new directory of the data set, if it was moved.
        allow_other_ranks: continue with another number of ranks, which changes the results.

    Raises the same errors as `start`.
    """
    run = run.resolve()  # "." has no name
    if not (run / CONFIG).exists():
        raise ValueError(f"resume {run}: expected the directory of a run, with its {CONFIG}")
    config = Config.load(run / CONFIG).replace(out=run.parent, name=run.name)
    if root is not None:
        config = config.replace(root=root).anywhere()
    return _train(config, held(run), allow_other_ranks=allow_other_ranks)


def _train(
    config: Config, directory: AbstractContextManager[None], **options: bool
) -> dict[str, Any]:
    """The results of a run, whose directory the first rank holds."""
    ranks = start_ranks(config.running.device)
    try:
        with ExitStack() as stack:
            ranks.from_first(lambda: stack.enter_context(directory))
            return _Run(config, ranks, **options).train()
    finally:
        stop_ranks()


def _checkpoint(run: Path) -> Path | None:
    """The checkpoint from which a run continues, or None before its first one."""
    saved = latest_checkpoint(run)
    if saved is None and (run / RESULTS).exists():
        raise ValueError(
            f"{run} has finished, and has no checkpoint: it would be trained again from its first "
            "step, and its results would be replaced"
        )
    return saved


class _Run:
    def __init__(
        self, config: Config, ranks: Ranks, *, new: bool = False, allow_other_ranks: bool = False
    ) -> None:
        """new: nothing in the directory belongs to this run, which begins after its first step."""
        self.config, self.ranks, self.run, self.new = config, ranks, config.run, new
        end_at_once.run = None if new else self.run
        options, running = config.optimization, config.running
        saved = None if new else ranks.from_first(lambda: _checkpoint(self.run))
        self.parts = build_parts(config, ranks, from_checkpoint=saved is not None, new=new)
        self.model, learner = self.parts.model, self.parts.learner
        self.schedule = Schedule(config)
        groups = parameter_groups(
            self.model,
            options.lr,
            options.weight_decay,
            options.head_lr_factor,
            options.regularizer_lr_factor,
        )
        self.optimizer = build_optimizer(options.optimizer, groups)
        self.lr = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule.lr_factor)
        self.state = State(
            self.model,
            self.optimizer,
            self.lr,
            config=config,
            data=self.parts.data_summary,
            ranks=ranks.world,
        )
        before = self.state.restore(saved) if saved else ranks.world
        self.averages, self.progress = self.state.averages, self.state.progress
        self.ratios: dict[str, float] = {}  # METHOD.gradient_ratio, as last measured
        others = before != ranks.world and not self.schedule.ended(self.progress)
        if others and not allow_other_ranks:
            raise ValueError(
                f"{saved} is of {before} ranks, this is {ranks.world}: the numbers would not be "
                "those of the run without a stop, for each rank has its own random numbers and "
                f"batch statistics. Resume with {before}, or with --allow-other-ranks"
            )
        if running.sync_bn and ranks.world > 1 and ranks.device.type == "cuda":
            convert_sync_batchnorm(learner)
        if running.compile:
            learner.compile()
        self.learner: nn.Module = learner
        if ranks.world > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            # otherwise DDP makes new buckets after the first step of a process, which changes the
            # order in which three or more ranks are summed
            fixed_buckets = running.deterministic
            self.learner = DistributedDataParallel(
                learner, device_ids=devices, find_unused_parameters=fixed_buckets
            )

    def train(self) -> dict[str, Any]:
        schedule, progress = self.schedule, self.progress
        self.learner.train()
        loader = training_loader(
            self.parts.training_set,
            self.config.data,
            self._sampler(),
            seed=self.config.running.seed,
            pin_memory=self.ranks.device.type == "cuda",
        )
        with StopSignals() as signals, batches_of(loader) as batches, self._journal() as journal:
            if not self.new:
                journal.open(progress.step, progress.evaluated)
            summary = self._evaluate(journal, signals) if schedule.evaluates(progress) else None
            first = progress.step + 1
            while not schedule.ended(progress):
                compares = schedule.compares_gradients(progress)
                begin = time.perf_counter()
                self._train_step(batches)
                if schedule.logs(progress) or self.new:
                    self._check_finite()  # synchronises, which the time measurement also needs
                seconds = time.perf_counter() - begin
                progress.seconds += seconds
                stop = self.ranks.any(signals.received is not None)
                if stop and self.new:
                    raise self._interrupted(signals)
                if self.new:
                    self._begin(journal)
                if progress.step == first:
                    steps = self.config.optimization.steps
                    journal.write(f"step {first} of {steps} took {seconds:.2g} s")
                if compares and self.ratios:
                    journal.record(progress.step, self.ratios)
                if schedule.logs(progress):
                    self._log(journal)
                journal.step()
                evaluation = schedule.evaluates(progress)
                if stop or evaluation or schedule.saves(progress):
                    self._save()  # so that a run stopped in an evaluation has been saved
                if stop:
                    raise self._interrupted(signals)
                if evaluation:
                    summary = self._evaluate(journal, signals)
            if summary is None:  # the run had already finished
                summary = self._measure(signals)
            else:
                self._save()
        return finish(self.parts, progress, summary)

    def _begin(self, journal: Journal) -> None:
        """Take over the directory: a step of all ranks has shown that the run can be trained."""
        self.ranks.from_first(lambda: begin_run(self.config))
        self.new, end_at_once.run = False, self.run
        journal.open(0, 0)

    def _sampler(self) -> BatchSampler:
        options = self.config.optimization
        return BatchSampler(
            Draws(len(self.parts.training_set), self.config.running.seed),
            batch_size=options.batch_size,
            accumulate=options.accumulate,
            rank=self.ranks.rank,
            world=self.ranks.world,
            first_step=self.progress.step,
            steps=options.steps,
        )

    def _journal(self) -> Journal:
        return Journal(
            self.run if self.ranks.first else None,
            self.progress.step,
            self.config.optimization.steps,
            tensorboard=self.config.running.tensorboard,
        )

    def _train_step(self, batches: Any) -> None:
        options, running = self.config.optimization, self.config.running
        device, step = self.ranks.device, self.progress.step
        # Each step and rank has its own random numbers, so an interruption does not change them.
        torch.manual_seed(mixed_seed("step", running.seed, step, self.ranks.rank))
        for number in range(options.accumulate):
            images, labels = next(batches)
            images = images.to(device, non_blocking=True, memory_format=self.parts.layout)
            labels = labels.to(device, non_blocking=True)
            if number == 0 and self.schedule.compares_gradients(self.progress):
                self._compare_gradients(images, labels)
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
        self.lr.step()
        self.progress.step += 1

    def _compare_gradients(self, images: Tensor, labels: Tensor) -> None:
        ratios = gradient_ratios(self.parts.learner, images, labels, bf16=self.config.running.bf16)
        named = zip(self.config.model.methods, ratios, strict=True)
        # a batch without a valid pixel has no gradients, and no ratio
        self.ratios = {f"{name}.{RATIO}": ratio for name, ratio in named if isfinite(ratio)}

    def _check_finite(self) -> None:
        """Raises ValueError if the loss, a weight or a running statistic is NaN or infinite."""
        broken = self.averages.not_finite()
        state = [x for x in self.model.state_dict().values() if x.is_floating_point()]
        if not nn.utils.get_total_norm(state).isfinite():
            broken.append("the weights' norm")
        if self.ranks.any(bool(broken)):
            raise self._diverged(", ".join(broken) or "on another rank")

    def _diverged(self, what: str) -> ValueError:
        options, progress = self.config.optimization, self.progress
        saved = None if self.new else latest_checkpoint(self.run)
        others = [f"--lr {options.lr / 10:g} (now {options.lr:g})"]
        others += [] if options.clip is not None else ["--clip 1"]
        others += [] if options.warmup else [f"--warmup {min(100, options.steps)}"]
        return ValueError(
            f"not finite at step {progress.step}: {what}; the network has diverged (last "
            f"checkpoint: {saved or 'none'}). It can come from the learning rate: start again with "
            f"{', '.join(others[:-1])}{' or ' * (len(others) > 1)}{others[-1]}; or from the data "
            "(values far from 0 to 1 in floating images)"
        )

    def _save(self) -> None:
        self._check_finite()
        if self.ranks.first:
            self.state.save(self.run)

    def _interrupted(self, signals: StopSignals) -> Interrupted:
        run = None if self.new else self.run
        return Interrupted(signals.received or signal.SIGTERM, run, self.progress.step)

    def _log(self, journal: Journal) -> None:
        options, progress = self.config.optimization, self.progress
        terms, steps = self.averages.take(options.accumulate)
        seconds = progress.seconds - progress.logged_seconds
        progress.logged_seconds = progress.seconds
        values = {
            **terms,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": steps * options.batch_size / seconds,
            "memory_mb": peak_memory_mb(self.ranks.device),
        }
        journal.record(progress.step, values)
        journal.show({name: values[name] for name in (*terms, "memory_mb")} | self.ratios)
        journal.warn_of_labels(terms.get(WRONG_LABELS, 0))

    def _measure(self, signals: StopSignals) -> dict[str, Any]:
        """The figures of the validation split. Raises Interrupted after a signal."""

        def stop_on_signal() -> None:
            if signals.received is not None:
                raise self._interrupted(signals)

        try:
            return validate(self.parts, stop_on_signal)
        except FloatingPointError as error:
            raise self._diverged(str(error)) from None

    def _evaluate(self, journal: Journal, signals: StopSignals) -> dict[str, Any]:
        summary, progress = self._measure(signals), self.progress
        known = {k: v for k, v in summary.items() if isinstance(v, int | float)}
        values = {f"val_{name}": value for name, value in known.items()}
        if self.config.running.collapse_images:
            values |= collapse_measures(self.parts, summary["classes"])
        journal.record(progress.step, values)
        journal.write(f"step {progress.step}: mIoU {100 * summary['miou']:.1f} %")
        progress.evaluated = progress.step
        progress.stale += 1
        if summary["miou"] > progress.best:
            progress.best, progress.stale = summary["miou"], 0
            if self.ranks.first:
                state = {"step": progress.step, "model": self.model.state_dict()}
                save_atomically(state, self.run / "best.pt")
        return summary
