"""SIGTERM, Ctrl-C and SIGKILL: before the first step, in the steps, and after the last one."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import TINY, assert_same_run

from anchorops.train import signals
from anchorops.train.config import Config
from anchorops.train.run import loop

# forked from one process that has imported everything: each case takes a second
PROGRAM = """
import os, signal, sys, time
from anchorops.train import __main__, commands, signals
from anchorops.train.report import finish
from anchorops.train.run import loop, parts

def end(place, signum, out):
    module, name = {
        "count": (parts, "class_counts"), "step": (loop._Run, "_train_step"),
        "features": (finish, "collect_features"),
    }[place]
    signals.StopSignals.ECHO = -1
    def send(*_, **__):
        if place == "step":
            os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)
        time.sleep(0.01)  # whoever comes here was not ended at once
        os.write(2, b"went on")
        os._exit(1)
    setattr(module, name, send)
    options = ["--crop", "32", "32", "--train-images", "4", "--val-images", "2", "--batch-size",
               "2", "--steps", "1", "--eval-batch-size", "2", "--threads", "1", "--device", "cpu"]
    __main__.main([*options, "--out", out, "--name", f"{place}-{signum}"])

signal.signal(signal.SIGINT, signal.default_int_handler)
for case in sys.argv[2:]:
    place, signum = case.split("-")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{sys.argv[1]}/{case}.txt", os.O_CREAT | os.O_WRONLY), 2)
        end(place, int(signum), sys.argv[1])
    print(case, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
CASES = {
    "count-2": "it has not begun: start it again",
    "step-2": "it has not begun: start it again",  # the second Ctrl-C
    "features-15": "results.json is there, make the report with: anchorops-train resume",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The directory of the runs, and the exit status of each case."""
    out = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-c", PROGRAM, str(out), *CASES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", CASES)
def test_signal_outside_the_steps(case: str, ended: tuple[Path, dict[str, str]]):
    out, statuses = ended
    message = (out / f"{case}.txt").read_text()
    signum = int(case.partition("-")[2])
    assert statuses[case] == str(128 + signum), message
    last = message.splitlines()[-1]
    assert last.startswith(f"anchorops-train: stopped by {signal.Signals(signum).name}; ")
    assert CASES[case] in last and "Traceback" not in message
    assert (out / case / "results.json").exists() == (case == "features-15")


SCRIPT = "from anchorops.train.__main__ import main\nmain()\n"  # as pip writes it


# in place of a library of training: the program waits while it imports it
LIBRARY = """
import pathlib, time
pathlib.Path(__file__).with_name("imported").touch()
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "signum"), [("module", signal.SIGINT), ("script", signal.SIGTERM)]
)
def test_signal_while_the_program_starts(program: str, signum: signal.Signals, tmp_path: Path):
    """The handlers are installed before the libraries of training are imported."""
    (tmp_path / "anchorops-train").write_text(SCRIPT)
    (tmp_path / "tyro.py").write_text(LIBRARY)
    started = ["-m", "anchorops.train"] if program == "module" else [tmp_path / "anchorops-train"]
    command = [sys.executable, *started, "--out", tmp_path / "runs", "--device", "cpu"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not (tmp_path / "imported").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signum)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, message
    expected = f"stopped by {signum.name}; it has not begun: start it again"
    assert message == f"\nanchorops-train: {expected}\n"
    assert not (tmp_path / "runs").exists()


def test_second_interrupt(monkeypatch: pytest.MonkeyPatch):
    now = time.monotonic()
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with signals.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as torchrun forwards it
        assert stop.received == signal.SIGINT
        now += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signals_stay_ignored():
    """As in a script that runs the program with & or nohup: Ctrl-C is for another program."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.end_at_once.installed(), signals.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that waits for its data at nearly every step."""
    root = tmp_path_factory.mktemp("large")
    for split, size in (("train", 2000), ("val", 32)):
        for kind, shape in (("images", (size, size, 3)), ("masks", (size, size))):
            (root / kind / split).mkdir(parents=True)
            values = np.random.default_rng(0).integers(2, size=shape, dtype=np.uint8)
            Image.fromarray(values).save(root / kind / split / "x.png", compress_level=1)
    files: dict = {"dataset": "folder", "root": root, "num_classes": 2}
    config = TINY.replace(**files, train_images=20_000, val_images=200)
    config = config.replace(log_every=1, save_every=100)
    return config.replace(out=root, name="straight", steps=5, batch_size=2)


@pytest.fixture(scope="module")
def waited(waiting: Config) -> Path:
    loop.start(waiting)
    return waiting.run


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_signals_and_workers(signum: int, waiting: Config, waited: Path):
    """After SIGTERM to the whole group, including workers, there is a checkpoint. If only the
    training process is killed, its workers end too."""
    config = waiting.replace(name=f"signal-{signum}", workers=1, save_every=1 if signum == 9 else 9)
    config.run.mkdir()
    config.save(config.run / "config.json")
    command = [sys.executable, "-m", "anchorops.train", "resume", str(config.run)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    sign = "checkpoint-*" if signum == signal.SIGKILL else "metrics.jsonl"
    while not list(config.run.glob(sign)) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.005)
    kill = process.send_signal if signum == signal.SIGKILL else partial(os.killpg, process.pid)
    kill(signum)
    try:  # stderr ends when every process that writes to it has ended
        _, messages = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if signum == signal.SIGTERM:
        assert process.returncode == 128 + signum, messages.decode()
        assert b"stopped by SIGTERM after step" in messages
    assert not (config.run / "results.json").exists()
    config.replace(workers=0).save(config.run / "config.json")
    loop.resume(config.run)
    assert_same_run(config.run, waited, 5)
