"""What a run leaves, how it goes on and is compared, and what is refused."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from image_files import image, mask, write
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY, assert_same_run, figures, state

from anchorops.train import callbacks, cli, module
from anchorops.train.callbacks import Saving
from anchorops.train.cli import Program, main, train, with_presets
from anchorops.train.metrics import Metrics, read_metrics
from anchorops.train.module import SegmentationModule
from anchorops.train.networks.models import build_model
from anchorops.train.report.compare import comparison, load_results
from anchorops.train.run import WEIGHTS
from anchorops.train.saving import save_atomically


def test_a_run_leaves_everything(straight: Path):
    files = {path.name for path in straight.iterdir()}
    assert {"config.yaml", "last.ckpt", "best.ckpt", "metrics.csv", "predictions.png"} <= files
    assert (straight / "predictions.png").read_bytes().startswith(b"\x89PNG")
    lines = read_metrics(straight / "metrics.csv")
    assert [step for step, line in lines.items() if "loss" in line] == [2, 4, 6]
    last = lines[6]
    assert 0 < last["val/miou"] <= 1 and {"val/head", "val/iou/background"} < set(last)
    assert last["cost/flops"] > 0 and last["cost/images_per_second"] > 0
    events = EventAccumulator(str(straight)).Reload()
    assert {"loss", "val/miou"} <= set(events.Tags()["scalars"])
    assert [x.step for x in events.Images("predictions")] == [3, 6]
    best = torch.load(straight / "best.ckpt", weights_only=True)
    assert "optimizer_states" not in best and best["global_step"] in (3, 6)


def test_a_finished_run_goes_on_to_nothing(straight: Path, tmp_path: Path):
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    (run / "predictions.png").unlink()
    config = (run / "config.yaml").read_text()
    # its config.yaml has the options; these change no number
    free = ["--saving.every", "1", "--data.workers", "1", "--data.eval_batch_size", "2"]
    free += ["--trainer.callbacks", "LearningRateMonitor"]
    train("--run", str(run), "--ckpt_path", str(run / "last.ckpt"), *free)
    assert (run / "config.yaml").read_text() == config
    assert_same_run(run, straight)
    module = SegmentationModule.load_from_checkpoint(run / "best.ckpt")
    assert module.network.classifier.out_channels == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"holds a run: go on with it by `anchorops-train fit --run .* --ckpt_path last`"),
        (["--ckpt_path", "best"], "--ckpt_path best: expected last"),
        (
            ["--ckpt_path", "other/last.ckpt"],
            "--ckpt_path other/last.ckpt: .* give --model.weights",
        ),
        (
            ["--ckpt_path", "last", "--model.lr", "1.0"],
            r"--model.lr is 1.0, .*config.yaml has 0.004: the numbers would not be those",
        ),
        (["--ckpt_path", "last", "--data.steps", "12"], "--data.steps is 12, .* has 6"),
        (["--ckpt_path", "last", "--seed_everything", "1"], "--seed_everything is 1, .* has 0"),
        (
            ["--ckpt_path", "last", "--model.method_options", "{sar.tau: 0.5}"],
            "--model.method_options is {'sar.tau': 0.5}, .* has None",
        ),
        (
            ["--ckpt_path", "last", "--trainer.callbacks", "[{class_path: EMAWeightAveraging}]"],
            r"--trainer.callbacks is \[.*EMAWeightAveraging.*\], .* has None",
        ),
    ],
)
def test_what_would_change_a_run_is_refused(straight: Path, options: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        train(*TINY, "--run", str(straight), *options)


def test_no_checkpoint_to_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = ["fit", *TINY, "--ckpt_path", "last"]
    with pytest.raises(ValueError, match=r"^--run: .*/runs/digits-sar-seed0 does not exist"):
        Program(*with_presets(words))
    Path("runs/digits-sar-seed0").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"last: .*/runs/digits-sar-seed0 has no last.ckpt"):
        Program(*with_presets(words))


def test_a_demo_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its second run is stopped; the first one has ended, and goes on to nothing."""
    trained: list[tuple[str, bool]] = []

    def train(*words: str) -> None:
        options = dict(zip(words[::2], words[1::2], strict=True))
        run, goes_on = Path(options["--run"]), options.get("--ckpt_path") == "last"
        trained.append((run.name, goes_on))
        run.mkdir(exist_ok=True)
        (run / "last.ckpt").touch()
        if len(trained) == 2:
            raise callbacks.Stopped(signal.SIGINT, run, 3)

    monkeypatch.setattr(cli, "train", train)
    monkeypatch.setattr(cli, "load_results", Path)
    monkeypatch.setattr(cli, "comparison", str)
    first, second, *others = (
        f"{x}-{y}" for x in ("digits", "digits-segformer-b0") for y in ("plain", "sar")
    )
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert trained[:2] == [(first, False), (second, False)]
    assert trained[2:] == [(first, True), (second, True), *((run, False) for run in others)]
    (tmp_path / first / "best.ckpt").touch()  # of something else: it has no config.yaml
    assert main(["demo", "--out", str(tmp_path)]) == 1 and len(trained) == 6


