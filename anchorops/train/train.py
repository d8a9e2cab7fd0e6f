"""Training: read it from top to bottom."""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from . import ranks
from .data.loading import mixed_seed
from .data.splits import Splits, open_splits, training_batches, validation_batches
from .evaluation import as_weights, check_sizes, evaluate, summarize
from .networks.learner import Learner, build_optimizer, set_learning_rates
from .networks.models import read_checkpoint, upsample_late
from .options import Options, config_of
from .report.cost import measure_complexity
from .report.pictures import draw_predictions
from .run import (
    BEST,
    CONFIG,
    DATA,
    LAST,
    Log,
    Stop,
    check_same,
    going_on,
    only_process,
    save_atomically,
)

PICTURES = 8  # validation images in predictions.png
RANDOM_WEIGHTS = "WARNING: the network starts from random weights; see --model.pretrained"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# of the step, the learner, and a batch's images and labels
Measure = Callable[[int, Learner, Tensor, Tensor], Mapping[str, float]]


def train(
    options: Options,
    run: Path,
    *,
    resume: bool = False,
    advice: str | None = None,
    measure: Measure | None = None,
) -> None:
    """Train in the directory of a run, or go on in it: from its last state, if it has one.

    advice: the command that goes on, for messages. measure: see `fit`.
    Raises ValueError for what cannot be trained, and Stopped for a run that can go on.
    """
    device = ranks.start(options.device)
    advice = advice or going_on(run)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with ExitStack() as held:
        ranks.on_first(lambda: held.enter_context(only_process(run)))
        data = open_splits(options.data, options.seed)
        ranks.on_first(lambda: _check_run(options, run, data, resume, advice))
        state = read_checkpoint(run / LAST, "optimizer") if (run / LAST).exists() else None
        if state and state["ranks"] != ranks.world():
            raise ValueError(
                f"{run / LAST} was written by {state['ranks']} ranks: expected as many, got "
                f"{ranks.world()}"
            )
        first, steps = (state["step"] if state else 0), options.data.steps
        if state and first == steps and not state["due"]:
            ranks.say(f"{run}: no step was done: the run has ended after step {first}")
            return
        with held.enter_context(Stop(options.max_hours, advice)) as stop:
            last = fit(options, run, data, device, state, stop, measure)
        if last < steps:
            nothing = "no step was done: " if last == first else ""
            ranks.say(
                f"{run}: {nothing}a limit ended the run after step {last} of {steps}; go on with: "
                f"{advice} --max_steps null"
            )


