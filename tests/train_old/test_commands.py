"""The command line: options, presets, comparing runs."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anchorops.train import signals
from anchorops.train.commands import main
from anchorops.train.config import Config
from anchorops.train.presets import PRESETS
from anchorops.train.report.compare import comparison


def test_help_has_no_line_breaks_of_the_source(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as help_shown:
        main(["folder", "--help"])
    assert help_shown.value.code == 0
    assert "under --root. Others: a published data set, with its" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (torch.distributed.DistBackendError("NCCL: x"), SystemExit, r"another rank .*\(NCCL: x\)"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:545] y"), SystemExit, "another rank has ended"),
        (RuntimeError("a mistake"), RuntimeError, "^a mistake$"),
    ],
)
def test_rank_that_waits_for_one_that_has_ended(
    error: Exception, raised: type, message: str, monkeypatch: pytest.MonkeyPatch
):
    """One line, beside the message of the other rank; other errors keep their traceback."""

    def fail(_: Config) -> dict:
        raise error

    monkeypatch.setattr("anchorops.train.commands.start", fail)
    with pytest.raises(raised, match=message):
        main([])


def test_options_on_the_command_line(monkeypatch: pytest.MonkeyPatch):
    started: list[Config] = []

    def record(config: Config) -> dict:
        started.append(config)
        raise signals.Interrupted(signal.SIGTERM, config.run, 0)

    monkeypatch.setattr("anchorops.train.commands.start", record)
    options = (
        "ade20k-segformer-b5 --methods cbp occl --method-options cbp.length 3 occl.split images"
    )
    options += " --root /data --crop 64 96 --no-pretrained --clip 1.0"
    for line in (options, "folder --root /data --label-map 128 1 7 255"):
        with pytest.raises(SystemExit) as stopped:
            main(line.split())
        assert stopped.value.code == 128 + signal.SIGTERM
    assert started == [
        PRESETS["ade20k-segformer-b5"][1].replace(
            methods=("cbp", "occl"),
            method_options={
                "cbp.length": "3",
                "occl.centroid_weight": "1",  # the preset's
                "occl.category_weight": "0.1",
                "occl.split": "images",
            },
            root=Path("/data"),
            crop=(64, 96),
            pretrained=False,
            clip=1.0,
        ),
        PRESETS["folder"][1].replace(root=Path("/data"), label_map={128: 1, 7: 255}),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("digits --root data", "--root: expected --dataset folder or .* with it, got digits"),
        ("digits --num-classes 3", "--num-classes: expected --dataset folder with it, got digits"),
        ("digits --short-side 96", "--short-side: expected --dataset folder or .*, got digits"),
        (
            "folder --train-images 9",
            "--train-images: expected --dataset digits with it, got folder",
        ),
        ("ade20k-hrnet-w48 --label-map 0 1", "--label-map: expected --dataset folder with it"),
        ("folder --label-map 7 0 7 1", "--label-map: expected each key once, got 7 again"),
        (
            "digits --methods sar --method-options sar.tau 0.1 sar.tau 0.2 --steps 9",
            r"--method-options: expected each key once, got sar.tau again",
        ),
    ],
)
def test_options_that_would_be_ignored(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A folder that is given to the preset digits is not trained on, for example."""
    monkeypatch.setattr("anchorops.train.commands.start", lambda config: pytest.fail("started"))
    with pytest.raises(SystemExit) as stopped:
        main(options.split())
    said = f"{stopped.value.code} {capsys.readouterr().err}"
    assert re.search(message, " ".join(said.replace("│", "").split()))


def test_command_line(straight: Path, capsys: pytest.CaptureFixture[str]):
    main(["compare", str(straight)])
    assert "hrnet-w18-small" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"expected each seed once, got .* with the same settings"):
        main(["compare", str(straight), str(straight)])
    with pytest.raises(SystemExit, match="expected a finished run"):
        main(["compare", str(straight.parent)])
    with pytest.raises(SystemExit, match="expected the directories of finished runs, got none"):
        main(["compare"])
    result = {name: 1.0 for name in ("miou", "head", "body", "tail", "macc", "seconds_per_step")}
    result |= {"dataset": "d", "model": "m", "methods": "sar", "parameters": 1}
    result["gpu_memory_mb"] = None
    runs = [
        {**result, "methods": methods, "seed": seed, "settings": {"lr": lr, "methods": methods}}
        for methods, lr, seed in (("sar", "0.1", 0), ("cr", "0.2", 0), ("sar", "0.1", 1))
    ]
    rows = comparison(runs).splitlines()[2:]
    assert [row.split()[2:5] for row in rows] == [["sar", "lr=0.1", "2"], ["cr", "lr=0.2", "1"]]
    with pytest.raises(SystemExit, match="'digts' is neither a command nor a preset"):
        main(["digts"])


@pytest.mark.parametrize(
    ("option", "expected"),
    [("-OO", "start it without -OO"), ("-O", "--steps: expected at least 1")],
)
def test_optimized_interpreter(option: str, expected: str):
    """-OO removes the docstrings, without which segmentation-models-pytorch cannot be imported."""
    command = [sys.executable, option, "-m", "anchorops.train", "digits", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert expected in done.stderr
