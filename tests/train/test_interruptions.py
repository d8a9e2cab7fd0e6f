"""Runs that are stopped by SIGTERM or Ctrl-C, or killed, and go on: they end as a run that nothing
disturbed, bit for bit. Workers load the images, and signals reach all processes of the group."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import TINY, assert_same_run, figures, state

# forked from one process that has imported everything: each run takes seconds
PROGRAM = """
import os, signal, sys, time
import torch
from anchorops.train import __main__, cli
from anchorops.train.module import SegmentationModule

def interrupt(name, step, signum):
    method = getattr(SegmentationModule, name)
    def wrapped(self, *args):
        if self.trainer.global_step == step:
            os.killpg(os.getpgid(0), signum)  # also the workers
        return method(self, *args)
    setattr(SegmentationModule, name, wrapped)

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    name, step, signum, *arguments = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(2, 1)
        if name:
            interrupt(name, int(step), int(signum))
        sys.argv[1:] = arguments
        sys.exit(__main__.main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
STEPS = 7
RUN = (*TINY, "--data.steps", str(STEPS), "--data.workers", "1")


class Programs:
    """Starts the program in one process after another."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def run(self, run: Path, *options: str, at: tuple[str, int, int] = ("", 0, 0)) -> int:
        """The exit status. at: the module's method and the step in which it gets a signal."""
        words = [*map(str, at), "fit", *RUN, "--run", str(run), *options]
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        stdin.write("\t".join(words) + "\n")
        stdin.flush()
        return int(stdout.readline())

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory):
    started = Programs(tmp_path_factory.mktemp("log") / "stderr.txt")
    yield started
    assert started.process.stdin
    started.process.stdin.close()
    started.process.wait()


@pytest.fixture(scope="module")
def undisturbed(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert programs.run(run) == 0, programs.said()
    return run


# training_step runs before the step is counted; validations are after 3, 6 and 7 steps
PLACES = {"training_step": range(STEPS), "validation_step": (3, 6, 7)}
CASES = [
    ("training_step", signal.SIGTERM),
    ("validation_step", signal.SIGINT),
    ("training_step", signal.SIGKILL),
    pytest.param("validation_step", signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param("training_step", signal.SIGINT, marks=pytest.mark.slow),
    pytest.param("validation_step", signal.SIGKILL, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("place", "signum"), CASES)
def test_interrupted_run_goes_on_bit_for_bit(
    place: str, signum: int, programs: Programs, undisturbed: Path, tmp_path: Path
):
    run = tmp_path / "run"
    steps = [step for step in PLACES[place] if step >= 2 or signum != signal.SIGKILL]
    step = random.Random(f"{place}{signum}").choice(steps)
    before = len(programs.said())
    status = programs.run(run, at=(place, step, signum))
    said = programs.said()[before:]
    if signum == signal.SIGKILL:
        assert status == -signum
    else:
        assert status == 128 + signum, said
        done = step + (place == "training_step")
        name = signal.Signals(signum).name
        expected = f"stopped by {name} after step {done}; go on with: anchorops-train fit --run"
        assert expected in said and "Traceback" not in said
        assert state(run)["global_step"] == done
    assert programs.run(run, "--ckpt_path", "last") == 0, programs.said()
    assert_same_run(run, undisturbed)
    steps = [step for step, line in figures(run).items() if "val/miou" in line]
    assert steps == [3, 6, 7]
