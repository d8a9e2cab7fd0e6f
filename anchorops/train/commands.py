"""The commands of anchorops-train: fit, validate, predict, demo, compare, presets."""

import argparse
import io
import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import imagecodecs
import torch
import torch.distributed as dist
import yaml
from jsonargparse import ArgumentParser, auto_cli, set_loader

from . import ranks
from .data.folders import IMAGES, files_of
from .data.images import read_image
from .data.loading import CHANNELS, Like, check_bits, network_input, open_splits
from .evaluation import check_crop, check_sizes, evaluate, figures_of, predict
from .networks import FROZEN, Segmenter, trained_model
from .options import Options, check_effects, expect, flat
from .run import (
    BEST,
    CONFIG,
    DATA,
    GO_ON,
    Stop,
    Stopped,
    comparison,
    read_yaml,
    save_atomically,
    save_confusion,
)
from .train import place, train

VALUES = "values"  # the mode of jsonargparse that reads them with `load_values`
PRESETS = Path(__file__).with_name("presets")
SHARED = "shared"  # of the presets: settings that are written once
DEMO = ("digits", "digits-segformer-b0")  # a laptop needs minutes for this


class Loader(yaml.SafeLoader):
    """Reads values on the command line and in files of options: YAML, in which each key is given
    once, and whose numbers are decimal. YAML 1.1 makes 90 of 1:30 and 8 of 010."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if tag.endswith(("bool", "null", "merge"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                message = f"expected each key once, got {key} twice"
                raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return super().construct_mapping(node, deep)


NUMBERS = {
    "int": r"[-+]?\d+$",
    "float": r"[-+]?((\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|\.?(inf|Inf|INF))$|\.?(nan|NaN|NAN)$",
}
for kind, pattern in NUMBERS.items():
    first = list("-+.0123456789iInN")
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), first)
Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def load_values(text: str) -> Any:
    return yaml.load(text, Loader)


set_loader(VALUES, load_values, (yaml.YAMLError,))


def parser_of(command: str) -> ArgumentParser:
    name = f"anchorops-train {command}"
    parser = ArgumentParser(prog=name, exit_on_error=False, allow_abbrev=False, parser_mode=VALUES)
    help = "A preset or a file of options. With several, the later ones override the earlier ones."
    parser.add_argument("--config", "-c", action="append", default=[], help=help)
    parser.add_argument("--run", help="Directory; of fit, runs/PRESET-METHODS-seedN by default.")
    if command != "validate":
        parser.add_argument("--resume", action="store_true", help="Go on with what was stopped.")
    if command == "predict":
        help = "Files to predict, or directories of them."
        parser.add_argument("--images", nargs="+", default=[], help=help)
        parser.add_argument("--out", default="predictions", help="Directory of the masks.")
    parser.add_class_arguments(Options)
    return parser


def parse(command: str, words: Sequence[str]) -> tuple[Options, Path, dict[str, Any]]:
    """The options, the directory of the run, and the options of the command alone. Raises
    ValueError for an unknown preset, a wrong value, and an option that acts on nothing; and what
    argparse raises for the others."""
    parser = parser_of(command)
    words_alone = parser.parse_args(words, defaults=False)
    names, of_run = words_alone.get("config", []), words_alone.get("run")
    configs = [(name, part) for name in names for part in load_preset(name)]
    of_user = {option for name, part in configs if _is_of_user(Path(name)) for option in flat(part)}
    goes_on = command == "fit" and words_alone.get("resume", False) and not configs
    if goes_on:
        exists = of_run is not None and (Path(of_run) / CONFIG).exists()
        expected = f"the --run of a run on {socket.gethostname()}, or --config to start one"
        expect(exists, "--resume", expected, of_run)
    if of_run and (command != "fit" or goes_on):
        first = [(f"{of_run}/{CONFIG}", read_yaml(Path(of_run) / CONFIG))]
        if command != "fit":  # the weights with which the run began
            first.append(("", {"model": {"weights": None}}))
        configs = [*first, *configs]
    values, paper = None, {}
    for file, content in configs:
        for group in ("model", "data"):
            options = content.get(group, {})
            expect(isinstance(options, dict), f"--config {file}: {group}", "options", options)
        model = content.get("model", {})
        if isinstance(added := model.get("paper_options"), dict):
            paper = paper | added  # to which each file adds, as `from-scratch` does
            content = content | {"model": model | {"paper_options": paper}}
        try:
            values = parser.parse_object(content, values)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(None, f"--config {file}: {error}") from None
    chosen = vars(parser.instantiate(parser.parse_args(words, values)))
    options = Options(**{name: chosen[name] for name in Options.__annotations__})
    others = {name: value for name, value in chosen.items() if name not in Options.__annotations__}
    with_run = f"{command} --run" if of_run else command
    check_effects(options, with_run, flat(words_alone.as_dict()), of_user)
    preset = "-".join(Path(name).stem for name in names) or "no-preset"
    methods = "+".join(options.model.methods) or "plain"
    run = others["run"] or f"runs/{preset}-{methods}-seed{options.seed}"
    return options, Path(run).absolute(), others


def _is_of_user(file: Path) -> bool:
    """Whether it is a file of options, not a preset or what a run has written."""
    of_run = file.name == CONFIG and file.with_name(DATA).exists()
    return file.is_file() and not of_run


def load_preset(name: str) -> list[dict[str, Any]]:
    """The options in a file; or in a preset of this name, after the shared ones that it names.
    Raises ValueError for an unknown name, and for a file that cannot be read."""
    if Path(name).is_file():
        content = read_yaml(Path(name), load=load_values)
        for word in ("config", "run", "resume", "images", "out"):
            place = f"--{word} on the command line"
            expect(word not in content, f"{name}: {word}", place, content.get(word))
        return [content]
    path = PRESETS / f"{name}.yaml"
    expect(path.exists(), "--config", "a file or a preset", f"{name}. The presets:\n{presets()}")
    content, shared = (read_yaml(x, load=load_values) for x in (path, PRESETS / f"{SHARED}.yaml"))
    own = {name: x for name, x in content.items() if name != SHARED}
    return [*(shared[part] for part in content.get(SHARED, [])), own]


def presets() -> str:
    """The presets, each with the first line of its file."""
    paths = sorted({*PRESETS.glob("*.yaml")} - {PRESETS / f"{SHARED}.yaml"})
    first = [path.read_text(encoding="utf-8").partition("\n")[0] for path in paths]
    lines = zip(paths, first, strict=True)
    return "\n".join(f"  {path.stem}: {line.removeprefix('# ')}" for path, line in lines)


def fit(words: Sequence[str]) -> Path:
    """Train; returns the directory of the run."""
    options, run, others = parse("fit", words)
    train(options, run, others["resume"])
    return run


def trained(options: Options, run: Path) -> Segmenter:
    """The network of the best weights of a run, or of those that the options name."""
    path = Path(options.model.weights or run / BEST)
    device = ranks.start(options.device)
    ranks.check_alike(options, path, path.with_name(FROZEN))
    model = trained_model(options.model, path, options.data.channels)
    if options.model.evaluation == "sliding":
        check_crop(model, options)
    place(model, model, options, device)
    return model.eval()


def of_training(
    options: Options, run: Path, run_is_given: bool, model: Segmenter
) -> tuple[Options, dict[str, Any] | None, Like | None]:
    """For an evaluation: the options with mean and standard deviation of the run's images; what was
    found for its training; and what images must be, of `check_bits`. Other weights than those of a
    run have none of them."""
    data, found = options.data, None
    if (run_is_given or options.model.weights is None) and (run / DATA).exists():
        found = read_yaml(run / DATA, "classes", "training pixels")
    channels = (found or {}).get(CHANNELS, {})
    given = {"mean": data.mean or (), "std": data.std or ()}
    if data.mean is not None and any([*given[x]] != channels.get(x) for x in given):
        return options, found, None  # they are given for these images
    if not channels:
        mean, std = model.moments or (None, None)
        options = replace(options, data=replace(data, mean=mean, std=std))
        return options, found, (True, "--data.mean and --data.std are not given")
    data = replace(data, mean=channels["mean"], std=channels["std"])
    return replace(options, data=data), found, (channels["8 bits"], "the images of the run")


def load(run: Path | str) -> tuple[Segmenter, Options]:
    """The network of a run's best weights, in evaluation mode, and its options, with which images
    are prepared. Raises ValueError for a run without weights, or with damaged ones."""
    options, path, _ = parse("predict", ["--run", str(run)])
    model = trained(options, path)
    options, *_ = of_training(options, path, True, model)
    return model, options


def validate(words: Sequence[str]) -> dict[str, float]:
    """Print the figures of a network on a split of the data. The confusion matrix of a run's best
    weights is written into the run."""
    options, run, others = parse("validate", words)
    best = Path(options.model.weights or run / BEST).absolute() == run / BEST
    model, given = trained(options, run), others["run"] is not None
    options, of_run, like = ranks.on_first(lambda: of_training(options, run, given, model))
    data = open_splits(options.data, options.seed, of_run, like)
    classes, known = len(data.validation.classes), model.classifier.out_channels
    expect(known == classes, "validate", f"data of {known} classes, as the weights", classes)
    check_sizes(model, options, data.sizes)
    with Stop("the figures are not complete") as stop:
        matrix = evaluate(model, data, options, stop)
    figures, names = figures_of(matrix, data, options), data.validation.classes
    if ranks.rank() == 0:
        print(*(f"{name}: {value:.6f}" for name, value in figures.items()), sep="\n")
    if best:
        ranks.on_first(lambda: save_confusion(run, options.data.split, names, matrix))
    return figures


def masks_of(images: Sequence[str], out: Path, resume: bool) -> dict[Path, Path]:
    """The mask of each image, and the image: out/NAME.png, or out/SUBFOLDER/NAME.png if the images
    are in several folders. resume: leave out the masks that exist. Raises ValueError for a mask
    that exists or would be written twice."""
    expect(len(images) > 0, "--images", "files of images", "none")
    paths: list[Path] = []
    for path in map(Path, map(os.path.abspath, images)):
        found = [path]
        if path.is_dir():  # in which earlier masks may be
            files = files_of(path / "*", IMAGES).values()
            found = [x for x in files if out.absolute() not in x.parents]
        expect(len(found) > 0, "--images", f"one of {', '.join(IMAGES)}", f"{path} with none")
        paths += found
    common = os.path.commonpath([path.parent for path in paths])
    masks = {out / path.relative_to(common).with_suffix(".png"): path for path in paths}
    expect(len(masks) == len(paths), "--images", "images of different masks", ", ".join(images))
    exist = {*filter(Path.exists, masks)}
    other = "another directory, or --resume to keep what is there"
    expect(resume or not exist, "--out", other, ", ".join(map(str, exist)))
    return {mask: path for mask, path in masks.items() if mask not in exist}


def predict_masks(words: Sequence[str]) -> None:
    """Write the classes of each image: 8 bits, or 16 with more than 256 classes."""
    options, run, others = parse("predict", words)
    model, out = trained(options, run), Path(others["out"])
    given = others["run"] is not None
    options, _, like = ranks.on_first(lambda: of_training(options, run, given, model))
    images_of = ranks.on_first(lambda: masks_of(others["images"], out, others["resume"]))
    own = [*images_of.items()][ranks.rank() :: ranks.world()]
    device = next(model.parameters()).device
    kind = torch.uint8 if model.classifier.out_channels <= 256 else torch.uint16
    with Stop(GO_ON) as stop, torch.no_grad():
        for mask, path in stop.until_asked(own):
            image = read_image(path, options.data.channels, options.data.nodata)
            check_bits(image, path, like)
            size = tuple(image.shape[1:])
            images = network_input(image, options.data)[None].to(device)
            try:
                (classes,) = predict(model, images, size, options)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{path} of {size}: {' '.join(str(error).split())}") from error
            mask.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(imagecodecs.png_encode(classes.cpu().to(kind).numpy()), mask)
            print(mask)


def demo(steps: int = 500, out: str = "runs/demo") -> None:
    """HRNet-W18-small and SegFormer-B0 on digit scenes, plain and with SAR, on one CPU thread.

    Args:
        steps: Of each of the four runs.
        out: Directory of the runs; those that it has go on.
    """
    torch.set_num_threads(1)
    runs = []
    for preset in DEMO:
        for methods in ("", "sar"):
            runs.append(Path(out) / f"{preset}-{methods or 'plain'}")
            print(f"\n{runs[-1]}", file=sys.stderr)
            words = ["--config", preset, f"--model.methods=[{methods}]", f"--data.steps={steps}"]
            options, *_ = parse("fit", words)
            train(options, runs[-1], resume=True, advice="go on with the same command")
    print(comparison(runs))
    print(*(run / "predictions.png" for run in runs), sep="\n")


def compare(words: Sequence[str]) -> None:
    """Print a table of the last figures of runs."""
    parser = argparse.ArgumentParser(prog="anchorops-train compare", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs that have ended")
    print(comparison(parser.parse_args(words).runs))


COMMANDS = {
    "fit": fit,
    "validate": validate,
    "predict": predict_masks,
    "demo": lambda words: auto_cli(demo, args=list(words), exit_on_error=False),
    "compare": compare,
    "presets": lambda _: print(presets()),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # of a terminal without UTF-8, and names that are none
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if arguments is None else arguments
    # torchrun has "--" between its options and ours
    command, *rest = [word for word in words if word != "--"] or [""]
    try:
        if command not in COMMANDS:
            raise ValueError(f"expected one of {', '.join(COMMANDS)}, got {command!r}")
        COMMANDS[command](rest)
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise
        # before the ranks meet, all on a machine find the same error
        alone = dist.is_initialized() and not isinstance(error, Stopped)
        if alone or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"anchorops-train: {message}", file=sys.stderr)
        return error.exit_status if isinstance(error, Stopped) else 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _explained(error: Exception) -> str | None:
    """What an error means to a user; None for what is one of the program."""
    text = str(error).rstrip()
    # the first three are of the sockets by which the workers of the data loader pass on images
    of_socket = isinstance(error, ConnectionResetError | ConnectionRefusedError | EOFError)
    if of_socket or "DataLoader worker (pid" in text:
        return "a process that loads images has ended (want of memory?): give fewer --data.workers"
    if isinstance(error, argparse.ArgumentError):
        text = " ".join(text.split())
        # jsonargparse's errors are texts alone:
        # Parser key "NAME": Does not validate against … Errors: - REASON …
        text = re.sub(r'Parser key "(\S+)": (Does not .*? Errors: - )?', r"--\1: ", text)
        return re.sub(r"Group '(\w+)' does not accept option '(\w+)'", r"--\1.\2 is unknown", text)
    if isinstance(error, Stopped | ValueError | OSError | ModuleNotFoundError):
        # for an error in a worker of the data loader, the message contains the whole traceback
        return text.rpartition("\nValueError: ")[2]
    if ranks.world() > 1 and re.search("peer|Gloo|gloo|NCCL", text):
        return "another rank has ended, which tells why"
    return None
