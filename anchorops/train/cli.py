"""The commands of anchorops-train: those of Lightning, and demo, compare, presets."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path
from typing import Any

try:
    import torch
    import yaml
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import (
        BatchSizeFinder,
        GradientAccumulationScheduler,
        LearningRateFinder,
        StochasticWeightAveraging,
    )
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities import rank_zero_only

    from .callbacks import (
        Best,
        MaskWriter,
        Reports,
        Saving,
        Stopped,
        Timing,
        WholeCheckpoints,
        continuing,
        saving_of,
    )
    from .data.module import SegmentationData
    from .loop import StepLoop
    from .metrics import Metrics
    from .module import SegmentationModule
    from .networks.learner import PUBLISHED
    from .options import TRAINER, check
    from .report.compare import NotEnded, comparison, load_results
    from .run import (
        BEST,
        CONFIG,
        LAST,
        WHOLE,
        check_same,
        flat_config,
        only_process,
        read_checkpoint,
    )
    from .saving import save_atomically
except ModuleNotFoundError as error:
    sys.exit(
        f"anchorops-train: {error}: install what training needs: pip install 'anchorops[train]'"
    )

PRESETS = Path(__file__).with_name("presets")
DEMO = ("digits", "digits-segformer-b0")  # a laptop needs minutes for this
# of Lightning, about what is meant so, and about its own use of torch
IGNORED_WARNINGS = (
    "Checkpoint directory",
    "LightningCLI's args",
    "It is recommended to use `self.log",
    "The number of training batches",
    "`isinstance.treespec, LeafSpec",
    "The '.*_dataloader' does not have many workers",
    "Be aware that when using `ckpt_path`",
    "You're using the WeightAveraging callback",
)
UNFIT_CALLBACKS = {
    StochasticWeightAveraging: "averages over epochs, but a run is one epoch: expected "
    "WeightAveraging or EMAWeightAveraging, which count steps",
    GradientAccumulationScheduler: "changes the batches of a step, but a run has as many as its "
    "steps need from the beginning: expected --trainer.accumulate_grad_batches",
    BatchSizeFinder: "tries sizes by training: expected --data.batch_size",
    LearningRateFinder: "tries rates by training: expected --model.lr",
}
MAX_SEED = 2**32 - 1
DEMO_SHOWS = """
mIoU: mean over the classes of intersection over union. head, body, tail: the same over frequent,
less frequent and rare classes. mAcc: mean over the classes of the share of pixels found. All in %.

