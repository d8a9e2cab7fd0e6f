"""Training runs that are killed or interrupted, or have a full disk, damaged checkpoints or damaged
data. In the end they must equal an undisturbed run, bit for bit. `make stress` runs them.

A round is a function of its seed: pytest tests/stress -m stress --seed 17 --rounds 1
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from image_files import write

from anchorops.train.data.digits import DigitScenes
from anchorops.train.run.checkpoint import checkpoints, latest_checkpoint, load_checkpoint

OPTIONS = (
    "--model hrnet-w18-small --crop 32 32 --steps 6 --batch-size 2 --save-every 2 --eval-every 3 "
    "--log-every 2 --eval-batch-size 2 --workers 0 --methods sar occl --threads 1 --device cpu "
    "--optimizer adamw --lr 0.01 --flip"
)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
TIMES = ("seconds_per_step", "images_per_second", "memory_mb", "seconds", "logged_seconds", "run")
PICTURES = 0.2  # share of the rounds that draw them
ATTACKS = ("signal", "signal", "signal", "signals", "disk", "checkpoint", "data")


class Program:
    """anchorops-train on one data set, in runs of one name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.straight = root / "straight/run"
        self.said, self.pictures = "", True
        events = root / "events.json"
        assert self.start(root / "straight", events=str(events)) == 0, self.said
        self.events: dict[str, list[int]] = json.loads(events.read_text())

    def places(self) -> dict[str, list[int]]:
        """How many events each call of each place has."""
        if self.pictures:
            return self.events
        without = {name: list(calls) for name, calls in self.events.items()}
        without["parse"][0] -= sum(without.pop("predictions") + without.pop("report"))
        return without

    def start(self, out: Path, **attack: Any) -> int:
        arguments = ["folder", "--root", str(self.root), "--out", str(out), "--name", "run"]
        return self._run([*arguments, *OPTIONS.split()], out, attack)

    def go_on(self, out: Path, **attack: Any) -> int:
        """Continue like a user: resume, or start again if the first start wrote no checkpoint."""
        if not (out / "run/config.json").exists():
            return self.start(out, **attack)
        return self._run(["resume", str(out / "run")], out, attack)

    def _run(self, arguments: list[str], out: Path, attack: dict[str, Any]) -> int:
        out.mkdir(exist_ok=True)
        messages = self.root / f"{out.name}.txt"
        order = {"arguments": arguments, "messages": str(messages), **attack}
        order["pictures"] = self.pictures
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        self.said = messages.read_text()
        assert "Traceback" not in self.said, self.said
        return status


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    root = tmp_path_factory.mktemp("stress")
    for split, count in (("train", 12), ("val", 4)):
        scenes = DigitScenes(split, count, (40, 48), seed=0)
        for index in range(count):
            image, labels = scenes[index]
            write(root / f"images/{split}/{index}.png", image.permute(1, 2, 0).numpy())
            mask = labels.numpy().astype(np.uint8)  # 255 is ignored
            write(root / f"masks/{split}/{index}.png", mask)
    (root / "classes.txt").write_text("\n".join(DigitScenes.classes))
    program = Program(root)
    yield program
    assert program.server.stdin
    program.server.stdin.close()
    program.server.wait(timeout=60)


@pytest.mark.stress
def test_attacked_run_is_the_run_without(program: Program, seed: int):
    random, out = Random(seed), program.root / f"round-{seed}"
    attack = random.choice(ATTACKS)
    program.pictures = random.random() < PICTURES
    print(f"seed {seed}: {attack}")
    try:
        if attack == "disk":
            fill_disk(program, out, random)
        else:
            stop_by_signal(program, out, random)
        if attack == "signals":
            for _ in range(random.randint(1, 3)):
                stop_by_signal(program, out, random)
        if attack == "checkpoint":
            damage_checkpoint(program, out, random)
        if attack == "data":
            damage_data(program, out, random)
        assert program.go_on(out) == 0, program.said
        assert_same_run(out / "run", program.straight, program.pictures)
    finally:
        unmount(out)
    shutil.rmtree(out)


def stop_by_signal(program: Program, out: Path, random: Random) -> None:
    """At a random moment in a random place; a run that has passed the place finishes."""
    places = program.places()
    signum, place = random.choice(SIGNALS), random.choice(sorted(places))
    call = random.randint(1, len(places[place]))
    event = random.randint(1, max(1, places[place][call - 1]))
    print(f"  {signum.name} in call {call} of {place}, event {event}")
    attack = {"place": place, "call": call, "event": event, "signum": int(signum)}
    begun = latest_checkpoint(out / "run") if (out / "run").exists() else None
    status = program.go_on(out, **attack)
    print(f"  {status}: {program.said.strip().splitlines()[-1:]}")
    assert status in (0, -signum, 128 + signum), program.said
    if status == 128 + signum:
        assert program.said.strip().splitlines()[-1].startswith("anchorops-train: stopped by")
    if begun:
        assert latest_checkpoint(out / "run"), "the checkpoints are gone"
    repeat_the_command(program, out)