def test_diverged_network_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    training_step = SegmentationModule.training_step

    def diverge(self: SegmentationModule, *args):
        if self.trainer.global_step == 3:
            self.network.state_dict()["body.mix.1.running_var"].fill_(math.inf)
        return training_step(self, *args)

    monkeypatch.setattr(SegmentationModule, "training_step", diverge)
    with pytest.raises(ValueError, match=r"not finite at step 4: .* --model.lr 0\.0004 \(now"):
        train(*TINY, "--model.methods", "[]", "--run", str(tmp_path / "run"))
    kept = state(tmp_path / "run")
    assert all(torch.isfinite(x).all() for x in kept["state_dict"].values())


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    now, ended = time.monotonic(), []
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    monkeypatch.setattr(callbacks, "end_at_once", lambda signum, frame: ended.append(signum))
    saving = Saving()
    saving._receive(signal.SIGINT, None)
    saving._receive(signal.SIGINT, None)  # as torchrun forwards it
    assert saving._received == signal.SIGINT and not ended
    now += 2
    saving._receive(signal.SIGINT, None)
    assert ended == [signal.SIGINT]


# in place of a library of training: the program waits while it imports it
LIBRARY = """
import pathlib, time
pathlib.Path(__file__).with_name("imported").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_the_program_starts(signum: signal.Signals, tmp_path: Path):
    """The handlers are installed before the libraries of training are imported."""
    (tmp_path / "lightning.py").write_text(LIBRARY)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "anchorops.train", "fit", "--run", tmp_path / "run"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "imported").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signum)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, message
    assert message == f"\nanchorops-train: ended by {signum.name}, without saving\n"
    assert not (tmp_path / "run").exists()


def test_file_that_cannot_be_written(tmp_path: Path):
    path = tmp_path / "state.pt"
    save_atomically({"a": torch.ones(2)}, path)
    with pytest.raises(OSError, match=r"state.pt could not be written: .* are intact"):
        path.with_name("state.pt.part").mkdir()
        save_atomically("text", path)
    path.with_name("state.pt.part").rmdir()
    path.with_name("state.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"state.pt could not be written: .*No space left on device;"):
        save_atomically({"a": torch.ones(100_000)}, path)
    assert torch.equal(torch.load(path)["a"], torch.ones(2))


def test_metrics_of_a_run_that_goes_on(tmp_path: Path):
    first = Metrics(tmp_path)
    for step in (2, 4, 6):
        first.log_metrics({"loss": 1 / step}, step)
    first.log_metrics({"val/iou/a, b": 0.1}, 4)
    first.save()
    second = Metrics(tmp_path, continued=4)
    second.log_metrics({"loss": 0.5}, 6)
    second.save()
    lines = read_metrics(tmp_path / "metrics.csv")
    assert lines == {2: {"loss": 0.5}, 4: {"loss": 0.25, "val/iou/a, b": 0.1}, 6: {"loss": 0.5}}
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"metrics.csv is damaged"):
        read_metrics(tmp_path / "metrics.csv")


def test_comparison(straight: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(straight)]) == 0
    assert "hrnet-w18-small" in capsys.readouterr().out
    assert main(["compare", str(straight), str(straight)]) == 1
    assert "expected each seed once, got" in capsys.readouterr().err
    assert main(["compare", str(straight.parent)]) == 1
    assert "expected the directory of a run" in capsys.readouterr().err
    result = dict.fromkeys(("miou", "head", "body", "tail", "macc", "seconds_per_step"), 1.0)
    result |= {"dataset": "d", "model": "m", "parameters": 1, "memory_mb": None}
    runs = [
        {**result, "methods": methods, "seed": seed, "settings": {"lr": lr, "methods": methods}}
        for methods, lr, seed in (("sar", "0.1", 0), ("cr", "0.2", 0), ("sar", "0.1", 1))
    ]
    rows = comparison(runs).splitlines()[2:]
    assert [row.split()[2:4] for row in rows] == [["sar", "lr=0.1"], ["cr", "lr=0.2"]]


def changed(run: Path, new: Path, group: str, **options: Any) -> Path:
    """The figures of a run, with other options."""
    new.mkdir()
    shutil.copy(run / "metrics.csv", new)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[group] |= options
    (new / "config.yaml").write_text(yaml.safe_dump(config))
    return new


def test_comparison_by_callbacks(straight: Path, tmp_path: Path):
    def settings(name: str, *callbacks: dict[str, Any]) -> dict[str, str]:
        run = changed(straight, tmp_path / name, "trainer", callbacks=[*callbacks])
        return load_results(run)["settings"]

    plain = settings("plain")
    assert settings("shown", {"class_path": "x.RichProgressBar"}) == plain
    average = {"class_path": "x.EMAWeightAveraging", "init_args": {"decay": 0.9}}
    assert settings("averaged", average) != plain


def test_comparison_by_data(straight: Path, tmp_path: Path):
    def settings(name: str, pixels: int, kept: str) -> dict[str, str]:
        run = changed(straight, tmp_path / name, "data", dataset="folder", root=name)
        data = {"classes": ["a"], "training": {"pixels": [pixels]}}
        torch.save({**dict.fromkeys(WEIGHTS), "SegmentationData": data}, run / kept)
        return load_results(run)["settings"]

    assert settings("first", 1, "last.ckpt") == settings("moved", 1, "best.ckpt")
    assert settings("other", 2, "last.ckpt") != settings("again", 1, "last.ckpt")


def test_comparison_with_a_run_that_stopped_early(straight: Path, tmp_path: Path):
    assert load_results(changed(straight, tmp_path / "run", "data", steps=12))["steps"] == 6


def test_parameters_for_training_only(straight: Path):
    """SAR's embedding: 2·(D² + D) + D² and three batch norms, D = 240."""
    line = read_metrics(straight / "metrics.csv")[6]
    extra = line["cost/trained_parameters"] - line["cost/parameters"]
    assert extra == 3 * 240**2 + 8 * 240
    assert line["cost/images_per_second"] > 0


