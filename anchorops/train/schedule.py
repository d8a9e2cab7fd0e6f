"""The schedule of a run: when it logs, saves, evaluates and ends; and its learning rate."""

from .config import Config
from .state import Progress


class Schedule:
    def __init__(self, config: Config) -> None:
        self.options, self.running = config.optimization, config.running

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then polynomial decay to zero."""
        options = self.options
        warmup = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
        return warmup * max(0.0, 1 - step / options.steps) ** options.power

    def logs(self, progress: Progress) -> bool:
        return _every(self.running.log_every, progress.step)

    def compares_gradients(self, progress: Progress) -> bool:
        """Whether the next step measures the gradients of the methods."""
        return _every(self.running.gradient_ratio_every, progress.step)

    def saves(self, progress: Progress) -> bool:
        return _every(self.running.save_every, progress.step)

    def evaluates(self, progress: Progress) -> bool:
        last = progress.step >= self.options.steps
        due = last or _every(self.running.eval_every, progress.step)
        return due and progress.evaluated < progress.step

    def ended(self, progress: Progress) -> bool:
        patience = self.running.patience
        return progress.step >= self.options.steps or (  # config.json may have been edited
            patience is not None and progress.stale >= patience
        )


def _every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0
