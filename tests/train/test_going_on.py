"""How runs of a small network end early and go on, in steps of two batches and with averaged
weights; and what keeps them from going on."""

import itertools
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import image, mask, write
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from tiny_runs import TINY, assert_same_run, figures, state
from torch import Tensor, nn

from anchorops.train import module
from anchorops.train.cli import Program, main, train, with_presets
from anchorops.train.data.counts import class_counts, fingerprint
from anchorops.train.data.folders import open_folder
from anchorops.train.metrics import Metrics, read_metrics
from anchorops.train.module import SegmentationModule
from anchorops.train.networks.models import Segmenter
from anchorops.train.run import only_process

AVERAGED = "[{class_path: EMAWeightAveraging, init_args: {decay: 0.9}}]"
RUN = (
    *(*TINY, "--model.methods", "[]", "--data.val_images", "4", "--data.steps", "5"),
    *("--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "3"),
    *("--trainer.log_every_n_steps", "1", "--model.lr", "0.1", "--trainer.callbacks", AVERAGED),
)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.BatchNorm2d(16))

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images).relu()


@pytest.fixture(autouse=True, scope="module")
def small_network() -> Iterator[None]:
    def build(name: str, num_classes: int, **_: Any) -> Segmenter:
        return Segmenter(Body(), 16, num_classes)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "build_model", build)
        yield


