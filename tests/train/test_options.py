"""Where options come from; and options and files that cannot be, which end with one line."""

from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from anchorops.train.commands import PRESETS, main, parse, presets
from anchorops.train.networks import build_model
from anchorops.train.options import FREE, Model, Options
from tests.helpers.image_files import image, write
from tests.helpers.tiny_runs import FOLDER, TINY

Refused = Callable[..., str]

OUT_OF_RANGE = {
    "-1": """model.auxiliary_weight model.classifier_std model.head_lr_factor model.warmup
        model.power model.focal_gamma model.label_smoothing model.ohem_threshold
        model.weight_decay data.workers
        data.data_seed data.zipf seed max_hours""",
    "0": """data.steps data.batch_size data.channels data.eval_batch_size data.train_images
        data.val_images data.short_side data.long_side accumulate val_every log_every save_every
        max_steps clip model.ohem_min_kept model.lr data.cat_max_ratio""",
    "2": "ema model.dropout data.cat_max_ratio",
    "[]": "model.eval_scales model.class_weights",
    "[0.0]": "model.eval_scales model.class_weights",
    "[1,-1]": "model.class_weights",
    "inf": "model.lr model.weight_decay model.power clip max_hours data.zipf",
    "[.inf]": "model.eval_scales model.class_weights",
    "[1,.nan,1]": "data.mean",
    "[1,.inf]": "data.scale",
    "[0.001,0.01]": "data.head_tail",
    str(2**63): "seed",
    "[2.0,0.5]": "data.scale",
    "[50,64]": "data.crop",
    "[99,1]": "model.window_stride",
}


@pytest.mark.parametrize("value", OUT_OF_RANGE)
def test_values_out_of_range(value: str, refused: Refused):
    for name in OUT_OF_RANGE[value].split():
        refused(f"fit {TINY} --{name}={value}", f"--{name}: (expected|Not of|Expected) ")
    assert len(FREE) <= 10


