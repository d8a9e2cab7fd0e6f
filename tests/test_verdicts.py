"""The verdicts of `anchorops-doctor --verify`, which `auto` follows."""

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops import _backend, _verdicts, doctor
from anchorops._ops.confusion import confusion_for
from anchorops._ops.upsampled_sums import upsampled_sums
from tests.test_backend import Gpus

CPU = torch.device("cpu")
LOGITS, LABELS = torch.randn(2, 3, 4, 5), torch.arange(160).view(2, 8, 10) % 3
ANCHORS = torch.eye(3)

pytestmark = [
    pytest.mark.usefixtures("verdicts"),
    pytest.mark.skipif(
        ao.backends()["cpu"] is not None,
        reason="the backend cpu, which is not usable, is judged here",
    ),
]


def warnings_of(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "anchorops" in str(warning.message)]


def cross_entropy(logits: Tensor = LOGITS) -> Tensor:
    return ao.pixel_cross_entropy(logits, LABELS)


def test_what_is_remembered(verdicts: Path):
    assert not _verdicts.verified("cpu", CPU) and not _verdicts.wrong("cpu", CPU)
    first = {"softmax_moments": False, "class_moments": True, "confusion": False}
    assert _verdicts.remember("cpu", CPU, first) == verdicts
    _verdicts.remember("reference", CPU, {"softmax_moments": True})
    for _ in range(2):
        assert _verdicts.wrong("cpu", CPU) == {"softmax_moments", "confusion"}
        assert _verdicts.verified("cpu", CPU) and _verdicts.verified("reference", CPU)
        assert not _verdicts.wrong("reference", CPU) and not _verdicts.verified("triton", CPU)
        _verdicts.load(ao.__version__)  # from the file
    _verdicts.remember("cpu", CPU, {"softmax_moments": True})
    _verdicts.load(ao.__version__)
    assert _verdicts.verified("reference", CPU) and not _verdicts.wrong("cpu", CPU)
    assert [file.name for file in verdicts.parent.iterdir()] == ["verdicts.json"]