def repeat_the_command(program: Program, out: Path) -> None:
    """Repeated by mistake: a run with a checkpoint is neither changed nor started again."""
    run = out / "run"
    if not run.exists() or not latest_checkpoint(run):
        return
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert program.start(out) == 1
    assert f"continue it with `anchorops-train resume {run}`" in program.said
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def fill_disk(program: Program, out: Path, random: Random) -> None:
    """A disk of a random size, or a limit of the file size if nothing can be mounted."""
    out.mkdir()
    needed = sum(path.stat().st_size for path in program.straight.iterdir())
    size = random.randint(needed // 20, needed)
    mounted = mount(out, size)
    print(f"  {size} bytes of {needed}, {'on a disk' if mounted else 'the largest file'}")
    status = program.start(out, **({} if mounted else {"limit": size}))
    print(f"  {status}: {program.said.strip().splitlines()[-1:]}")
    if status == 0:  # failures after the training are only reported
        assert (out / "run/results.json").exists()
    else:
        assert status == 1 and "anchorops-train: " in program.said
        assert "No space left" in program.said or "File too large" in program.said
    if mounted:
        mount(out, 4 * needed, "remount,")


def mount(folder: Path, size: int, options: str = "") -> bool:
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"{options}size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def damage_checkpoint(program: Program, out: Path, random: Random) -> None:
    """A damaged checkpoint is refused with its name, unless the damage changed no value."""
    run = out / "run"
    path = latest_checkpoint(run) if run.exists() else None
    if path is None:
        return
    whole = bytearray(path.read_bytes())
    kind, place = random.choice(("flip", "cut", "empty", "other")), random.randrange(len(whole))
    print(f"  {path.name}: {kind} at byte {place} of {len(whole)}")
    if kind == "flip":
        whole[place] ^= 1 << random.randrange(8)
        path.write_bytes(whole)
    elif kind == "other":
        torch.save(random.choice(([1], {"step": 1}, {"model": {}})), path)
    else:
        path.write_bytes(whole[:place] if kind == "cut" else b"")
    status = program.go_on(out)
    if status != 0:
        assert status == 1 and f"checkpoint {path}" in program.said, program.said
        path.unlink()
    else:
        assert kind == "flip"


def damage_data(program: Program, out: Path, random: Random) -> None:
    """The message names a truncated file, unless it was no longer needed."""
    files = [path for path in sorted(program.root.glob("[im]*s/*/*")) if path.is_file()]
    path = random.choice([*files, program.root / "classes.txt"])
    kept = path.with_suffix(".kept")
    shutil.copy2(path, kept)
    place = random.randrange(path.stat().st_size - 20)
    print(f"  {path.name}: cut at byte {place}")
    os.truncate(path, place)
    status = program.go_on(out)
    kept.replace(path)
    assert status in (0, 1)
    if status == 1:
        named = str(path) if path.name != "classes.txt" else "anchorops-train: "
        assert named in program.said, program.said


def assert_same_run(run: Path, straight: Path, pictures: bool) -> None:
    saved, expected = checkpoints(run), checkpoints(straight)
    assert saved[-1].name == expected[-1].name and len(saved) <= 2  # the other: from stopping
    names = {path.name for path in straight.iterdir() if path not in expected}
    assert {path.name for path in run.iterdir() if path not in saved} == names
    for name in ("results.json", "metrics.jsonl"):
        assert timeless_lines(run / name) == timeless_lines(straight / name), name
    if pictures:
        assert (run / "predictions.png").read_bytes() == (straight / "predictions.png").read_bytes()
        pages = [(x / "report.html").read_text() for x in (run, straight)]
        assert pages[0].count("<h2>") == pages[1].count("<h2>")
    for path in (expected[-1], straight / "best.pt"):
        assert_same(load_checkpoint(run / path.name), load_checkpoint(path), path.name)


def timeless_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    values = [json.loads(text)] if path.suffix == ".json" else map(json.loads, text.splitlines())
    return [{key: x for key, x in value.items() if key not in TIMES} for value in values]


def assert_same(value: Any, expected: Any, where: str) -> None:
    assert type(value) is type(expected), where
    if isinstance(value, torch.Tensor):
        assert value.dtype == expected.dtype and torch.equal(value, expected), where
    elif isinstance(value, dict):
        assert value.keys() == expected.keys(), where
        for key in value.keys() - set(TIMES):
            assert_same(value[key], expected[key], f"{where}: {key}")
    elif isinstance(value, list | tuple):
        assert len(value) == len(expected), where
        for index, (one, other) in enumerate(zip(value, expected, strict=True)):
            assert_same(one, other, f"{where}: {index}")
    else:
        assert value == expected, where