FOLDER = (
    *("--config", "folder", "--model.network", "segformer-b0", "--data.crop", "[32, 32]"),
    *("--data.steps", "1", "--data.batch_size", "2", "--data.workers", "0"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
)


def fit_folder(folder: Path, *options: str) -> Path:
    place = ["--data.root", str(folder)]
    return train(*FOLDER, *place, "--run", str(folder / "run"), *options)


def test_run_on_images_of_any_size(folder: Path, capsys: pytest.CaptureFixture[str]):
    names = [r"Straße $\frac$", "<i>thing", *(f"absent {k}" for k in range(12))]
    (folder / "classes.txt").write_text("\n".join([*names, "", ""]), encoding="utf-8")
    run = fit_folder(folder)
    said = capsys.readouterr().err
    assert "no training pixels: absent 0, absent 1, " in said
    assert said.count("WARNING: the network starts from random weights") == 1
    assert "could not be made" not in said
    assert rf"val/iou/{names[0]}" in read_metrics(run / "metrics.csv")[1]


def test_run_from_weights_of_a_backbone(folder: Path, capsys: pytest.CaptureFixture[str]):
    """They replace a download. Then the run is evaluated on a third split."""
    weights = folder / "mit_b0.pth"
    torch.save(build_model("segformer-b0", 2).backbone.state_dict(), weights)
    initial = ["--model.pretrained", "true", "--model.backbone_weights", str(weights)]
    with pytest.raises(ValueError, match=r"--data\.split: fit expects val, got test"):
        fit_folder(folder, *initial, "--data.split", "test")
    run = fit_folder(folder, *initial)
    said = capsys.readouterr().err
    assert f"backbone: 176 tensors of {weights} taken, 0 not used" in said
    assert "random weights" not in said
    for kind in ("images", "masks"):  # and the training images are not needed
        (folder / kind / "val").rename(folder / kind / "test")
        shutil.rmtree(folder / kind / "train")
    validate = ["validate", "--run", str(run), "--data.split", "test"]
    program = Program(*with_presets(validate))
    assert {"test/miou", "test/iou/thing"} < program.trainer.callback_metrics.keys()
    with pytest.raises(ValueError, match=r"^the weights of .* segformer-b1 .* \(--run\)\. \w+"):
        Program(*with_presets([*validate, "--model.network", "segformer-b1"]))


def test_weights_of_a_whole_network_need_no_download(folder: Path):
    weights = folder / "weights.pt"
    torch.save(build_model("segformer-b0", 2).state_dict(), weights)
    initial = ["--model.pretrained", "true", "--model.weights", str(weights)]
    with mock.patch.object(module, "build_model", wraps=build_model) as built:
        fit_folder(folder, *initial)
    assert built.call_args.kwargs["pretrained"] is False


def test_pictures_may_fail(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nink")

    monkeypatch.setattr(callbacks, "draw_predictions", fail)
    run = fit_folder(folder)
    assert "predictions.png could not be made: no ink" in capsys.readouterr().err
    assert (run / "last.ckpt").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_are_checked_before_a_run(split: str, folder: Path):
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(image(5, 5)).save(folder / f"images/{split}/c.png", exif=turned)
    write(folder / f"masks/{split}/c.png", mask(0, 1, height=5, width=5))
    with pytest.raises(ValueError, match=rf"{split}/c.png: the EXIF orientation is 6, that of"):
        fit_folder(folder)
    (folder / f"images/{split}/c.png").unlink()
    (folder / f"masks/{split}/c.png").unlink()
    write(folder / f"masks/{split}/b.png", mask(9, height=4, width=5))
    with pytest.raises(ValueError, match=rf"masks/{split}/b.png: label values \[9\]"):
        fit_folder(folder)


def test_corrupt_image_in_a_worker(folder: Path, capsys: pytest.CaptureFixture[str]):
    path = folder / "images/train/a/1.jpg"
    path.write_bytes(path.read_bytes()[:-20])  # the header, which is read at the start, is left
    place = ["--data.root", str(folder)]
    words = ["fit", *FOLDER, *place, "--run", str(folder / "run"), "--data.workers", "1"]
    assert main(words) == 1
    (message,) = re.findall("anchorops-train: (.*)", capsys.readouterr().err)
    assert message.startswith(f"{path} cannot be read: ")


@pytest.mark.slow
def test_more_than_255_classes(tmp_path: Path):
    """16-bit masks; class 255 is an ordinary class."""
    for split in ("train", "val"):
        for name, classes in (("a", [255, 299]), ("b", [0, 255])):
            noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
            write(tmp_path / f"images/{split}/{name}.png", noise)
            rows = np.resize(np.array(classes, np.uint16), 64)
            rows[3] = 65_535
            write(tmp_path / f"masks/{split}/{name}.png", np.repeat(rows[:, None], 64, 1))
    (tmp_path / "classes.txt").write_text("\n".join(f"class {k}" for k in range(300)))
    options = ["--data.label_map", "{65535: -1}"]
    run = fit_folder(tmp_path, *options, "--model.methods", "[occl]")
    known = [name for name in read_metrics(run / "metrics.csv")[1] if "val/iou/" in name]
    assert {"val/iou/class 0", "val/iou/class 255", "val/iou/class 299"} <= set(known)


RANKS = """
import os, signal, sys
from torch import nn
from anchorops.train import module
from anchorops.train.cli import main
from anchorops.train.data.digits import DigitScenes
from anchorops.train.networks.models import Segmenter

class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 16, 3, stride=4, padding=1)
    def forward(self, images):
        return self.backbone(images).relu()

# the methods reduce their statistics over the ranks, but not batch norm on a CPU; and the mean of
# the ranks' cross-entropies is that of all if both have the same number of valid pixels
module.build_model = lambda *_, **__: Segmenter(Body(), 16, 11)
scene = DigitScenes.__getitem__
def labelled(self, index):
    image, labels = scene(self, index)
    return image, labels.clamp(min=0)
DigitScenes.__getitem__ = labelled

training_step = module.SegmentationModule.training_step
def step_and_signal(self, *args):
    if "STOPPED" in os.environ and (self.trainer.global_step, self.global_rank) == (1, 1):
        os.kill(os.getpid(), signal.SIGTERM)
    return training_step(self, *args)
module.SegmentationModule.training_step = step_and_signal
status = main()
sys.exit(status != (128 + signal.SIGTERM if "STOPPED" in os.environ else 0))
"""


@pytest.mark.slow
def test_two_ranks(tmp_path: Path):
    """They equal one process. If one rank is asked to stop, both stop after the step, and they go
    on bit for bit."""
    (tmp_path / "ranks.py").write_text(RANKS)
    options = ["--data.steps", "3", "--data.val_images", "11"]
    options += ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "6"]
    options += ["--data.batch_size", "8", "--model.methods", "[sar, cbp]", "--model.method_options"]
    options += ["{sar.process_group: world, sar.delta: 0.0, sar.gate: per_class}"]

    def ranks(count: int, run: Path, *more: str, **environment: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={count}", str(tmp_path / "ranks.py"), "--", "fit", *TINY]
        command += [*options, "--run", str(run), "--trainer.devices", str(count), *more]
        command += ["--trainer.strategy", "ddp"]
        variables = os.environ | environment
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stderr

    alone, straight, stopped = (tmp_path / name for name in ("alone", "straight", "stopped"))
    ranks(1, alone)
    ranks(2, straight)
    said = ranks(2, stopped, STOPPED="yes")
    assert "after step 2; go on with: anchorops-train fit --run" in said
    ranks(2, stopped, "--ckpt_path", "last")
    assert_same_run(stopped, straight)
    first, second = (state(run)["state_dict"] for run in (alone, straight))
    torch.testing.assert_close(first, second)
    together = figures(straight)[3]
    for name, value in figures(alone)[3].items():
        assert value == pytest.approx(together[name], 1e-3) or name in ("loss", "ce", "accuracy")


@pytest.mark.slow
def test_workers_end_with_a_killed_process(tmp_path: Path):
    words = [*TINY, "--data.workers", "1", "--data.steps", "5000", "--run", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "anchorops.train", "fit", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "run/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    try:  # stderr ends when every process that writes to it has ended
        process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert state(tmp_path / "run")["global_step"] >= 2
