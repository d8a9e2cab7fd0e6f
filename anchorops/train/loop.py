"""The loop over the steps of a run: when it validates, saves and ends."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from .callbacks import saving_of


class StepLoop(_TrainingEpochLoop):
    """Lightning's loop, in whole steps: Lightning itself would also validate and end between
    accumulated batches, whose gradients are in no checkpoint.

    After a step its line is written to the log, then the state of the run is saved, then it is
    validated. So a run that was killed at any place goes on from a state before which every line
    of the log exists, and behind which every line is written anew.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.min_steps, trainer.max_steps)

    @property
    def done(self) -> bool:
        return super().done and not self._should_accumulate()

    def reset(self) -> None:
        super().reset()
        self._batches_that_stepped = self.global_step  # from any place in a step

    def run(self, data_fetcher: Any) -> None:
        super().run(data_fetcher)
        saving_of(self.trainer).ended = self._ended()

    def advance(self, data_fetcher: Any) -> None:
        self.restarting = False  # no loop goes on within a step or a validation
        if not saving_of(self.trainer).validating:  # else a run goes on with its validation
            super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: Any) -> None:
        if self._should_accumulate():
            return
        saving = saving_of(self.trainer)
        if not saving.validating:
            saving.validating = self._validation_is_due()
            saving.on_step_end(self.trainer)
        super().on_advance_end(data_fetcher)
        saving.validating = False
        self._batches_that_stepped = self.global_step

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        return saving_of(self.trainer).validating

    def _validation_is_due(self) -> bool:
        """After each val_check_interval of steps, and at the end."""
        trainer: Any = self.trainer
        if not self._should_check_val_epoch():
            return False
        if self._ended():
            return True
        every = trainer.val_check_interval
        if isinstance(every, float):  # a share of the run
            every = max(1, trainer.val_check_batch // trainer.accumulate_grad_batches)
        return self.global_step % every == 0

    def _ended(self) -> bool:
        """Whether the run has done all its steps, or a callback such as EarlyStopping stops it. A
        limit, max_steps or max_time, is no end: the run can go on."""
        if self._num_ready_batches_reached():
            return True
        trainer: Any = self.trainer
        if not (trainer.should_stop and trainer.fit_loop._can_stop_early):  # see min_steps
            return False
        left = [x.time_remaining() for x in trainer.callbacks if isinstance(x, Timer)]
        in_time = all(seconds is None or seconds > 0 for seconds in left)
        return trainer.strategy.broadcast(in_time)
