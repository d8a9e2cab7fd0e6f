"""What a run leaves, how it goes on and is compared, and what it needs."""

import csv
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from anchorops.train import __main__ as start
from anchorops.train import commands, networks
from anchorops.train import train as training
from anchorops.train.commands import main
from anchorops.train.options import FREE
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
Refused = Callable[..., str]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network, and empty pictures."""
    monkeypatch.setattr(networks, "build_model", small_network)
    monkeypatch.setattr(training, "draw_predictions", lambda *_: Image.new("RGB", (1, 1)))


@pytest.fixture
def copied(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


def program(*words: str | bytes, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anchorops.train", *words]
    variables = os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd)


def test_a_run_leaves_everything(straight: Path, capsys):
    files = {path.name for path in straight.iterdir()}
    expected = {"config.yaml", "data.yaml", "last.ckpt", "best.ckpt", "metrics.csv"}
    assert {*expected, "predictions.png"} <= files and not any("part" in name for name in files)
    lines = read_metrics(straight / "metrics.csv")
    assert [step for step, line in lines.items() if "loss" in line] == [2, 4, 6]
    last = lines[6]
    assert 0 < last["val/miou"] <= 1 and {"val/head", "val/iou/background"} < set(last)
    events = EventAccumulator(str(straight)).Reload()
    assert {"loss", "val/miou"} <= set(events.Tags()["scalars"])
    picture = np.array(Image.open(straight / "predictions.png"))
    assert picture.shape == (3 * 192, 8 * 192, 3) and len(np.unique(picture)) > 10
    assert state(straight, "best").keys() == {"model", "step", "miou"}
    assert main(["compare", str(straight), str(straight)]) == 0
    header, *rows = (words.split() for words in capsys.readouterr().out.splitlines())
    assert rows[0] == rows[1] and header[:2] == ["run", "val/miou"]
    assert rows[0][:2] == ["straight", f"{last['val/miou']:.3f}"]


def test_a_finished_run_goes_on_to_nothing(straight: Path, copied: Path, capsys):
    """It is not validated again. Free options may differ, and are kept. Without its log it is
    validated, but its best weights stay."""
    fitted(f"--run {copied} --resume --save_every 1 --data.workers 1")
    said = capsys.readouterr().err
    assert f"{copied} goes on from step 6\n{copied} has ended, after step 6\n" in said
    assert (copied / "best.ckpt").stat().st_mtime == (straight / "best.ckpt").stat().st_mtime
    assert_same_run(copied, straight)
    assert yaml.safe_load((copied / "config.yaml").read_text())["save_every"] == 1
    (copied / "metrics.csv").unlink()
    fitted(f"--run {copied} --resume")
    assert (copied / "best.ckpt").stat().st_mtime == (straight / "best.ckpt").stat().st_mtime


def test_limits_of_a_run(small: None, tmp_path: Path, refused: Refused, capsys):
    """The printed advice goes on, also after a limit of time."""
    words, run = f"{PLAIN} --log_every 1 --val_every 2", tmp_path / "run"
    straight = fitted(f"{words} --run {tmp_path}/straight")
    line = r"^step (\d) of 6: loss [\d.]+, lr [\d.e-]+, \d\d:\d\d left$"  # without a terminal
    assert re.findall(line, capsys.readouterr().err, re.MULTILINE) == [*"123456"]

    def advised(words: str, reason: str) -> str:
        assert main(words.split()) == 0
        said = capsys.readouterr().err
        (added,) = re.findall(rf"{reason}; go on with the same command and (.*)", said)
        return f"{words} {added}"

    ended = "a limit ended the run after step 3 of 6"
    words = advised(f"fit {words} --run {run} --max_steps 3", ended)
    refused(f"compare {run} {straight}", "run has not ended: 3 of 6 steps are in metrics.csv")
    with open(run / "metrics.csv", "a") as log:  # behind the last state
        log.write("7,1.0\n")
    for step in (4, 5):  # the second validates, then does a step
        advised(f"{words} --max_hours 1e-9", "stopped by --max_hours")
        assert state(run)["step"] == step
    assert main(words.split()) == 0
    assert_same_run(run, straight)


def test_a_run_whose_first_steps_float16_skips(small: None, tmp_path: Path, monkeypatch):
    """It goes on from a skipped step, and from one that was not."""
    large = partial(torch.amp.GradScaler, init_scale=2.0**20)
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    words = f"{PLAIN} --precision fp16 --model.optimizer sgd"
    straight = fitted(f"{words} --run {tmp_path}/straight")
    scale = state(straight)["scaler"]["scale"]
    assert 2.0**20 > scale > 2.0**14  # a step halves it
    for step in (1, 5, 6):
        run = fitted(f"{words} --run {tmp_path}/run --resume --max_steps {step}")
    assert_same_run(run, straight)


def test_a_run_without_its_state(small: None, tmp_path: Path, refused: Refused, capsys):
    """It starts again if it cannot have saved one."""
    words, run = f"{PLAIN} --log_every 1 --val_every 5 --save_every 3", tmp_path / "run"
    straight = fitted(f"{words} --run {tmp_path}/straight")
    starts = f"{run} has no state: the run starts at step 0\n"
    fitted(f"{words} --run {run} --resume --max_steps 5")
    assert starts in capsys.readouterr().err
    lines = (run / "metrics.csv").read_bytes().splitlines(keepends=True)
    for name, content in (("last.ckpt", []), ("best.ckpt", []), ("metrics.csv", lines[:5])):
        (run / name).unlink()
        if content:
            write(run / name, b"".join(content))
        missing = f"--resume: expected {run}/last.ckpt, which the run has saved, got no such file"
        refused(f"fit --run {run} --resume", missing)
        refused(f"fit {words} --run {run}", "holds a run: --resume")
    write(run / "metrics.csv", b"".join(lines[:4]))
    fitted(f"--run {run} --resume --max_steps null")
    assert starts in capsys.readouterr().err
    assert_same_run(run, straight)


def test_best_weights_are_those_that_were_validated(small: None, tmp_path: Path):
    """Averaged ones, also where a run goes on that has moved."""
    run = fitted(f"{PLAIN} --ema 0.5 --model.lr 0.1 --run {tmp_path}/before --max_steps 3")
    last, best = state(run), state(run, "best")["model"]["classifier.weight"]
    assert torch.equal(best, last["average"]["module.classifier.weight"])
    assert not torch.equal(best, last["model"]["classifier.weight"])
    run = Path(shutil.move(run, tmp_path / "after"))
    fitted(f"--run {run} --resume --max_steps null")
    line = figures(run)[state(run, "best")["step"]]
    logged = {name: x for name, x in line.items() if name.startswith("val/")}
    assert commands.validate(["--run", str(run)]) == pytest.approx(logged, abs=1e-7)


def test_precision_and_confusion_of_an_evaluation(copied: Path):
    """The precision is that of the run. The matrix has names; other weights leave none."""
    dtypes = list[torch.dtype]()

    def keep(module: nn.Module, _: object, output: Any) -> None:
        if isinstance(module, networks.Segmenter):
            dtypes.append(output.dtype)

    with register_module_forward_hook(keep):
        found = commands.validate(["--run", str(copied)])
        assert dtypes[-1] == torch.float32
        rows = [*csv.DictReader((copied / "confusion.csv").read_text().splitlines())]
        (copied / "confusion.csv").unlink()
        words = f"--config {copied}/config.yaml --model.weights {copied}/best.ckpt --precision bf16"
        commands.validate(words.split())
    assert not (copied / "confusion.csv").exists()
    assert dtypes[-1] == torch.bfloat16
    known = yaml.safe_load((copied / "data.yaml").read_text())
    assert [row.pop("true class") for row in rows] == [*rows[0]] == known["classes"]
    matrix = np.array([[*map(int, row.values())] for row in rows])
    assert matrix.sum(1).tolist() == known["validation pixels"]
    assert matrix.trace() / matrix.sum() == pytest.approx(found["val/accuracy"], abs=1e-6)


def test_diverged_network_is_not_saved(small: None, tmp_path: Path, monkeypatch, refused: Refused):
    log = training.Record.log

    def diverge(self: Any, step: int, *others: Any) -> None:
        if step == 4:
            self.stateful["model"].body.backbone[1].running_var.fill_(math.inf)
        log(self, step, *others)

    monkeypatch.setattr(training.Record, "log", diverge)
    message = r"not finite at step 4: .* --model.lr 0\.0004 \(now"
    refused(f"fit {PLAIN} --run {tmp_path}/run", message)
    assert state(tmp_path / "run")["step"] == 3


def test_a_demo_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its second run is stopped; the first one has ended, and goes on to nothing."""
    trained: list[str] = []

    def train(options: Any, run: Path, resume: bool, advice: str) -> None:
        assert resume and advice == "go on with the same command"
        trained.append(run.name)
        if len(trained) == 2:
            raise Stopped("stopped", 130)

    monkeypatch.setattr(commands, "train", train)
    monkeypatch.setattr(commands, "comparison", str)
    names = [f"{x}-{y}" for x in ("digits", "digits-segformer-b0") for y in ("plain", "sar")]
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert trained == [*names[:2], *names]


