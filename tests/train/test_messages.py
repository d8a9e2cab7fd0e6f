"""Options and files that cannot be end with one line that names them."""

import re
from collections.abc import Callable
from pathlib import Path
from string import Template

import numpy as np
import pytest
import torch

from anchorops.train.commands import COMMANDS, RENAMED
from anchorops.train.networks.models import build_model
from anchorops.train.options import FREE, Model
from tests.helpers.image_files import image, write
from tests.helpers.tiny_runs import TINY

Refused = Callable[..., None]

OUT_OF_RANGE = {
    "-1": """model.auxiliary_weight model.classifier_std model.lr model.head_lr_factor model.warmup
        model.power data.workers data.data_seed seed clip max_hours""",
    "0": """data.steps data.batch_size data.channels data.eval_batch_size data.train_images
        data.val_images data.short_side data.long_side accumulate val_every log_every save_every
        max_steps""",
    "1": "data.channels",  # for other data sets
    "5": "model.focal_gamma",
    "512": "data.short_side",
    ".inf": "model.auxiliary_weight clip",
    ".nan": "model.classifier_std model.lr",
    "[]": "model.eval_scales",
    "[0.0]": "model.eval_scales",
    "[1.0,.inf]": "model.eval_scales data.scale",
    "[0.0,0.0]": "data.scale",
    "[2.0,0.5]": "data.scale",
    "[0.5,2.0]": "data.scale",
    "[sar,sar]": "model.methods",
    "[50,64]": "data.crop",
    "[0,32]": "data.crop",
    "[0.001,0.01]": "data.head_tail",
    "[1.1,0.1]": "data.head_tail",
    "[0.1,-0.1]": "data.head_tail",
    "data": "data.root",
    '{"1":0}': "data.label_map",
}


@pytest.mark.parametrize("value", OUT_OF_RANGE)
def test_values_out_of_range(value: str, refused: Refused):
    for name in OUT_OF_RANGE[value].split():
        refused(f"fit --{name}={value}", f"-train: --{name}: expected .*, got .*$")
    assert len(FREE) <= 10


