"""The commands of anchorops-train: fit, validate, predict, demo, compare, presets."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    from jsonargparse import ArgumentParser
    from PIL import Image

    from . import ranks
    from .data.folders import MaskFolder
    from .data.splits import open_splits, validation_batches
    from .evaluation import as_weights, check_sizes, evaluate, predict, prediction_of, summarize
    from .networks.models import Segmenter, trained_model, upsample_late
    from .options import PUBLISHED, Options, expect, flat
    from .report.compare import NotEnded, comparison, load_results
    from .run import (
        BEST,
        CONFIG,
        DATA,
        LAST,
        Stop,
        Stopped,
        only_process,
        read_config,
        read_yaml,
        save_atomically,
    )
    from .train import Measure, train
except ModuleNotFoundError as error:
    sys.exit(
        f"anchorops-train: {error}: install what training needs: pip install 'anchorops[train]'"
    )

PRESETS = Path(__file__).with_name("presets")
SHARED = "shared"  # of the presets: settings that are written once
DEMO = ("digits", "digits-segformer-b0")  # a laptop needs minutes for this
DEMO_SHOWS = """
mIoU: mean over the classes of intersection over union. head, body, tail: the same over frequent,
less frequent and rare classes. mAcc: mean over the classes of the share of pixels found. All in %.