A short training shows how fast a network learns. On these scenes the gain of SAR disappears in
longer trainings; docs/evidence.md compares all methods after 500, 1,500 and 4,000 steps."""


class Program(LightningCLI):
    """fit, validate and predict. A run has one directory.

    arguments: of the command line. preset: name of the configuration, for that of the directory.
    """

    def __init__(self, arguments: Sequence[str], preset: str) -> None:
        logging.getLogger("lightning").setLevel(logging.WARNING)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        for message in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        self.preset = preset
        self.run = Path()
        self.continued: int | None = None
        """The step after which the run goes on."""
        self.ended = False
        """Whether nothing is left to do in it."""
        with ExitStack() as self.held:
            self._run_command(arguments)

    def _run_command(self, arguments: Sequence[str]) -> None:
        super().__init__(
            SegmentationModule,
            SegmentationData,
            save_config_callback=None,
            parser_kwargs={"prog": "anchorops-train", "exit_on_error": False},
            trainer_defaults={
                "max_epochs": 1,  # of as many steps as the run has
                "check_val_every_n_epoch": None,
                "val_check_interval": 1_000,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "enable_autolog_hparams": False,
                "log_every_n_steps": 10,
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(arguments),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "dataloaders", "datamodule"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": skipped,
            "predict": {*skipped, "return_predictions"},
        }

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        help = f"Random seed of the run, 0 to {MAX_SEED}."
        parser.add_argument("--seed_everything", type=int, default=0, help=help)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run",
            type=str,
            default=None,
            help="Directory of the run; runs/PRESET-METHODS-seedN if not given.",
        )
        parser.add_lightning_class_args(Saving, "saving")
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            help = "Directory of the masks: the images' subfolders and names, which end in .png."
            parser.add_argument("--out", type=str, default="predictions", help=help)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Also checks the trainer's options, and turns the checkpoints `last` and `best` into files
        of the run."""
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        options = self.config[command]
        if not 0 <= options.seed_everything <= MAX_SEED:
            raise ValueError(
                f"--seed_everything: expected 0 to {MAX_SEED}, got {options.seed_everything}"
            )
        if command == "fit":
            check("trainer", options.trainer, TRAINER)
            if isinstance(options.trainer.val_check_interval, float):  # for Lightning, of an epoch
                options.trainer.check_val_every_n_epoch = 1
        self.run = Path(options.run or self._default_run(options)).absolute()
        options.run, name = str(self.run), options.ckpt_path
        if command != "fit":
            name = name or "best"
        elif name and name != "last" and Path(name).absolute() != self.run / LAST:
            raise ValueError(
                f"--ckpt_path {name}: expected last: only that has the state of {self.run}; to "
                "start from the weights of a file, give --model.weights FILE"
            )
        elif name:
            name = "last"
        if name in ("last", "best"):
            options.ckpt_path = self._checkpoint(name)
        if command == "fit":
            self._check_run(options)

    def _checkpoint(self, name: str) -> str:
        path = self.run / {"last": LAST, "best": BEST}[name]
        if not self.run.is_dir():
            raise ValueError(f"--run: {self.run} does not exist")
        if not path.exists():
            raise ValueError(f"--ckpt_path {name}: {self.run} has no {path.name}")
        return str(path)

    def _default_run(self, options: Any) -> str:
        methods = "+".join(options.model.methods) or "plain"
        if options.model.setting != PUBLISHED:
            methods += f"-{options.model.setting}"
        return f"runs/{self.preset}-{methods}-seed{options.seed_everything}"

    def _check_run(self, options: Any) -> None:
        last, leads = self.run / LAST, rank_zero_only.rank == 0
        if leads and self.run.exists():
            self.held.enter_context(only_process(self.run))
        if options.ckpt_path == str(last):
            state = read_checkpoint(last, options.weights_only, WHOLE)
            if (saving := state["callbacks"].get("Saving")) is None:
                raise ValueError(f"checkpoint {last} is of another kind: it has no state of Saving")
            self.continued = state["global_step"]
            self.ended = saving["ended"]
            if leads:
                now = yaml.safe_load(self._parser("fit").dump(options, skip_none=False))
                check_same(self.run, now)
        elif leads and last.exists():
            raise ValueError(
                f"{self.run} holds a run: go on with it by `{continuing(self.run)}`, or give this "
                "one another directory with --run"
            )

    def _parse_ckpt_path(self) -> None:
        """The options of a checkpoint do not replace those of the command line: see check_same."""

    def before_instantiate_classes(self) -> None:
        options = self.config[self.config.subcommand]
        command, own = self.config.subcommand, options.trainer.logger
        self.trainer_defaults["callbacks"] = []
        if command == "predict":
            masks = MaskWriter(Path(options.out), options.data.images or [])
            self.trainer_defaults["callbacks"] = [masks]
        self._loggers: Any = False
        if command == "fit":
            self._loggers = [Metrics(self.run, self.continued)]
            if own in (None, True):
                purge = None if self.continued is None else self.continued + 1
                events = TensorBoardLogger(str(self.run), name="", version="", purge_step=purge)
                self._loggers.append(events)
            self.trainer_defaults["callbacks"] = [Best(), Reports(), Timing()]

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        given = self._get(self.config_init, "trainer")
        loggers, plugins = given["logger"], given["plugins"] or []
        if self._loggers and loggers not in (None, True, False):
            loggers = loggers if isinstance(loggers, list) else [loggers]
            self._loggers += loggers
        plugins = plugins if isinstance(plugins, list) else [plugins]
        try:
            trainer: Any = super().instantiate_trainer(
                default_root_dir=str(self.run),
                logger=self._loggers,
                plugins=[*plugins, WholeCheckpoints()],
                **kwargs,
            )
        except TypeError as error:  # of an option whose values depend on others, such as devices
            raise ValueError(f"--trainer: {error}") from error
        for callback, found in product(UNFIT_CALLBACKS, trainer.callbacks):
            if isinstance(found, callback):
                raise ValueError(
                    f"--trainer.callbacks: {callback.__name__} {UNFIT_CALLBACKS[callback]}"
                )
        # these see the network as it was validated: see Best
        trainer.callbacks.sort(key=lambda x: not isinstance(x, Best | Reports))
        trainer.fit_loop.epoch_loop = StepLoop(trainer)
        if given["min_epochs"] is None:  # else 1 with min_steps, and no run would stop early
            trainer.fit_loop.min_epochs = 0
        return trainer

    def before_fit(self) -> None:
        options = self.config.fit
        self.model.from_checkpoint = options.ckpt_path is not None
        self._check_checkpoint()
        if rank_zero_only.rank == 0:
            self.held.enter_context(only_process(self.run))
            if self.continued is None:
                text = self._parser("fit").dump(options, skip_none=False)
                save_atomically(text, self.run / CONFIG)

    def _check_checkpoint(self) -> None:
        options = self.config[self.config.subcommand]
        path = options.ckpt_path
        if path and Path(path).is_file():
            state = read_checkpoint(Path(path), options.weights_only)
            self.datamodule.of_run = state.get("SegmentationData")

    before_validate = before_predict = _check_checkpoint

    def fit(self, **kwargs: Any) -> None:
        try:
            if not self.ended:
                self.trainer.fit(**kwargs)
        except RuntimeError as error:
            if not str(error).startswith("Early stopping conditioned on metric"):
                raise
            raise ValueError(f"--trainer.callbacks: {error}") from error
        if rank_zero_only.rank == 0:
            self._say_what_is_left()

    def _say_what_is_left(self) -> None:
        options, step = self.config.fit, self.trainer.global_step
        nothing = f"{self.run}: no step was done: "
        if self.ended:
            print(f"{nothing}the run has ended after step {self.continued}", file=sys.stderr)
        elif not saving_of(self.trainer).ended:
            limits = (("max_steps", -1), ("max_time", "null"))
            chosen = [(k, v) for k, v in limits if options.trainer[k] not in (None, v)]
            print(
                f"{nothing if step == self.continued else ''}a limit ended the run after step "
                f"{step} of {options.data.steps}; go on with: {continuing(self.run)}",
                *(f"--trainer.{name} {value}" for name, value in chosen),
                file=sys.stderr,
            )

    def predict(self, **kwargs: Any) -> None:
        self.trainer.predict(**kwargs, return_predictions=False)


