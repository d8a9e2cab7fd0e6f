"""What a run does beside its steps: stopping and saving, timing, and the files at its end."""

import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor, nn

from .module import SegmentationModule
from .options import COUNT, check
from .report.cost import measure_complexity
from .report.pictures import draw_predictions
from .run import BEST, LAST
from .saving import save_atomically
from .signals import end_at_once, handle

PICTURES = 8  # validation images in predictions.png


def continuing(run: Path) -> str:
    """The command that continues a run."""
    return f"anchorops-train fit --run {shlex.quote(str(run))} --ckpt_path last"


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's own class writes to the directory of temporary files and moves the result. On
    another disk this is a copy, which a killed process leaves unfinished."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_atomically(checkpoint, Path(path))


class Stopped(Exception):
    """The run was asked to stop, and has saved its state."""

    def __init__(self, signum: int, run: Path, step: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}; go on with: {continuing(run)}")
        self.exit_status = 128 + signum


class Saving(Checkpoint):
    """Saves the state of the run in `last.ckpt`.

    This is done every few steps, before each validation, at the end, and when the run is asked to
    stop by SIGTERM or Ctrl-C, after the current step. Lightning itself would answer Ctrl-C in the
    middle of a step. A validation ends at its next batch, and is repeated when the run goes on.

    Args:
        every: Steps between two checkpoints.
    """

    ECHO = 1.0  # seconds in which torchrun forwards a Ctrl-C that its ranks have also received

    def __init__(self, every: int = 500) -> None:
        check("saving", {"every": every}, {"every": COUNT})
        self.every = every
        self.validating = False
        """Whether the validation of this step is not finished."""
        self.ended = False
        """Whether nothing is left to do."""
        self._received: int | None = None
        self._first = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"validating": self.validating, "ended": self.ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validating = state_dict["validating"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A run whose limit was raised goes on in its epoch, which Lightning has finished."""
        for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            progress |= {"processed": 0, "completed": 0}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        handle(self._receive)  # Lightning restores what was there

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._first = now
        elif self._received == signal.SIGINT == signum and now > self._first + self.ECHO:
            end_at_once(signum, frame)
        self._received = signum

    def _stop(self, trainer: Trainer) -> None:
        run = Path(trainer.default_root_dir)
        raise Stopped(self._received or signal.SIGTERM, run, trainer.global_step)

    def on_step_end(self, trainer: Trainer) -> None:
        """After the step, when its line is in the log."""
        received = self._received is not None
        stopping = trainer.strategy.reduce_boolean_decision(received, all=False)
        leaves = trainer.fit_loop.epoch_loop.done
        if stopping or leaves or self.validating or trainer.global_step % self.every == 0:
            self._save(trainer)
        if stopping:
            self._stop(trainer)

    @staticmethod
    def _save(trainer: Trainer) -> None:
        """Raises ValueError, and keeps the earlier checkpoint, if a weight is not finite."""
        module = trainer.lightning_module
        assert isinstance(module, SegmentationModule)
        state = [x for x in module.state_dict().values() if x.is_floating_point()]
        wrong = not bool(nn.utils.get_total_norm(state).isfinite())
        if trainer.strategy.reduce_boolean_decision(wrong, all=False):
            lr = module.options.lr
            raise ValueError(
                f"not finite at step {trainer.global_step}: the network has diverged. Start again "
                f"with --model.lr {lr / 10:g} (now {lr:g}), with --model.warmup 100 or "
                "--trainer.gradient_clip_val 1; or the data are wrong (values far from 0 to 1 in "
                "floating images)"
            )
        trainer.save_checkpoint(Path(trainer.default_root_dir) / LAST)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._received is not None:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ended:
            self._save(trainer)


def saving_of(trainer: Trainer) -> Saving:
    callbacks: Any = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    (saving,) = (x for x in callbacks if isinstance(x, Saving))
    return saving


def trains(trainer: Trainer) -> bool:
    """Whether a validation is one of a run."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


class Best(Callback):
    """Saves the weights in `best.ckpt` when their mIoU is the largest. These are the weights that
    were validated, as long as this hook runs before those of other callbacks: one that averages
    weights puts them into the network for a validation only."""

    def __init__(self) -> None:
        self.miou = -1.0

    def state_dict(self) -> dict[str, Any]:
        return {"miou": self.miou}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.miou = state_dict["miou"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SegmentationModule)
        miou = pl_module.results()["miou"]
        if trains(trainer) and miou > self.miou:
            self.miou = miou
            path = Path(trainer.default_root_dir) / BEST
            trainer.save_checkpoint(path, weights_only=True)


class Timing(Callback):
    """Logs the seconds of a step, their mean since the last line of the log, without validations,
    and the peak memory in MB: of a GPU's tensors, or of the process."""

    def __init__(self) -> None:
        self._begin = self._seconds = 0.0
        self._batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = time.perf_counter()

    on_validation_end = on_train_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._seconds += now - self._begin
        self._begin = now
        self._batches += 1
        step = trainer.global_step
        every: Any = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if step % every or self._batches < trainer.accumulate_grad_batches:
            return
        device, seconds = trainer.strategy.root_device, self._seconds / self._batches
        values = {"seconds_per_step": seconds * trainer.accumulate_grad_batches}
        pl_module.log_dict({**values, "memory_mb": peak_memory_mb(device)})
        self._seconds, self._batches = 0.0, 0


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Reports(Callback):
    """predictions.png, which is also in TensorBoard, after each validation; the size and speed of
    the network at the end of the run."""

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SegmentationModule)
        if trains(trainer):
            with attempt("predictions.png"):
                self._draw(trainer, pl_module)

    @staticmethod
    def _draw(trainer: Trainer, module: SegmentationModule) -> None:
        run, step = Path(trainer.default_root_dir), trainer.global_step
        title = f"{run.name}, step {step}: mIoU {100 * module.figures['miou']:.1f} %"
        figure = draw_predictions(module, PICTURES, title=title)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("predictions", figure, step, close=False)
        figure.savefig(run / "predictions.png", dpi=110)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SegmentationModule)
        if not saving_of(trainer).ended:
            return
        pl_module.eval()
        with attempt("size and speed of the network"):
            values = measure_complexity(pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)
                logger.save()


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """An error in the block becomes a line on stderr: the training and its figures are saved."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"anchorops-train: {what} could not be made: {reason}", file=sys.stderr)


class MaskWriter(BasePredictionWriter):
    """Writes the classes of each image to out/NAME.png, or out/SUBFOLDER/NAME.png if the images are
    in several folders: a mask of the image's size, 8 bits, or 16 with more than 256 classes.

    Raises ValueError for an image that is not there, and a mask that exists or would be written
    twice.
    """

    def __init__(self, out: Path, images: list[str]) -> None:
        super().__init__("batch")
        paths = [Path(os.path.abspath(image)) for image in images]
        common = os.path.commonpath([path.parent for path in paths]) if paths else ""
        self.masks = [out / path.relative_to(common).with_suffix(".png") for path in paths]
        seen: set[Path] = set()
        for path, mask in zip(paths, self.masks, strict=True):
            if not path.is_file():
                raise ValueError(f"predict: --data.images: {path} is not a file")
            if mask.exists():
                raise ValueError(f"predict: --out: {mask} exists: give another directory")
            if mask in seen:
                raise ValueError(
                    f"predict: --data.images: {mask} would be written twice: expected images of "
                    "different names"
                )
            seen.add(mask)
        out.mkdir(parents=True, exist_ok=True)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert isinstance(pl_module, SegmentationModule)
        kind = np.uint8 if pl_module.network.classifier.out_channels <= 256 else np.uint16
        mask = self.masks[int(batch[0])]
        mask.parent.mkdir(parents=True, exist_ok=True)
        encoded = BytesIO()
        Image.fromarray(prediction[0].cpu().numpy().astype(kind)).save(encoded, "PNG")
        save_atomically(encoded.getvalue(), mask)
        print(mask)