# what is not refused ends after some steps
FIT = f"fit {FOLDER} --data.root $folder --run $new"
PREDICT = "predict --run $run --out $new"
PAN = "--run $run --model.network pan:resnet18 --data.crop [128,128] --model.weights $files"
DIGITS = f"fit {TINY} --run $new --model.network"
SAR = f"{DIGITS} hrnet-w18-small --model.method_options"
COMMAND_LINES = {
    "trian": "expected one of fit, validate, predict, demo, compare, presets, got",
    "demo --threads 0": "nrecognized arguments: --threads 0$",
    "demo --steps 0": "--data.steps: Not of type PositiveInt",
    "fit --model.lrr 1": "nrecognized arguments: --model.lrr",
    f"fit {TINY} --model.methods [sar,sar]": "--model.methods: expected each at most once",
    f"fit {TINY} --accumulate 3": "--data.batch_size: expected a multiple of .* = 3, got 4",
    f"fit {TINY} --data.channels 4": "--data.channels: expected 3 for digits, got 4",
    f"fit {TINY} --data.mean [1,2,3]": "--data.mean: expected .* and --data.std, each of 3",
    f"fit {TINY} --data.mean [1,2] --data.std [1,2]": "--data.mean: .* each of 3 .*, got",
    f"{FIT} --data.photometric true --data.channels 4": "--data.photometric: expected 3 channels",
    "validate --run $new --model.weights nowhere": "No such file .*new/config.yaml'$",
    "validate --model.weights nowhere": "nowhere does not exist: a run has its best weights after",
    # what acts on nothing
    f"fit {TINY} --model.loss dice --model.ohem_min_kept 9": "min_kept: expected another .* th",
    f"fit {TINY} --model.loss dice --model.class_weights [1]": "weights: expected another .* th",
    f"fit {TINY} --model.class_weights [1,2] --run $new": "_weights: expected 11 numbers, got .1.0",
    f'fit {TINY} --model.paper_options {{"cbp.length":1}}': "ons: expected METHOD.ARGUMENT of chos",
    f"fit {TINY} --model.focal_gamma 2": "gamma: expected --model.loss focal, got 2.0, w",
    f"fit {TINY} --model.window_stride [9,9]": "window_stride: expected --model.evaluation sliding",
    f"fit {TINY} --model.pretrained true --model.weights x": "pretrained: expected no file of",
    f"fit {TINY} --data.root x": "--data.root: expected another --data.dataset than digits, got x",
    f"fit {TINY} --data.nodata nan": "nodata: expected another .* digits, got nan, which",
    f"{FIT} --data.zipf 1": "--data.zipf: expected --data.dataset digits, got 1.0, which acts on",
    "fit -c camvid --data.mask_suffix x": "mask_suffix: expected --data.dataset folder, got x",
    "validate --run $run --seed 1": "--seed: expected an option that validate --run uses, got",
    "predict --model.lr 1": "--model.lr: expected an option that predict uses, got 1.0, which acts",
    "predict --data.dataset folder --data.crop [64,64]": "crop: expected an option that predict",
    # what the data or the network cannot be
    f"{FIT} --data.eval_batch_size 2": r"size: expected 1 for images of several sizes, got .*6, 9",
    f'{FIT} --data.label_map {{"1,2,3":0,"4":1}}': "or only colours .*, got .4.: 1",
    f'{FIT} --data.label_map {{"1,2,3":2}}': "classes -1 to 1, got '1,2,3': 2",
    f"{FIT} --data.label_map {{128:1}}": "--data.label_map: .* Given value: {'128:1': None}",
    f'{FIT} --data.label_map {{"-32769":1}}': "expected values -32768 to 65535, .* -32769: 1",
    f'{FIT} --data.label_map {{"1":-1}}': "training pixels: thing; .*; 255 is ignored unless",
    f'{FIT} --data.label_map {{"0":-1,"1":-1}}': "in the validation: 0: expected two",
    # networks
    f"{DIGITS} pan:resnet18": r"cannot take images of 32×32 \(.*\); of squares .* 128×128,",
    f"{DIGITS} deeplabv3:resnet18 --data.batch_size 1": "--data.batch_size: batch norm needs",
    f"{DIGITS} alexnet": "--model.network alexnet: .*architecture",
    f"{DIGITS} hrnet-w99": "--model.network hrnet-w99: Unknown model",
    f"{DIGITS} dpt:tu-vit_tiny_patch16_224 --model.auxiliary_weight 1": "0 for DPT and probes",
    f"{DIGITS} hrnet-w18-small --model.weights $files/list": "list is damaged",
    f"{DIGITS} hrnet-w18-small --model.weights $files/code": "code is damaged",
    # arguments of methods
    f'{SAR} {{"sar.detla":0.5}}': "SAR.*unexpected keyword argument 'detla'",
    f'{SAR} {{"occl.temperature":1}}': r"METHOD among --model.methods \['sar'\], got occl",
    # runs
    f"fit {TINY} --run $run": "holds a run: --resume goes on with it",
    f"fit {TINY} --run $run --resume --model.lr 1": "--model.lr: 1.0, .*straight has 0.004: ",
    "fit --run $new --resume": "--resume: expected the --run of a run on .*, or --config to start",
    f"fit {TINY} --run $new\udcff": r"--run: expected a path in UTF-8, .*new.udcff'$",
    "validate --run $run --model.network segformer-b1": "weights .*best.ckpt are not those of this",
    f"validate {PAN}/linear": "linear are not those .*classifier.weight",
    "validate --run $run --model.weights $files/headless": "less: they have no classifier.weight",
    "fit --data.dataset ade20k --data.root $new": r"no image .*new/images/training/\*.jpg",
    "compare $folder": "No such file .*metrics.csv",
    # images to predict
    PREDICT: "--images: expected files of images, got none",
    f"{PREDICT} --images $files/none": "--images: expected one of .png, .* got .*none with none",
    f"{PREDICT} --images $new.png": "new.png cannot be read: .*No such file",
    f"{PREDICT} --images $folder/images/val/b.png $folder/images/val/b.png": "masks, got .*b.png, ",
    f"predict {PAN}/pan --out $new --images $files/small.png": r"small.png of \(64, 64\): Given in",
    "predict --run $run --out $folder/masks/val --images $folder/images/val/b.png": (
        "--out: expected another directory, or --resume .*masks/val/b.png"
    ),
}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, weights and vectors."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "none").mkdir()
    write(folder / "small.png", image(64, 64))
    pan = build_model(Model("pan:resnet18"), 2).state_dict()
    torch.save({"model": pan, "channels": 3}, folder / "pan")
    torch.save([1, 2], folder / "list")
    torch.save({"model": {"x": folder}}, folder / "code")  # a path is no weight
    torch.save({"model": pan | {"classifier.weight": torch.zeros(2, 9)}}, folder / "linear")
    del pan["classifier.weight"]
    torch.save({"model": pan}, folder / "headless")
    np.save(folder / "objects.npy", np.array([[{}]]))
    return folder


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_command_lines(
    words: str, straight: Path, files: Path, folder: Path, tmp_path: Path, refused: Refused
):
    """What needs no data is found before they are read, and no directory is left."""
    places = {"run": straight, "files": files, "folder": folder, "new": tmp_path / "new"}
    said = refused(Template(words).substitute(places), COMMAND_LINES[words])
    assert "reading " not in said or words.startswith(FIT)
    assert not (tmp_path / "new").exists()


OPTIONS = {
    "model: {lrr: 1}": "model.lrr is unknown",
    "model: {lr: a}": "--model.lr: Not of type PositiveFloat",
    "data: 3": "data: expected options, got 3",
    "trainer: {profiler: 1}": "'trainer.profiler' is not accepted",
    "{": "is damaged",
    "model: {lr: 1}\nmodel: {power: 1}": "each key once, got model twice .* line 1",
    "data: {label_map: {1: 0, 1: 1}}": "each key once, got 1 twice",
    "config: [digits]": "config: expected --config on the command line, got ",
    "resume: true": "resume: expected --resume on the command line, got True",
    "data: {nodata: 1:30, dataset: folder}": "--data.nodata: .*'1:30'",
    "data: {label_map: {1: 1:30}}": "--data.label_map: .*'1:30'",
    "max_hours: 1:30": "--max_hours: Not of type PositiveFloat: could not .*'1:30'",
    "data: {crop: [64, 1:4]}": "--data.crop: Not of type PositiveInt: .*'1:4'",
    "data: {zipf: 2, dataset: folder}": "--data.zipf: expected --data.dataset digits, got 2",
    "model: {window_stride: [9, 9]}": "--model.window_stride: expected --model.evaluation sliding",
    "1: 2": "Key must be a string",
}


