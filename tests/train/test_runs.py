"""What a run leaves, how it goes on and is compared, and what is refused."""

import inspect
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anchorops.train import commands
from anchorops.train import run as runs
from anchorops.train import train as training
from anchorops.train.__main__ import USAGE
from anchorops.train.commands import fit, main, validate
from anchorops.train.networks import learner, models
from anchorops.train.report.compare import comparison, load_results
from anchorops.train.run import Log, Stop, Stopped, only_process, read_metrics, save_atomically
from tests.helpers.image_files import image, mask, write
from tests.helpers.tiny_runs import FOLDER, TINY, assert_same_run, figures, small_network, state


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network, and no pictures."""
    monkeypatch.setattr(learner, "build_model", small_network)
    monkeypatch.setattr(models, "build_model", small_network)
    monkeypatch.setattr(training, "draw_predictions", lambda *_, **__: 1 / 0)


def test_a_run_leaves_everything(straight: Path):
    files = {path.name for path in straight.iterdir()}
    expected = {"config.yaml", "data.yaml", "last.ckpt", "best.ckpt", "metrics.csv"}
    assert {*expected, "predictions.png"} <= files and not any("part" in name for name in files)
    lines = read_metrics(straight / "metrics.csv")
    assert [step for step, line in lines.items() if "loss" in line] == [2, 4, 6]
    last = lines[6]
    assert 0 < last["val/miou"] <= 1 and {"val/head", "val/iou/background"} < set(last)
    # SAR's embedding is for training only: 2·(D² + D) + D² and three batch norms, D = 240
    extra = last["cost/trained_parameters"] - last["cost/parameters"]
    assert extra == 3 * 240**2 + 8 * 240
    assert last["cost/flops"] > 0 and last["cost/images_per_second"] > 0
    events = EventAccumulator(str(straight)).Reload()
    assert {"loss", "val/miou"} <= set(events.Tags()["scalars"])
    assert [x.step for x in events.Images("predictions")] == [3, 6]
    assert state(straight, "best").keys() == {"model", "step", "channels"}


def test_a_finished_run_goes_on_to_nothing(straight: Path, tmp_path: Path, capsys):
    """Free options may differ, and are kept."""
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    fit(["--run", str(run), "--resume", "--save_every", "1", "--data.workers", "1"])
    assert "no step was done: the run has ended after step 6" in capsys.readouterr().err
    assert_same_run(run, straight)
    assert yaml.safe_load((run / "config.yaml").read_text())["save_every"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"holds a run: go on with it by `anchorops-train fit --run .* --resume`"),
        (
            ["--resume", "--model.lr", "1.0"],
            r"--model.lr is 1.0, .*config.yaml has 0.004: the numb",
        ),
        (["--resume", "--data.steps", "12"], "--data.steps is 12, .* has 6"),
        (["--resume", "--seed", "1"], "--seed is 1, .* has 0"),
        (["--resume", "--ema", "0.9"], "--ema is 0.9, .* has None"),
        (
            ["--resume", "--model.method_options", "{sar.tau: 0.5}"],
            "--model.method_options is {'sar.tau': 0.5}, .* has None",
        ),
    ],
)
def test_what_would_change_a_run_is_refused(straight: Path, options: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        fit([*TINY, "--run", str(straight), *options])


def test_limits_of_a_run(small: None, tmp_path: Path, capsys):
    """The printed commands go on, also after a limit of time."""
    words = [*TINY, "--model.methods", "[]", "--log_every", "1", "--val_every", "2"]
    straight, run = fit([*words, "--run", str(tmp_path / "straight")]), tmp_path / "run"
    fit([*words, "--run", str(run), "--max_steps", "3"])
    said = capsys.readouterr().err
    (command,) = re.findall(r"a limit ended the run after step 3 of 6; go on with: (.*)", said)
    assert command == f"anchorops-train fit --run {run} --resume --max_steps null"
    assert main(["fit", "--run", str(run), "--resume"]) == 0
    assert "no step was done: a limit ended the run after step 3" in capsys.readouterr().err
    assert main(["compare", str(run), str(straight)]) == 0
    said = capsys.readouterr()
    assert f"{run} has not ended: 3 of 6 steps are in its metrics.csv; it is left out" in said.err
    assert said.out.splitlines()[-1].split()[3] == "1"  # seeds
    assert main(["compare", str(run)]) == 1
    assert main([*command.split()[1:], "--max_hours", "0"]) == 0
    said = capsys.readouterr().err
    (command,) = re.findall(r"stopped by --max_hours after step 4; go on with: (.*)", said)
    assert main([*command.split()[1:], "--max_hours", "0"]) == 0  # validates, then a step
    assert "stopped by --max_hours after step 5" in capsys.readouterr().err
    assert main([*command.split()[1:], "--max_hours", "9"]) == 0
    assert_same_run(run, straight)


def test_best_weights_are_those_that_were_validated(small: None, tmp_path: Path):
    """Averaged ones, also where a run goes on that has moved."""
    words = [*TINY, "--model.methods", "[]", "--ema", "0.5", "--model.lr", "0.1"]
    run = fit([*words, "--run", str(tmp_path / "before"), "--max_steps", "3"])
    last, best = state(run), state(run, "best")["model"]
    averaged = last["average"]["module.classifier.weight"]
    assert torch.equal(best["classifier.weight"], averaged)
    assert not torch.equal(best["classifier.weight"], last["model"]["classifier.weight"])
    run = Path(shutil.move(run, tmp_path / "after"))
    fit(["--run", str(run), "--resume", "--max_steps", "null"])
    step = state(run, "best")["step"]
    logged = {k: x for k, x in figures(run)[step].items() if k.startswith("val/")}
    assert validate(["--run", str(run)]) == pytest.approx(logged, abs=1e-7)


def test_diverged_network_is_not_saved(small: None, tmp_path: Path, monkeypatch):
    log = training.Record.log

    def diverge(self: Any, step: int, *others: Any) -> None:
        if step == 4:
            self.parts["model"].body.backbone[1].running_var.fill_(math.inf)
        log(self, step, *others)

    monkeypatch.setattr(training.Record, "log", diverge)
    with pytest.raises(ValueError, match=r"not finite at step 4: .* --model.lr 0\.0004 \(now"):
        fit([*TINY, "--model.methods", "[]", "--run", str(tmp_path / "run")])
    assert state(tmp_path / "run")["step"] == 3


def test_a_demo_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its second run is stopped; the first one has ended, and goes on to nothing."""
    trained: list[tuple[str, bool]] = []

    def train(options: Any, run: Path, *, resume: bool, advice: str) -> None:
        assert advice.startswith("anchorops-train demo --out")
        trained.append((run.name, resume))
        run.mkdir(exist_ok=True)
        (run / "config.yaml").touch()
        if len(trained) == 2:
            raise Stopped("stopped", 130)

    monkeypatch.setattr(commands, "train", train)
    monkeypatch.setattr(commands, "load_results", Path)
    monkeypatch.setattr(commands, "comparison", str)
    names = [f"{x}-{y}" for x in ("digits", "digits-segformer-b0") for y in ("plain", "sar")]
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert trained[:2] == [(names[0], False), (names[1], False)]
    assert trained[2:] == [(run, run in names[:2]) for run in names]


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    now, ended = time.monotonic(), []
    monkeypatch.setattr(runs.time, "monotonic", lambda: now)
    monkeypatch.setattr(runs, "end_at_once", lambda signum, frame: ended.append(signum))
    stop = Stop()
    stop._receive(signal.SIGINT, None)
    stop._receive(signal.SIGINT, None)  # as torchrun forwards it
    assert stop.asked() and not ended
    now += 2
    stop._receive(signal.SIGINT, None)
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
    (tmp_path / "jsonargparse.py").write_text(LIBRARY)
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


