"""Checkpoints and journals that are truncated, damaged or from another run."""

import resource
import signal
from pathlib import Path

import pytest
import torch

from anchorops.train.commands import main
from anchorops.train.report.compare import load_results
from anchorops.train.run import checkpoint
from anchorops.train.run.journal import Journal, read_metrics


def test_lines_after_the_checkpoint_are_taken_back(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 2, "val_miou": 0.5}\n{"step": 4}\n'
    path.write_text(kept + '{"step": 4, "val_miou": 0.5}\n{"step": 6}\n{"ste')
    Journal(tmp_path, 4, 10).open(4, evaluated=2)
    assert path.read_text() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_earlier_checkpoint(tmp_path: Path):
    path = checkpoint.save_checkpoint(tmp_path, 1, {"model": torch.zeros(10)})
    journal = Journal(tmp_path, 1, 10)
    journal.open(1, evaluated=0)
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
    Journal(tmp_path, 1, 10).open(1, evaluated=0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # the truncated line was removed


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
    assert torch.load(path)["x"].any()  # torch does not report it
    with pytest.raises(ValueError, match=r"checkpoint-00000001.pt is damaged \(the checksum of"):
        checkpoint.load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [state], r"checkpoint .*6.pt is damaged \(it contains a list\); delete"),
        (
            lambda state: state | {"model": {"body.weight": torch.zeros(3)}},
            r"checkpoint .*6.pt does not fit this run: it is of another model.* Missing key",
        ),
        (
            lambda state: {"step": 6},
            r"checkpoint .*6.pt does not fit this run: .*KeyError: 'options'",
        ),
        (
            lambda state: state | {"evaluated": None},
            r"checkpoint .*6.pt does not fit this run: .*TypeError: int\(\) argument",
        ),
    ],
)
def test_checkpoint_of_something_else(change, message: str, copied: Path):
    path = copied / "checkpoint-00000006.pt"
    checkpoint.save_atomically(change(checkpoint.load_checkpoint(path)), path)
    with pytest.raises(SystemExit, match=message):
        main(["resume", str(copied)])


@pytest.mark.parametrize("text", ["{", "[]", '{"loss": 1}\n', '{"step": "1"}\n'])
def test_damaged_files_are_named(text: str, copied: Path):
    (copied / "metrics.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged \("):
        read_metrics(copied / "metrics.jsonl")
    (copied / "results.json").write_text(text[:2])
    with pytest.raises(ValueError, match=r"results.json is damaged \("):
        load_results(copied)
