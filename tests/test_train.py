"""The training program: data, models, figures, and runs that end, stop and go on."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import anchorops as ao
from anchorops.train import checkpoint, directory, loop, signals
from anchorops.train.__main__ import main
from anchorops.train.compare import comparison
from anchorops.train.config import Config
from anchorops.train.data import BatchSampler, Draws, class_counts
from anchorops.train.digits import DigitScenes
from anchorops.train.journal import Journal
from anchorops.train.learner import Learner, PixelCrossEntropy, build_regularizer
from anchorops.train.metrics import class_groups, frequency_groups, summarize
from anchorops.train.models import build_model
from anchorops.train.presets import DIGITS, PRESETS
from anchorops.train.ranks import start_ranks

TINY = DIGITS.replace(
    crop=(32, 32),
    train_images=64,
    val_images=10,
    batch_size=4,
    steps=6,
    eval_batch_size=5,
    log_every=2,
    save_every=2,
    eval_every=0,
    warmup=0,
    threads=1,
    methods=("sar",),
    device="cpu",
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing interrupted."""
    config = TINY.replace(out=tmp_path_factory.mktemp("runs"), name="straight")
    loop.start(config)
    return config.run


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return checkpoint.load_checkpoint(run / f"checkpoint-{step:08d}.pt")["model"]


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["p2a"]) for line in lines if "loss" in line]


