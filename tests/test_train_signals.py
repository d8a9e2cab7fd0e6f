"""SIGTERM and Ctrl-C before the first step and after the last one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# forked from one process that has imported everything: each case takes a second
PROGRAM = """
import os, signal, sys, time
from anchorops.train import __main__, commands, finish, loop, parts, report, signals

def end(place, signum, out):
    module, name = {
        "count": (parts, "class_counts"), "build": (parts, "build_model"),
        "step": (loop._Run, "_train_step"),
        "features": (finish, "collect_features"), "report": (report, "_curves"),
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
    "count-2": "there is no checkpoint yet: start it again",
    "build-15": "there is no checkpoint yet: start it again",
    "step-2": "there is no checkpoint yet: start it again",  # the second Ctrl-C
    "features-15": "results.json is there, make the report with: anchorops-train resume",
    "report-2": "results.json is there, make the report with: anchorops-train resume",
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
    assert (out / case / "results.json").exists() == (case in ("features-15", "report-2"))


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_the_program_is_imported(signum: int, tmp_path: Path):
    command = [sys.executable, "-m", "anchorops.train", "--out", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as a shell may
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not hears(process.pid, signal.SIGTERM) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signum)
    _, message = process.communicate(timeout=60)
    name = signal.Signals(signum).name
    assert process.returncode == 128 + signum, message
    assert message == (
        f"\nanchorops-train: stopped by {name}; there is no checkpoint yet: start it again\n"
    )
    assert not list(tmp_path.iterdir())


def hears(process: int, signum: int) -> bool:
    """Whether a process has a handler of the signal."""
    status = Path(f"/proc/{process}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signum - 1) & 1)