A short training shows how fast a network learns. On these scenes the gain of SAR disappears in
longer trainings; docs/evidence.md compares all methods after 500, 1,500 and 4,000 steps."""
WORKER_ENDED = (
    "a process that loads images was ended from outside, usually for want of memory: give fewer "
    "--data.workers"
)
RENAMED = {  # options of earlier versions
    "ckpt_path": "--resume (of fit), --checkpoint (of validate and predict)",
    "seed_everything": "--seed",
    "saving.every": "--save_every",
    "data.images": "--images",
    "data.allow_changes": "--model.weights, for a new run on other data",
    "trainer.accelerator": "--device",
    "trainer.devices": "torchrun --nproc-per-node N -m anchorops.train -- fit …",
    "trainer.num_nodes": "torchrun --nnodes N -m anchorops.train -- fit …",
    "trainer.strategy": "torchrun -m anchorops.train -- fit …",
    "trainer.precision": "--precision",
    "trainer.accumulate_grad_batches": "--accumulate",
    "trainer.gradient_clip_val": "--clip",
    "trainer.deterministic": "--deterministic",
    "trainer.max_steps": "--max_steps",
    "trainer.max_time": "--max_hours",
    "trainer.val_check_interval": "--val_every",
    "trainer.log_every_n_steps": "--log_every",
    "trainer.callbacks": "--ema, for averaged weights",
    "trainer": "an option that fit --help lists",
}


class Given(NamedTuple):
    """What a command line gives. run: its directory. others: the options of the command alone."""

    options: Options
    run: Path
    others: Mapping[str, Any]


def parser_of(command: str) -> ArgumentParser:
    name = f"anchorops-train {command}"
    parser = ArgumentParser(prog=name, exit_on_error=False, allow_abbrev=False)
    help = "A preset or a file of options. With several, the later ones override the earlier ones."
    parser.add_argument("--config", "-c", action="config", help=help)
    help = "Directory of the run; of fit, runs/PRESET-METHODS-seedN if not given."
    parser.add_argument("--run", type=str, default=None, help=help)
    if command == "fit":
        help = "Go on with the run, from its last state; the options are those of its config.yaml."
        parser.add_argument("--resume", action="store_true", help=help)
    else:
        help = "Weights of the run: best or last. --model.weights FILE replaces them."
        choices = {"choices": ["best", "last"], "default": "best"}
        parser.add_argument("--checkpoint", **choices, help=help)
    if command == "predict":
        parser.add_argument("--images", nargs="+", type=str, default=[], help="Files to predict.")
        help = "Directory of the masks: the images' subfolders and names, which end in .png."
        parser.add_argument("--out", type=str, default="predictions", help=help)
        help = "Go on with predictions that were stopped: leave out masks that exist."
        parser.add_argument("--resume", action="store_true", help=help)
    parser.add_class_arguments(Options)
    return parser


def parse(command: str, words: Sequence[str]) -> Given:
    """Raises ValueError for an option of an earlier version, an unknown preset and a wrong value,
    and what argparse raises for the others."""
    for word in words:
        if word.startswith("--"):
            _check_renamed(word[2:].partition("=")[0], "")
    parser = parser_of(command)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", "-c", action="append", default=[])
    first.add_argument("--run", type=lambda x: Path(x) if x else None)
    files, rest = first.parse_known_args(words)
    configs = [(name, load_preset(name)) for name in files.config]
    if files.run and (command != "fit" or not configs):
        needed = "--resume" in rest if command == "fit" else "--model.weights" not in rest
        if needed or (files.run / CONFIG).exists():
            saved = read_config(files.run)
            if command != "fit":
                saved.setdefault("model", {})["weights"] = None  # with which it began
            configs.insert(0, (files.run / CONFIG, saved))
    texts = []
    for file, content in configs:
        texts.append(json.dumps(content, default=str))  # YAML has dates
        try:
            parser.parse_string(texts[-1])
        except argparse.ArgumentError as error:
            raise ValueError(f"--config {file}: {' '.join(str(error).split())}") from None
    values = parser.parse_args([*(x for text in texts for x in ("--config", text)), *rest])
    given = vars(parser.instantiate(values))
    own = {name: given.pop(name) for name in [*given] if name not in Options.__annotations__}
    options = Options(**given)
    methods = "+".join(options.model.methods) or "plain"
    if options.model.setting != PUBLISHED:
        methods += f"-{options.model.setting}"
    preset = Path(files.config[-1]).stem if files.config else "no-preset"
    run = files.run or own["run"] or f"runs/{preset}-{methods}-seed{options.seed}"
    return Given(options, Path(run).absolute(), own)


def _check_renamed(name: str, place: str) -> None:
    known = RENAMED.get(name) or (RENAMED["trainer"] if name.startswith("trainer.") else None)
    if known:
        raise ValueError(f"{place}--{name} is now {known}")


def load_preset(name: str) -> dict[str, Any]:
    """The options in a file, or in a preset of this name, after those of the shared settings that
    it names. Raises ValueError for an unknown name, and for a file that cannot be read."""
    path = Path(name)
    if not path.is_file():
        path = PRESETS / f"{name}.yaml"
    if not path.exists():
        raise ValueError(
            f"--config: expected a file or a preset, got {name}. The presets:\n{presets()}"
        )
    content = read_yaml(path)
    for group in ("model", "data"):
        options = content.get(group)
        if options is not None and not isinstance(options, dict):
            raise ValueError(f"--config {path}: {group}: expected options, got {options}")
    for option in flat(content):
        _check_renamed(str(option), f"--config {path}: ")
    shared, names = read_yaml(PRESETS / f"{SHARED}.yaml"), content.pop(SHARED, [])
    if not isinstance(names, list) or any(name not in [*shared] for name in names):
        expected = f"expected a list of {', '.join(shared)}"
        raise ValueError(f"--config {path}: {SHARED}: {expected}, got {names}")
    merged: dict[str, Any] = {}
    for part in (*(shared[name] for name in names), content):
        for option, value in part.items():
            if isinstance(value, dict):
                merged[option] = {**merged.get(option, {}), **value}
            elif option not in ("model", "data") or value is not None:  # a group may be empty
                merged[option] = value
    return merged


def presets() -> str:
    """The presets, each with the first line of its file."""
    lines = []
    for path in sorted(PRESETS.glob("*.yaml")):
        first, *_ = path.read_text(encoding="utf-8").splitlines()
        if path.stem != SHARED:
            lines.append(f"  {path.stem}: {first.removeprefix('# ')}")
    return "\n".join(lines)


def fit(words: Sequence[str], measure: Measure | None = None) -> Path:
    """Train; returns the directory of the run."""
    given = parse("fit", words)
    train(given.options, given.run, resume=given.others["resume"], measure=measure)
    return given.run


def trained(given: Given) -> Segmenter:
    """The network of the weights that a command line names, on its device."""
    options, run = given.options, given.run
    path = run / {"best": BEST, "last": LAST}[given.others["checkpoint"]]
    path = Path(options.model.weights) if options.model.weights else path
    if not path.exists():
        raise ValueError(f"--run {run}: expected a run with {path.name}, there is none")
    device = ranks.start(options.device)
    model = trained_model(options.model, path, options.data.channels)
    layout = torch.channels_last if options.model.channels_last else torch.preserve_format
    model.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    zeros = torch.zeros(1, options.data.channels, *options.data.crop)
    upsample_late(model, as_weights(model, zeros, options.model.channels_last))
    return model.eval()


def validate(words: Sequence[str]) -> dict[str, float]:
    """The figures of a network on a split of the data."""
    given = parse("validate", words)
    options, model = given.options, trained(given)
    of_run = read_yaml(given.run / DATA) if (given.run / DATA).exists() else None
    data = open_splits(options.data, options.seed, of_run)
    classes, known = data.validation.classes, model.classifier.out_channels
    if known != len(classes):
        raise ValueError(f"validate: expected data of {known} classes, got {len(classes)}")
    ranks.on_first(lambda: check_sizes(model, options, data.sizes))
    with Stop() as stop:
        stop.where = "before the figures were complete"
        batches = validation_batches(options.data, data.validation)
        matrix = evaluate(model, batches, options, known, stop)
    figures = summarize(matrix, classes, data.frequencies, options.data.head_tail)
    return {f"{options.data.split}/{name}": figure for name, figure in figures.items()}


def _validate(words: Sequence[str]) -> None:
    figures = validate(words)
    if ranks.rank() == 0:
        print(*(f"{name}: {value:.6f}" for name, value in figures.items()), sep="\n")


def masks_of(images: Sequence[str], out: Path, resume: bool) -> dict[Path, Path]:
    """Each image and its mask, out/NAME.png, or out/SUBFOLDER/NAME.png if the images are in several
    folders. resume: leave out those that exist.

    Raises ValueError for an image that is not there, and a mask that exists or would be written
    twice.
    """
    expect(len(images) > 0, "images", "files of images", "none")
    paths = [Path(os.path.abspath(image)) for image in images]
    common = os.path.commonpath([path.parent for path in paths])
    of_masks: dict[Path, Path] = {}
    for path in paths:
        mask = out / path.relative_to(common).with_suffix(".png")
        expect(path.is_file(), "images", "files", path)
        expect(mask not in of_masks, "images", "images of different masks", f"{mask} twice")
        exists = mask.exists() and not resume
        expect(not exists, "out", "another directory, or --resume to keep what is there", mask)
        of_masks[mask] = path
    return {path: mask for mask, path in of_masks.items() if not mask.exists()}


def predict_masks(words: Sequence[str]) -> None:
    """Write the classes of each image: 8 bits, or 16 with more than 256 classes."""
    given = parse("predict", words)
    options, others = given.options, given.others
    model, out = trained(given), Path(others["out"])
    masks = ranks.on_first(lambda: masks_of(others["images"], out, others["resume"]))
    images, how = [*masks], prediction_of(options)
    kind = np.uint8 if model.classifier.out_channels <= 256 else np.uint16
    unlabelled = MaskFolder([(path, None) for path in images], options.data.channels)
    batches = validation_batches(replace(options.data, eval_batch_size=1), unlabelled)
    with Stop(advice="the same command and --resume") as stop, torch.no_grad():
        for done in range(0, len(images), ranks.world()):
            stop.where = f"after {done} of {len(images)} masks"
            stop.check()
            if (batch := next(batches, None)) is None:
                continue
            image, labels = batch
            image = as_weights(model, image, options.model.channels_last)
            path, size = images[done + ranks.rank()], tuple(labels.shape[1:])
            try:
                (classes,) = predict(model, image, size, **how)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{path} of {size}: {' '.join(str(error).split())}") from error
            mask, encoded = masks[path], BytesIO()
            Image.fromarray(classes.cpu().numpy().astype(kind)).save(encoded, "PNG")
            mask.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(encoded.getvalue(), mask)
            print(mask)


def _compare(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="anchorops-train compare", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of the runs")
    results = []
    for run in parser.parse_args(words).runs:
        try:
            results.append(load_results(run))
        except NotEnded as error:
            print(f"anchorops-train: {error}; it is left out", file=sys.stderr)
    if not results:
        raise ValueError("compare: expected runs that have ended, got none")
    print(comparison(results))


def _demo(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="anchorops-train demo",
        allow_abbrev=False,
        description="HRNet-W18-small and SegFormer-B0 on digit scenes, plain and with SAR.",
    )
    parser.add_argument("--steps", type=int, default=500, help="of each of the four runs")
    help = "directory of the runs; those that it has go on, or stay if they have ended"
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help=help)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    demo = parser.parse_args(words)
    expect(demo.threads >= 1, "threads", "at least 1", demo.threads)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("demo: expected one process: start it without torchrun")
    torch.set_num_threads(demo.threads)
    runs, advice = [], shlex.join(["anchorops-train", "demo", *words])
    with only_process(demo.out, "give this demo its own directory with --out"):
        for preset in DEMO:
            for methods in ("", "sar"):
                run = demo.out / f"{preset}-{methods or 'plain'}"
                print(f"\n{run}", file=sys.stderr)
                chosen = ["--config", preset, "--model.methods", f"[{methods}]"]
                chosen += ["--data.steps", str(demo.steps), "--seed", str(demo.seed)]
                options = parse("fit", chosen).options
                train(options, run, resume=(run / CONFIG).exists(), advice=advice)
                runs.append(run)
    print(comparison([load_results(run) for run in runs]))
    print(*(run / "predictions.png" for run in runs), sep="\n")
    print(DEMO_SHOWS)


COMMANDS = {
    "fit": fit,
    "validate": _validate,
    "predict": predict_masks,
    "demo": _demo,
    "compare": _compare,
    "presets": lambda _: print(presets()),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # of a terminal without UTF-8, and names that are none
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--"]:  # between the options of torchrun and ours
        del words[0]
    command, *rest = words or [""]
    try:
        if command not in COMMANDS:
            raise ValueError(f"expected one of the commands {', '.join(COMMANDS)}, got {command!r}")
        COMMANDS[command](rest)
    except Stopped as stopped:
        return _ended(str(stopped), stopped.exit_status, on_first=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ranks.AnotherRankFailed:
        return 1
    except argparse.ArgumentError as error:  # of the parser, in several lines
        return _ended(" ".join(str(error).split()), 2)
    except (ConnectionResetError, ConnectionRefusedError, EOFError):
        # of the sockets by which the workers of the data loader pass on their images
        return _ended(WORKER_ENDED, 1)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # for an error in a worker of the data loader, the message contains the whole traceback
        return _ended(str(error).rstrip().rpartition("\nValueError: ")[2], 1)
    except RuntimeError as error:
        if known := _known(str(error)):
            return _ended(known, 1)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _known(error: str) -> str | None:
    """What an error of torch means, where its own text does not say it."""
    if "DataLoader worker" in error:
        return WORKER_ENDED
    if ranks.world() > 1 and any(x in error for x in ("peer", "Gloo", "gloo", "NCCL")):
        return "another rank has ended, which tells why"
    return None


def _ended(message: str, status: int, on_first: bool = False) -> int:
    alone = dist.is_initialized() and not on_first  # an error of this rank, or of all
    if alone or int(os.environ.get("RANK", 0)) == 0:
        print(f"anchorops-train: {message}", file=sys.stderr)
    return status
