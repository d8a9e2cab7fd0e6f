"""Commands that are stopped by SIGTERM or Ctrl-C, or killed, and go on by the command that they
print: runs end as one that nothing disturbed, bit for bit, on one rank and on several. Workers load
the images, and signals reach all processes of the group."""

import re
import shlex
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.image_files import image, write
from tests.helpers.programs import Programs
from tests.helpers.tiny_runs import TINY, assert_same_run, figures, state

RUN = (
    *(*TINY, "--data.steps", "7", "--data.workers", "1", "--data.val_images", "8"),
    *("--data.batch_size", "12"),  # of two batches of three ranks, too
    *("--data.eval_batch_size", "2", "--accumulate", "2", "--ema", "0.9", "--log_every", "1"),
)
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    started = Programs(tmp_path_factory.mktemp("log") / "stderr.txt")
    yield started
    assert started.process.stdin
    started.process.stdin.close()
    started.process.wait()


@pytest.fixture(scope="module")
def straight(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run of this number of ranks that nothing disturbs."""

    @cache
    def trained(ranks: int) -> Path:
        run = tmp_path_factory.mktemp("runs") / "straight"
        status, said = programs.run("fit", *RUN, "--run", run, ranks=ranks)
        assert not any(status), said
        assert [step for step, line in figures(run).items() if "val/miou" in line] == [3, 6, 7]
        return run

    return trained


def go_on(programs: Programs, command: str, ranks: int) -> None:
    """By the command that was printed."""
    launcher = f"torchrun --standalone --nproc-per-node {ranks} -m anchorops.train --"
    program = "anchorops-train" if ranks == 1 else launcher
    assert command.startswith(f"{program} ")
    status, said = programs.run(*shlex.split(command.removeprefix(program)), ranks=ranks)
    assert not any(status), said


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


# a step calls once; a validation once for each batch of a rank
@pytest.mark.parametrize(
    ("ranks", "place", "call", "signum", "rank"),
    [
        (1, "step", 4, TERM, None),
        (1, "step", 5, KILL, None),
        (1, "validation", 1, INT, None),
        slow(1, "step", 1, INT, None),
        slow(1, "validation", 3, KILL, None),
        (2, "step", 4, INT, 1),
        (2, "validation", 0, TERM, 0),
        slow(2, "step", 3, TERM, None),
        slow(2, "step", 5, KILL, 0),
        slow(2, "validation", 2, KILL, None),
        slow(3, "step", 3, TERM, None),  # sums of three depend on their order
    ],
)
def test_a_run_goes_on_bit_for_bit(
    ranks: int,
    place: str,
    call: int,
    signum: signal.Signals,
    rank: int | None,
    programs: Programs,
    straight: Callable[[int], Path],
    tmp_path: Path,
):
    run, at = tmp_path / "run", {"place": place, "call": call, "signum": signum, "rank": rank}
    status, said = programs.run("fit", *RUN, "--run", run, ranks=ranks, **at)
    assert "Traceback" not in said
    if signum == KILL:
        assert -KILL in status
        alone, several = f"anchorops-train fit --run {run} --resume", "torchrun --standalone "
        several += f"--nproc-per-node {ranks} -m anchorops.train -- fit --run {run} --resume"
        go_on(programs, alone if ranks == 1 else several, ranks)
    else:
        assert stopped(status, signum), said
        (message,) = re.findall(rf"by {signum.name} after step (\d+); go on with: (.*)", said)
        assert state(run)["step"] == int(message[0]) == (call + 1 if place == "step" else 3)
        go_on(programs, message[1], ranks)
    assert_same_run(run, straight(ranks))


def stopped(status: list[int], signum: int) -> bool:
    """torchrun may end a rank that is about to end."""
    return 128 + signum in status and {*status} <= {128 + signum, -TERM}


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_one_of_two_ranks_is_stopped_where_nothing_is_saved(
    command: str, programs: Programs, straight: Callable[[int], Path], tmp_path: Path
):
    """Before the first step, or while figures are computed: both end."""
    place: dict[str, Any] = {"place": "start", "call": 0}
    words = ("fit", *RUN, "--run", tmp_path / "run")
    if command == "validate":
        words, place = ("validate", "--run", straight(2)), {"place": "validation", "call": 0}
    status, said = programs.run(*words, ranks=2, signum=TERM, rank=1, **place)
    assert status[1] in (128 + TERM, -TERM)  # torchrun may end a rank that is about to end
    assert status[0] not in (0, -KILL) and "Traceback" not in said


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_predictions_go_on(
    ranks: int, programs: Programs, straight: Callable[[int], Path], tmp_path: Path
):
    for name in "abcd":
        write(tmp_path / f"{name}.png", image(40, 50))
    words = ("predict", "--run", straight(1), "--out", tmp_path / "out", "--images")
    words = (*words, *(tmp_path / f"{name}.png" for name in "abcd"))
    at = {"place": "prediction", "call": 0, "signum": TERM, "rank": ranks - 1}
    status, said = programs.run(*words, ranks=ranks, **at)
    assert stopped(status, TERM), said
    assert f"after {ranks} of 4 masks; go on with: the same command and --resume" in said
    assert len([*(tmp_path / "out").iterdir()]) == ranks
    status, said = programs.run(*words, "--resume", ranks=ranks)
    assert not any(status), said
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["a.png", "b.png", "c.png", "d.png"]


def test_an_error_of_one_rank_has_one_line(programs: Programs, folder: Path, tmp_path: Path):
    """Here of a damaged image whose header is whole."""
    path = folder / "images/train/a/1.jpg"
    path.write_bytes(path.read_bytes()[:-20])
    words = (
        "fit",
        *TINY[2:],
        "--config",
        "folder",
        "--data.root",
        folder,
        "--run",
        tmp_path / "run",
    )
    words = [x for x in words if x not in ("--data.train_images", "64", "--data.val_images", "10")]
    words += ["--data.eval_batch_size", "1", "--data.workers", "0", "--data.scale", "[1, 1]"]
    status, said = programs.run(*words, ranks=2)
    assert all(status) and "Traceback" not in said
    lines = re.findall("anchorops-train: (.*)", said)
    assert any(line.startswith(f"{path} cannot be read: ") for line in lines) and len(lines) <= 2


def test_another_number_of_ranks(programs: Programs, straight: Callable[[int], Path]):
    status, said = programs.run("fit", "--run", straight(1), "--resume", ranks=2)
    assert all(status)
    assert "last.ckpt was written by 1 ranks: expected as many, got 2" in said