def test_another_process_follows(verdicts: Path):
    _verdicts.remember("cpu", CPU, {"softmax_moments": False})
    code = "import torch, anchorops as ao\nao.pixel_argmax(torch.randn(1, 3, 4, 5), (8, 10))\n"
    code += "ao.pixel_cross_entropy(torch.randn(1, 3, 4, 5), torch.zeros(1, 8, 10).long())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("found wrong: softmax_moments of the backend cpu on cpu (") == 1


def test_auto_takes_the_next_backend(monkeypatch: pytest.MonkeyPatch):
    computed = []
    formula = _backend_reference("softmax_moments", monkeypatch, computed)
    expected = cross_entropy()
    assert not computed
    _verdicts.remember("cpu", CPU, {"softmax_moments": False, "class_moments": True})
    (message,) = warnings_of(lambda: torch.testing.assert_close(cross_entropy(), expected))
    assert computed == [formula]
    name = _verdicts.device_name(CPU)
    assert message == (
        "anchorops: anchorops-doctor --verify found wrong: softmax_moments of the backend cpu on "
        f'{name}. "auto" takes another backend; to verify again: anchorops-doctor --verify'
    )
    assert not warnings_of(cross_entropy) and len(computed) == 2  # it is said once
    moments = lambda: _backend.select("class_moments", LOGITS, 3)  # noqa: E731
    assert moments() == "cpu" and not warnings_of(moments)
    assert ao.backends()["cpu"] is None
    _verdicts.remember("cpu", CPU, {"softmax_moments": True})
    cross_entropy()
    assert len(computed) == 2


def _backend_reference(name: str, monkeypatch: pytest.MonkeyPatch, computed: list) -> Any:
    """Notes each call of the reference's function."""
    from anchorops import reference

    function = getattr(reference, name)

    def note(*args: Any, **options: Any) -> Any:
        computed.append(function)
        return function(*args, **options)

    monkeypatch.setattr(reference, name, note)
    return function


def test_a_backend_chosen_by_name_is_used():
    _verdicts.remember("cpu", CPU, {"softmax_moments": False})
    with ao.use_backend("cpu"):
        select = partial(_backend.select, "f", LOGITS, 3, runs=("softmax_moments",))
        (message,) = warnings_of(select)
        assert "It is used; to verify again" in message and select() == "cpu"
        assert not warnings_of(cross_entropy)
    assert len(warnings_of(cross_entropy)) == 1  # of "auto"


def test_verdicts_are_ignored_by_the_check_itself():
    _verdicts.remember("cpu", CPU, {"softmax_moments": False})
    select = partial(_backend.select, "f", LOGITS, 3, runs=("softmax_moments",))
    with _verdicts.ignored():
        assert not warnings_of(select) and select() == "cpu"
    assert len(warnings_of(select)) == 1 and select() == "reference"


def test_the_reference_is_the_last():
    for backend in ("cpu", "reference"):
        _verdicts.remember(backend, CPU, {"softmax_moments": False})
    messages = warnings_of(cross_entropy)
    assert ["backend cpu" in message for message in messages] == [True, False]
    assert "of the backend reference" in messages[1] and "It is used" in messages[1]


@pytest.mark.parametrize(
    ("call", "operators"),
    [
        (cross_entropy, "softmax_moments"),
        (lambda: ao.pixel_cross_entropy(LOGITS[..., None], LABELS[..., None]), "softmax_moments"),
        (lambda: ao.pixel_binary_cross_entropy(LOGITS[:, 0], LABELS[:, :4, :5]), "softmax_moments"),
        (lambda: ao.CrossEntropyDice()(LOGITS, LABELS), "softmax_moments"),
        (
            lambda: ao.CrossEntropy(ohem=0.5, ohem_kept=9)(LOGITS, LABELS),
            "kth_largest softmax_moments",
        ),
        (lambda: ao.pixel_kl_divergence(LOGITS, LOGITS, (8, 10)), "pixel_kl_divergence"),
        (lambda: ao.pixel_argmax(LOGITS, (8, 10)), "pixel_argmax"),
        (
            lambda: ao.pixel_argmax(LOGITS, (8, 10), confidence=True),
            "pixel_argmax softmax_moments",
        ),
        (lambda: ao.pixel_confusion(LOGITS, LABELS), "confusion pixel_argmax"),
        (lambda: confusion_for("MeanIoU", LABELS, LABELS, 3, ignore_index=None), "confusion"),
        (lambda: ao.ops.class_moments(LOGITS, LABELS, 3), "class_moments"),
        (
            lambda: ao.ops.class_moments(LOGITS, LABELS, 3, groups=2, seed=1),
            "class_moments split_groups",
        ),
        (lambda: ao.class_centroids(LOGITS, LABELS, 3), "class_moments"),
        (lambda: ao.pixel_to_anchor_mse(LOGITS, LABELS, ANCHORS), "class_moments"),
        (
            lambda: upsampled_sums(
                LOGITS, LABELS, 3, per_image=False, upsample=True, ignore_index=-1
            ),
            "upsampled_sums",
        ),
    ],
)
def test_operators_of_the_calls(call: Callable[[], Any], operators: str):
    """Each operator that a call runs is looked up."""
    looked_up = []
    for name in _verdicts.OPERATORS:
        _verdicts._told.clear()
        _verdicts.remember("cpu", CPU, {name: False})
        looked_up += [name] * bool(warnings_of(call))
    assert sorted(looked_up) == operators.split()


def test_the_choice_is_compiled():
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(str(graph.code))
        return graph

    logits = LOGITS.clone().requires_grad_()
    expected = cross_entropy(logits)
    for right in (True, False):
        torch._dynamo.reset()
        _verdicts.remember("cpu", CPU, {"softmax_moments": right})
        compiled = torch.compile(cross_entropy, fullgraph=True, backend=keep)
        assert len(warnings_of(lambda run=compiled: run(logits))) == (not right)
        assert ("softmax_moments_cpu" in graphs[-1]) == right
        torch.testing.assert_close(compiled(logits), expected)
        torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")(logits).backward()
        assert not warnings_of(lambda run=compiled: run(logits))


def test_the_choice_in_a_transform():
    features, labels = LOGITS[:, None], LABELS[:, None, :4, :5]
    counted = torch.vmap(lambda f, y: ao.class_centroids(f, y, 3)[0])
    expected = counted(features, labels)
    _verdicts.remember("cpu", CPU, {"class_moments": False})
    (message,) = warnings_of(
        lambda: torch.testing.assert_close(counted(features, labels), expected)
    )
    assert "class_moments" in message


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[1]", '[{"right": {}}]', "[[]]", '{"a": 1}', b"\xff\xfe"]
)
def test_a_broken_file_is_absent(
    verdicts: Path, caplog: pytest.LogCaptureFixture, text: str | bytes
):
    verdicts.parent.mkdir()
    verdicts.write_bytes(text if isinstance(text, bytes) else text.encode())
    _verdicts.load(ao.__version__)
    assert not _verdicts.verified("cpu", CPU)
    (record,) = caplog.records
    assert record.name == "anchorops" and "cannot be read and is not used" in record.getMessage()
    _verdicts.remember("cpu", CPU, {"confusion": False})
    caplog.clear()
    _verdicts.load(ao.__version__)
    assert not caplog.records and _verdicts.wrong("cpu", CPU) == {"confusion"}


@pytest.mark.parametrize("obstacle", ["no directory", "a directory in its place"])
def test_a_cache_that_cannot_be_written(
    verdicts: Path, caplog: pytest.LogCaptureFixture, obstacle: str
):
    if obstacle == "no directory":
        verdicts.parent.write_text("a file")
    else:
        verdicts.mkdir(parents=True)
    assert _verdicts.remember("cpu", CPU, {"confusion": False}) == verdicts
    message = caplog.records[-1].getMessage()
    assert message.startswith(f"{verdicts} cannot be written: the verdict is forgotten when")
    assert _verdicts.wrong("cpu", CPU) == {"confusion"}
    assert verdicts.parent.is_file() or list(verdicts.parent.iterdir()) == [verdicts]


