"""Options out of range, or that a run cannot have, end with one line that names them; presets."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from anchorops.train import ranks
from anchorops.train.commands import COMMANDS, PRESETS, RENAMED, main, masks_of, parse, presets
from anchorops.train.data.splits import images_to_predict, open_split, open_splits
from anchorops.train.options import FREE, Data, Model, Options
from tests.helpers.tiny_runs import TINY

MODEL_VALUES = {
    "auxiliary_weight": [-0.4, math.inf],
    "dropout": [-0.1, 1.0],
    "classifier_std": [-0.01, math.nan],
    "methods": [["sar", "sar"]],
    "focal_gamma": [-1.0, 5.0],
    "ohem_threshold": [0.0, 1.1],
    "ohem_min_kept": [0],
    "lr": [-1.0, math.nan],
    "weight_decay": [-1.0],
    "head_lr_factor": [-1.0],
    "warmup": [-3],
    "power": [-0.9],
    "eval_scales": [[], [0.0], [1.0, math.inf]],
}
DATA_VALUES = {
    "steps": [0],
    "batch_size": [0],
    "eval_batch_size": [0],
    "workers": [-1],
    "crop": [(50, 64), (0, 32)],
    "head_tail": [(0.001, 0.01), (1.1, 0.1), (0.1, -0.1)],
    "train_images": [0],
    "val_images": [0],
    "zipf": [-1.0],
    "data_seed": [-1],
    "channels": [0, 1],  # the second is for other data sets
    "short_side": [0, 512],
    "long_side": [0],
    "scale": [(0.0, 0.0), (2.0, 0.5), (1.0, math.inf), (0.5, 2.0)],
    "cat_max_ratio": [0.0, 1.5],
    "root": ["data"],
    "label_map": [{1: 0}],
}
VALUES = {
    "seed": [-1, 2**32],
    "accumulate": [0],
    "clip": [-1.0, 0.0, math.inf],
    "ema": [-0.1, 1.0],
    "val_every": [0],
    "log_every": [0],
    "save_every": [0],
    "max_steps": [0],
    "max_hours": [-1.0],
}


def cases(kind: type, group: str, values: dict[str, list[Any]]) -> list[tuple[type, str, str, Any]]:
    return [(kind, group, name, value) for name, wrong in values.items() for value in wrong]


@pytest.mark.parametrize(
    ("kind", "group", "name", "value"),
    [
        *cases(Model, "model.", MODEL_VALUES),
        *cases(Data, "data.", DATA_VALUES),
        *cases(Options, "", VALUES),
    ],
)
def test_values_out_of_range(kind: type, group: str, name: str, value: Any):
    with pytest.raises(ValueError, match=rf"^--{group}{name}: expected [^\n]*, got [^\n]*$"):
        kind(**{name: value})


def test_values_that_do_not_fit_each_other():
    with pytest.raises(ValueError, match=r"^--model.loss: expected ce, .* --model.ohem_min_kept"):
        Model(loss="dice", ohem_min_kept=9)
    for dataset, option in (("folder", "zipf"), ("ade20k", "val_images"), ("ade20k", "channels")):
        with pytest.raises(ValueError, match=rf"^--data.{option}: expected .*, got {dataset}$"):
            Data(dataset, "data", **{option: 2})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^--model.window_stride: expected 1 to the crop's"):
        Options(Model(evaluation="sliding", window_stride=(32, 40)), Data(crop=(32, 32)))
    Options(Model(window_stride=(32, 40)), Data(crop=(32, 32)))
    with pytest.raises(ValueError, match=r"^--data.split: expected .* train or val, got test"):
        open_split(Data(split="test"), "test", 0)
    assert len(FREE) <= 10


def test_images_of_several_sizes_in_a_batch(folder: Path):
    data = Data("folder", str(folder), eval_batch_size=2)
    message = r"^--data.eval_batch_size: expected 1 for images of several sizes, got 4×5, 6×9$"
    with pytest.raises(ValueError, match=message):
        open_splits(data, 0)
    (folder / "images/val/b.png").unlink()
    (folder / "masks/val/b.png").unlink()
    open_splits(data, 0)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["trian"], 1, "expected one of the commands fit, validate, predict, demo, compare, prese"),
        ([], 1, "expected one of the commands fit, "),
        (["fit", "--data.crop", "[3, 4]"], 1, "--data.crop: expected two multiples of 32"),
        (["fit", "--model.lr", "a"], 2, 'Parser key "model.lr": Expected a'),
        (["fit", "--model.lrr", "1"], 2, "nrecognized arguments: --model.lrr"),
        (["fit", "--see", "1"], 2, "nrecognized arguments: --see"),
        (["demo", "--threads", "0"], 1, "--threads: expected at least 1, got 0"),
        (["predict", "--run", "nowhere"], 1, "nowhere: expected the directory of a run"),
        *((["fit", f"--{x}", "1"], 1, f"--{x} is now {now}") for x, now in RENAMED.items()),
        (["fit", "--trainer.profiler=foo"], 1, "--trainer.profiler is now an option that fit --he"),
    ],
)
def test_messages_have_one_line(words: list[str], status: int, message: str, capsys):
    assert main(words) == status
    said = capsys.readouterr().err
    assert said.startswith("anchorops-train: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {lrr: 1}", "does not accept option 'lrr'"),
        ("model: {lr: a}", "Expected a"),
        ("trainer: {max_steps: 1}", "--trainer.max_steps is now --max_steps"),
        ("seed_everything: 1", "--seed_everything is now --seed"),
        ("{", "is damaged"),
        ("shared: [foo]", "shared: expected a list of "),
        ("shared: digits", "shared: expected a list of "),
        ("shared:", "got None"),
        ("run: 2024-01-01", "a date in quotation marks"),
        ("model:", "model: expected options, got None"),
        ("1: 2", "own.yaml"),
    ],
)
def test_a_wrong_file_is_named(content: str, message: str, tmp_path: Path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    assert main(["fit", "--config", str(path)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert str(path) in said and message in said


def test_a_file_of_one_group(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text("lr: 0.5")
    model = parse("fit", ["--config", "digits", "--model", str(path), "--model.power", "1"])
    assert (model.options.model.lr, model.options.model.power) == (0.5, 1)


def test_fewer_images_than_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert not [*images_to_predict(Data(workers=1), [Path("a.png")])]


def test_a_demo_is_one_process(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["demo"]) == 1
    assert "demo: expected one process: start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset")])
def test_a_worker_that_was_killed(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys):
    """What its process leaves to read is a matter of chance."""

    def fail(_: object) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "fit", fail)
    assert main(["fit"]) == 1
    assert "a process that loads images was ended from outside" in capsys.readouterr().err


def test_files_to_predict(tmp_path: Path):
    for name in ("a.png", "low/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    out, names = tmp_path / "out", [str(tmp_path / x) for x in ("a.png", "low/a.png")]
    masks = masks_of(names, out, resume=False)
    assert [x.relative_to(out) for x in masks.values()] == [Path("a.png"), Path("low/a.png")]
    out.mkdir()
    (out / "a.png").touch()
    assert [*masks_of(names, out, resume=True).values()] == [out / "low/a.png"]
    for images, message in (
        (names, r"^--out: .*out/a.png exists: give another directory, or --resume"),
        ([names[1]] * 2, "new/a.png would be written twice"),
        ([str(tmp_path / "b.png")], r"^--images: expected files, got .*b.png$"),
        ([], r"^--images: expected files of images, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            masks_of(images, tmp_path / ("out" if images == names else "new"), resume=False)
    words = ["predict", "--config", "digits", "--images", "[a].jpg", "ö😀.jpg", "--out", "o"]
    given = parse("predict", words[1:])
    assert given.others["images"] == ["[a].jpg", "ö😀.jpg"]


def test_names_of_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A file of that name wins; an unknown one lists the presets with their published results."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()  # of data
    given = parse("fit", ["--config=folder", "--model.lr", "3", "--model.methods", "[sar]"])
    assert given.options.data.crop == (256, 256) and given.options.model.lr == 3
    assert given.run == tmp_path / "runs/folder-sar-seed0"
    assert parse("fit", ["--seed", "1"]).run == tmp_path / "runs/no-preset-plain-seed1"
    assert main(["presets"]) == 0 and "81.4 with sar" in capsys.readouterr().out
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").write_text("shared: [digits]\nmodel: {network: x}")
    given = parse("fit", ["-c", "folder", "-c", "digits-segformer-b0", "--seed", "1"])
    assert (given.options.model.network, given.options.val_every) == ("segformer-b0", 100)
    with pytest.raises(ValueError, match=r"(?s)got foldr\. The presets:.*81.4 with sar"):
        parse("fit", ["--config", "foldr"])
    assert len(presets().splitlines()) == len([*PRESETS.glob("*.yaml")]) - 1


def test_the_options_of_a_run_come_first(straight: Path):
    given = parse("validate", ["--run", str(straight), "--data.workers", "2"])
    assert given.options.data.crop == (32, 32) and given.options.data.workers == 2
    options = yaml.safe_load((straight / "config.yaml").read_text())
    assert options["data"]["val_images"] == 10 and list(options) == [*Options.__annotations__]
    given = parse("fit", [*TINY, "--run", str(straight), "--resume"])
    assert given.others["resume"] and given.run == straight
