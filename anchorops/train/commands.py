"""The commands of anchorops-train: train, resume, compare, demo."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType

try:
    import docstring_parser  # tyro installs it
    import torch
    import tyro

    from .config import Config
    from .presets import DEMO, PRESETS, with_published_options
    from .report.compare import class_dependency, comparison, load_results
    from .report.predictions import predict_files
    from .run.loop import resume, start
    from .run.ranks import lost_connection
    from .signals import Interrupted, is_first
except ModuleNotFoundError as error:
    sys.exit(f"anchorops-train: {error}: install what training needs: pip install anchorops[train]")

DEMO_SHOWS = """
mIoU: mean over the classes of intersection over union. head, body, tail: the same over frequent,
less frequent and rare classes. mAcc: mean over the classes of the share of pixels found. All in %.

A short training shows how fast a network learns. On these scenes the gain of SAR disappears in
longer trainings; docs/evidence.md compares all methods after 500, 1,500 and 4,000 steps."""

USAGE = """usage: anchorops-train [PRESET] [OPTIONS]     train; PRESET is digits if not given
       anchorops-train [PRESET] --help        the options
       anchorops-train resume RUN             continue an interrupted run
       anchorops-train compare RUN [RUN …]    compare finished runs
       anchorops-train predict RUN IMAGE [IMAGE …]    write the classes of images
       anchorops-train demo [--steps N]       both networks, plain and with SAR, on digits"""


def _train(arguments: Sequence[str]) -> None:
    preset = "digits"
    if arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
    if preset not in PRESETS:
        raise ValueError(f"{preset!r} is neither a command nor a preset ({', '.join(PRESETS)})")
    _check_pairs(arguments)
    description, default = PRESETS[preset]
    _join_help_lines(default)
    config = tyro.cli(
        type(default),
        prog=f"anchorops-train {preset}",
        description=description,
        args=arguments,
        default=default,
    )
    _show([start(with_published_options(preset, config))])


def _check_pairs(arguments: Sequence[str]) -> None:
    """Raises ValueError for a key with two values: tyro would take the last one."""
    for option in ("--label-map", "--method-options"):
        if option not in arguments:
            continue
        rest = arguments[arguments.index(option) + 1 :]
        keys = list(takewhile(lambda text: not text.startswith("--"), rest))[::2]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ValueError(f"{option}: expected each key once, got {twice[0]} again")


def _join_help_lines(config: Config) -> None:
    """Set the help of each option as a single line: tyro would keep its docstring's line breaks."""
    for section in fields(config):
        options = getattr(config, section.name)
        described = docstring_parser.parse_from_object(type(options)).params
        texts = {option.arg_name: option.description or "" for option in described}
        for option in fields(options):
            text = " ".join(texts.get(option.name, "").split())
            option.metadata = MappingProxyType({"help": text})


def _resume(
    run: tyro.conf.Positional[Path], root: Path | None = None, allow_other_ranks: bool = False
) -> None:
    """Continue an interrupted run.

    Args:
        run: directory of the run.
        root: new directory of the data set, if it was moved.
        allow_other_ranks: continue with another number of ranks, which changes the results.
    """
    _show([resume(run, root=root, allow_other_ranks=allow_other_ranks)])


def _predict(
    run: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("predictions"),
    device: str | None = None,
) -> None:
    """Write the class of each pixel of images, by the weights of a run with its best mIoU.

    Args:
        run: directory of the run.
        images: files as in the training.
        out: directory of the masks, which have the images' names and end in .png.
        device: device; if not given, cuda if there is a GPU, otherwise cpu.
    """
    if not images:
        raise ValueError("predict: expected files of images, got none")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(*predict_files(run, images, out, device=torch.device(name)), sep="\n")


def _compare(runs: tyro.conf.Positional[tuple[Path, ...]], dependency: bool = False) -> None:
    """Compare finished runs: mean ± standard deviation over seeds.

    Args:
        runs: directories of the runs.
        dependency: also print which classes have similar centroids, and whether the seeds agree in
            this (as in SAR's Fig. 1).
    """
    if not runs:
        raise ValueError("compare: expected the directories of finished runs, got none")
    print(comparison([load_results(run) for run in runs]))
    if dependency:
        print(f"\n{class_dependency(runs)}")


def _demo(
    steps: int = 500,
    out: Path = Path("runs/demo"),
    seed: int = 0,
    threads: int = 1,
) -> None:
    """HRNet-W18-small and SegFormer-B0 on digit scenes, plain and with SAR: how fast they learn.

    Args:
        steps: training steps of each of the four runs.
        out: directory of the runs; earlier runs in it are overwritten.
        seed: random seed of the weights and the data.
        threads: CPU threads of torch.
    """
    results = []
    for name, config in DEMO.items():
        for methods in ((), ("sar",)):
            run = f"{name}-{'+'.join(methods) or 'plain'}"
            config = config.replace(
                steps=steps,
                out=out,
                seed=seed,
                threads=threads,
                methods=methods,
                name=run,
                overwrite=True,
            )
            results.append(start(config))
    _show(results)
    if is_first():
        print(DEMO_SHOWS)


def _show(results: list[dict]) -> None:
    if not is_first():
        return
    print(comparison(results))
    for result in results:
        made = [Path(result["run"], name) for name in ("predictions.png", "report.html")]
        print(*(path for path in made if path.exists()), sep="  ")


COMMANDS = {"resume": _resume, "compare": _compare, "predict": _predict, "demo": _demo}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            command, *rest = arguments
            tyro.cli(COMMANDS[command], prog=f"anchorops-train {command}", args=rest)
        else:
            if arguments and arguments[0] in ("-h", "--help"):
                print(USAGE)
                print("presets:", *(f"{k}: {text}" for k, (text, _) in PRESETS.items()), sep="\n  ")
                return
            _train(arguments)
    except Interrupted as interrupted:
        if is_first():
            print(f"anchorops-train: {interrupted}", file=sys.stderr)
        sys.exit(interrupted.exit_status)
    except (ValueError, OSError) as error:
        # for an error in a worker of the data loader, the message contains the whole traceback
        _, _, message = str(error).rstrip().rpartition("\nValueError: ")
        sys.exit(f"anchorops-train: {message}")
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        sys.exit(f"anchorops-train: another rank has ended, see its message ({error})")