def test_a_terminal_without_utf_8(tmp_path: Path):
    """Nor does a name of a file have to be UTF-8."""
    assert USAGE.isascii()
    command = [sys.executable, "-m", "anchorops.train", "validate", "--run", b"\xff\xc3\xb6"]
    variables = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("anchorops-train: ")
    assert "Traceback" not in done.stderr and r"\xf6" in done.stderr


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
    assert main(["fit", *TINY, "--run", str(run)]) == 1
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


def test_log_of_a_run_that_goes_on(tmp_path: Path):
    first = Log(tmp_path, 0)
    for step in (2, 4, 6):
        first.write(step, {"loss": 1 / step})
    first.write(4, {"val/iou/a, b": 0.1})
    Log(tmp_path, 4).write(6, {"loss": 0.5})
    lines = read_metrics(tmp_path / "metrics.csv")
    assert lines == {2: {"loss": 0.5}, 4: {"loss": 0.25, "val/iou/a, b": 0.1}, 6: {"loss": 0.5}}


@pytest.mark.parametrize("end", [0, 40, -1000])
def test_damaged_files(end: int, straight: Path, tmp_path: Path, capsys):
    def cut(name: str) -> None:
        (run / name).write_bytes((run / name).read_bytes()[:end])

    run = Path(shutil.copytree(straight, tmp_path / "run"))
    commands = {
        "best.ckpt": ["validate", "--run", str(run)],
        "last.ckpt": ["fit", "--run", str(run), "--resume"],
        "metrics.csv": ["compare", str(run)],
        "config.yaml": ["fit", "--run", str(run), "--resume"],
    }
    for name, command in commands.items():
        cut(name)
        assert main(command) == 1
        assert f"{run / name} is damaged (" in capsys.readouterr().err.splitlines()[-1]


