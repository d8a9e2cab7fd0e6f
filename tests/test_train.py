"""Training runs: that they end, stop, go on, and say what is wrong."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anchorops.train import checkpoint, loop, signals, workers
from anchorops.train.commands import main
from anchorops.train.compare import comparison, load_results
from anchorops.train.config import Config
from anchorops.train.data import evaluation_loader
from anchorops.train.digits import DigitScenes
from anchorops.train.journal import Journal, read_metrics
from anchorops.train.models import build_model
from anchorops.train.presets import DIGITS, PRESETS

TINY = DIGITS.replace(
    crop=(32, 32),
    train_images=64,
    val_images=10,
    batch_size=4,
    steps=6,
    eval_batch_size=5,
    log_every=2,
    save_every=2,
    eval_every=3,
    warmup=0,
    threads=1,
    methods=("sar",),
    device="cpu",
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing interrupted."""
    config = TINY.replace(out=tmp_path_factory.mktemp("runs"), name="straight")
    loop.start(config)
    return config.run


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return checkpoint.load_checkpoint(run / f"checkpoint-{step:08d}.pt")["model"]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["p2a"]) for line in metrics(run) if "loss" in line]


def assert_same_run(run: Path, other: Path, step: int = 6) -> None:
    assert losses(run) == losses(other)
    first, second = weights(run, step), weights(other, step)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_run_leaves_everything(straight: Path):
    results = json.loads((straight / "results.json").read_text())
    assert 0 < results["miou"] <= 1 and results["steps"] == 6 and len(results["classes"]) == 11
    assert [step for step, *_ in losses(straight)] == [2, 4, 6]
    assert (straight / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert Config.load(straight / "config.json").run == straight
    names = sorted(path.name for path in straight.glob("*.pt"))
    assert names == ["best.pt", "checkpoint-00000004.pt", "checkpoint-00000006.pt"]


def test_report_is_one_page(straight: Path):
    page = (straight / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 8
    assert "http" not in page and "<script" not in page
    for section in (
        "Predictions",
        "F1 by frequency",
        "Training",
        "Cosines between classes",
        "Cost of the regulariser",
    ):
        assert f"<h2>{section}</h2>" in page


@pytest.mark.parametrize(
    ("signum", "where"), [(signal.SIGTERM, "_measure"), (signal.SIGINT, "_train_step")]
)
def test_interrupted_run_continues_bit_for_bit(
    signum: int, where: str, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In a step, and in the evaluation after it, which begins anew."""
    config = TINY.replace(out=tmp_path, name="interrupted", save_every=100)
    steps = []

    def step(self: loop._Run, *args: object) -> None:
        train_step(self, *args)
        steps.append(self.progress.step)

    train_step = loop._Run._train_step
    monkeypatch.setattr(loop._Run, "_train_step", step)
    interrupted = getattr(loop._Run, where)

    def call_and_signal(self: loop._Run, *args: object) -> object:
        if self.progress.step == (3 if where == "_measure" else 2) and not signalled:
            signalled.append(os.kill(os.getpid(), signum))
        return interrupted(self, *args)

    signalled: list[None] = []
    monkeypatch.setattr(loop._Run, where, call_and_signal)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(signals.Interrupted, match=r"step 3; continue with: anchorops-train resume"):
        loop.start(config)
    assert signal.getsignal(signal.SIGINT) == handler
    torch.randn(5)  # the state of the global generator must not matter
    loop.resume(config.run)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert_same_run(config.run, straight)
    figures = [line for line in metrics(straight) if "val_miou" in line]
    assert [line for line in metrics(config.run) if "val_miou" in line] == figures
    assert [line["step"] for line in figures] == [3, 6]


def test_resuming_from_inside(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The results of a finished run are made anew, in its directory alone."""
    shutil.copytree(straight, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    Path("results.json").unlink()
    assert loop.resume(Path("."))["run"] == str(tmp_path / "run")
    assert Path("results.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_other_ranks_need_a_flag(straight: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "checkpoint-00000006.pt").unlink()
    path = run / "checkpoint-00000004.pt"
    state = checkpoint.load_checkpoint(path)
    assert state["ranks"] == 1
    checkpoint.save_atomically({**state, "ranks": 2}, path)
    with pytest.raises(ValueError, match=r"4.pt is of 2 ranks, this is 1: .*--allow-other-ranks"):
        loop.resume(run)
    main(["resume", str(run), "--allow-other-ranks"])
    assert_same_run(run, straight)


def test_second_interrupt(monkeypatch: pytest.MonkeyPatch):
    now = time.monotonic()
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with signals.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's echo
        assert stop.received == signal.SIGINT
        now += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that waits for its data at nearly every step."""
    root = tmp_path_factory.mktemp("large")
    for split, size in (("train", 2000), ("val", 32)):
        for kind, shape in (("images", (size, size, 3)), ("masks", (size, size))):
            (root / kind / split).mkdir(parents=True)
            values = np.random.default_rng(0).integers(2, size=shape, dtype=np.uint8)
            Image.fromarray(values).save(root / kind / split / "x.png", compress_level=1)
    config = TINY.replace(dataset="folder", root=root, num_classes=2, log_every=1, save_every=100)
    return config.replace(out=root, name="straight", steps=5, batch_size=2)


@pytest.fixture(scope="module")
def waited(waiting: Config) -> Path:
    loop.start(waiting)
    return waiting.run


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_signals_and_workers(signum: int, waiting: Config, waited: Path):
    """SIGTERM to the whole group, workers included, leaves a checkpoint; a training process that is
    killed alone takes its workers with it."""
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
    try:  # the end of stderr is that of every process which writes to it
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


RANKS = """
import os, signal, sys
from contextlib import suppress
from pathlib import Path
from anchorops.train import config, loop, signals

def main(run):
    loop.resume(run / "straight")
    os.environ["MASTER_PORT"] = sys.argv[2]  # groups after the first need a store of their own
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    train_step = loop._Run._train_step
    def step_and_signal(self, *args):
        if (self.progress.step, self.ranks.rank) == (0, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, *args)
    loop._Run._train_step = step_and_signal
    with suppress(signals.Interrupted):
        loop.resume(run / "stopped")
        sys.exit("the run was not stopped")
    loop._Run._train_step = train_step
    os.environ["MASTER_PORT"] = sys.argv[3]
    loop.resume(run / "stopped")

main(Path(sys.argv[1]))
"""


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return str(server.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "deterministic"), [(2, False), (3, True)])
def test_ranks(ranks: int, deterministic: bool, tmp_path: Path):
    """Ranks, of which one is asked to stop between two log lines, stop together and go on bit
    for bit. Images are counted once, and what the ranks measure is what their checkpoint does
    alone. Methods with statistics of all ranks come to the report's end, too."""
    for name in ("straight", "stopped"):
        config = TINY.replace(
            out=tmp_path,
            name=name,
            batch_size=12,
            accumulate=2,
            clip=1.0,
            steps=3,
            val_images=11,
            log_every=3,
            save_every=100,
            deterministic=deterministic,
            method_options={"sar.process_group": "world"},
        )
        config.run.mkdir()
        config.save(config.run / "config.json")
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={ranks}"]
    command = [*torchrun, str(tmp_path / "ranks.py"), str(tmp_path), free_port(), free_port()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert (stopped / "checkpoint-00000001.pt").exists()
    assert_same_run(straight, stopped, 3)
    together = json.loads((straight / "results.json").read_text())
    alone = loop.resume(straight)
    assert together["pixels"] == alone["pixels"]
    assert together["classes"] == alone["classes"]
    scenes = DigitScenes("val", 11, (32, 32), seed=0)
    assert alone["pixels"] == sum(int((scenes[i][1] >= 0).sum()) for i in range(11))


def test_worker_that_is_killed():
    config = TINY.replace(workers=1).data
    loader = evaluation_loader(
        DigitScenes("val", 40, (32, 32), seed=0), config, batch_size=1, rank=0, world=1
    )
    with workers.batches_of(loader) as batches:
        next(batches)
        (worker,) = [p for p in multiprocessing.active_children() if p.is_alive()]
        worker.kill()
        with pytest.raises(ValueError, match=r"want of memory .* fewer --workers"):
            list(batches)


def test_bf16_with_workers_and_events(tmp_path: Path):
    config = TINY.replace(
        out=tmp_path, name="fast", steps=2, bf16=True, workers=1, tensorboard=True
    )
    config = config.replace(channels_last=True, methods=("sar", "occl"), auxiliary_weight=0.4)
    results = loop.start(config)
    assert results["miou"] > 0
    assert list(config.run.glob("events.out.tfevents*"))


def test_patience_ends_a_run(tmp_path: Path):
    config = TINY.replace(out=tmp_path, name="patient", lr=0.0, steps=50, eval_every=1, patience=2)
    results = loop.start(config)
    assert results["steps"] < 50 and loop.resume(config.run)["steps"] == results["steps"]


def test_finished_run_is_not_overwritten(straight: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="holds an earlier run: continue it with"):
        main(["--out", str(straight.parent), "--name", "straight"])
    assert (straight / "results.json").exists()


def test_resumption_does_not_need_the_first_weights(tmp_path: Path):
    path, config = tmp_path / "w.pt", TINY.replace(out=tmp_path, name="from", steps=1, methods=())
    torch.save(build_model("hrnet-w18-small", 11).state_dict(), path)
    config = config.replace(weights=path)
    loop.start(config)
    path.unlink()
    assert loop.resume(config.run)["steps"] == 1
    path.write_text("not weights")
    with pytest.raises(ValueError, match=r"weights .*w.pt cannot be read"):
        loop.start(config.replace(overwrite=True))


def test_lines_after_the_checkpoint_are_taken_back(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 2, "val_miou": 0.5}\n{"step": 4}\n'
    path.write_text(kept + '{"step": 4, "val_miou": 0.5}\n{"step": 6}\n{"ste')
    Journal(tmp_path, 4, 10, evaluated=2)
    assert path.read_text() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_earlier_checkpoint(tmp_path: Path):
    path = checkpoint.save_checkpoint(tmp_path, 1, {"model": torch.zeros(10)})
    journal = Journal(tmp_path, 1, 10, evaluated=0)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(OSError, match=r"not be written: .*File too large.* are intact"):
            checkpoint.save_checkpoint(tmp_path, 2, {"model": torch.zeros(1_000_000)})
        with pytest.raises(OSError, match=r"metrics.jsonl could not be written: .*File too large"):
            journal.record(2, {"name": "x" * 200_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(x.name for x in tmp_path.iterdir()) == [path.name, "metrics.jsonl"]
    assert checkpoint.load_checkpoint(path)["step"] == 1
    Journal(tmp_path, 1, 10, evaluated=0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # the line that was cut short is gone


def test_truncated_checkpoint_names_the_earlier_one(tmp_path: Path):
    first, second = (checkpoint.save_checkpoint(tmp_path, s, {"x": 1}) for s in (1, 2))
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=f"{second} is damaged .* delete it to resume from {first}"
    ):
        checkpoint.load_checkpoint(second)


def test_flipped_bit_in_a_checkpoint(tmp_path: Path):
    path = checkpoint.save_checkpoint(tmp_path, 1, {"x": torch.zeros(10_000)})
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4  # in the tensor's values
    path.write_bytes(whole)
    assert torch.load(path)["x"].any()  # torch says nothing
    with pytest.raises(ValueError, match=r"checkpoint-00000001.pt is damaged \(the checksum of"):
        checkpoint.load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [state], r"checkpoint .*6.pt is damaged \(it holds a list\); delete it to"),
        (
            lambda state: state | {"model": {"body.weight": torch.zeros(3)}},
            r"checkpoint .*6.pt does not fit this run: it is of another model.* Missing key",
        ),
        (
            lambda state: {"step": 6},
            r"checkpoint .*6.pt does not fit this run: .*KeyError: 'model'",
        ),
    ],
)
def test_checkpoint_of_something_else(change, message: str, straight: Path, tmp_path: Path):
    shutil.copytree(straight, tmp_path / "run")
    path = tmp_path / "run/checkpoint-00000006.pt"
    checkpoint.save_atomically(change(checkpoint.load_checkpoint(path)), path)
    with pytest.raises(SystemExit, match=message):
        main(["resume", str(tmp_path / "run")])


@pytest.mark.parametrize("text", ["{", "[]", '{"loss": 1}\n'])
def test_damaged_files_are_named(text: str, straight: Path, tmp_path: Path):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged \("):
        read_metrics(tmp_path / "run/metrics.jsonl")
    (tmp_path / "run/results.json").write_text(text[:2])
    with pytest.raises(ValueError, match=r"results.json is damaged \("):
        load_results(tmp_path / "run")


def test_what_was_found_is_said_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = TINY.replace(out=tmp_path, name="found", steps=1, methods=())
    loop.start(config)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        f"run in {config.run}",
        "data set digits: 64 training and 10 validation images, 11 classes",
    ]
    assert re.match(r"training images: 32 high, 32 wide, [\d.]+ % of the pixels ignored", lines[2])
    assert lines[3].startswith("validation images: 32 high")
    assert re.match(r"rarest classes: \d [\d.]+ %, .* of the training pixels", lines[4])
    assert any(re.search(r"step 1 of 1 took [\d.]+ s", line) for line in lines[5:])


def test_loss_that_is_not_finite(tmp_path: Path):
    config = TINY.replace(
        out=tmp_path, name="diverging", lr=1e30, optimizer="sgd", methods=(), save_every=1
    )
    with pytest.raises(ValueError, match=r"not finite at step 1: .*norm; .*none\).* --lr.*data"):
        loop.start(config)
    assert not list(config.run.glob("*.pt"))


def test_options_on_the_command_line(monkeypatch: pytest.MonkeyPatch):
    started: list[Config] = []

    def record(config: Config) -> dict:
        started.append(config)
        raise signals.Interrupted(signal.SIGTERM, config.run, 0)

    monkeypatch.setattr("anchorops.train.commands.start", record)
    options = (
        "ade20k-segformer-b5 --methods cbp occl --method-options cbp.length 1 occl.split images"
    )
    options += " --root /data --crop 64 96 --label-map 128 1 7 255 --no-pretrained --clip 1.0"
    with pytest.raises(SystemExit) as stopped:
        main(options.split())
    assert stopped.value.code == 128 + signal.SIGTERM
    assert started == [
        PRESETS["ade20k-segformer-b5"][1].replace(
            methods=("cbp", "occl"),
            method_options={"cbp.length": "1", "occl.split": "images"},
            root=Path("/data"),
            crop=(64, 96),
            label_map={128: 1, 7: 255},
            pretrained=False,
            clip=1.0,
        )
    ]


def test_command_line(straight: Path, capsys: pytest.CaptureFixture[str]):
    main(["compare", str(straight), str(straight)])
    table = capsys.readouterr().out
    assert "hrnet-w18-small" in table and "± 0.0" in table
    with pytest.raises(SystemExit, match="expected a finished run"):
        main(["compare", str(straight.parent)])
    with pytest.raises(SystemExit, match="expected the directories of finished runs, got none"):
        main(["compare"])
    result = {name: 1.0 for name in ("miou", "head", "body", "tail", "macc", "seconds_per_step")}
    result |= {"dataset": "d", "model": "m", "methods": "sar", "parameters": 1}
    result["gpu_memory_mb"] = None
    first, second = ({**result, "settings": {"lr": lr, "steps": "5"}} for lr in ("0.1", "0.2"))
    rows = comparison([first, second, first]).splitlines()[2:]
    assert [row.split()[2:5] for row in rows] == [["sar", "lr=0.1", "2"], ["sar", "lr=0.2", "1"]]
    with pytest.raises(SystemExit, match="'digts' is neither a command nor a preset"):
        main(["digts"])
    with pytest.raises(SystemExit) as help_shown:
        main(["digits", "--help"])
    assert help_shown.value.code == 0 and "--batch-size" in capsys.readouterr().out