@pytest.fixture(scope="module")
def undisturbed(small_network: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(*RUN, "--run", str(tmp_path_factory.mktemp("runs") / "undisturbed"))


def go_on(run: Path, *options: str) -> int:
    return main(["fit", "--run", str(run), "--ckpt_path", "last", *options])


def test_an_interval_of_validations_counts_steps(undisturbed: Path):
    validated = [step for step, line in figures(undisturbed).items() if "val/miou" in line]
    assert validated == [3, 5]


def once(function: Callable, when: Callable[..., bool], what: Callable[[], object]) -> Callable:
    """The function; before its first call with `when`, also `what` is called."""
    calls = iter([what])

    def wrapped(*args: Any, **options: Any) -> Any:
        if when(*args, **options):
            next(calls, lambda: None)()
        return function(*args, **options)

    return wrapped


def test_a_stop_in_a_validation(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    stop = once(
        SegmentationModule.validation_step,
        lambda *_: True,
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    monkeypatch.setattr(SegmentationModule, "validation_step", stop)
    options = ["--data.eval_batch_size", "1"]
    run = tmp_path / "run"
    assert main(["fit", *RUN, "--run", str(run), *options]) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 3; go on with: anchorops-train" in capsys.readouterr().err
    assert go_on(run) == 0
    assert_same_run(run, undisturbed)


def test_limits_of_a_run(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """A step more than max_steps, then to the middle of a step by max_time, which finishes it."""
    run = tmp_path / "run"
    train(*RUN, "--run", str(run), "--trainer.max_steps", "3")
    said = capsys.readouterr().err
    advice = f"anchorops-train fit --run {run} --ckpt_path last --trainer.max_steps -1"
    assert f"a limit ended the run after step 3 of 5; go on with: {advice}\n" in said
    assert go_on(run) == 0
    assert f"{run}: no step was done: a limit ended the run" in capsys.readouterr().err
    assert main(["compare", str(run), str(undisturbed)]) == 0
    said = capsys.readouterr()
    assert f"{run} has not ended: 3 of 5 steps are in its metrics.csv; it is left out" in said.err
    assert said.out.splitlines()[-1].split()[3] == "1"  # seeds
    assert main(["compare", str(run)]) == 1

    def stop(timer: Timer, trainer: Any, *_: Any) -> None:
        trainer.should_stop = True

    monkeypatch.setattr(Timer, "on_train_batch_end", stop)
    monkeypatch.setattr(Timer, "time_remaining", lambda self: 0.0)
    limit = ["--trainer.max_steps", "-1", "--trainer.max_time", "01:00:00:00"]
    assert go_on(run, *limit) == 0
    assert "ended the run after step 4 of 5; go on with: " in capsys.readouterr().err
    assert go_on(run, "--trainer.max_steps", "-1") == 0
    assert_same_run(run, undisturbed)
    assert go_on(run) == 0
    assert "no step was done: the run has ended after step 5" in capsys.readouterr().err
    assert_same_run(run, undisturbed)


def test_no_line_of_the_log_is_lost(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed() -> None:
        raise RuntimeError("killed")

    run = tmp_path / "run"
    log = once(Metrics.log_metrics, lambda *_, step, **__: step == 4, killed)
    monkeypatch.setattr(Metrics, "log_metrics", log)
    with pytest.raises(RuntimeError, match="killed"):
        train(*RUN, "--run", str(run))
    assert go_on(run) == 0
    assert_same_run(run, undisturbed)


def test_a_run_that_moved_keeps_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    summarize, scores = module.summarize, itertools.count(0.5, -0.1)
    monkeypatch.setattr(
        module, "summarize", lambda *args: {**summarize(*args), "miou": next(scores)}
    )
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patched:

        def killed(*_: object) -> None:
            raise RuntimeError

        late = lambda self, *_: self.trainer.global_step == 4  # noqa: E731
        step = once(SegmentationModule.training_step, late, killed)
        patched.setattr(SegmentationModule, "training_step", step)
        train(*RUN, "--run", str(tmp_path / "before"))
    run = shutil.move(tmp_path / "before", tmp_path / "after")
    assert go_on(run) == 0
    assert state(run, "best")["global_step"] == 3


def hold(run: Path, pipe: Any) -> None:
    with only_process(run):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        pipe.send(worker.pid)
        time.sleep(60)


def test_two_processes_with_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, fork = tmp_path / "run", multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe()
    process = fork.Process(target=hold, args=(run, sender))
    process.start()
    worker = receiver.recv()
    assert main(["fit", *RUN, "--run", str(run)]) == 1
    said = capsys.readouterr().err
    assert f"another process trains in {run}: give this run its own directory with --run" in said
    assert main(["demo", "--out", str(run)]) == 1
    said = capsys.readouterr().err
    assert f"another process trains in {run}: give this demo its own directory with --out" in said
    assert [path.name for path in run.iterdir()] == ["run.lock"]
    process.kill()
    process.join()
    with only_process(run):  # although a worker still lives
        os.kill(worker, signal.SIGKILL)


class Average(Callback):
    """A usual callback of users: other weights for the whole validation."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.bias = pl_module.network.classifier.bias
        self.kept = self.bias.detach().clone()
        self.bias += 3 * torch.arange(11)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.bias.copy_(self.kept)


@pytest.mark.parametrize("callback", [None, f"[{{class_path: {__name__}.Average}}]"])
def test_the_best_weights_are_those_that_were_validated(
    callback: str | None, undisturbed: Path, tmp_path: Path
):
    run = undisturbed
    if callback:
        run = train(*RUN, "--run", str(tmp_path / "run"), "--trainer.callbacks", callback)
    logged = figures(run)[state(run, "best")["global_step"]]
    validate = ["validate", "--run", str(run), "--trainer.callbacks", "null"]
    program = Program(*with_presets(validate))
    values = program.trainer.callback_metrics
    assert {name: float(x) for name, x in values.items() if name.startswith("val/")} == {
        name: pytest.approx(x, abs=1e-7) for name, x in logged.items() if name.startswith("val/")
    }


STOPPING = """
    class_path: EarlyStopping
    init_args: {monitor: val/miou, mode: max, stopping_threshold: -1.0}
"""


@pytest.mark.parametrize(
    ("least", "validated"),
    [(None, [2]), (("steps", "5"), [2, 4, 5]), (("epochs", "1"), [2, 4, 6, 7])],
)
def test_early_stopping_after_a_least_length(
    least: tuple[str, str] | None, validated: list[int], tmp_path: Path
):
    """The first validation asks for the stop."""
    options = ["--trainer.callbacks", STOPPING, "--trainer.val_check_interval", "2"]
    options += ["--data.steps", "7", *([f"--trainer.min_{least[0]}", least[1]] if least else [])]
    run = train(*RUN, *options, "--run", str(tmp_path / "run"))
    assert [step for step, line in figures(run).items() if "val/miou" in line] == validated
    assert "cost/flops" in read_metrics(run / "metrics.csv")[validated[-1]]
    assert state(run)["callbacks"]["Saving"]["ended"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "callbacks",
            "[{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}]",
            "expected WeightAveraging or EMAWeightAveraging",
        ),
        (
            "callbacks",
            "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}",
            "expected --trainer.accumulate_grad_batches",
        ),
        ("callbacks", "[{class_path: BatchSizeFinder}]", "expected --data.batch_size"),
        ("callbacks", "[{class_path: LearningRateFinder}]", "expected --model.lr"),
        (
            "callbacks",
            "[{class_path: EarlyStopping, init_args: {monitor: nope}}]",
            "--trainer.callbacks: Early stopping conditioned on metric `nope` which is not",
        ),
        ("devices", "-1", "--trainer: `devices` selected with `CPUAccelerator` should be an int"),
    ],
)
def test_what_lightning_would_find_late_or_not(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["fit", *RUN, "--run", str(tmp_path / "run"), f"--trainer.{option}", value]
    assert main([*words, "--trainer.accumulate_grad_batches", "1"]) == 1
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("anchorops-train: ")]
    assert len(said) == 1 and message in said[0]


FOLDER = (
    *("--config", "folder", "--data.crop", "[32, 32]", "--data.steps", "2", "--data.workers", "0"),
    *("--data.batch_size", "2", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
)


@pytest.fixture
def folder_run(folder: Path) -> Path:
    """After the first of two steps."""
    return train(*FOLDER, "--data.root", str(folder), "--run", str(folder / "run"))


def reorder_classes(root: Path) -> None:
    (root / "classes.txt").write_text("thing\nground\n")


def add_class(root: Path) -> None:
    (root / "classes.txt").write_text("ground\nthing\nmore\n")


def add_image(root: Path) -> None:
    write(root / "images/train/c.png", image(4, 5))
    write(root / "masks/train/c.png", mask(1, height=4, width=5))


def rename_image(root: Path) -> None:
    (root / "images/val/b.png").rename(root / "images/val/c.png")
    (root / "masks/val/b.png").rename(root / "masks/val/c.png")


def redraw_mask(root: Path) -> None:
    write(root / "masks/train/b.png", mask(0, height=4, width=5))


def test_other_data(folder_run: Path, folder: Path, tmp_path: Path, capsys):
    changes = {
        reorder_classes: "the order of the classes",
        add_class: "3 classes instead of 2",
        add_image: "3 training images instead of 2",
        rename_image: "the names of validation images or masks",
        redraw_mask: "38 pixels of the class ground in training masks instead of 18",
    }
    goes_on = ["--trainer.max_steps", "-1", "--data.root"]
    for change, found in changes.items():
        root = Path(shutil.copytree(folder, tmp_path / change.__name__))
        change(root)
        assert go_on(folder_run, *goes_on, str(root)) == 1
        assert f"the data are not those of the run: {found}" in capsys.readouterr().err
    allowed = tmp_path / "add_image"
    assert go_on(folder_run, *goes_on, str(allowed), "--data.allow_changes", "true") == 0
    assert "the data are not those of the run: 3 training images" in capsys.readouterr().err
    validate = ["validate", "--run", str(folder_run), "--data.root"]
    assert main([*validate, str(allowed)]) == 0
    assert main([*validate, str(tmp_path / "reorder_classes")]) == 1
    assert "the order of the classes" in capsys.readouterr().err


def test_data_that_moved(folder_run: Path, folder: Path, tmp_path: Path):
    root = shutil.copytree(folder, tmp_path / "moved")
    assert go_on(folder_run, "--trainer.max_steps", "-1", "--data.root", str(root)) == 0
    assert state(folder_run)["global_step"] == 2


def test_data_in_the_current_directory(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def found(root: Path) -> dict[str, Any]:
        split = open_folder(root, "train")
        return fingerprint(split, class_counts(split), root)

    monkeypatch.chdir(folder)
    assert found(Path()) == found(folder)


@pytest.mark.parametrize(
    ("lacking", "place"), [("loops", ()), ("Saving", ("callbacks",)), ("callbacks", ())]
)
def test_a_checkpoint_of_another_kind(
    lacking: str, place: tuple[str, ...], undisturbed: Path, tmp_path: Path, capsys
):
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    last = state(run)
    part = last[place[0]] if place else last
    del part[lacking]
    torch.save(last, run / "last.ckpt")
    assert go_on(run) == 1
    said = capsys.readouterr().err
    assert f"{run / 'last.ckpt'} is of another kind: it has no " in said and lacking in said


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize("end", [0, 40, -1000])
def test_damaged_files(end: int, undisturbed: Path, tmp_path: Path, capsys):
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    for name in ("last.ckpt", "best.ckpt"):
        cut(run / name, end)
        command = ["validate", "--run", str(run), "--ckpt_path", name.removesuffix(".ckpt")]
        assert main(command) == 1
        assert f"checkpoint {run / name} is damaged (" in capsys.readouterr().err
    assert go_on(run) == 1
    assert f"checkpoint {run / 'last.ckpt'} is damaged (" in capsys.readouterr().err
    cut(run / "metrics.csv", end)
    assert main(["compare", str(run)]) == 1
    assert f"{run / 'metrics.csv'} is damaged (" in capsys.readouterr().err
    cut(run / "config.yaml", end)
    for command in (["compare", str(run)], ["fit", "--run", str(run), "--ckpt_path", "last"]):
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run / 'config.yaml'} is damaged (" in line