def test_an_interrupt_while_the_program_starts(tmp_path: Path):
    """Here a library that it imports. It ends without a traceback."""
    library = b"import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    write(tmp_path / "jsonargparse.py", library)
    done = program("fit", "--run", "run", cwd=tmp_path)
    assert not done.stderr and done.returncode == -signal.SIGINT


def test_a_terminal_without_utf_8(tmp_path: Path):
    """Nor does a name of a file have to be UTF-8."""
    variables = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = program("validate", "--run", b"\xff\xc3\xb6", cwd=tmp_path, **variables)
    assert done.returncode == 1 and done.stderr.startswith("anchorops-train: ")
    assert r"\xf6" in done.stderr and "Traceback" not in done.stderr
    assert str(start.__doc__).isascii()


def hold(run: Path, pipe: Any) -> None:
    with only_process(run):
        if worker := os.fork():
            pipe.send(worker)
        time.sleep(60)


def test_two_processes_with_one_run(tmp_path: Path, refused: Refused):
    run, fork = tmp_path / "digits-plain", multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe()
    process = fork.Process(target=hold, args=(run, sender))
    process.start()
    worker, another = receiver.recv(), f"another process trains in {run}: give this one its own"
    refused(f"fit {TINY} --run {run}", another)
    refused(f"demo --out {tmp_path}", another)
    assert [path.name for path in run.iterdir()] == ["run.lock"]
    process.kill()
    process.join()
    with only_process(run):  # although a worker still lives
        os.kill(worker, signal.SIGKILL)