def test_a_state_of_another_kind(straight: Path, tmp_path: Path, capsys):
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.copy(run / "best.ckpt", run / "last.ckpt")
    assert main(["fit", "--run", str(run), "--resume"]) == 1
    assert "last.ckpt is of another kind: it has no optimizer" in capsys.readouterr().err


def test_comparison(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(straight)]) == 0
    assert "hrnet-w18-small" in capsys.readouterr().out
    assert main(["compare", str(straight), str(straight)]) == 1
    assert "expected each seed once, got" in capsys.readouterr().err
    assert main(["compare", str(straight.parent)]) == 1
    assert "expected the directory of a run" in capsys.readouterr().err
    result = dict.fromkeys(("miou", "head", "body", "tail", "macc", "seconds_per_step"), 1.0)
    result |= {"dataset": "d", "model": "m", "parameters": 1, "memory_mb": None}
    several = [
        {**result, "methods": methods, "seed": seed, "settings": {"lr": lr, "methods": methods}}
        for methods, lr, seed in (("sar", "0.1", 0), ("cr", "0.2", 0), ("sar", "0.1", 1))
    ]
    rows = comparison(several).splitlines()[2:]
    assert [row.split()[2:4] for row in rows] == [["sar", "lr=0.1"], ["cr", "lr=0.2"]]

    def settings(name: str, data: str) -> dict[str, str]:
        shutil.copytree(straight, tmp_path / name)
        config = yaml.safe_load((straight / "config.yaml").read_text())
        config["data"] |= {"dataset": "folder", "root": name}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / name / "data.yaml").write_text(data)
        return load_results(tmp_path / name)["settings"]

    assert settings("first", "a: 1") == settings("moved", "a: 1") != settings("other", "a: 2")


def fit_folder(folder: Path, *options: str) -> Path:
    return fit([*FOLDER, "--data.root", str(folder), "--run", str(folder / "run"), *options])


def test_run_on_images_of_any_size(folder: Path, capsys: pytest.CaptureFixture[str]):
    """The weights of a backbone replace a download. Then the run is evaluated on a third split."""
    names = [r"Straße $\frac$", "<i>thing", *(f"absent {k}" for k in range(12))]
    (folder / "classes.txt").write_text("\n".join([*names, "", ""]), encoding="utf-8")
    weights = folder / "mit_b0.pth"
    torch.save(models.build_model("segformer-b0", 2).backbone.state_dict(), weights)
    initial = ["--model.pretrained", "true", "--model.backbone_weights", str(weights)]
    with pytest.raises(ValueError, match=r"--data\.split: fit expects val, got test"):
        shutil.copytree(folder / "images/val", folder / "images/test")
        shutil.copytree(folder / "masks/val", folder / "masks/test")
        fit_folder(folder, *initial, "--data.split", "test")
    run = fit_folder(folder, *initial, "--precision", "bf16", "--clip", "1", "--data.steps", "1")
    said = capsys.readouterr().err
    assert "no training pixels: absent 0, absent 1, " in said and "could not be made" not in said
    assert f"backbone: 176 tensors of {weights} taken, 0 not used" in said
    assert "random weights" not in said
    assert rf"val/iou/{names[0]}" in read_metrics(run / "metrics.csv")[1]
    for kind in ("images", "masks"):  # the training images are not needed
        shutil.rmtree(folder / kind / "train")
    words = ["--run", str(run), "--data.split", "test"]
    assert {"test/miou", "test/iou/<i>thing"} < validate(words).keys()
    with pytest.raises(ValueError, match=r"^the weights are .* segformer-b1 .* \(--run\)\. \w+"):
        validate([*words, "--model.network", "segformer-b1"])


def test_pictures_may_fail(small: None, folder: Path, capsys):
    run = fit_folder(folder)
    said = capsys.readouterr().err
    assert "predictions.png could not be made: division by zero" in said
    assert said.count("WARNING: the network starts from random weights") == 1
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


