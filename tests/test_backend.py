"""The choice of a backend."""

import os
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import anchorops as ao
from anchorops import _backend, _libraries
from anchorops._ops import class_moments, triton_launch
from anchorops.doctor import __main__ as doctor
from anchorops.doctor.catalogue import cases

FEATURES, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 10, dtype=torch.int64)
select = partial(_backend.select, "f", called=("class_moments",))


def test_use_backend():
    context = ao.use_backend("reference")
    with context:
        assert select(FEATURES, 6) == "reference"
        with ao.use_backend("cpu"):
            assert select(FEATURES, 6) == "cpu"
            with context:
                assert _backend._choice.backend == "reference"
            assert select(FEATURES, 6) == "cpu"
        with context:  # in itself
            assert _backend._choice.backend == "reference"
        assert _backend._choice.backend == "reference"
        with pytest.raises(KeyError), ao.use_backend("auto"):
            raise KeyError
        assert _backend._choice.backend == "reference"
    assert _backend._choice.backend == "auto"
    try:
        ao.use_backend("reference")  # for good
        assert select(FEATURES, 6) == "reference"
    finally:
        ao.use_backend("auto")
    assert select(FEATURES, 6) == "cpu"


def test_each_thread_chooses_for_itself():
    """Two threads enter and leave in turns. With a shared choice, one would get the other's."""
    ours, theirs = threading.Event(), threading.Event()
    seen = []

    def other():
        seen.append(select(FEATURES, 6))  # not the choice of the starting thread
        with ao.use_backend("cpu"):
            theirs.set()
            ours.wait()
            seen.append(select(FEATURES.double(), 6))
            with pytest.raises(ValueError, match=r"^f: backend cpu does not support"):
                select(FEATURES.to("meta"), 6)
        seen.append(select(FEATURES.to("meta"), 6))

    with ao.use_backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        theirs.wait()
        assert select(FEATURES, 6) == "reference"
    ours.set()
    thread.join()
    assert seen == ["cpu", "cpu", "reference"]
    assert select(FEATURES, 6) == "cpu"