def test_file_that_cannot_be_written(tmp_path: Path):
    path, part = tmp_path / "state.pt", tmp_path / "state.pt.part"
    save_atomically({"a": torch.ones(2)}, path)
    for content in ("text", {"a": torch.ones(100_000)}):
        part.symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"state.pt could not be written: .*No space .*intact"):
            save_atomically(content, path)
    with pytest.raises(OSError, match=r"state.pt could not be written: .*No such file"):
        save_atomically("text", tmp_path / "nowhere/state.pt")
    assert torch.equal(torch.load(path)["a"], torch.ones(2))


def test_log_on_a_full_disk(tmp_path: Path):
    log = Log(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    log.path = Path("/dev/full")
    with pytest.raises(OSError, match=r"^/dev/full could not be written: .*No space left"):
        log.write(2, {"loss": 1.0})


def test_log(tmp_path: Path):
    """The file is written anew only for a new column. A part of a line is no line."""
    log, path = Log(tmp_path, 0), tmp_path / "metrics.csv"
    for step, name, appended in ((1, "a", 0), (2, "a", 1), (2, "b", 0), (3, "b", 1)):
        before = path.stat().st_ino if path.exists() else None
        log.write(step, {name: step / 2})
        assert (path.stat().st_ino == before) == appended
    write(path, path.read_bytes() + b"4,1")  # of a process that was killed
    assert read_metrics(path) == {1: {"a": 0.5}, 2: {"a": 1.0, "b": 1.0}, 3: {"b": 1.5}}


def test_damaged_files(straight: Path, copied: Path, refused: Refused):
    data = (copied / "data.yaml").read_bytes()
    write(copied / "data.yaml", b"classes: [a, b]")
    refused(f"validate --run {copied}", r"data.yaml is damaged \(it has no classes or no training")
    write(copied / "data.yaml", data)
    lines = (copied / "metrics.csv").read_bytes()
    for damaged in (b"", b"x\n", b"step,loss\na,b\n"):
        write(copied / "metrics.csv", damaged)
        refused(f"fit --run {copied} --resume", r"metrics.csv is damaged \(")
    write(copied / "metrics.csv", lines)
    shutil.copy(copied / "best.ckpt", copied / "last.ckpt")
    refused(f"fit --run {copied} --resume", "last.ckpt is of another kind: it has no optimizer")
    weights = f"fit {TINY} --run {copied}/new --model.weights {copied}/best.ckpt"
    go_on, validate = f"fit --run {copied} --resume", f"validate --run {copied}"
    shutil.copy(straight / "last.ckpt", copied / "last.ckpt")
    cases = [(words, "best.ckpt") for words in (weights, validate, go_on)] + [(go_on, "last.ckpt")]
    for words, name in cases:
        whole = (straight / name).read_bytes()
        half = len(whole) // 2
        zeros = whole[:half] + bytes(4096) + whole[half + 4096 :]  # which torch does not notice
        for content in (zeros, whole[:-1000], whole[:40], b""):
            write(copied / name, content)
            refused(words, rf"{copied / name} is damaged \(")
    write(copied / "config.yaml", b"step,loss\n1,2,3,4\n")
    refused(f"compare {copied}", r"config.yaml is damaged \(")


def test_run_on_images_of_any_size(folder: Path, refused: Refused, capsys):
    """Then the run is evaluated on a third split."""
    names = [r"Straße $\frac$", "<i>thing", *(f"absent {k}" for k in range(12))]
    (folder / "classes.txt").write_text("\n".join([*names, "", ""]), encoding="utf-8")
    words = f"{FOLDER} --data.root {folder} --run {folder}/run --clip 1 --precision bf16"
    refused(f"fit {words} --data.split test", "--data.split: expected val for fit, got test")
    run = fitted(words)
    assert "classes without training pixels: absent 0, absent 1, " in capsys.readouterr().err
    assert f"val/iou/{names[0]}" in read_metrics(run / "metrics.csv")[2]
    for kind in ("images", "masks"):  # the training images are not needed
        (folder / kind / "train").rename(folder / kind / "test")
    found = commands.validate(["--run", str(run), "--data.split", "test"])
    assert {"test/miou", "test/iou/<i>thing"} < found.keys()


@pytest.mark.parametrize("error", [None, EOFError(), ConnectionResetError(104, "reset")], ids=repr)
def test_a_worker_that_was_killed(
    error: Exception | None, small: None, tmp_path: Path, monkeypatch, refused: Refused
):
    """What its process leaves to read is a matter of chance: nothing, or an error."""

    def end(*_: Any) -> Any:
        if error:
            raise error
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("anchorops.train.data.loading.Prepared.__getitem__", end)
    words = f"fit {TINY} --data.workers 1 --run {tmp_path}/run"
    refused(words, "a process that loads images has ended .* give fewer --data.workers$")


def test_other_data(small: None, folder: Path, tmp_path_factory, monkeypatch, refused: Refused):
    """Moved data are the same; the printed command remembers where they are."""
    run = tmp_path_factory.mktemp("runs") / "run"
    fitted(f"{FOLDER} --data.root {folder} --run {run} --max_steps 1 --val_every 1")
    changes: list[tuple[str, str, Any]] = [
        ("classes", "classes.txt", b"thing\nground\n"),
        ("training pixels", "masks/train/b.png", mask(0, height=4, width=5)),
        ("validation pixels", "masks/val/b.png", mask(0, height=4, width=5)),
        ("validation files", "masks/val/b.tif", mask(1, height=4, width=5)),
        ("validation files", "images/val/b.tif", image(4, 5)),
    ]
    for number, (found, name, content) in enumerate(changes):
        root = Path(shutil.copytree(folder, run.with_name(str(number))))
        write(root / name, content)
        if name.endswith(".tif"):
            (root / name).with_suffix(".png").unlink()
        words = f"--run {run} --data.root {root}"
        message = f"-train: {found}: .* the numbers would not be those of the run"
        refused(f"fit {words} --resume --max_steps null", message)
        assert main(["validate", *words.split()]) == (found == "classes")
    monkeypatch.chdir(shutil.move(folder, run.with_name("moved")))
    fitted(f"--run {run} --resume --data.root .")  # to no step
    fitted(f"--run {run} --resume --max_steps null")
    assert state(run)["step"] == 2


def test_documented_lines(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page has the loop's exact lines, and what may differ where a run goes on. Its lines in
    Python read the best weights, as does the ONNX model that they write."""
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    assert f"```py\n{inspect.getsource(training.fit)}```" in page
    assert ", ".join(f"`{name}`" for name in FREE) in page
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits-plain-seed0").symlink_to(straight)
    write(tmp_path / "a.jpg", image(32, 32))
    monkeypatch.chdir(tmp_path)
    (lines,) = (x for x in re.findall("```py\n(.*?)```", page, re.DOTALL) if "onnx" in x)
    exec(lines, names := dict[str, Any]())
    commands.predict_masks(["--run", str(straight), "--images", "a.jpg", "--out", "masks"])
    np.testing.assert_array_equal(names["classes"][0], np.array(Image.open("masks/a.png")))
    inputs = names["images"].cpu()
    (logits,) = onnxruntime.InferenceSession("model.onnx").run(None, {"images": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), names["model"](inputs), atol=1e-4, rtol=0)