@pytest.mark.parametrize("damage", ["image", "killed"])
def test_an_error_in_a_worker(damage: str, small: None, folder: Path, monkeypatch, capsys):
    path = folder / "images/train/a/1.jpg"
    expected = f"{path} cannot be read: "
    if damage == "image":  # its header, which is read at the start, is left
        path.write_bytes(path.read_bytes()[:-20])
    else:
        expected = "a process that loads images was ended from outside"
        monkeypatch.setattr("anchorops.train.data.loading.Training.__getitem__", die)
    words = ["--data.root", str(folder), "--run", str(folder / "run"), "--data.workers", "1"]
    assert main(["fit", *FOLDER, *words]) == 1
    (message,) = re.findall("anchorops-train: (.*)", capsys.readouterr().err)
    assert message.startswith(expected)


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_other_data(small: None, folder: Path, tmp_path: Path, capsys):
    """Moved data are the same; the printed command remembers where they are."""
    run = fit_folder(folder, "--max_steps", "1", "--val_every", "1")
    changes = {
        "order": lambda root: (root / "classes.txt").write_text("thing\nground\n"),
        "more": lambda root: (root / "classes.txt").write_text("ground\nthing\nmore\n"),
        "renamed": lambda root: [
            (root / kind / "val/b.png").rename(root / kind / "val/c.png")
            for kind in ("images", "masks")
        ],
        "drawn": lambda root: write(root / "masks/train/b.png", mask(0, height=4, width=5)),
    }
    found = {"renamed": "validation files", "drawn": "training pixels"}
    for name, change in changes.items():
        root = Path(shutil.copytree(folder, tmp_path / name, ignore=lambda *_: ["run"]))
        change(root)
        words = ["--run", str(run), "--data.root", str(root)]
        assert main(["fit", *words, "--resume", "--max_steps", "null"]) == 1
        expected = f"the data are not those of the run: other {found.get(name, 'classes')}"
        assert expected in capsys.readouterr().err
        assert main(["validate", *words]) == (name not in found)
    shutil.copytree(folder, tmp_path / "moved", ignore=lambda *_: ["run"])
    shutil.rmtree(folder / "images")
    words = ["fit", "--run", str(run), "--resume"]
    assert main([*words, "--data.root", str(tmp_path / "moved")]) == 0  # to no step
    assert main([*words, "--max_steps", "null"]) == 0
    assert state(run)["step"] == 2


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (
            "pan:resnet18",
            ["--data.crop", "[64, 64]"],
            r"pan:resnet18 cannot take images of 64×64 \(.*\); of squares .* it takes 128×128,",
        ),
        ("deeplabv3:resnet18", ["--data.batch_size", "1"], r"--data.batch_size: batch norm needs"),
    ],
)
def test_sizes_that_a_network_cannot_take(network: str, options: list[str], message: str, tmp_path):
    words = [*TINY, "--model.network", network, "--run", str(tmp_path / "run"), *options]
    with pytest.raises(ValueError, match=message):
        fit(words)


def test_images_that_a_network_cannot_take(tmp_path: Path, capsys):
    model = models.build_model("pan:resnet18", 2)
    torch.save({"model": model.state_dict(), "channels": 3}, tmp_path / "best.ckpt")
    write(tmp_path / "small.png", image(64, 64))
    words = ["--run", str(tmp_path), "--model.weights", str(tmp_path / "best.ckpt")]
    words += ["--model.network", "pan:resnet18", "--data.crop", "[128, 128]", "--device", "cpu"]
    words += ["--out", str(tmp_path / "out"), "--images", str(tmp_path / "small.png")]
    for sliding, message in (
        ([], "give such a --data.crop, and --model.evaluation sliding for"),
        (["--model.evaluation", "sliding"], "give a --data.short_side with which no side"),
    ):
        assert main(["predict", *words, *sliding]) == 1
        said = capsys.readouterr().err
        assert f"{tmp_path / 'small.png'}: --model.network pan:resnet18 cannot take" in said
        assert message in said and said.count("\n") == 1


@pytest.fixture
def checkpoint_of_an_earlier_version(straight: Path, tmp_path: Path) -> Iterator[Path]:
    run = tmp_path / "old"
    run.mkdir()
    config = yaml.safe_load((straight / "config.yaml").read_text())
    model, data = (config[group] | {"seed": 0} for group in ("model", "data"))
    old = {"seed_everything": 0, "model": model, "data": data | {"images": None}}
    (run / "config.yaml").write_text(yaml.safe_dump(old | {"trainer": {"max_epochs": 1}}))
    best = state(straight, "best")
    weights = {f"learner.model.{name}": x for name, x in best["model"].items()}
    old = {"state_dict": weights, "global_step": 6, "channels": 3}
    torch.save(old, run / "best.ckpt")
    yield run


def test_weights_of_an_earlier_version(checkpoint_of_an_earlier_version: Path, straight: Path):
    old = validate(["--run", str(checkpoint_of_an_earlier_version)])
    assert old == validate(["--run", str(straight)])
    run = checkpoint_of_an_earlier_version
    for words in (["--resume"], TINY):
        with pytest.raises(ValueError, match=rf"of an earlier .* --model.weights {run}/best.ckpt"):
            fit(["--run", str(run), *words])


def test_documented_loop():
    """The page has the loop's exact lines."""
    page = Path(__file__).parents[2] / "docs/training.md"
    assert f"```py\n{inspect.getsource(training.fit)}```" in page.read_text()