@pytest.mark.parametrize("content", OPTIONS)
def test_a_wrong_file_of_options(content: str, tmp_path: Path, refused: Refused):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    refused(f"fit -c {path}", OPTIONS[content])


def parsed(words: str) -> tuple[Options, Path, dict[str, Any]]:
    command, *others = words.split()
    return parse(command, others)


def test_values_are_those_of_the_command_line(tmp_path: Path):
    """Unlike in YAML 1.1: decimal numbers, and no dates."""
    values = {"lr": "1e-3", "warmup": "010", "dropout": ".5", "weights": "2020-01-01"}
    values |= {"window_stride": "[010, 08]", "eval_flip": "on", "evaluation": "sliding"}
    words = " ".join(f"--model.{name}={value.replace(' ', '')}" for name, value in values.items())
    text = ", ".join(f"{name}: {value}" for name, value in values.items())
    write(tmp_path / "own.yaml", f"model: {{{text}}}".encode())
    options, *_ = parsed(f"fit {words}")
    assert parsed(f"fit -c {tmp_path}/own.yaml")[0] == options
    model = options.model
    assert (model.lr, model.warmup, model.window_stride) == (1e-3, 10, (10, 8))
    assert (model.weights, model.eval_flip) == ("2020-01-01", True)


def test_what_is_not_refused_though_it_acts_on_nothing(straight: Path, tmp_path: Path):
    """That of a preset, of a run, with its default in a file, and turned off."""
    parsed("fit -c pascal-context-hrnet-w48 --model.evaluation whole --model.weights x")
    saved = (straight / "config.yaml").read_text().replace("zipf: 1.0", "zipf: 2.0")
    for name in ("config.yaml", "data.yaml"):
        write(tmp_path / "run" / name, saved.encode())
    parsed(f"predict --run {tmp_path}/run")
    parsed(f"fit -c {tmp_path}/run/config.yaml --data.dataset folder")
    write(tmp_path / "own.yaml", b"data: {dataset: folder, zipf: 1, train_images: 20000}")
    parsed(f"fit -c {tmp_path}/own.yaml --model.window_stride null --model.pretrained false")


def test_names_of_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A file of that name wins; an unknown one lists the presets with their published results."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()  # of data
    options, run, _ = parsed("fit --config=folder --model.lr 3 --model.methods [sar]")
    assert options.data.crop == (256, 256) and options.model.lr == 3
    assert run == tmp_path / "runs/folder-sar-seed0"
    assert parsed("fit --seed 1")[1] == tmp_path / "runs/no-preset-plain-seed1"
    options, run, _ = parsed("fit -c pascal-context-deeplabv3-r101 -c from-scratch")
    arguments = options.model.paper_options or {}
    assert arguments["sar.loss_weight"] == 0.05 and arguments["ceco.loss_weight"] == 0.2
    assert run.name == "pascal-context-deeplabv3-r101-from-scratch-plain-seed0"
    assert main(["presets"]) == 0 and "81.4 with sar" in capsys.readouterr().out
    assert len(presets().splitlines()) == len([*PRESETS.glob("*.yaml")]) - 1
    with pytest.raises(ValueError, match=r"(?s)got foldr\. The presets:.*81.4 with sar"):
        parsed("fit --config foldr")
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").write_text("model: {network: x}")
    options, *_ = parsed("fit -c digits-segformer-b0 -c folder --seed 1")
    assert (options.model.network, options.val_every, options.seed) == ("x", 100, 1)


def test_the_options_of_a_run_come_first(straight: Path, tmp_path: Path):
    options, *_ = parsed(f"validate --run {straight} --data.workers 2")
    assert (options.data.crop, options.data.val_images, options.data.workers) == ((32, 32), 10, 2)
    saved = yaml.safe_load((straight / "config.yaml").read_text())
    assert list(saved) == [*Options.__annotations__]
    _, run, others = parsed(f"fit --config digits --run {straight} --resume")
    assert others["resume"] and run == straight
    saved["model"]["weights"] = "first.pt"  # its network is not that of the run's end
    write(tmp_path / "config.yaml", yaml.safe_dump(saved).encode())
    for command, weights in (("validate", None), ("predict", None), ("fit --resume", "first.pt")):
        assert parsed(f"{command} --run {tmp_path}")[0].model.weights == weights


def test_a_picture_that_cannot_be_written(tmp_path: Path, refused: Refused):
    (tmp_path / "predictions.png.part").mkdir()
    refused(f"fit {TINY} --run {tmp_path}", "predictions.png could not be written: .*earlier files")