def fit(
    options: Options,
    run: Path,
    data: Splits,
    device: torch.device,
    state: dict[str, Any] | None,
    stop: Stop,
    measure: Measure | None = None,
) -> int:
    """Train from a state, or from the beginning, to the end or to a limit; returns the last step.
    measure: more values for the log."""
    steps, dtype = options.data.steps, PRECISIONS[options.precision]
    learner = build(options, data, device, from_state=state is not None)
    # with unused parameters DDP keeps its buckets, so that gradients are summed in one order, also
    # where a run goes on
    parallel = DDP(learner, find_unused_parameters=True) if ranks.world() > 1 else learner
    optimizer = build_optimizer(options.model, learner.model)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    average = None
    if options.ema is not None:
        average_of = get_ema_multi_avg_fn(options.ema)
        average = AveragedModel(learner.model, multi_avg_fn=average_of, use_buffers=True)
    parts = {"model": learner.model, "optimizer": optimizer, "scaler": scaler, "average": average}
    record = Record(options, run, data, device, parts, state)
    step, due = record.step, record.due
    last = min(steps, options.max_steps or steps)
    batches = iter(training_batches(options, data.training, step))
    stop.where = f"after step {step}"
    while True:
        if due:
            record.validate(step, learner.model if average is None else average.module, stop)
        if step >= last:
            break
        torch.manual_seed(mixed_seed("step", options.seed, step, ranks.rank()))
        lr = set_learning_rates(optimizer, options.model, step, steps)
        for part in range(options.accumulate):
            images, labels = next(batches)
            images = as_weights(learner, images, options.model.channels_last)
            labels = labels.to(device, non_blocking=True)
            if measure and part == 0:
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    record.write(step, measure(step, learner, images, labels))
            adds = part + 1 < options.accumulate
            with parallel.no_sync() if adds and isinstance(parallel, DDP) else nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss, terms = parallel(images, labels)
                scaler.scale(loss / options.accumulate).backward()
        if options.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(learner.parameters(), options.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(learner.model)
        step += 1
        stop.where = f"after step {step}"
        record.log(step, lr, terms)
        due = step % options.val_every == 0 or step == steps
        stopped = stop.asked()
        if stopped or due or step == last or step % options.save_every == 0:
            record.save(step, due)
        if stopped:
            raise stopped
    if step == steps:
        record.end(step)
    return step


def build(options: Options, data: Splits, device: torch.device, *, from_state: bool) -> Learner:
    """The network with its methods and losses, on its device."""
    model, channels = options.model, options.data.channels
    initial = model.pretrained or model.weights or model.backbone_weights or from_state
    if not initial and options.data.dataset != "digits":
        ranks.say(RANDOM_WEIGHTS)
    if from_state:  # which has what the files of weights and vectors had
        given = model.method_options or {}
        given = {name: x for name, x in given.items() if not str(x).startswith("@")}
        model = replace(model, pretrained=False, weights=None, backbone_weights=None)
        model = replace(model, method_options=given)
    torch.manual_seed(options.seed)
    classes = len(data.training.classes)
    learner = Learner(model, classes, channels, data.prior)
    layout = torch.channels_last if model.channels_last else torch.preserve_format
    learner.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    synchronised = ranks.world() if device.type == "cuda" else 1  # batch norm
    batch = options.data.batch_size // (options.accumulate * ranks.world())
    check_sizes(learner.model, options, data.sizes, batch * synchronised)
    images = torch.zeros(1, channels, *options.data.crop)
    upsample_late(learner.model, as_weights(learner, images, model.channels_last))
    if synchronised > 1:
        convert_sync_batchnorm(learner)
    if model.compile:
        learner.compile()
    return learner


class Record:
    """What a run leaves: its state, log, best weights and pictures, written by the first rank."""

    def __init__(
        self,
        options: Options,
        run: Path,
        data: Splits,
        device: torch.device,
        parts: Mapping[str, Any],
        state: Mapping[str, Any] | None,
    ) -> None:
        self.options, self.run, self.data, self.device = options, run, data, device
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.step, self.due, self.best = 0, False, -1.0
        if state is not None:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.due, self.best = state["step"], state["due"], state["best"]
        leads = ranks.rank() == 0
        self.files = Log(run, self.step) if leads else None
        shown = None if leads else True  # None: on a terminal
        self.bar = tqdm(total=options.data.steps, initial=self.step, disable=shown)
        self._begin, self._seconds, self._steps = time.perf_counter(), 0.0, 0

    def write(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        if self.files and values:
            self.files.write(step, values)

    def log(self, step: int, lr: float, terms: dict[str, Tensor]) -> None:
        """The losses of a step's last batch, the mean time of the steps since the last line, and
        the peak memory in MB: of a GPU's tensors, or of the process."""
        now = time.perf_counter()
        self._seconds, self._steps = self._seconds + now - self._begin, self._steps + 1
        self._begin = now
        self.bar.update()
        if step % self.options.log_every == 0 and self.files:
            values = {"loss": terms.pop("loss"), "lr": lr, **terms}
            values |= {"seconds_per_step": self._seconds / self._steps}
            values |= {"memory_mb": peak_memory_mb(self.device)}
            self.write(step, values)
            self.bar.set_postfix(loss=float(values["loss"]))
        if step % self.options.log_every == 0:
            self._seconds, self._steps = 0.0, 0

    def save(self, step: int, due: bool) -> None:
        """due: whether the validation of this step is still to be done."""
        ranks.on_first(lambda: self._save(step, due))

    def _save(self, step: int, due: bool) -> None:
        """Raises ValueError, and keeps the earlier state, if a weight is not finite."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        numbers = [x for x in state["model"].values() if x.is_floating_point()]
        if not bool(nn.utils.get_total_norm(numbers).isfinite()):
            lr = self.options.model.lr
            raise ValueError(
                f"not finite at step {step}: the network has diverged. Start again with --model.lr "
                f"{lr / 10:g} (now {lr:g}), with --model.warmup 100 or --clip 1; or the data are "
                "wrong (values far from 0 to 1 in floating images)"
            )
        facts = {"step": step, "due": due, "best": self.best, "ranks": ranks.world()}
        save_atomically(state | facts, self.run / LAST)

    def validate(self, step: int, model: nn.Module, stop: Stop) -> None:
        """Raises Stopped; then the validation is repeated when the run goes on."""
        options, validation = self.options, self.data.validation
        batches = validation_batches(options.data, validation)
        matrix = evaluate(model, batches, options, len(validation.classes), stop)
        figures = summarize(
            matrix, validation.classes, self.data.frequencies, options.data.head_tail
        )
        ranks.on_first(lambda: self._keep(step, model, figures))
        self._begin = time.perf_counter()

    def _keep(self, step: int, model: nn.Module, figures: dict[str, float]) -> None:
        miou = figures["miou"]
        self.bar.write(f"step {step}: mIoU {100 * miou:.1f} %")
        self.write(step, {f"val/{name}": figure for name, figure in figures.items()})
        if miou > self.best:
            self.best = miou
            save_atomically({"model": model.state_dict(), "step": step}, self.run / BEST)
        with attempt("predictions.png"):
            title = f"{self.run.name}, step {step}: mIoU {100 * miou:.1f} %"
            images = self.data.validation
            figure = draw_predictions(model, images, self.options, PICTURES, title=title)
            figure.savefig(self.run / "predictions.png", dpi=110)
            if self.files:
                self.files.events.add_figure("predictions", figure, step)

    def end(self, step: int) -> None:
        """The size and speed of the network, and a state in which nothing is left to do."""
        model = self.parts["model"]
        if ranks.rank() == 0:
            with attempt("size and speed of the network"):
                self.write(step, measure_complexity(model.eval(), self.options))
        self.save(step, due=False)


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """An error in the block becomes a line on stderr: the training and its figures are saved."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"anchorops-train: {what} could not be made: {reason}", file=sys.stderr)


def _check_run(options: Options, run: Path, data: Splits, resume: bool, advice: str) -> None:
    """Write the configuration of the run. Raises ValueError if the directory has another run, or if
    the run would go on to other numbers."""
    if options.data.split != "val":
        raise ValueError(f"--data.split: fit expects val, got {options.data.split}")
    now = config_of(options)
    if resume:
        check_same(run, now, data.found)
    elif (run / LAST).exists() or (run / BEST).exists():
        raise ValueError(
            f"{run} holds a run: go on with it by `{advice}`, or give this one another directory "
            "with --run"
        )
    for name, content in ((DATA, data.found), (CONFIG, now)):
        save_atomically(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), run / name)