@pytest.mark.parametrize("field", ["anchorops", "torch", "device", "driver", "triton", "backend"])
def test_records_of_other_versions(verdicts: Path, field: str):
    _verdicts.remember("cpu", CPU, {"confusion": False})
    (record,) = json.loads(verdicts.read_text())
    verdicts.write_text(json.dumps([{**record, field: "another"}]))
    _verdicts.load(ao.__version__)
    assert not _verdicts.verified("cpu", CPU)
    _verdicts.remember("cpu", CPU, {"confusion": True})
    kept, new = json.loads(verdicts.read_text())
    assert kept[field] == "another" and new == {**record, "right": {"confusion": True}}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], str]:
    """Two GPUs, and a CUDA library for both. The function selects a backend on one of them."""
    monkeypatch.setattr(_verdicts, "driver", lambda: "580.95.05")
    return partial(Gpus(monkeypatch, "8.9;9.0", "8.9", "9.0").select, function="class_moments")


def test_on_gpus(gpus: Callable[[int], str], verdicts: Path, monkeypatch: pytest.MonkeyPatch):
    first = torch.device("cuda", 0)
    _verdicts.remember("cuda", first, {"class_moments": False})
    (message,) = warnings_of(lambda: gpus(0))
    assert "class_moments of the backend cuda on number 0" in message
    assert [gpus(0), gpus(1)] == ["triton", "cuda"]
    _verdicts.remember("triton", first, {"class_moments": False})
    assert len(warnings_of(lambda: gpus(0))) == 1 and gpus(0) == "reference"
    cuda, triton = json.loads(verdicts.read_text())
    assert (cuda["driver"], cuda["triton"]) == ("580.95.05", "")
    assert triton["triton"] == _verdicts._triton()
    table = [doctor._usable(name) for name in ("cuda", "triton")]
    wrong = "yes, WRONG on number 0: class_moments, never verified on number 1"
    assert table == [f"{wrong} (anchorops-doctor --verify)"] * 2
    monkeypatch.setattr(_verdicts, "driver", lambda: "590.1")
    _verdicts.load(ao.__version__)
    assert gpus(0) == "cuda" and not _verdicts.verified("cuda", first)


def test_a_gpu_that_was_never_verified(
    gpus: Callable[[int], str], caplog: pytest.LogCaptureFixture
):
    _verdicts.remember("cuda", torch.device("cuda", 1), {"class_moments": True})
    assert gpus(1) == "cuda" and not caplog.records
    with _verdicts.ignored():
        assert gpus(0) == "cuda" and not caplog.records
    assert [gpus(0), gpus(0), gpus(1)] == ["cuda"] * 3
    (record,) = caplog.records  # it is said once
    assert (record.name, record.levelno) == ("anchorops", logging.WARNING)
    message = "the backend cuda was never verified on number 0. It takes minutes: "
    assert record.getMessage() == message + "anchorops-doctor --verify"


def test_without_a_gpu_nothing_is_said(caplog: pytest.LogCaptureFixture):
    assert not warnings_of(cross_entropy) and not caplog.records
    fake = torch.device("cuda", 0)
    if not torch.cuda.is_available():  # a tensor without values
        assert not _verdicts.found_wrong("cuda", fake, ("class_moments",)) and not caplog.records


def test_the_driver(monkeypatch: pytest.MonkeyPatch):
    nvidia = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
    monkeypatch.setattr(Path, "read_text", lambda file: nvidia)
    assert _verdicts.driver() == "580.95.05"

    def absent(file: Path) -> str:
        raise FileNotFoundError(file)

    monkeypatch.setattr(Path, "read_text", absent)
    assert _verdicts.driver() == "unknown"


def test_doctor_names_the_operators(capsys: pytest.CaptureFixture):
    name = _verdicts.device_name(CPU)
    _verdicts.remember("cpu", CPU, {"softmax_moments": False, "confusion": False})
    _verdicts.remember("reference", CPU, {"softmax_moments": True})
    doctor.main([])
    table = capsys.readouterr().out
    assert f"\ncpu        yes, WRONG on {name}: confusion, softmax_moments\n" in table
    assert f"\nreference  yes, verified on {name}\n" in table


def test_the_import_does_not_initialise_cuda(verdicts: Path):
    _verdicts.remember("cpu", CPU, {"confusion": True})
    (record,) = json.loads(verdicts.read_text())
    gpu = {"backend": "cuda", "device": "NVIDIA L4", "driver": "580.95.05"}
    verdicts.write_text(json.dumps([record, {**record, **gpu}]))
    code = """
import torch
def fail(*args):
    raise AssertionError("CUDA is asked")
for name in ("is_available", "device_count", "get_device_properties", "_lazy_init", "init"):
    setattr(torch.cuda, name, fail)
import anchorops
assert anchorops._verdicts.verified("cpu", torch.device("cpu"))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
