"""What a run leaves, how it goes on and is compared, and what it needs."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anchorops.train import commands
from anchorops.train import train as training
from anchorops.train.__main__ import USAGE
from anchorops.train.commands import main
from anchorops.train.networks import learner, models
from anchorops.train.options import Model
from anchorops.train.report.compare import comparison, load_results
from anchorops.train.run import Log, Stopped, only_process, read_metrics, save_atomically
from tests.helpers.image_files import image, mask, write
from tests.helpers.tiny_runs import (
    FOLDER,
    TINY,
    assert_same_run,
    figures,
    fitted,
    small_network,
    state,
)

PLAIN = f"{TINY} --model.methods []"
Refused = Callable[..., None]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network, and empty pictures."""
    monkeypatch.setattr(learner, "build_model", small_network)
    monkeypatch.setattr(models, "build_model", small_network)
    monkeypatch.setattr(training, "draw_predictions", lambda *_, **__: Figure(figsize=(1, 1)))


@pytest.fixture
def copied(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


def validated(words: str) -> dict[str, float]:
    return commands.validate(words.split())


def program(*words: str | bytes, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anchorops.train", *words]
    variables = os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd)


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
    assert state(straight, "best").keys() == {"model", "step"}


def test_a_finished_run_goes_on_to_nothing(straight: Path, copied: Path, capsys):
    """Free options may differ, and are kept."""
    fitted(f"--run {copied} --resume --save_every 1 --data.workers 1")
    assert "no step was done: the run has ended after step 6" in capsys.readouterr().err
    assert_same_run(copied, straight)
    assert yaml.safe_load((copied / "config.yaml").read_text())["save_every"] == 1


def test_limits_of_a_run(small: None, tmp_path: Path, capsys):
    """The printed commands go on, also after a limit of time."""
    words, run = f"{PLAIN} --log_every 1 --val_every 2", tmp_path / "run"
    straight = fitted(f"{words} --run {tmp_path}/straight")

    def printed(command: str, reason: str) -> str:
        assert main(command.split()) == 0
        said = capsys.readouterr().err
        (line,) = re.findall(rf"{reason}; go on with: anchorops-train (.*)", said)
        return line

    ended = "a limit ended the run after step 3 of 6"
    command = printed(f"fit {words} --run {run} --max_steps 3", ended)
    assert command == f"fit --run {run} --resume --max_steps null"
    printed(f"fit --run {run} --resume", f"no step was done: {ended}")
    main(["compare", str(run), str(straight)])
    out, err = capsys.readouterr()
    assert f"{run} has not ended: 3 of 6 steps are in its metrics.csv; it is left out" in err
    assert out.splitlines()[-1].split()[3] == "1"  # seeds
    for step in (4, 5):  # the second validates, then does a step
        command = printed(f"{command} --max_hours 0", f"stopped by --max_hours after step {step}")
    assert main([*command.split(), "--max_hours", "9"]) == 0
    assert_same_run(run, straight)


def test_best_weights_are_those_that_were_validated(
    small: None, tmp_path: Path, monkeypatch, capsys
):
    """Averaged ones, also where a run goes on that has moved. Pictures may fail."""
    monkeypatch.setattr(training, "draw_predictions", lambda *_, **__: 1 / 0)
    run = fitted(f"{PLAIN} --ema 0.5 --model.lr 0.1 --run {tmp_path}/before --max_steps 3")
    last, best = state(run), state(run, "best")["model"]["classifier.weight"]
    assert torch.equal(best, last["average"]["module.classifier.weight"])
    assert not torch.equal(best, last["model"]["classifier.weight"])
    assert "predictions.png could not be made: division by zero" in capsys.readouterr().err
    run = Path(shutil.move(run, tmp_path / "after"))
    fitted(f"--run {run} --resume --max_steps null")
    line = figures(run)[state(run, "best")["step"]]
    logged = {name: x for name, x in line.items() if name.startswith("val/")}
    assert validated(f"--run {run}") == pytest.approx(logged, abs=1e-7)


def test_diverged_network_is_not_saved(small: None, tmp_path: Path, monkeypatch, refused: Refused):
    log = training.Record.log

    def diverge(self: Any, step: int, *others: Any) -> None:
        if step == 4:
            self.parts["model"].body.backbone[1].running_var.fill_(math.inf)
        log(self, step, *others)

    monkeypatch.setattr(training.Record, "log", diverge)
    message = r"not finite at step 4: .* --model.lr 0\.0004 \(now"
    refused(f"fit {PLAIN} --run {tmp_path}/run", message)
    assert state(tmp_path / "run")["step"] == 3


def test_a_demo_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its second run is stopped; the first one has ended, and goes on to nothing."""
    trained: list[tuple[str, bool]] = []

    def train(options: Any, run: Path, *, resume: bool, advice: str) -> None:
        assert advice.startswith("anchorops-train demo --out")
        trained.append((run.name, resume))
        write(run / "config.yaml", b"")
        if len(trained) == 2:
            raise Stopped("stopped", 130)

    monkeypatch.setattr(commands, "train", train)
    monkeypatch.setattr(commands, "load_results", Path)
    monkeypatch.setattr(commands, "comparison", str)
    names = [f"{x}-{y}" for x in ("digits", "digits-segformer-b0") for y in ("plain", "sar")]
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert main(["demo", "--out", str(tmp_path)]) == 0
    again = [(run, run in names[:2]) for run in names]
    assert trained == [(names[0], False), (names[1], False), *again]


# in place of a library of training, which the program imports
LIBRARY = b"import os, time\nos.kill(os.getpid(), int(os.environ['SIGNUM']))\ntime.sleep(60)"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_the_program_starts(signum: signal.Signals, tmp_path: Path):
    """It ends without a traceback."""
    write(tmp_path / "jsonargparse.py", LIBRARY)
    done = program("fit", "--run", "run", cwd=tmp_path, SIGNUM=str(int(signum)))
    assert not done.stderr and done.returncode == -signum and not (tmp_path / "run").exists()


def test_a_terminal_without_utf_8(tmp_path: Path):
    """Nor does a name of a file have to be UTF-8."""
    variables = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = program("validate", "--run", b"\xff\xc3\xb6", cwd=tmp_path, **variables)
    assert done.returncode == 1 and done.stderr.startswith("anchorops-train: ")
    assert r"\xf6" in done.stderr and "Traceback" not in done.stderr and USAGE.isascii()


def hold(run: Path, pipe: Any) -> None:
    with only_process(run):
        if worker := os.fork():
            pipe.send(worker)
        time.sleep(60)


def test_two_processes_with_one_run(tmp_path: Path, refused: Refused):
    run, fork = tmp_path / "run", multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe()
    process = fork.Process(target=hold, args=(run, sender))
    process.start()
    worker, another = receiver.recv(), f"another process trains in {run}: give this"
    refused(f"fit {TINY} --run {run}", f"{another} run its own directory with --run")
    refused(f"demo --out {run}", f"{another} demo its own directory with --out")
    assert [path.name for path in run.iterdir()] == ["run.lock"]
    process.kill()
    process.join()
    with only_process(run):  # although a worker still lives
        os.kill(worker, signal.SIGKILL)


def test_file_that_cannot_be_written(tmp_path: Path):
    path, part = tmp_path / "state.pt", tmp_path / "state.pt.part"
    save_atomically({"a": torch.ones(2)}, path)
    part.mkdir()
    with pytest.raises(OSError, match=r"state.pt could not be written: .* are intact"):
        save_atomically("text", path)
    part.rmdir()
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"state.pt could not be written: .*No space left on device;"):
        save_atomically({"a": torch.ones(100_000)}, path)
    assert torch.equal(torch.load(path)["a"], torch.ones(2))


def test_log_of_a_run_that_goes_on(tmp_path: Path):
    first = Log(tmp_path, 0)
    for step in (2, 4, 6, 8):
        first.write(step, {"loss": 1 / step})
    first.write(4, {"val/iou/a, b": 0.125})
    Log(tmp_path, 4).write(6, {"loss": 0.5})
    lines = read_metrics(tmp_path / "metrics.csv")
    assert lines == {2: {"loss": 0.5}, 4: {"loss": 0.25, "val/iou/a, b": 0.125}, 6: {"loss": 0.5}}


@pytest.mark.parametrize("end", [0, 40, -1000])
def test_damaged_files(end: int, copied: Path, refused: Refused):
    shutil.copy(copied / "best.ckpt", copied / "last.ckpt")
    refused(f"fit --run {copied} --resume", "last.ckpt is of another kind: it has no optimizer")
    for command, name in (
        ("validate --run", "best.ckpt"),
        ("fit --resume --run", "last.ckpt"),
    ):
        write(copied / name, (copied / name).read_bytes()[:end])
        refused(f"{command} {copied}", rf"{copied / name} is damaged \(")
    for name in ("metrics.csv", "config.yaml"):
        write(copied / name, b"step,loss\n1,2,3,4\n")
        refused(f"compare {copied}", rf"{copied / name} is damaged \(")


def test_comparison(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Directories of one name but for the seed are one run, of one setting and one data set."""
    assert main(["compare", str(straight)]) == 0
    assert "hrnet-w18-small" in capsys.readouterr().out

    def results(name: str, seed: int, data: bytes = b"a: 1", lr: float = 0.1) -> dict[str, Any]:
        run = Path(shutil.copytree(straight, tmp_path / name))
        config = yaml.safe_load((straight / "config.yaml").read_text())
        config["data"] |= {"dataset": "folder", "root": name}
        config["model"]["lr"], config["seed"] = lr, seed
        write(run / "config.yaml", yaml.safe_dump(config).encode())
        write(run / "data.yaml", data)
        return load_results(run)

    runs = [results("x-seed0", 0), results("x-seed1", 1), results("y-seed0", 0, lr=1.0)]
    rows = [row.split() for row in comparison(runs).splitlines()[2:]]
    assert [row[:4] for row in rows] == [
        ["x", "hrnet-w18-small", "sar", "2"],
        ["y", "hrnet-w18-small", "sar", "1"],
    ]
    others = [results("0/x-seed0", 0), results("1/x", 2, b"a: 2"), results("2/x-seed3", 3, lr=1.0)]
    for other in others:
        with pytest.raises(ValueError, match="expected directories of one name to have the same"):
            comparison([*runs, other])


def test_run_on_images_of_any_size(folder: Path, refused: Refused, capsys):
    """The weights of a backbone replace a download. Then the run is evaluated on a third split."""
    names = [r"Straße $\frac$", "<i>thing", *(f"absent {k}" for k in range(12))]
    (folder / "classes.txt").write_text("\n".join([*names, "", ""]), encoding="utf-8")
    weights = folder / "mit_b0.pth"
    torch.save(models.build_model(Model("segformer-b0"), 2).backbone.state_dict(), weights)
    for kind in ("images", "masks"):
        shutil.copytree(folder / kind / "val", folder / kind / "test")
    words = f"{FOLDER} --data.root {folder} --run {folder}/run --model.pretrained true --clip 1"
    words += f" --model.backbone_weights {weights} --precision bf16 --data.steps 1"
    refused(f"fit {words} --data.split test", "--data.split: fit expects val, got test")
    run = fitted(words)
    said = capsys.readouterr().err
    assert "no training pixels: absent 0, absent 1, " in said and "could not be made" not in said
    assert f"backbone: 176 tensors of {weights} taken, 0 not used" in said
    assert "random weights" not in said
    assert rf"val/iou/{names[0]}" in read_metrics(run / "metrics.csv")[1]
    for kind in ("images", "masks"):  # the training images are not needed
        shutil.rmtree(folder / kind / "train")
    found = validated(f"--run {run} --data.split test")
    assert {"test/miou", "test/iou/<i>thing"} < found.keys()


def test_files_of_the_validation_are_checked_before_a_run(folder: Path, refused: Refused):
    write(folder / "masks/val/b.png", mask(9, height=4, width=5))
    words = f"fit {FOLDER} --data.root {folder} --run {folder}/run"
    refused(words, r"masks/val/b.png: label values \[9\]")
    assert not (folder / "run/last.ckpt").exists()


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("damage", ["image", "killed"])
def test_an_error_in_a_worker(
    damage: str, small: None, folder: Path, monkeypatch, refused: Refused
):
    path = folder / "images/train/a/1.jpg"
    expected = f"-train: {path} cannot be read: "
    if damage == "image":  # its header, which is read at the start, is left
        write(path, path.read_bytes()[:-20])
    else:
        expected = "a process that loads images was ended from outside"
        monkeypatch.setattr("anchorops.train.data.loading.Training.__getitem__", die)
    words = f"fit {FOLDER} --data.root {folder} --run {folder}/run --data.workers 1"
    refused(words, expected)


def test_other_data(
    small: None, folder: Path, tmp_path_factory, monkeypatch, capsys, refused: Refused
):
    """Moved data are the same; the printed command remembers where they are."""
    run = tmp_path_factory.mktemp("runs") / "run"
    fitted(f"{FOLDER} --data.root {folder} --run {run} --max_steps 1 --val_every 1")
    said = capsys.readouterr().err
    assert said.count("WARNING: the network starts from random weights") == 1
    changes: dict[str, tuple[str, Any]] = {
        "classes": ("classes.txt", b"thing\nground\n"),
        "training pixels": ("masks/train/b.png", mask(0, height=4, width=5)),
        "validation pixels": ("masks/val/b.png", mask(0, height=4, width=5)),
        "validation files": ("images/val/c.png", image(4, 5)),
    }
    for found, (name, content) in changes.items():
        root = Path(shutil.copytree(folder, run.with_name(found.replace(" ", "-"))))
        write(root / name, content)
        if found == "validation files":
            write(root / "images/val/b.png", None)
            (root / "masks/val/b.png").rename(root / "masks/val/c.png")
        words = f"--run {run} --data.root {root}"
        message = f"the data are not those of the run: other {found}"
        refused(f"fit {words} --resume --max_steps null", message)
        assert main(["validate", *words.split()]) == (found == "classes")
    monkeypatch.chdir(shutil.move(folder, run.with_name("moved")))
    fitted(f"--run {run} --resume --data.root .")  # to no step
    fitted(f"--run {run} --resume --max_steps null")
    assert state(run)["step"] == 2


def test_weights_of_an_earlier_version(straight: Path, tmp_path: Path):
    run, best = tmp_path / "old", state(straight, "best")
    config = yaml.safe_load((straight / "config.yaml").read_text())
    model, data = (config[group] | {"seed": 0} for group in ("model", "data"))
    old = {"seed_everything": 0, "model": model, "data": data | {"images": None}}
    old |= {"trainer": {"max_epochs": 1}}
    write(run / "config.yaml", yaml.safe_dump(old).encode())
    weights = {f"learner.model.{name}": x for name, x in best["model"].items()}
    torch.save({"state_dict": weights, "global_step": 6, "channels": 3}, run / "best.ckpt")
    assert validated(f"--run {run}") == validated(f"--run {straight}")


def test_documented_loop():
    """The page has the loop's exact lines."""
    page = Path(__file__).parents[2] / "docs/training.md"
    assert f"```py\n{inspect.getsource(training.fit)}```" in page.read_text()