def compiled_centroids() -> tuple[Any, list[str]]:
    """A compiled function, and the codes of its graphs."""
    graphs: list[str] = []

    def keep(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    @torch.compile(fullgraph=True, backend=keep)
    def centroids(features):
        return ao.class_centroids(features, LABELS, 6)[0]

    return centroids, graphs


def test_a_compiled_function_follows_the_choice_of_its_thread():
    centroids, graphs = compiled_centroids()
    for backend in ("cpu", "reference"):
        with ao.use_backend(backend):
            centroids(FEATURES)
            assert ("class_moments_cpu" in graphs[-1]) == (backend == "cpu")
    with ao.use_backend("reference"):
        thread = threading.Thread(target=centroids, args=(FEATURES,))
        thread.start()
        thread.join()
        centroids(FEATURES)
    assert len(graphs) == 3

    @torch.compile(fullgraph=True, backend="eager")
    def chosen_inside(features):
        with ao.use_backend("reference"):
            return ao.class_centroids(features, LABELS, 6)[0]

    torch.testing.assert_close(chosen_inside(FEATURES), centroids(FEATURES))
    assert select(FEATURES, 6) == "cpu"


def test_unknown_and_unusable_backends():
    message = "^use_backend: name: expected 'auto' or 'cuda' or .* got 'gpu'"
    with pytest.raises(ValueError, match=message):
        ao.use_backend("gpu")
    for name, reason in ao.backends().items():
        if reason:
            with pytest.raises(RuntimeError, match=f"^use_backend: {name} is not usable here: "):
                ao.use_backend(name)
    assert select(FEATURES, 6) == "cpu"


CASES = {case.entry.name: case for tag in ("all", "small") for case in cases(tag)}
IN_PYTORCH = ["Lovasz of sigmoids"]  # on every backend


@pytest.mark.parametrize("name", CASES)
def test_a_chosen_backend_never_gives_way(name: str, monkeypatch):
    """It serves each operator, or says why not."""
    case = CASES[name]
    monkeypatch.setattr(_libraries, "ON_HOST", {})
    for backend in ("cuda", "triton", "cpu"):
        monkeypatch.setattr(_backend._choice, "backend", backend)
        if backend == "cpu" or name in IN_PYTORCH:
            case.ours(**case.sample.inputs())
            continue
        reason = "it supports cuda tensors, the input is on cpu"
        if backend not in case.entry.backends:
            reason = 'it does not have this operator: choose "cpu" or "auto"'
        message = rf"^\w+: backend {backend} does not support this call: {reason}$"
        with pytest.raises(ValueError, match=message):
            case.ours(**case.sample.inputs())


def test_a_cuda_library_of_no_use_says_why(monkeypatch):
    def does_not_load(path):
        raise OSError(f"Could not load this library: {path}") from OSError("no libcudart.so.13")

    built = {"cuda": "13.0"}
    monkeypatch.setattr(_libraries, "build_info", lambda: built)
    monkeypatch.setattr(torch.ops, "load_library", does_not_load)
    for version, reason in (
        (None, "this torch is a CPU build"),
        ("12.8", "anchorops was built with CUDA 13.0, this torch with 12.8: "),
        ("13.2", "anchorops/_cuda.so does not load: no libcudart.so.13"),
    ):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert str(_libraries._load_cuda()).startswith(reason)
    built = {"cuda": "", "cuda_choice": ""}
    assert str(_libraries._load_cuda()).startswith(
        "anchorops was built without CUDA: it needs nvcc"
    )
    built = {"cuda": "", "cuda_choice": "", "cuda_obstacle": "nvcc was not found"}
    assert _libraries._load_cuda() == "anchorops was built without CUDA: nvcc was not found"
    built = {"cuda": "", "cuda_choice": "0"}
    assert _libraries._load_cuda() == "anchorops was built with ANCHOROPS_CUDA=0"


def test_a_library_older_than_its_sources(tmp_path, caplog):
    library, source = tmp_path / "_cpu.so", tmp_path / "csrc" / "library.cpp"
    source.parent.mkdir()
    library.touch()
    _libraries._tell_if_older(library, source.parent, "*.cpp")  # an installed wheel
    source.touch()
    for age, told in ((-1, 0), (1, 1)):
        os.utime(source, (library.stat().st_mtime + age,) * 2)
        _libraries._tell_if_older(library, source.parent, "*.cpp")
        assert len(caplog.messages) == told
    assert "_cpu.so is older than its sources in" in caplog.text


def test_triton_that_could_launch_nothing(monkeypatch, tmp_path):
    """As in slim images: Triton is installed, but compiles a C module at its first launch."""
    gcc, header = tmp_path / "gcc", tmp_path / "include/Python.h"
    header.parent.mkdir()
    monkeypatch.setattr(_libraries.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_libraries, "TRITON_ON_HOST", False)
    monkeypatch.setattr(_libraries.sysconfig, "get_path", lambda *_: str(header.parent))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    reason = _libraries._find_triton()
    assert reason == "triton found no C compiler (gcc or clang): install one, or name it in CC"
    gcc.touch(0o755)
    reason = f"triton needs the headers of Python, and found no {header}: install them"
    assert _libraries._find_triton() == reason
    gpus = Gpus(monkeypatch, "", "9.0")
    monkeypatch.setitem(_libraries.MISSING, "triton", reason)
    expected = f"{reason}; until then, pixel losses on a GPU take the reference"
    assert ao.backends()["triton"] == expected and gpus.select(0) == "reference"
    header.touch()
    assert _libraries._find_triton() is None
    monkeypatch.setenv("CC", "icc")
    assert str(_libraries._find_triton()).startswith("triton found no C compiler (icc)")
    monkeypatch.setenv("CC", str(gcc))
    assert _libraries._find_triton() is None
    header.rename(tmp_path / "Python.h")
    monkeypatch.setenv("CPATH", f"/nowhere:{tmp_path}")
    assert _libraries._find_triton() is None


def test_it_is_said_once_that_triton_is_missing(monkeypatch, caplog):
    """Where a call would have taken it."""
    gpus = Gpus(monkeypatch, "9.0", "9.0", "7.0")
    monkeypatch.setitem(_libraries.MISSING, "triton", "triton is not installed")
    monkeypatch.setattr(_backend, "_told", set())
    pixels = {"called": ("softmax_moments",)}
    assert gpus.select(1, **pixels) == "reference"  # the GPU is too old
    assert gpus.select(0, refusal=lambda backend: backend, **pixels) == "reference"
    with ao.use_backend("reference"):
        assert gpus.select(0, **pixels) == "reference"
    assert not caplog.messages
    for function in ("CrossEntropy", "CrossEntropy", "Dice"):
        assert gpus.select(0, function, **pixels) == "reference"
    message = "takes the reference, in plain PyTorch, as all that needs Triton on a GPU"
    assert caplog.messages == [f"CrossEntropy {message}: triton is not installed"]
    assert [x.levelname for x in caplog.records] == ["WARNING"]
    assert gpus.select(0) == "cuda"


def test_torch_compile_traces_what_is_said(monkeypatch, caplog):
    monkeypatch.setitem(_libraries.MISSING, "triton", "triton is not installed")
    monkeypatch.setattr(_backend, "_told", set())

    def step(x):
        _backend._tell_that_triton_is_missing("Dice")
        return x + 1

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert [compiled(torch.zeros(())) for _ in range(2)] == [1, 1]
    assert [x.name for x in caplog.records].count("anchorops") == 1


def test_it_is_said_that_kernels_are_compiled(monkeypatch, caplog):
    """Once for each operator, if it takes long: kernels that are stored load quickly."""
    pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache")
    monkeypatch.setattr(triton_launch, "_launched", set())
    with triton_launch.compiling("softmax_moments", 60):
        pass
    for operator in ("confusion", "confusion", "pixel_argmax"):
        with triton_launch.compiling(operator, 0.01):
            time.sleep(0.5)
    assert caplog.messages == [
        f"Triton compiles the kernels of {operator}, which takes seconds, and stores them in /cache"
        for operator in ("confusion", "pixel_argmax")
    ]


class WithoutNotes(RuntimeError):
    """As on Python 3.10."""

    @property
    def add_note(self):
        raise AttributeError


@pytest.mark.parametrize("kind", [RuntimeError, WithoutNotes])
def test_the_note_of_what_triton_raises(monkeypatch, caplog, kind: type[RuntimeError]):
    """On Python 3.10 it is a line of the log. Other exclusions stay in the line of the shell."""
    triton = pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")
    Gpus(monkeypatch, "", "7.5")
    ao.exclude_from_auto("triton", "confusion")
    error = kind("ptxas failed")
    triton_launch._add_note(error, "class_keys", torch.device("cuda", 0))
    excluded = ("class_moments", "confusion", "kth_largest", "upsampled_sums")
    assert getattr(error, "__notes__", caplog.messages) == [
        f"Triton raised this in class_keys of anchorops (torch {torch.__version__}, Triton "
        f"{triton.__version__}, number 0, compute capability 7.5). If its kernels do not compile "
        'here, this line takes it out of "auto": export ANCHOROPS_NOT_AUTO='
        + ",".join(f"triton:{name}" for name in excluded)
    ]


def refuse(tensor: torch.Tensor) -> None:
    raise ValueError("confusion: too many pixels")


def have_no_memory(tensor: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def need_a_newer_triton(tensor: torch.Tensor) -> None:
    raise ImportError("cannot import name 'cuda_capability_geq' from 'triton'")


def compile_what_is_missing(tensor: torch.Tensor) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    triton.compile("missing.ttir", GPUTarget("cuda", 75, 32))


@pytest.mark.parametrize(
    ("call", "noted"),
    [
        (refuse, False),
        (have_no_memory, False),
        (need_a_newer_triton, True),
        (compile_what_is_missing, True),
    ],
)
def test_only_what_triton_raises_gets_a_note(monkeypatch, call: Any, noted: bool):
    pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")
    add_note, launches = Mock(), Mock()
    monkeypatch.setattr(triton_launch, "_add_note", add_note)
    triton_launch.implement_by_triton(launches, "confusion", call)
    launch = launches.impl.call_args.args[1]
    with pytest.raises((ValueError, RuntimeError, ImportError, OSError)) as raised:
        launch(LABELS)
    noted_of = [(raised.value, "confusion", LABELS.device)] if noted else []
    assert [x.args for x in add_note.call_args_list] == noted_of


class Gpus:
    """GPUs of these compute capabilities instead of the machine's, and a CUDA library for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, targets: str, *capabilities: str) -> None:
        gpus = []
        for i, capability in enumerate(capabilities):
            major, minor = map(int, capability.split("."))
            gpus.append(SimpleNamespace(name=f"number {i}", major=major, minor=minor))
        # Lightning sets it, and then torch.cuda.is_available() believes device_count
        monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.cuda, "_get_device_properties", gpus.__getitem__, raising=False)
        missing = {"cuda": None, "triton": None, "cpu": None, "reference": None}
        monkeypatch.setattr(_libraries, "MISSING", missing)
        monkeypatch.setattr(_libraries, "_CUDA_TARGETS", targets)
        monkeypatch.setattr(_libraries, "_CUDA_RANGES", _libraries._built_for(targets))

    def select(self, index: int, function: str = "f", **options: Any) -> str:
        features: Any = SimpleNamespace(
            device=torch.device("cuda", index),
            is_cpu=False,
            dtype=torch.bfloat16,
            shape=(2, 3, 4, 5),
        )
        options = {"called": ("class_moments",)} | options
        return _backend.select(function, features, 6, **options)


@pytest.mark.parametrize(
    ("targets", "served", "not_served"),
    [
        ("8.0;9.0", ["8.0", "8.6", "8.9", "9.0"], ["10.0", "12.0"]),
        ("8.6 9.0+PTX", ["8.6", "8.9", "9.0", "10.0", "12.1"], ["8.0"]),
        ("9.0a;10.0f+PTX", ["9.0", "10.0", "10.3"], ["8.9", "11.0", "12.0"]),
        ("9.0+PTX", ["9.0", "12.0"], ["8.9"]),
        ("", [], ["9.0"]),
    ],
)
def test_auto_takes_triton_on_a_gpu_without_code(monkeypatch, targets, served, not_served):
    gpus = Gpus(monkeypatch, targets, *served, *not_served)
    expected = ["cuda"] * len(served) + ["triton"] * len(not_served)
    assert [gpus.select(i) for i in range(len(expected))] == expected


FEW, MANY = (partial(class_moments.refusal, keys) for keys in (1024, 1025))


NOT_THERE = "it does not have this operator"


@pytest.mark.parametrize(
    ("options", "auto", "cuda", "without_triton"),
    [
        ({"refusal": FEW}, "cuda", "cuda", "cuda"),
        ({"refusal": MANY}, "triton", "at most 1024 keys .*", "reference"),
        ({"faster": "triton"}, "triton", "cuda", "cuda"),
        ({"called": ("softmax_moments",)}, "triton", NOT_THERE, "reference"),
    ],
)
def test_choice_on_a_gpu(monkeypatch, options, auto: str, cuda: str, without_triton: str):
    """By "auto"; of a chosen CUDA, or why it refuses; and by "auto" where Triton is missing."""
    gpus = Gpus(monkeypatch, "9.0", "9.0")
    assert gpus.select(0, **options) == auto
    with ao.use_backend("cuda"):
        if cuda == "cuda":
            assert gpus.select(0, **options) == cuda
        else:
            message = f'^f: backend cuda .* {cuda}: choose "triton" or "auto"$'
            with pytest.raises(ValueError, match=message):
                gpus.select(0, **options)
    monkeypatch.setitem(_libraries.MISSING, "triton", "not installed")
    assert gpus.select(0, **options) == without_triton


def test_where_triton_was_faster_than_cuda():
    points, images = torch.zeros(8, 96, dtype=torch.bfloat16), FEATURES.bfloat16()
    faster = class_moments.faster_backend
    assert [faster(points, keys, True) for keys in (199, 200, 1000)] == [None, "triton", "triton"]
    assert faster(images, 200, True) is faster(points, 200, False) is None
    assert faster(points.float(), 200, True) is None


def test_a_gpu_without_code_says_why(monkeypatch):
    gpus = Gpus(monkeypatch, "9.0", "9.0", "8.9")
    assert ao.backends()["cuda"] is None
    reason = "anchorops was built for compute capability 9.0, the GPU number 1 has 8.9: install"
    message = f"^f: backend cuda does not support this call: {reason}"
    with ao.use_backend("cuda"):
        assert gpus.select(0) == "cuda"
        with pytest.raises(ValueError, match=message):
            gpus.select(1)
    gpus = Gpus(monkeypatch, "10.0", "8.0", "8.9")
    assert str(ao.backends()["cuda"]).startswith("anchorops was built for compute capability 10.0")
    with pytest.raises(RuntimeError, match=r"^use_backend: cuda is not usable here: anchorops was"):
        ao.use_backend("cuda")


@pytest.mark.parametrize("targets", ["", "7.0;9.0", "9.0+PTX"])
def test_gpus_before_7_5_are_for_the_reference(monkeypatch, targets):
    """Neither our CUDA sources nor Triton support them."""
    reasons = {
        name: f"it needs a GPU of compute capability {oldest} or later, number 0 has 7.0"
        for name, oldest in (("cuda", "8.0"), ("triton", "7.5"))
    }
    gpus = Gpus(monkeypatch, targets, "7.0")
    if not targets:
        monkeypatch.setitem(_libraries.MISSING, "cuda", "anchorops was built without CUDA")
    assert gpus.select(0) == "reference"
    assert ao.backends() == {**reasons, "cpu": None, "reference": None}
    for name in ("cuda", "triton"):
        message = f"^use_backend: {name} is not usable here: {reasons[name]}$"
        with pytest.raises(RuntimeError, match=message):
            ao.use_backend(name)
    gpus = Gpus(monkeypatch, "8.0", "7.0", "8.6")
    assert ao.backends()["cuda"] is ao.backends()["triton"] is None
    for name in ("cuda", "triton"):
        message = rf"^f: backend {name} does not .*: {reasons[name]}$"
        with ao.use_backend(name), pytest.raises(ValueError, match=message):
            gpus.select(0)


def test_a_gpu_of_7_5_is_for_triton(monkeypatch):
    gpus = Gpus(monkeypatch, "7.5;9.0", "7.5")
    reason = "it needs a GPU of compute capability 8.0 or later, number 0 has 7.5"
    assert ao.backends() == {"cuda": reason, "triton": None, "cpu": None, "reference": None}
    assert gpus.select(0) == gpus.select(0, called=("softmax_moments",)) == "triton"
    message = rf"^f: backend cuda does not .*: {reason}$"
    monkeypatch.setattr(_backend._choice, "backend", "cuda")
    with pytest.raises(ValueError, match=message):
        gpus.select(0)
    monkeypatch.setattr(_backend._choice, "backend", "auto")
    monkeypatch.setitem(_libraries.MISSING, "triton", "triton is not installed")
    assert gpus.select(0) == "reference"


SELECT = partial(select, FEATURES, 6, called=("class_moments", "split_groups"))


@pytest.fixture(autouse=True)
def nothing_excluded(monkeypatch):
    monkeypatch.setattr(_backend, "excluded", dict.fromkeys(_backend.excluded, ()))


def test_an_operator_that_auto_does_not_take():
    assert SELECT() == "cpu" and ao.backends()["cpu"] is None
    ao.exclude_from_auto("cpu", "confusion", "split_groups")
    ao.exclude_from_auto("cpu", "confusion", "pixel_argmax")
    assert SELECT() == "reference" and _backend.select("class_moments", FEATURES, 6) == "cpu"
    shown = 'usable, but "auto" does not take confusion, split_groups, pixel_argmax'
    assert ao.backends()["cpu"] == shown
    with ao.use_backend("cpu"):
        assert SELECT() == "cpu"
    seen = []
    thread = threading.Thread(target=lambda: seen.append(SELECT()))
    thread.start()
    thread.join()
    assert seen == ["reference"]


def test_auto_takes_the_next_backend_of_a_gpu(monkeypatch):
    gpus = Gpus(monkeypatch, "9.0", "9.0")
    for backend, following in (("cuda", "triton"), ("triton", "reference")):
        ao.exclude_from_auto(backend, "class_moments")
        assert gpus.select(0) == following
        assert gpus.select(0, called=("split_groups",)) == "cuda"


def test_the_doctor_shows_what_is_excluded(capsys):
    ao.exclude_from_auto("cpu", "softmax_moments")
    assert doctor.main([]) == 0
    shown = '\ncpu        usable, but "auto" does not take softmax_moments\nreference  yes\n'
    assert shown in capsys.readouterr().out


OPERATORS = "operators: expected 'class_moments' or .*, got "
UNKNOWN = "backend: expected 'cuda' or 'triton' or 'cpu', got "
EXCLUDE, VARIABLE = ao.exclude_from_auto, _backend._exclude_from_environment


@pytest.mark.parametrize(
    ("exclude", "arguments", "message"),
    [
        (EXCLUDE, ("gpu", "confusion"), f"{UNKNOWN}'gpu'"),
        (EXCLUDE, ("reference", "confusion"), f"{UNKNOWN}'reference'"),
        (EXCLUDE, ("cpu", "confusion", "dice"), f"{OPERATORS}'dice'"),
        (EXCLUDE, ("cpu", ["confusion"]), rf"{OPERATORS}\['confusion'\]"),
        (EXCLUDE, ("cuda", "softmax_moments"), f"{OPERATORS}'softmax_moments'"),
        (EXCLUDE, ("cpu",), "operators: expected at least one name, got none"),
        (VARIABLE, ("gpu:confusion",), f"{UNKNOWN}'gpu'"),
        (VARIABLE, ("cpu:confusion,cpu:dice",), f"{OPERATORS}'dice'"),
        (VARIABLE, ("triton",), "the variable: expected BACKEND:OPERATOR,.*,…, got 'triton'"),
    ],
)
def test_what_cannot_be_excluded(exclude: Any, arguments: tuple[Any, ...], message: str):
    name = "exclude_from_auto" if exclude is EXCLUDE else "ANCHOROPS_NOT_AUTO"
    with pytest.raises(ValueError, match=f"^{name}: {message}$"):
        exclude(*arguments)


def test_the_exclusion_is_traced():
    """The choice is made when the function is traced, and traced again if it has changed."""
    centroids, graphs = compiled_centroids()
    expected = centroids(FEATURES)
    assert "class_moments_cpu" in graphs[-1]
    ao.exclude_from_auto("cpu", "class_moments")
    torch.testing.assert_close(centroids(FEATURES), expected)
    assert len(graphs) == 2 and "class_moments_cpu" not in graphs[-1]


IMPORT = """
import torch
def fail(*args):
    raise AssertionError("CUDA is asked")
for name in ("is_available", "device_count", "get_device_properties", "_lazy_init", "init"):
    setattr(torch.cuda, name, fail)
import anchorops
print(anchorops._backend.excluded)
"""


def test_the_import_reads_the_environment_and_asks_no_gpu(monkeypatch):
    value = "triton:softmax_moments,cuda:class_moments,triton:confusion"
    monkeypatch.setenv("ANCHOROPS_NOT_AUTO", value)
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    excluded = "{'cuda': ('class_moments',), 'triton': ('softmax_moments', 'confusion'), 'cpu': ()}"
    assert run.stdout.strip() == excluded, run.stderr
