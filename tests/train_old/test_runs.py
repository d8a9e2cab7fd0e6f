"""Training runs: they finish, stop, resume, and report what is wrong."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, assert_same_run, losses, metrics, weights

from anchorops.train import signals
from anchorops.train.commands import main
from anchorops.train.config import Config
from anchorops.train.data.digits import DigitScenes
from anchorops.train.networks.models import build_model
from anchorops.train.report.features import collapse_measures
from anchorops.train.run import checkpoint, loop
from anchorops.train.run.parts import build_parts
from anchorops.train.run.ranks import Ranks, start_ranks


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
    """A run is stopped in a step, and in the evaluation after it, which is then repeated."""
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
    figures = metrics(straight, "val_miou")
    assert metrics(config.run, "val_miou") == figures
    assert [line["step"] for line in figures] == [3, 6]


def test_resuming_from_inside(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The results of a finished run are written again, only in its directory."""
    monkeypatch.chdir(copied)
    Path("results.json").unlink()
    assert loop.resume(Path("."))["run"] == str(copied)
    assert Path("results.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_other_ranks_need_a_flag(straight: Path, copied: Path):
    (copied / "checkpoint-00000006.pt").unlink()
    path = copied / "checkpoint-00000004.pt"
    state = checkpoint.load_checkpoint(path)
    assert state["ranks"] == 1
    checkpoint.save_atomically({**state, "ranks": 2}, path)
    with pytest.raises(ValueError, match=r"4.pt is of 2 ranks, this is 1: .*--allow-other-ranks"):
        loop.resume(copied)
    main(["resume", str(copied), "--allow-other-ranks"])
    assert_same_run(copied, straight)


def change_config(run: Path, **options: Any) -> None:
    Config.load(run / "config.json").replace(**options).save(run / "config.json")


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"train_images": 32}, r"training images: 64, now 32"),
        ({"val_images": 11}, r"validation images: 10, now 11"),
        ({"data_seed": 1}, r"pixels: \[\d+, .*, now \[\d+, "),
    ],
)
def test_other_data_is_refused(options: dict, difference: str, copied: Path):
    """For example by a wrong --root: the images would be drawn in another order."""
    change_config(copied, **options)
    path = copied / "checkpoint-00000006.pt"
    state = checkpoint.load_checkpoint(path)
    checkpoint.save_atomically({**state, "options": state["options"] | options}, path)
    with pytest.raises(ValueError, match=rf"6.pt was written with other data \({difference}"):
        loop.resume(copied)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"optimizer": "sgd"}, "--optimizer adamw, config.json now has sgd"),
        ({"seed": 1}, "--seed 0, config.json now has 1"),
        ({"steps": 12}, "--steps 6, config.json now has 12"),
        ({"crop": (64, 32)}, r"--crop \[32, 32\], config.json now has \[64, 32\]"),
        ({"method_options": {"sar.tau": "0.5"}}, r"--method-options {}, config.json now has {'sar"),
    ],
)
def test_other_options_are_refused(options: dict, difference: str, copied: Path):
    """The run would continue with numbers that are those of no run."""
    change_config(copied, **options)
    with pytest.raises(ValueError, match=rf"6.pt was written with {difference}"):
        loop.resume(copied)


def test_options_that_change_no_number(straight: Path, copied: Path):
    (copied / "checkpoint-00000006.pt").unlink()
    change_config(copied, log_every=1, save_every=1, eval_batch_size=2, workers=1)
    loop.resume(copied)
    expected = weights(straight)
    assert all(torch.equal(x, expected[name]) for name, x in weights(copied).items())


