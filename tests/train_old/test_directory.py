"""The directory of a run: what may be deleted, and what is suggested instead."""

import errno
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY

from anchorops.train import commands
from anchorops.train.commands import main
from anchorops.train.config import Config
from anchorops.train.networks.models import build_model
from anchorops.train.presets import DIGITS
from anchorops.train.run import checkpoint, directory, loop
from anchorops.train.signals import Interrupted


def begin(run: Path, **options) -> None:
    config = DIGITS.replace(out=run.parent, name=run.name, **options)
    with directory.new_run(config):
        directory.begin_run(config)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_other_directories_are_not_changed(options: list[str], tmp_path: Path):
    """A model of Hugging Face has a config.json, but no metrics.jsonl."""
    model = tmp_path / "models/bert"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "bert"}')
    (model / "model.safetensors").write_bytes(b"months of training")
    before = contents(model)
    with pytest.raises(SystemExit, match=r"models/bert contains files but no .anchorops-run"):
        main(["--out", str(tmp_path / "models"), "--name", "bert", *options])
    assert contents(model) == before


@pytest.mark.parametrize("config", ['{"model_type": "bert"}', "[]", "{"])
def test_marker_in_the_directory_of_a_model(config: str, tmp_path: Path):
    """It was copied there, and proves nothing: best.pt may be the model's."""
    for name, text in (("config.json", config), ("best.pt", "months"), (directory.MARKER, "")):
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"config.json was not written by a run, although"):
        begin(tmp_path, overwrite=True)
    assert contents(tmp_path) == before


def test_command_that_was_killed_and_is_repeated(tmp_path: Path):
    """A run may have written checkpoints before its first log line."""
    run = tmp_path / "run"
    begin(run)
    checkpoint.save_checkpoint(run, 400, {})
    before = contents(run)
    with pytest.raises(SystemExit, match=f"continue it with `anchorops-train resume {run}`"):
        main(["--out", str(tmp_path), "--name", "run"])
    assert contents(run) == before


def test_earlier_run_without_a_checkpoint(tmp_path: Path):
    begin(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="an earlier run: give this one a --name") as error:
        begin(tmp_path / "run")
    assert "resume" not in str(error.value)