def train(*options: str) -> Path:
    """Run `anchorops-train fit` with these options; returns the directory of the run."""
    return Program(*with_presets(["fit", *options])).run


# an "=" may stand between these options and their values
SEPARATED = ("--config", "-c", "--run", "--data.images")


def with_presets(arguments: Sequence[str]) -> tuple[list[str], str]:
    """The arguments with files instead of the names of presets, and the last of these names. The
    configuration of a run that exists stands before these files; for `fit` with such files it is
    not added. Raises ValueError for an unknown preset."""
    words = [part for word in arguments for part in _separated(word)]
    preset = "no-preset"
    configs = [i + 1 for i, word in enumerate(words[:-1]) if word in ("--config", "-c")]
    for i in configs:
        preset = Path(words[i]).stem
        packaged = PRESETS / f"{words[i]}.yaml"
        if not Path(words[i]).exists() or Path(words[i]).is_dir():
            if not packaged.exists():
                raise ValueError(
                    f"--config: expected a file or a preset, got {words[i]}. The presets:\n"
                    f"{presets()}"
                )
            words[i] = str(packaged)
    if "--run" in words[:-1] and (not configs or words[0] != "fit"):
        run = Path(words[words.index("--run") + 1])
        if (run / CONFIG).exists():
            flat_config(run)  # an error names the file
            words[1:1] = ["--config", str(run / CONFIG)]
    if "--data.images" in words:
        first = words.index("--data.images") + 1
        ends = [i for i, word in enumerate(words) if i >= first and word.startswith("--")]
        files = words[first : min(ends, default=len(words))]
        words[first : first + len(files)] = [_as_list(files)]
    return words, preset