def test_finished_run_without_checkpoints(straight: Path, copied: Path):
    """It is not trained again, which would replace its results."""
    for path in copied.glob("checkpoint-*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"run has finished, and has no checkpoint"):
        loop.resume(copied)
    assert metrics(copied) == metrics(straight)


def test_steps_made_fewer_than_done(copied: Path):
    """In config.json, to end a run earlier: it ends where it is."""
    change_config(copied, steps=3)
    assert loop.resume(copied)["steps"] == 6


def test_error_of_the_first_rank_is_that_of_all(straight: Path, monkeypatch: pytest.MonkeyPatch):
    """An earlier run in the directory, for example: the other ranks do not read it."""
    sent: list[Any] = []

    def broadcast(shared: list[Any], device: torch.device) -> None:
        sent[:] = shared

    def receive(shared: list[Any], device: torch.device) -> None:
        shared[:] = sent

    for rank, transfer in enumerate((broadcast, receive)):
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", transfer)
        monkeypatch.setattr(
            loop, "start_ranks", lambda _, rank=rank: Ranks(rank, 2, torch.device("cpu"))
        )
        with pytest.raises(ValueError, match="contains an earlier run: continue it with"):
            loop.start(TINY.replace(out=straight.parent, name=straight.name))


RANKS = """
import os, signal, sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from anchorops.train import config, signals
from anchorops.train.run import loop

assert "torch.utils.cpp_extension" not in sys.modules  # it warns where nvcc is and no GPU

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
    """If one rank is asked to stop between two log lines, all ranks stop, and they resume bit for
    bit. Images are counted once, and the figures of the ranks equal those of their checkpoint in
    one process. With statistics of all ranks, the report is also written."""
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
            gradient_ratio_every=int(name == "straight"),  # which changes nothing
            collapse_images=11,
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
    parts = build_parts(
        Config.load(straight / "config.json"), start_ranks("cpu"), from_checkpoint=True
    )
    parts.model.load_state_dict(weights(straight, 3))
    measures = collapse_measures(parts, alone["classes"])
    (line,) = metrics(straight, "val_miou")
    assert {name: line[name] for name in measures} == pytest.approx(measures, rel=1e-5)
    assert together["pixels"] == alone["pixels"]
    assert together["classes"] == alone["classes"]
    scenes = DigitScenes("val", 11, (32, 32), seed=0)
    assert alone["pixels"] == sum(int((scenes[i][1] >= 0).sum()) for i in range(11))


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


def test_scales_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: set[int] = set()
    evaluation = loop.validate

    def watched(parts, before_batch):
        hook = parts.model.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[2]))
        results = evaluation(parts, before_batch)
        hook.remove()
        return results

    monkeypatch.setattr(loop, "validate", watched)
    config = TINY.replace(out=tmp_path, name="run", steps=1, methods=(), eval_every=0)
    config = config.replace(eval_scales=(1.0, 2.0), eval_flip=True)
    assert loop.start(config)["miou"] > 0
    assert seen == {32, 64}


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


@pytest.mark.parametrize("broken", ["logits", "statistics"])
def test_diverged_network_has_no_results(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In a step without log lines, after which all weights are finite: running statistics, or the
    logits in an evaluation, are not."""
    config = TINY.replace(out=tmp_path, name="diverged", methods=(), log_every=100, workers=0)
    config = config.replace(lr=0.25, eval_every=3, steps=5, save_every=100)
    train_step = loop._Run._train_step

    def diverge(self: loop._Run, *args: object) -> None:
        train_step(self, *args)
        if self.progress.step == 5 and broken == "logits":
            self.model.classifier.register_forward_hook(lambda *args: args[2] / args[0].training)
        elif self.progress.step == 5:
            self.model.state_dict()["body.mix.1.running_var"].fill_(math.inf)

    monkeypatch.setattr(loop._Run, "_train_step", diverge)
    expected = "the logits of validation images" if broken == "logits" else "the weights' norm"
    advice = r"--lr 0\.025 \(now 0\.25\), --clip 1 or --warmup 5;"
    with pytest.raises(ValueError, match=rf"not finite at step 5: {expected}; .* {advice}"):
        loop.start(config)
    assert not (config.run / "results.json").exists()
    assert torch.load(config.run / "best.pt")["step"] == 3
    assert [line["step"] for line in metrics(config.run, "val_miou")] == [3]