def assert_same_run(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_scene_is_a_function_of_seed_split_and_index():
    scenes, again = (DigitScenes("train", 50, (48, 64), seed=3) for _ in range(2))
    image, labels = scenes[7]
    scenes[8]
    assert image.shape == (3, 48, 64) and labels.shape == (48, 64)
    assert torch.equal(image, again[7][0]) and torch.equal(labels, again[7][1])
    for other in (
        DigitScenes("train", 50, (48, 64), seed=4),
        DigitScenes("val", 9, (48, 64), seed=3),
    ):
        assert not torch.equal(image, other[7][0])
    assert set(labels.unique().tolist()) <= {*range(11), 255}
    with pytest.raises(IndexError):
        scenes[50]


def test_digits_of_train_and_val_are_disjoint():
    from anchorops.train.digits import _digit_images

    train, val = (
        {image.tobytes() for images in _digit_images(split) for image in images}
        for split in ("train", "val")
    )
    assert train and val and not train & val


def test_digit_frequencies_have_a_long_tail():
    pixels, images = class_counts(DigitScenes("train", 2000, (64, 64), seed=0), Path())
    shares = pixels / pixels.sum()
    assert images[0] == 2000 and images[1] > 2 * images[10]
    assert shares[1] > 2 * shares[3] > 3 * shares[8]
    assert class_groups(shares, DIGITS.data.head_tail).count("tail") == 3


def test_draws_do_not_depend_on_ranks_or_interruptions():
    def drawn(world: int, accumulate: int, steps: range) -> list[tuple[int, int]]:
        options = {"batch_size": 8, "accumulate": accumulate, "world": world}
        options |= {"first_step": steps.start, "steps": steps.stop}
        samplers = [BatchSampler(Draws(10, seed=1), rank=r, **options) for r in range(world)]
        return sorted(item for sampler in samplers for batch in sampler for item in batch)

    everything = drawn(1, 1, range(0, 5))
    assert everything == drawn(2, 2, range(0, 5)) == drawn(4, 1, range(0, 5))
    assert everything == sorted(drawn(1, 1, range(0, 2)) + drawn(1, 1, range(2, 5)))
    # each of the four passes over the data shows every image once
    by_draw = [image for _, image in sorted((draw, image) for image, draw in everything)]
    assert all(sorted(by_draw[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))


def test_batch_size_that_ranks_cannot_share():
    with pytest.raises(ValueError, match=r"--batch-size: expected a multiple of .* = 3, got 8"):
        BatchSampler(
            Draws(4, 0), batch_size=8, accumulate=1, rank=0, world=3, first_step=0, steps=1
        )


def test_summary_of_a_confusion_matrix():
    confusion = torch.tensor([[8, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    shares = torch.tensor([0.9, 0.05, 0.0005, 0.0495])
    summary = summarize(confusion, "abcd", shares, (0.06, 0.001))
    assert summary["miou"] == pytest.approx((8 / 11 + 3 / 6) / 2)
    assert summary["macc"] == pytest.approx((8 / 10 + 3 / 4) / 2)
    assert summary["accuracy"] == pytest.approx(11 / 14)
    assert summary["head"] == pytest.approx(8 / 11) and summary["body"] == pytest.approx(0.5)
    assert summary["tail"] is None
    assert [c["group"] for c in summary["classes"]] == ["head", "body", "tail", "body"]
    assert [c["f1"] for c in summary["classes"]][1:3] == [pytest.approx(6 / 9), None]
    assert summary["f1_by_frequency"] == [pytest.approx(16 / 19), pytest.approx(6 / 9), None, None]


def test_groups_by_frequency():
    values, shares = torch.arange(31.0), torch.arange(31.0)
    values[0] = torch.nan
    groups = frequency_groups(values, shares)
    assert len(groups) == 15 and groups[0] == 29 and groups[-2:] == [2.5, 1.0]


def test_class_predicted_but_never_true_counts_as_zero():
    summary = summarize(torch.tensor([[1, 1], [0, 0]]), "ab", torch.tensor([1.0, 0.0]), (0.1, 0.01))
    assert summary["miou"] == pytest.approx(0.25) and summary["classes"][1]["accuracy"] is None


def test_cross_entropy_of_valid_pixels():
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    labels = torch.randint(5, (2, 4, 4))
    labels[0, :2] = 255
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(PixelCrossEntropy()(logits, labels), expected)
    nothing = PixelCrossEntropy()(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize(
    ("name", "dim", "stride"),
    [("hrnet-w18-small", 240, 4), ("segformer-b0", 256, 4), ("unet:resnet18", 16, 1)],
)
def test_models(name: str, dim: int, stride: int):
    model = build_model(name, 7, channels=4)
    logits = model(torch.randn(2, 4, 64, 32))
    assert logits.shape == (2, 7, 64 // stride, 32 // stride)
    classifier = list(model.modules())[-1]
    assert classifier is model.classifier and model.classifier.weight.shape == (7, dim, 1, 1)


def test_hrnet_w48_has_the_papers_dimension():
    with torch.device("meta"):
        assert build_model("hrnet-w48", 19).classifier.in_channels == 720


def test_unknown_model():
    with pytest.raises(ValueError, match=r"model: expected hrnet-w18-small, .* got 'alexnet'"):
        build_model("alexnet", 3)
    with pytest.raises(ValueError, match="model 'unet:alexnet'"):
        build_model("unet:alexnet", 3)


def test_weights_start_a_model_with_other_classes(tmp_path: Path):
    source, path = build_model("hrnet-w18-small", 5), tmp_path / "weights.pt"
    torch.save(source.state_dict(), path)
    model = build_model("hrnet-w18-small", 9, weights=path)
    assert torch.equal(next(model.parameters()), next(source.parameters()))
    with pytest.raises(
        ValueError, match=r"weights .*weights.pt are of another model: missing body"
    ):
        build_model("segformer-b0", 5, weights=path)


@pytest.mark.parametrize("methods", [("cr",), ("cbp", "occl"), ("ceco",), ("sar", "mvsc")])
def test_every_method_takes_a_step(methods: tuple[str, ...]):
    model = build_model("hrnet-w18-small", 11)
    learner = Learner(model, build_regularizer(methods, {}, 11, 240))
    labels = torch.randint(11, (2, 32, 32))
    loss, terms = learner(torch.randn(2, 3, 32, 32), labels)
    loss.backward()
    assert {"loss", "ce"} < terms.keys() and all(value.isfinite() for value in terms.values())
    assert all(p.grad is not None for p in model.body.parameters())
    assert len(learner.state_dict()) == len(model.state_dict())  # each entry once


def test_method_options():
    sar = build_regularizer(["sar"], {"sar.delta": "0.5", "sar.gate": "per_class"}, 11, 240)
    assert isinstance(sar, ao.SAR) and (sar.delta, sar.gate) == (0.5, "per_class")
    with pytest.raises(ValueError, match=r"sar has .*delta"):
        build_regularizer(["sar"], {"sar.detla": "0.5"}, 11, 240)
    with pytest.raises(ValueError, match="--method-options: a value of the wrong type"):
        build_regularizer(["sar"], {"sar.momentum": "foo"}, 11, 240)
    with pytest.raises(ValueError, match="METHOD among --methods sar"):
        build_regularizer(["sar"], {"occl.temperature": "1"}, 11, 240)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_batch_size": 0}, "--eval-batch-size: expected at least 1, got 0"),
        ({"patience": 0}, "--patience: expected at least 1"),
        ({"lr": -1.0}, "--lr: expected at least 0"),
        ({"crop": (50, 64)}, r"--crop: expected two multiples of 32, got \(50, 64\)"),
        ({"scale": (2.0, 0.5)}, "--scale: expected"),
        ({"head_tail": (0.1, 0.5)}, "--head-tail: expected"),
        ({"clip": 0.0}, "--clip: expected more than 0"),
        ({"ohem": 7.0}, "--ohem: expected a probability"),
        ({"methods": ("sar", "sar")}, "--methods: expected each at most once"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DIGITS.replace(**options)


def test_device_that_is_not_there():
    with pytest.raises(ValueError, match="--device nonsense cannot be used"):
        start_ranks("nonsense")


@pytest.mark.parametrize("name", PRESETS)
def test_configuration_survives_its_file(name: str, tmp_path: Path):
    config = PRESETS[name][1].replace(methods=("sar", "occl"), method_options={"sar.tau": "1"})
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config


def test_a_run_leaves_everything(straight: Path):
    results = json.loads((straight / "results.json").read_text())
    assert 0 < results["miou"] <= 1 and results["steps"] == 6 and len(results["classes"]) == 11
    assert [step for step, *_ in losses(straight)] == [2, 4, 6]
    assert (straight / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert Config.load(straight / "config.json").run == straight
    names = sorted(path.name for path in straight.glob("*.pt"))
    assert names == ["best.pt", "checkpoint-00000004.pt", "checkpoint-00000006.pt"]


def test_report_is_one_page(straight: Path):
    page = (straight / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 8
    assert "http" not in page and "<script" not in page
    for section in (
        "Predictions",
        "F1 by frequency",
        "Training",
        "Cosines between classes",
        "Cost of the regulariser",
    ):
        assert f"<h2>{section}</h2>" in page


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_continues_bit_for_bit(
    signum: int, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = TINY.replace(out=tmp_path, name="interrupted", save_every=100)
    steps = []

    def step_and_signal(self: loop._Run, *args: object) -> None:
        train_step(self, *args)
        steps.append(self.step)
        if self.step == 3:
            os.kill(os.getpid(), signum)

    train_step = loop._Run._train_step
    monkeypatch.setattr(loop._Run, "_train_step", step_and_signal)
    with pytest.raises(signals.Interrupted, match=r"step 3; continue with: anchorops-train resume"):
        loop.start(config)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.randn(5)  # the state of the global generator must not matter
    loop.resume(config.run)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert_same_run(config.run, straight)


def test_killed_run_continues_bit_for_bit(straight: Path, tmp_path: Path):
    config = TINY.replace(out=tmp_path, name="killed")
    config.run.mkdir()
    config.save(config.run / "config.json")
    command = [sys.executable, "-m", "anchorops.train", "resume", str(config.run)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(config.run.glob("checkpoint-*.pt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (config.run / "results.json").exists()
    loop.resume(config.run)
    assert_same_run(config.run, straight)


@pytest.mark.slow
def test_two_ranks(tmp_path: Path):
    """Images are counted once, and what the ranks measure is what their checkpoint does alone."""
    config = TINY.replace(
        out=tmp_path, name="ranks", batch_size=8, accumulate=2, clip=1.0, steps=3, val_images=11
    )
    config.run.mkdir()
    config.save(config.run / "config.json")
    module = ["-m", "anchorops.train", "resume", str(config.run)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, *module], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    together = json.loads((config.run / "results.json").read_text())
    alone = loop.resume(config.run)
    assert together["pixels"] == alone["pixels"]
    assert together["classes"] == alone["classes"]
    scenes = DigitScenes("val", 11, (32, 32), seed=0)
    assert alone["pixels"] == sum(int((scenes[i][1] != 255).sum()) for i in range(11))


def test_bf16_with_workers_and_events(tmp_path: Path):
    config = TINY.replace(
        out=tmp_path, name="fast", steps=2, bf16=True, workers=1, tensorboard=True
    )
    results = loop.start(config.replace(channels_last=True, methods=("sar", "occl")))
    assert results["miou"] > 0
    assert list(config.run.glob("events.out.tfevents*"))


def test_patience_ends_a_run(tmp_path: Path):
    config = TINY.replace(out=tmp_path, name="patient", lr=0.0, steps=50, eval_every=1, patience=2)
    results = loop.start(config)
    assert results["steps"] < 50 and loop.resume(config.run)["steps"] == results["steps"]


def test_finished_run_is_not_overwritten(straight: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="holds an earlier run: continue it with"):
        main(["--out", str(straight.parent), "--name", "straight"])
    assert (straight / "results.json").exists()


def test_directory_has_one_program_at_a_time(tmp_path: Path):
    config = TINY.replace(out=tmp_path, name="busy", overwrite=True)
    directory.make_directory(config)
    with directory.held(config.run):
        with pytest.raises(ValueError, match="busy: another process is training in this directory"):
            loop.resume(config.run)
        with pytest.raises(ValueError, match="another process is training"):
            loop.start(config)
    assert (config.run / "config.json").exists()


def test_resumption_does_not_need_the_first_weights(tmp_path: Path):
    path, config = tmp_path / "w.pt", TINY.replace(out=tmp_path, name="from", steps=1, methods=())
    torch.save(build_model("hrnet-w18-small", 11).state_dict(), path)
    config = config.replace(weights=path)
    loop.start(config)
    path.unlink()
    assert loop.resume(config.run)["steps"] == 1
    path.write_text("not weights")
    with pytest.raises(ValueError, match=r"weights .*w.pt cannot be read"):
        loop.start(config.replace(overwrite=True))


def test_lines_after_the_checkpoint_are_taken_back(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    Journal(tmp_path, 4, 10)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_earlier_checkpoint(tmp_path: Path):
    path = checkpoint.save_checkpoint(tmp_path, 1, {"model": torch.zeros(10)})
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .*earlier files are intact"):
            checkpoint.save_checkpoint(tmp_path, 2, {"model": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == [path]
    assert checkpoint.load_checkpoint(path)["step"] == 1


def test_truncated_checkpoint_names_the_earlier_one(tmp_path: Path):
    first, second = (checkpoint.save_checkpoint(tmp_path, s, {"x": 1}) for s in (1, 2))
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=f"{second} is damaged .* delete it to resume from {first}"
    ):
        checkpoint.load_checkpoint(second)


def test_loss_that_is_not_finite(tmp_path: Path):
    config = TINY.replace(
        out=tmp_path, name="diverging", lr=1e30, optimizer="sgd", methods=(), save_every=1
    )
    with pytest.raises(ValueError, match=r"not finite at step 1: .*norm; .*checkpoint: none"):
        loop.start(config)
    assert not list(config.run.glob("*.pt"))


def test_options_on_the_command_line(monkeypatch: pytest.MonkeyPatch):
    started: list[Config] = []

    def record(config: Config) -> dict:
        started.append(config)
        raise signals.Interrupted(signal.SIGTERM, config.run, 0)

    monkeypatch.setattr("anchorops.train.__main__.start", record)
    options = (
        "ade20k-segformer-b5 --methods cbp occl --method-options cbp.length 1 occl.split images"
    )
    options += " --root /data --crop 64 96 --label-map 128 1 7 255 --no-pretrained --clip 1.0"
    with pytest.raises(SystemExit) as stopped:
        main(options.split())
    assert stopped.value.code == 128 + signal.SIGTERM
    assert started == [
        PRESETS["ade20k-segformer-b5"][1].replace(
            methods=("cbp", "occl"),
            method_options={"cbp.length": "1", "occl.split": "images"},
            root=Path("/data"),
            crop=(64, 96),
            label_map={128: 1, 7: 255},
            pretrained=False,
            clip=1.0,
        )
    ]


def test_command_line(straight: Path, capsys: pytest.CaptureFixture[str]):
    main(["compare", str(straight), str(straight)])
    table = capsys.readouterr().out
    assert "hrnet-w18-small" in table and "± 0.0" in table
    with pytest.raises(SystemExit, match="expected a finished run"):
        main(["compare", str(straight.parent)])
    with pytest.raises(SystemExit, match="expected the directories of finished runs, got none"):
        main(["compare"])
    result = {name: 1.0 for name in ("miou", "head", "body", "tail", "macc", "seconds_per_step")}
    result |= {"dataset": "d", "model": "m", "methods": "sar", "parameters": 1}
    result["gpu_memory_mb"] = None
    first, second = ({**result, "settings": {"lr": lr, "steps": "5"}} for lr in ("0.1", "0.2"))
    rows = comparison([first, second, first]).splitlines()[2:]
    assert [row.split()[2:5] for row in rows] == [["sar", "lr=0.1", "2"], ["sar", "lr=0.2", "1"]]
    with pytest.raises(SystemExit, match="'digts' is neither a command nor a preset"):
        main(["digts"])
    with pytest.raises(SystemExit) as help_shown:
        main(["digits", "--help"])
    assert help_shown.value.code == 0 and "--batch-size" in capsys.readouterr().out