def _separated(word: str) -> list[str]:
    name, equals, value = word.partition("=")
    return [name, value] if equals and name in SEPARATED else [word]


def _as_list(files: Sequence[str]) -> str:
    """Files, as a shell gives them, as a list of YAML; or the list that is given."""
    if len(files) == 1 and not os.path.exists(files[0]):
        with suppress(yaml.YAMLError):
            if isinstance(yaml.safe_load(files[0]), list):
                return files[0]
    return json.dumps(files, ensure_ascii=False)


def presets() -> str:
    """The presets, each with the first line of its file."""
    lines = []
    for path in sorted(PRESETS.glob("*.yaml")):
        first, *_ = path.read_text().splitlines()
        lines.append(f"  {path.stem}: {first.removeprefix('# ')}")
    return "\n".join(lines)


def _compare(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="anchorops-train compare", description=_compare.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of the runs")
    results = []
    for run in parser.parse_args(arguments).runs:
        try:
            results.append(load_results(run))
        except NotEnded as error:
            print(f"anchorops-train: {error}; it is left out", file=sys.stderr)
    if not results:
        raise ValueError("compare: expected runs that have ended, got none")
    print(comparison(results))


def _demo(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="anchorops-train demo",
        description="HRNet-W18-small and SegFormer-B0 on digit scenes, plain and with SAR.",
    )
    parser.add_argument("--steps", type=int, default=500, help="of each of the four runs")
    help = "directory of the runs; those that it has go on, or stay if they have ended"
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help=help)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    runs = []
    with only_process(options.out, "give this demo its own directory with --out"):
        for preset in DEMO:
            for methods in ("", "sar"):
                run = options.out / f"{preset}-{methods or 'plain'}"
                print(f"\n{run}", file=sys.stderr)
                words = ["--config", preset, "--model.methods", f"[{methods}]"]
                words += ["--data.steps", str(options.steps)]
                words += ["--seed_everything", str(options.seed)]
                if (run / BEST).exists() and not (run / CONFIG).exists():
                    raise ValueError(f"--out: expected runs of a demo, {run} has no {CONFIG}")
                again = ("--ckpt_path", "last") if (run / LAST).exists() else ()
                train(*words, "--run", str(run), *again)
                runs.append(run)
    print(comparison([load_results(run) for run in runs]))
    print(*(run / "predictions.png" for run in runs), sep="\n")
    print(DEMO_SHOWS)


COMMANDS = {"demo": _demo, "compare": _compare, "presets": lambda _: print(presets())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    of_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--"]:  # between the options of torchrun and ours
        del arguments[0]
    command, *rest = arguments or [""]
    try:
        if command in COMMANDS:
            COMMANDS[command](rest)
        elif command not in Program.subcommands() and not command.startswith("-"):
            known = ", ".join([*Program.subcommands(), *COMMANDS])
            raise ValueError(f"expected one of the commands {known}, got {command!r}")
        else:
            words, preset = with_presets(arguments)
            if of_process:  # which Lightning gives to the ranks that it starts
                sys.argv[1:] = words
            Program(words, preset)
    except Stopped as stopped:
        if rank_zero_only.rank == 0:
            print(f"anchorops-train: {stopped}", file=sys.stderr)
        return stopped.exit_status
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except argparse.ArgumentError as error:  # of the parser, in several lines
        print(f"anchorops-train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ModuleNotFoundError, MisconfigurationException) as error:
        # for an error in a worker of the data loader, the message contains the whole traceback
        _, _, message = str(error).rstrip().rpartition("\nValueError: ")
        print(f"anchorops-train: {message}", file=sys.stderr)
        return 1
    return 0
