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

import numpy as np
import pytest
import torch
from image_files import image, mask, write
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY, assert_same_run, figures, state

import anchorops as ao
from anchorops.train import IGNORED, callbacks
from anchorops.train.callbacks import Saving, Stopped
from anchorops.train.cli import Program, main, train, with_presets
from anchorops.train.data.module import SegmentationData
from anchorops.train.metrics import Metrics, read_metrics
from anchorops.train.module import SegmentationModule
from anchorops.train.report.compare import comparison
from anchorops.train.saving import save_atomically


def test_a_run_leaves_everything(straight: Path):
    files = {path.name for path in straight.iterdir()}
    assert {"config.yaml", "last.ckpt", "best.ckpt", "metrics.csv", "predictions.png"} <= files
    assert (straight / "predictions.png").read_bytes().startswith(b"\x89PNG")
    lines = read_metrics(straight / "metrics.csv")
    assert [step for step, line in lines.items() if "loss" in line] == [2, 4, 6]
    last = lines[6]
    assert 0 < last["val/miou"] <= 1 and {"val/head", "val/iou/background"} < set(last)
    assert last["cost/flops"] > 0 and last["cost/seconds_methods"] > 0
    events = EventAccumulator(str(straight)).Reload()
    assert {"loss", "val/miou"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["predictions"]
    best = torch.load(straight / "best.ckpt", weights_only=True)
    assert "optimizer_states" not in best and best["global_step"] in (3, 6)


def test_a_finished_run_goes_on_to_nothing(straight: Path, tmp_path: Path):
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    (run / "predictions.png").unlink()
    train("--run", str(run), "--ckpt_path", "last")  # its config.yaml has the options
    assert_same_run(run, straight)
    module = SegmentationModule.load_from_checkpoint(run / "best.ckpt")
    assert module.network.classifier.out_channels == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"holds a run: go on with it by `anchorops-train fit --run .* --ckpt_path last`"),
        (["--ckpt_path", "best"], "--ckpt_path best: expected last"),
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
    ],
)
def test_what_would_change_a_run_is_refused(straight: Path, options: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        train(*TINY, "--run", str(straight), *options)


def test_options_that_change_no_number(straight: Path, tmp_path: Path):
    """Going on also keeps config.yaml, and finds the run by its default name."""
    words = [*TINY, "--run", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Saving, "_received", signal.SIGTERM, raising=False)
        patched.setattr(Saving, "__init__", lambda self, every=500: _saving(self, every, 3))
        train(*words)
    assert state(tmp_path / "run")["global_step"] == 1
    before = (tmp_path / "run/config.yaml").read_text()
    run = train(*words, "--ckpt_path", "last", "--saving.every", "1", "--data.workers", "1")
    assert (run / "config.yaml").read_text() == before
    assert_same_run(run, straight)


def _saving(callback: Saving, every: int, _: int) -> None:
    callback.every, callback.validating, callback._ranks = every, False, None
    callback._received, callback._first, callback._stopping = signal.SIGTERM, 0.0, False


def test_no_checkpoint_to_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = ["fit", *TINY, "--ckpt_path", "last"]
    with pytest.raises(ValueError, match=r"last: .*/runs/digits-sar-seed0 has no last.ckpt"):
        Program(*with_presets(words))
    path = tmp_path / "runs/digits-sar-seed0/last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK\x03\x04")
    (path.parent / "config.yaml").write_text("data: {}\n")
    with pytest.raises(ValueError, match=r"checkpoint .*last.ckpt is damaged"):
        Program(*with_presets(words))


@pytest.mark.parametrize(
    ("images", "difference"),
    [(32, r"training images: 64, now 32"), (64, r"pixels: \[\d+, .*, now \[\d+, ")],
)
def test_other_data_is_refused(images: int, difference: str, straight: Path, tmp_path: Path):
    """For example by a wrong --data.root: the images would be drawn in another order."""
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    config = config.replace("train_images: 64", f"train_images: {images}")
    (run / "config.yaml").write_text(config.replace("data_seed: null", "data_seed: 1"))
    with pytest.raises(ValueError, match=rf"written with other data \({difference}"):
        train("--run", str(run), "--ckpt_path", "last")