def test_overwriting_deletes_only_what_a_run_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    begin(run)
    checkpoint.save_checkpoint(run, 400, {})
    run_files = ["best.pt", "metrics.jsonl", "results.json.part", "events.out.tfevents.1.host.2.0"]
    run_files += ["vectors-sar.anchors.npy"]
    others = [
        "notes.txt",
        "checkpoint-best.pt",
        "results.json.old",
        "config.json~",
        "vectors-a.npy",
    ]
    for name in run_files + others:
        (run / name).write_text(name)
    (run / "predictions.png").mkdir()
    begin(run, overwrite=True, seed=7)
    left = {path.name for path in run.iterdir()}
    assert left == {*others, "predictions.png", "config.json", directory.MARKER}
    assert json.loads((run / "config.json").read_text())["running"]["seed"] == 7
    said = capsys.readouterr().err
    assert f"deleted the earlier run in {run} (best.pt, checkpoint-00000400.pt, config.json" in said
    assert "left alone: checkpoint-best.pt, config.json~, notes.txt" in said


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A run of 400 steps."""
    begin(tmp_path / "run")
    checkpoint.save_checkpoint(tmp_path / "run", 400, {})
    (tmp_path / "run/best.pt").write_text("months of training")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("sar",), "method_options": {"sar.dim": "x"}}, "--method-options sar.dim"),
        ({"weights": Path("/nowhere.pt")}, "weights /nowhere.pt do not exist"),
        ({"batch_size": 3, "accumulate": 2}, "--batch-size: expected a multiple of accumulate"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
        ({"given_class_weights": (1.0,)}, "--given-class-weights: expected 11 values, got 1"),
        ({"lr": 1e30, "optimizer": "sgd"}, r"not finite at step 1: .*norm; .*none\).* --lr.*data"),
    ],
    ids=lambda case: "" if isinstance(case, str) else "-".join(case),
)
def test_start_that_fails_deletes_no_earlier_run(options: dict, message: str, earlier: Path):
    before = contents(earlier)
    config = TINY.replace(methods=(), out=earlier.parent, name="run", overwrite=True, workers=0)
    with pytest.raises(ValueError, match=message):
        loop.start(config.replace(**options))
    assert contents(earlier) == before


@pytest.mark.parametrize("module", ["torch.utils.tensorboard", None])
def test_first_step_that_fails_deletes_no_earlier_run(
    module: str | None, earlier: Path, monkeypatch: pytest.MonkeyPatch
):
    """For example because the memory is not sufficient."""

    def fail(*_: object) -> None:
        raise ValueError("the step failed")

    if module:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(loop._Run, "_train_step", fail)
    before = contents(earlier)
    config = TINY.replace(out=earlier.parent, name="run", overwrite=True, tensorboard=True)
    with pytest.raises(ValueError, match="pip install tensorboard" if module else "the step"):
        loop.start(config)
    assert contents(earlier) == before


def test_signal_in_the_first_step_deletes_no_earlier_run(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
):
    train_step = loop._Run._train_step

    def signal_and_step(self: loop._Run, *args: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        train_step(self, *args)

    monkeypatch.setattr(loop._Run, "_train_step", signal_and_step)
    before = contents(earlier)
    config = TINY.replace(out=earlier.parent, name="run", overwrite=True)
    with pytest.raises(Interrupted, match="stopped by SIGTERM; it has not begun: start it again"):
        loop.start(config)
    assert contents(earlier) == before


def test_full_disk_deletes_no_earlier_run(earlier: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(earlier)
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"config.json could not be written: .*No space left"):
        begin(earlier, overwrite=True)
    assert contents(earlier) == before


def test_weights_of_the_run_that_is_overwritten(earlier: Path):
    """They would be lost, also if a link leads to them."""
    torch.save({"model": build_model("hrnet-w18-small", 11).state_dict()}, earlier / "best.pt")
    weights, before = earlier.parent / "link.pt", contents(earlier)
    weights.symlink_to(earlier / "best.pt")
    config = TINY.replace(out=earlier.parent, name="run", overwrite=True, weights=weights)
    expected = f"--weights {weights} is a file of the run that --overwrite deletes: give this run a"
    with pytest.raises(ValueError, match=expected):
        loop.start(config.replace(methods=(), steps=1))
    assert contents(earlier) == before
    kept = earlier / "mine.pt"  # which a run does not delete
    (earlier / "best.pt").rename(kept)
    with directory.new_run(config.replace(weights=kept)):
        pass


def test_parts_of_a_killed_process_are_removed(earlier: Path):
    for name in ("config.json.part", "results.json.part"):
        (earlier / name).write_text("{")
    begin(earlier, overwrite=True)
    assert {path.name for path in earlier.iterdir()} == {"config.json", directory.MARKER}


def test_demo_overwrites_its_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def start(config: Config) -> dict:
        with directory.new_run(config):
            directory.begin_run(config)
            checkpoint.save_checkpoint(config.run, 5, {})
        return {}

    monkeypatch.setattr(commands, "start", start)
    monkeypatch.setattr(commands, "_show", lambda results: None)
    for _ in range(2):
        main(["demo", "--out", str(tmp_path)])
    runs = sorted(tmp_path.iterdir())
    assert [run.name for run in runs][:2] == ["hrnet-w18-small-plain", "hrnet-w18-small-sar"]
    (runs[0] / directory.MARKER).unlink()
    with pytest.raises(SystemExit, match="w18-small-plain contains files but no"):
        main(["demo", "--out", str(tmp_path)])


def test_start_in_an_empty_directory(tmp_path: Path):
    (tmp_path / "run").mkdir()
    begin(tmp_path / "run")
    begin(tmp_path / "run")  # the first start failed
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: give this run a --name"):
        begin(tmp_path / "file")


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "a\\b", "a\nb"])
def test_name_that_is_a_path(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match="--name: expected a directory's name inside --out"):
        loop.start(DIGITS.replace(out=tmp_path, name=name, device="cpu"))
    assert not list(tmp_path.iterdir())


def test_model_that_is_a_path(tmp_path: Path):
    run = DIGITS.replace(out=tmp_path, model="unet:../../x").run
    assert run.parent == tmp_path and run.name == "digits-unet-..-..-x-plain-seed0"


def test_directory_has_one_program_at_a_time(tmp_path: Path):
    config = DIGITS.replace(out=tmp_path, name="busy", overwrite=True, device="cpu")
    with directory.new_run(config):
        directory.begin_run(config)
        with pytest.raises(ValueError, match="busy: another process is training in this directory"):
            loop.resume(config.run)
        with pytest.raises(ValueError, match="another process is training"):
            loop.start(config)
    assert (config.run / "config.json").exists()


def test_only_checkpoints_are_rotated(tmp_path: Path):
    """Another file in the directory is neither deleted nor resumed from."""
    for name in ("checkpoint-best.pt", "checkpoint-1.pt", "checkpoint-00000009.pt.old"):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint-00000002.pt.part").touch()  # of a process that was killed
    paths = [checkpoint.save_checkpoint(tmp_path, step, {}) for step in (3, 4, 5)]
    assert checkpoint.checkpoints(tmp_path) == paths[1:]
    assert checkpoint.latest_checkpoint(tmp_path) == paths[2]
    assert len(list(tmp_path.iterdir())) == 5