FIT = "fit --device cpu --config folder --data.root $folder --data.crop [32,32] --run $new"
PREDICT = "predict --run $run --out $new"
COMMAND_LINES = {
    "": "expected one of the commands fit, ",
    "trian": "expected one of the commands fit, validate, predict, demo, compare, presets, got",
    "demo --threads 0": "--threads: expected at least 1, got 0",
    "fit --trainer.profiler=foo": "--trainer.profiler is now an option that fit --help lists",
    **{f"fit --{name} 1": f"--{name} is now {re.escape(new)}" for name, new in RENAMED.items()},
    # options that do not fit each other
    "fit --model.loss dice --model.ohem_min_kept 9": "--model.loss: expected ce, .* --model.ohem_m",
    f"{FIT} --data.zipf 2": "--data.zipf: expected .*, got folder",
    "fit --data.dataset ade20k --data.root . --data.val_images 2": "val_images: .*, got ade20k",
    "fit --data.dataset ade20k --data.root . --data.channels 4": "channels: .*, got ade20k",
    f"{FIT} --model.evaluation sliding --model.window_stride [32,40]": "_stride: expected 1 to the",
    "fit --config digits --data.split test": "--data.split: expected .* train or val, got test",
    # what the data or the network cannot be
    f"{FIT} --data.eval_batch_size 2": "size: expected 1 for images of several sizes, got 4×5, 6×9",
    f'{FIT} --data.label_map {{"1,2,3":0,"4":1}}': "expected either values or colours, got both",
    f'{FIT} --data.label_map {{"1,2,256":0}}': "values, or colours 'R,G,B' .*255, got '1,2,256'",
    f'{FIT} --data.label_map {{"1,2":0}}': "got '1,2'",
    f'{FIT} --data.label_map {{"red":0}}': "--data.label_map: expected .* got 'red'",
    f'{FIT} --data.label_map {{"1,2,3":2}}': "classes -1 to 1, got 1,2,3: 2",
    f'{FIT} --data.label_map {{"-1":1}}': "values 0 to 65535 and classes -1 to 1, got -1: 1",
    f'{FIT} --data.label_map {{"70000":1}}': "got 70000: 1",
    f"fit {TINY} --run $new --model.network pan:resnet18": (
        r"pan:resnet18 cannot take images of 32×32 \(.*\); of squares .* it takes 128×128,"
    ),
    f"fit {TINY} --run $new --model.network deeplabv3:resnet18 --data.batch_size 1": (
        "--data.batch_size: batch norm needs"
    ),
    # runs
    f"fit {TINY} --run $run": "holds a run: go on with it by `anchorops-train fit --run .*",
    f"fit {TINY} --run $run --resume --model.lr 1": r"--model.lr is 1.0, .*config.yaml has 0.004: ",
    f"fit {TINY} --run $run --resume --data.steps 12": "--data.steps is 12, .* has 6",
    f"fit {TINY} --run $run --resume --seed 1": "--seed is 1, .* has 0",
    f"fit {TINY} --run $run --resume --ema 0.9": "--ema is 0.9, .* has None",
    f'fit {TINY} --run $run --resume --model.method_options {{"sar.tau":0.5}}': (
        "--model.method_options is {'sar.tau': 0.5}, .* has None"
    ),
    "validate --run $run --model.network segformer-b1": "weights .*best.ckpt are not those of this",
    "predict --run nowhere": "nowhere: expected the directory of a run",
    "compare $folder": "expected the directory of a run",
    "compare $run $run": "the same options and different seeds, got",
    # images to predict
    PREDICT: "--images: expected files of images, got none",
    f"{PREDICT} --images $new.png": "--images: expected files, got .*new.png",
    f"{PREDICT} --images $folder/images/val/b.png $folder/images/val/b.png": "masks, got .* twice",
    f"{PREDICT} --images $folder/four.tif": "four.tif: expected 3 channels, got 4: save the image",
    "predict --run $run --out $folder/masks/val --images $folder/images/val/b.png": (
        "--out: expected another directory, or --resume .*masks/val/b.png"
    ),
}


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_command_lines(words: str, straight: Path, folder: Path, tmp_path: Path, refused: Refused):
    write(folder / "four.tif", np.zeros((5, 6, 4), np.uint8))
    line = Template(words).substitute(folder=folder, run=straight, new=tmp_path / "new")
    refused(line, COMMAND_LINES[words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fit --model.lr a", 'Parser key "model.lr": Expected a'),
        ("fit --model.lrr 1", "nrecognized arguments: --model.lrr"),
        ("fit --see 1", "nrecognized arguments: --see"),
    ],
)
def test_usage(words: str, message: str, refused: Refused):
    refused(words, message, status=2)


OPTIONS = {
    "model: {lrr: 1}": "does not accept option 'lrr'",
    "model: {lr: a}": "Expected a",
    "trainer: {max_steps: 1}": "--trainer.max_steps is now --max_steps",
    "seed_everything: 1": "--seed_everything is now --seed",
    "{": "is damaged",
    "shared: [foo]": "shared: expected a list of ",
    "shared: digits": "shared: expected a list of ",
    "shared:": "got None",
    "1: 2": "",
}


@pytest.mark.parametrize("content", OPTIONS)
def test_a_wrong_file_of_options(content: str, tmp_path: Path, refused: Refused):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    refused(f"fit -c {path}", f"--config {path}: .*{OPTIONS[content]}|{path} is damaged")


def test_images_that_a_network_cannot_take(tmp_path: Path, refused: Refused):
    small, weights = tmp_path / "small.png", tmp_path / "weights.pt"
    torch.save(
        {"model": build_model(Model("pan:resnet18"), 2).state_dict(), "channels": 3}, weights
    )
    write(small, image(64, 64))
    words = f"predict --run {tmp_path} --model.weights {weights} --model.network pan:resnet18"
    words += f" --data.crop [128,128] --device cpu --out {tmp_path}/out --images {small}"
    for sliding, advice in (
        ("", "give such a --data.crop, and --model.evaluation sliding for"),
        (" --model.evaluation sliding", "give a --data.short_side with which no side"),
    ):
        message = f"{small}: --model.network pan:resnet18 cannot take .*{advice}"
        refused(words + sliding, message)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset")])
def test_a_worker_that_was_killed(
    error: Exception, monkeypatch: pytest.MonkeyPatch, refused: Refused
):
    """What its process leaves to read is a matter of chance."""

    def fail(_: object) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "fit", fail)
    refused("fit", "a process that loads images was ended from outside")


def test_a_demo_is_one_process(monkeypatch: pytest.MonkeyPatch, refused: Refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("demo", "demo: expected one process: start it without torchrun")
