"""Commands that are stopped by SIGTERM or Ctrl-C, or killed, and go on by the command that they
print: runs end as one that nothing disturbed, bit for bit, on one rank and on several. Workers load
the images, and signals reach all processes of the group."""

import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.image_files import image, write
from tests.helpers.programs import Programs
from tests.helpers.tiny_runs import FOLDER, TINY, Body, assert_same_run, figures, state

RUN = (  # batches of two images for each of three ranks, too
    f"fit {TINY} --data.steps 7 --data.workers 1 --data.val_images 8 --data.batch_size 12 "
    "--data.eval_batch_size 2 --accumulate 2 --ema 0.9 --log_every 1 --model.class_weights balanced"
)
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
Straight = Callable[[int], Path]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    started = Programs(tmp_path_factory.mktemp("log") / "stderr.txt")
    yield started
    started.process.stdin.close()
    started.process.wait()


@pytest.fixture(scope="module")
def straight(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The run of this number of ranks that nothing disturbs."""

    @cache
    def trained(ranks: int) -> Path:
        run = tmp_path_factory.mktemp("runs") / "straight"
        succeeds(programs, f"{RUN} --run {run}", ranks)
        assert [step for step, line in figures(run).items() if "val/miou" in line] == [3, 6, 7]
        return run

    return trained


def succeeds(programs: Programs, words: str, ranks: int) -> None:
    status, said = programs.run(words, ranks)
    assert not any(status), said


def test_a_frozen_backbone_on_two_ranks(programs: Programs, tmp_path: Path):
    """Its weights are not those of the seed."""
    given = Body().backbone.state_dict()
    torch.save(given, tmp_path / "given")
    words = f"{RUN} --model.freeze true --model.backbone_weights {tmp_path}/given --run {tmp_path}"
    succeeds(programs, f"{words}/straight", 2)
    succeeds(programs, f"{words}/run --max_steps 4", 2)
    succeeds(programs, f"{words}/run --max_steps 7 --resume", 2)
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    frozen = torch.load(tmp_path / "run/frozen.ckpt")
    assert all(torch.equal(frozen[name], x) for name, x in given.items())


def stopped(status: list[int], signum: int) -> bool:
    """torchrun may end a rank that is about to end."""
    return 128 + signum in status and {*status} <= {128 + signum, -TERM}


# ranks, place, call, signal and rank; a step calls once, a validation for each batch of a rank
@pytest.mark.parametrize(
    "case",
    [
        (1, "step", 4, TERM, None),
        (1, "step", 5, KILL, None),
        (1, "validation", 1, INT, None),
        (2, "step", 4, INT, 1),
        (2, "validation", 0, TERM, 0),
        pytest.param((2, "step", 5, KILL, 0), marks=pytest.mark.slow),
        # sums of three depend on their order
        pytest.param((3, "step", 3, TERM, None), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_bit_for_bit(
    case: tuple[Any, ...], programs: Programs, straight: Straight, tmp_path: Path
):
    run, (ranks, place, call, signum, rank) = tmp_path / "run", case
    words = f"{RUN} --run {run}"
    status, said = programs.run(words, ranks, place=place, call=call, signum=signum, rank=rank)
    if signum == KILL:
        assert -KILL in status
    else:
        step = call + 1 if place == "step" else 3
        assert stopped(status, signum) and state(run)["step"] == step
        assert f"by {signum.name}; go on with the same command and --resume\n" in said
    assert "Traceback" not in said
    succeeds(programs, f"{words} --resume", ranks)
    assert_same_run(run, straight(ranks))


@pytest.mark.parametrize(("place", "call"), [("start", 0), ("start", 1), ("validation", 0)])
def test_one_of_two_ranks_is_stopped_where_nothing_is_saved(
    place: str, call: int, programs: Programs, straight: Straight, tmp_path: Path
):
    """Before the data are read, before the first step, or while figures are computed: both end."""
    words = f"{RUN} --run {tmp_path}/run" if place == "start" else f"validate --run {straight(2)}"
    status, said = programs.run(words, 2, place=place, call=call, signum=TERM, rank=1)
    assert status[1] in (128 + TERM, -TERM)  # torchrun may end a rank that is about to end
    assert status[0] not in (0, -KILL) and "Traceback" not in said


def test_machines_that_share_no_directory(programs: Programs, straight: Straight, tmp_path: Path):
    """A run starts there, but goes on only if all ranks find its state."""
    words, first, second = f"{RUN} --run {tmp_path}/RANK", tmp_path / "0", tmp_path / "1"

    def fails(words: str, name: str, expected: str) -> None:
        status, said = programs.run(words, ranks=2)
        lines = re.findall("anchorops-train: (.*)", said)
        found = f"{name} on {socket.gethostname()}: expected {expected}"
        assert all(status) and len(lines) == 1 and re.search(found, lines[0]), said

    succeeds(programs, f"{words} --max_steps 3", 2)
    assert not second.exists()
    crc = r"CRC-32 \w{8}"
    fails(f"{words} --resume", f"{second}/last.ckpt", f"{crc} as on the first rank, got no file")
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("metrics.csv"))
    (first / "last.ckpt").rename(tmp_path / "last.ckpt")
    fails(f"{words} --resume", f"{second}/last.ckpt", f"no file as on the first rank, got {crc}")
    (tmp_path / "last.ckpt").rename(first / "last.ckpt")
    fails(f"{words} --resume --seed RANK", "--seed", "0 as on the first rank, got 1")
    succeeds(programs, f"{words} --resume", 2)
    assert_same_run(first, straight(2))


def test_a_run_goes_on_with_another_number_of_ranks(
    programs: Programs, straight: Straight, tmp_path: Path
):
    """On the same images."""
    run = tmp_path / "run"
    succeeds(programs, f"{RUN} --run {run} --max_steps 3", 2)
    status, said = programs.run(f"{RUN} --run {run} --resume --accumulate 4")
    assert status == [0]
    for change in (f"--accumulate: 4, {run} has 2", f"ranks: 1, {run} has 2"):
        assert f"{change}: the bits will not be those of the run without a stop\n" in said
    assert figures(run).keys() == figures(straight(2)).keys()


def test_predictions_go_on(programs: Programs, straight: Straight, tmp_path: Path):
    """In the end on fewer images than ranks."""
    images, out = [f"{tmp_path}/{name}.png" for name in "abc"], tmp_path / "out"
    for path in images:
        write(Path(path), image(40, 50))
    words = f"predict --run {straight(1)} --out {out} --images {' '.join(images)}"
    status, said = programs.run(words, 2, place="prediction", call=0, signum=TERM, rank=1)
    assert stopped(status, TERM), said
    assert "go on with the same command and --resume" in said
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]
    write(out / "a.png", b"as it was")
    succeeds(programs, f"{words} --resume", 2)
    assert (out / "a.png").read_bytes() == b"as it was"
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "c.png"]


def test_an_error_of_one_rank_has_one_line(programs: Programs, folder: Path, tmp_path: Path):
    """Here of a damaged image whose header is whole."""
    path = folder / "images/train/a/1.jpg"
    write(path, path.read_bytes()[:-20])
    words = f"fit {FOLDER} --data.workers 1 --data.root {folder} --run {tmp_path}/run"
    status, said = programs.run(words, ranks=2)
    assert all(status) and "Traceback" not in said
    lines = re.findall("anchorops-train: (.*)", said)
    assert any(line.startswith(f"{path} cannot be read: ") for line in lines) and len(lines) <= 2


def test_an_error_of_all_ranks_has_one_line(programs: Programs, tmp_path: Path):
    """Here of options, of a network that cannot be built, and of a run that does not exist."""
    for words, message in {
        f"fit --run {tmp_path}/run --resume": "--resume: expected the --run of a run on ",
        f"{RUN} --run {tmp_path}/run --model.focal_gamma 1": "--model.focal_gamma: ",
        f'{RUN} --run {tmp_path}/run --model.method_options {{"sar.detla":1}}': "SAR.*'detla'",
    }.items():
        status, said = programs.run(words, ranks=2)
        lines = re.findall("anchorops-train: (.*)", said)
        assert all(status) and len(lines) == 1 and re.search(message, lines[0]), said
    assert not (tmp_path / "run").exists()