def test_early_stopping_of_lightning(tmp_path: Path):
    stopping = "{class_path: EarlyStopping, init_args: {monitor: val/miou, mode: max, patience: 1}}"
    options = ["--model.lr", "0.0", "--trainer.val_check_interval", "1", "--model.methods", "[]"]
    words = [*TINY, *options, "--trainer.callbacks", f"[{stopping}]", "--model.eval_flip", "true"]
    run = train(*words, "--run", str(tmp_path / "run"))
    assert max(figures(run)) < 6 and "cost/flops" in read_metrics(run / "metrics.csv")[2]


@pytest.mark.parametrize("broken", ["logits", "statistics"])
def test_diverged_network_is_not_saved(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training_step = SegmentationModule.training_step

    def diverge(self: SegmentationModule, *args):
        if self.trainer.global_step == 3 and broken == "logits":
            self.network.classifier.register_forward_hook(lambda *x: x[2] / x[0].training)
        elif self.trainer.global_step == 3:
            self.network.state_dict()["body.mix.1.running_var"].fill_(math.inf)
        return training_step(self, *args)

    monkeypatch.setattr(SegmentationModule, "training_step", diverge)
    what = "the logits of validation images" if broken == "logits" else "the weights"
    advice = r"--model.lr 0\.0004 \(now 0\.004\), --trainer.gradient_clip_val 1 or --model.warmup 6"
    with pytest.raises(ValueError, match=rf"not finite at step \d: {what}; .* {advice};"):
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
    with pytest.raises(OSError, match=r"state.pt could not be written: .* MB free"):
        path.with_name("state.pt.part").mkdir()
        save_atomically("text", path)
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


def test_messages_of_the_program(capsys: pytest.CaptureFixture[str]):
    assert main(["presets"]) == 0
    assert "81.4 with sar" in capsys.readouterr().out
    assert main(["fit", "--config", "digts"]) == 1
    assert "expected a file or a preset, got digts" in capsys.readouterr().err
    assert main(["fit", "--config", "digits", "--data.crop", "[3, 4]"]) == 1
    assert "--data.crop: expected two multiples of 32" in capsys.readouterr().err
    assert main(["fit", "--config", "digits", "--model.lr", "a"]) == 2


def test_measures_of_neural_collapse(tmp_path: Path):
    """On the first two of ten images, compared with direct computations."""
    run = train(
        *(*TINY, "--model.methods", "[]", "--collapse.images", "2", "--data.eval_batch_size", "2"),
        *("--data.steps", "3", "--run", str(tmp_path / "run")),
    )
    measures = read_metrics(run / "metrics.csv")[3]
    module = SegmentationModule.load_from_checkpoint(run / "best.ckpt").eval()
    _, scenes = SegmentationData(crop=(32, 32), val_images=10).splits()
    images, labels = zip(*(scenes[i] for i in range(2)), strict=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        features = module.network.body((torch.stack(images) / 255 - mean) / std)
    centroids, counts = ao.class_centroids(
        features, torch.stack(labels).long(), 11, ignore_index=IGNORED
    )
    centered = centroids[counts > 0] - centroids[counts > 0].mean(0)
    i, j = torch.triu_indices(len(centered), len(centered), 1)
    cosines = torch.cosine_similarity(centered[i], centered[j])
    spread = float(cosines.std(correction=0))
    assert measures["centroids.equiangularity"] == pytest.approx(spread, 1e-3)
    expected = float((cosines + 1 / (len(centered) - 1)).abs().mean())
    assert measures["centroids.maximal_angle"] == pytest.approx(expected, 1e-3)
    names = ("classifier.equiangularity", "classifier.maximal_angle", "accuracy_and_pixels")
    assert {*names, "accuracy_and_images"} <= measures.keys()


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
    place = ["--data.root", str(folder), "--data.cache", str(folder / "counts")]
    return train(*FOLDER, *place, "--run", str(folder / "run"), *options)


def test_run_on_images_of_any_size(folder: Path, capsys: pytest.CaptureFixture[str]):
    names = [r"Straße $\frac$", "<i>thing", *(f"absent {k}" for k in range(12))]
    (folder / "classes.txt").write_text("\n".join([*names, "", ""]), encoding="utf-8")
    run = fit_folder(folder)
    said = capsys.readouterr().err
    assert f"no training pixels: {', '.join(names[2:12])} and 2 more\n" in said
    assert said.count("WARNING: the network starts from random weights") == 1
    assert "could not be made" not in said
    assert rf"val/iou/{names[0]}" in read_metrics(run / "metrics.csv")[1]
    with pytest.raises(
        ValueError, match=r"--data\.eval_batch_size: more than 1 needs images of one"
    ):
        fit_folder(folder, "--run", str(folder / "other"), "--data.eval_batch_size", "2")


def test_pictures_may_fail(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nink")

    monkeypatch.setattr(callbacks, "draw_predictions", fail)
    run = fit_folder(folder)
    assert "predictions.png could not be made: no ink" in capsys.readouterr().err
    assert (run / "centroids.npz").exists() and (run / "last.ckpt").exists()


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
    place = ["--data.root", str(folder), "--data.cache", str(folder / "counts")]
    words = ["fit", *FOLDER, *place, "--run", str(folder / "run"), "--data.workers", "1"]
    assert main(words) == 1
    (message,) = re.findall("anchorops-train: (.*)", capsys.readouterr().err)
    assert message.startswith(f"{path} cannot be read: ")


def test_weights_of_absent_classes(folder: Path):
    (folder / "classes.txt").write_text("ground\nthing\nabsent")
    with pytest.raises(ValueError, match="every class with training pixels has weight 0"):
        fit_folder(folder, "--model.given_class_weights", "[0.0, 0.0, 1.0]")


def test_more_than_255_classes(tmp_path: Path):
    """16-bit masks; class 255 is an ordinary class."""
    for split in ("train", "val"):
        for name, classes in (("a", [255, 299]), ("b", [0, 255])):
            noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
            write(tmp_path / f"images/{split}/{name}.png", noise)
            rows = np.resize(np.array(classes, np.uint16), 64)
            rows[3] = 65_535
            write(tmp_path / f"masks/{split}/{name}.png", np.repeat(rows[:, None], 64, 1))
    options = ["--data.num_classes", "300", "--data.label_map", "{65535: -1}"]
    run = fit_folder(tmp_path, *options, "--model.methods", "[occl]")
    known = [name for name in read_metrics(run / "metrics.csv")[1] if "val/iou/" in name]
    assert {"val/iou/class 0", "val/iou/class 255", "val/iou/class 299"} <= set(known)


RANKS = """
import os, signal, sys
import torch
from anchorops.train.cli import main
from anchorops.train.module import SegmentationModule

training_step = SegmentationModule.training_step
def step_and_signal(self, *args):
    if (self.trainer.global_step, self.global_rank) == (0, 1) and "--stopped" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    return training_step(self, *args)
SegmentationModule.training_step = step_and_signal
torch.set_num_threads(1)
words = sys.argv[1:]
if "--stopped" in words:
    words.remove("--stopped")
    sys.argv.append("--stopped")
status = main(words)
expected = 128 + signal.SIGTERM if "--stopped" in sys.argv else 0
sys.exit(status != expected)
"""


@pytest.mark.slow
def test_two_ranks(tmp_path: Path):
    """If one rank is asked to stop, both stop after the step, and they go on bit for bit. The
    figures of two ranks are those of their checkpoint in one process."""
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", str(tmp_path / "ranks.py"), "--", "fit", *TINY]
    options = ["--data.steps", "3", "--data.val_images", "11", "--trainer.strategy", "ddp"]
    options += ["--trainer.devices", "2", "--collapse.images", "11", "--data.batch_size", "8"]
    options += ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "6"]
    options += ["--model.method_options", "{sar.process_group: world}"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for run, more in (
        (straight, ()),
        (stopped, ("--stopped",)),
        (stopped, ("--ckpt_path", "last")),
    ):
        command = [*torchrun, *options, "--run", str(run), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        if "--stopped" in more:
            assert state(run)["global_step"] == 1
            assert "go on with: torchrun … -m anchorops.train -- fit --run" in done.stderr
    assert_same_run(stopped, straight)
    words = ["validate", "--run", str(straight), "--ckpt_path", "last"]
    words += ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    alone = Program(*with_presets(words)).trainer.callback_metrics
    together = figures(straight)[3]
    for name, value in alone.items():
        assert float(value) == pytest.approx(together[name], rel=1e-6), name


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
