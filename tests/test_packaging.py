"""Building and installing, and the messages about it. These tests need no network."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import anchorops
from anchorops._libraries import CPU_LIBRARY, build_info
from anchorops.doctor import __main__ as doctor

ROOT = Path(__file__).parents[1]
PACKAGE = Path(anchorops.__file__).parent
WITHOUT_LIBRARIES = """
import sys, torch
def load_library(path):
    raise OSError(f"{path} is for another machine")
torch.ops.load_library = load_library
"""
ELSEWHERE = Path(sys.executable).parent  # in the root, folders could be imported as packages
OTHER_PYTHONS = os.getenv("ANCHOROPS_ABI_PYTHONS", "").split()  # of make check-abi
compiled = pytest.mark.skipif(not CPU_LIBRARY.exists(), reason="nothing was compiled")


def run(*command: object, cwd: Path = ELSEWHERE, **environment: object):
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    arguments = list(map(str, command))
    return subprocess.run(arguments, cwd=cwd, env=variables, text=True, capture_output=True)


@compiled
def test_build_info():
    info = build_info()
    assert info["version"] == anchorops.__version__
    assert info["torch_target"] == "2.10"
    assert int(info["cxx_standard"]) >= 202002
    assert re.match(r"2\.\d+\.\d+", info["torch"])
    assert info["compiler"]
    assert bool(info["cuda"]) == bool(info["cuda_arch_list"])
    requested = info["cuda_choice"] != "0"
    assert bool(info["cuda_obstacle"]) == (requested and not info["cuda"])


@compiled
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("library", sorted(PACKAGE.glob("*.so")), ids=lambda path: path.name)
def test_only_the_stable_abi(library):
    """C++ symbols of torch change from version to version; C symbols of the stable ABI do not."""
    symbols = run("nm", "-D", "--undefined-only", library).stdout.split()
    assert symbols
    assert [name for name in symbols if re.match(r"_Z.*(2at|3c10|5torch|6caffe2)\d", name)] == []
    assert [name for name in symbols if re.match(r"_?Py[A-Z_]", name)] == []  # nor Python's


@pytest.mark.parametrize("python", OTHER_PYTHONS)
@compiled
def test_other_torch(python):
    """The compiled files work with the torch and the Python of another interpreter."""
    code = (
        "import torch, anchorops as ao; ao.use_backend('cpu');"
        "labels = torch.tensor([0, 1, 1, 255]);"
        "print(ao.ops.class_moments(torch.ones(4, 3), labels, 2).counts.tolist())"
    )
    answer = run(ROOT / python, "-c", code, PYTHONPATH=PACKAGE.parent)
    assert answer.stdout.strip() == "[1, 2]", answer.stderr


@pytest.mark.parametrize("python", OTHER_PYTHONS)
@pytest.mark.parametrize("part", ["cpu/*.cpp", "cuda/**/*.cu"])
def test_other_torch_compiles_the_sources(python, part, tmp_path):
    """The sources use only what the headers of another torch declare."""
    code = "from torch.utils.cpp_extension import include_paths as p; print(*p('cpu'), sep='\\n')"
    process = run(ROOT / python, "-c", code)
    include, sources = process.stdout.split(), sorted((ROOT / "csrc").glob(part))
    assert include and sources, process.stderr
    if part.startswith("cuda") and shutil.which("nvcc") is None:
        pytest.skip("reading CUDA sources needs nvcc")
    command = [os.environ.get("CXX", "c++"), "-fsyntax-only"]
    if part.startswith("cuda"):
        command = ["nvcc", "--cuda", "-arch=sm_80", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
        command.append(f"-odir={tmp_path}")
    command += ["-std=c++20", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    answer = run(*command, *[x for path in include for x in ("-isystem", path)], *sources)
    assert answer.returncode == 0, answer.stderr[:4000]


@compiled
def test_doctor(capsys):
    assert doctor.main([]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^torch +2\.\d+\.\d+", table, re.M)
    assert re.search(r"^extension +/.*_cpu\.so", table, re.M)
    assert re.search(r"^cpu +yes$", table, re.M)
    assert re.search(r"^reference +yes$", table, re.M)


def test_doctor_without_the_extension():
    code = f"""{WITHOUT_LIBRARIES}
import anchorops as ao
from anchorops.doctor import __main__ as doctor
assert ao.ops.class_moments(torch.ones(3, 2), torch.tensor([0, 0, 1]), 2).counts.tolist() == [2, 1]
sys.exit(doctor.main())"""
    answer = run(sys.executable, "-c", code, CUDA_VISIBLE_DEVICES="")
    assert answer.returncode == 1, answer.stderr
    assert re.search(r"^extension +not loaded", answer.stdout, re.M)
    assert re.search(r"^cpu +no: .*_cpu.so does not load: ", answer.stdout, re.M)


def copy_sources(destination: Path) -> Path:
    ignored = shutil.ignore_patterns(".*", "build", "dist", "data", "runs", "*.egg-info", "*.so")
    return shutil.copytree(ROOT, destination, symlinks=True, ignore=ignored)


@pytest.fixture
def checkout(tmp_path):
    return copy_sources(tmp_path / "checkout")


class Built(NamedTuple):
    checkout: Path
    source: Path
    """The unpacked sdist."""
    wheel: Path
    """Made from it without a compiler, which leaves a pure one."""
    python: Path
    """The interpreter of an environment with the wheel, and what this one has but for anchorops."""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip", reason="pip is not installed")
    folder = tmp_path_factory.mktemp("built")
    checkout = copy_sources(folder / "checkout")
    hook = "import build_backend as b; b.build_{}({!r})"
    answer = run(sys.executable, "-c", hook.format("sdist", str(folder)), cwd=checkout)
    assert answer.returncode == 0, answer.stderr
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    source = folder / sdist.name.removesuffix(".tar.gz")
    hook = hook.format("wheel", str(folder))
    answer = run(sys.executable, "-c", hook, cwd=source, CXX="/nonexistent")
    assert answer.returncode == 0, answer.stderr
    assert "installing without the compiled backends" in answer.stderr
    (wheel,) = folder.glob("*-py3-none-any.whl")
    venv.create(folder / "environment")
    (packages,) = (folder / "environment").glob("lib/python*/site-packages")
    python = folder / "environment/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    answer = run(*pip, wheel)
    assert answer.returncode == 0, answer.stderr
    # .pth files in a directory that a .pth file names are not read, so no editable install
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return Built(checkout, source, wheel, python)


def test_sdist_and_wheel_hold_everything(built):
    checkout, source, wheel, _ = built

    def files(folder: str) -> set[str]:
        paths = (path for path in (checkout / folder).rglob("*") if path.is_file())
        return {path.relative_to(checkout).as_posix() for path in paths if path.suffix != ".pyc"}

    for folder in ("anchorops", "csrc", "kernels", "tests", "bench", "examples", "docs"):
        missing = {name for name in files(folder) if not (source / name).exists()}
        assert {name for name in missing if not name.startswith("anchorops/kernels/")} == set()
    wheeled = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"anchorops-{anchorops.__version__}-")
    assert f"\nversion: {anchorops.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert files("anchorops") <= wheeled and "anchorops/py.typed" in wheeled
    assert {f"anchorops/{name}" for name in files("csrc") | files("kernels")} <= wheeled


def test_installed_wheel(built, tmp_path):
    """A training step in an environment that has no compiler and no extras."""
    code = """
import importlib.util, shutil, sys
assert not importlib.util.find_spec("kernels")
assert not any(map(shutil.which, ("c++", "g++", "cc", "gcc", "clang++", "nvcc")))
sys.modules.update(matplotlib=None, torchmetrics=None)
import torch, anchorops as ao
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 5, 1))
sar, labels = ao.attach(model, ao.SAR(5, 8)), torch.randint(0, 5, (2, 16, 16))
loss = ao.pixel_cross_entropy(model(torch.randn(2, 3, 4, 4)), labels) + sar(labels)
loss.backward()
assert loss.isfinite() and model[0].weight.grad.any()
print(ao.__file__)
print(ao.ops.class_moments(torch.ones(3, 2), torch.tensor([0, 0, 1]), 2).counts.tolist())
print(ao.backends()["cpu"])
from anchorops import *
for part in ("plots", "diagnostics"):
    try:
        getattr(ao, part)
    except ModuleNotFoundError as error:
        print(error)
"""
    answer = run(built.python, "-c", code, PYTHONPATH="", PATH=tmp_path)
    assert answer.returncode == 0, answer.stderr
    file, counts, cpu, plots, diagnostics = answer.stdout.splitlines()
    assert Path(file).is_relative_to(built.python.parents[1])
    assert counts == "[2, 1]"
    assert cpu.startswith("anchorops/_cpu.so was not compiled")
    assert plots.endswith("install it with: pip install 'anchorops[plots]'")
    assert diagnostics.endswith("install it with: pip install 'anchorops[diagnostics]'")


@pytest.fixture
def toolkit(checkout, tmp_path):
    """Runs setup.py with a torch and an nvcc that only say what they are."""

    def run_setup(torch: str, extension: str = "", **environment):
        plan = "TOP=/opt/cuda/bin/..\n-D__CUDACC_VER_MAJOR__=12 -D__CUDACC_VER_MINOR__=4"
        extension = extension or "import os, sys\nsys.exit(os.environ['TORCH_CUDA_ARCH_LIST'])"
        files = {
            "torch/__init__.py": torch,
            "torch/utils/__init__.py": "",
            "torch/utils/cpp_extension.py": extension,
            "bin/nvcc": NVCC.format(plan=plan),
            "checkout/csrc/cuda/toy.cu": "",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "bin/nvcc").chmod(0o755)
        defaults = {"ANCHOROPS_CUDA": 1, "CUDA_HOME": tmp_path, "PYTHONPATH": tmp_path}
        defaults["TORCH_CUDA_ARCH_LIST"] = ""
        command = (sys.executable, "setup.py", "build_ext")
        return run(*command, cwd=checkout, **(defaults | environment))

    return run_setup


NVCC = """\
#!/bin/sh
case "$*" in
*gcc-99*) echo "In file included from cuda_runtime.h" >&2
  echo 'host_config.h:137:2: error: #error -- "gcc-99" is a $GNU\\\\version!' >&2; exit 1 ;;
esac
echo '{plan}' >&2
echo compute_75 compute_80 compute_86 compute_89 compute_90 compute_100 compute_120
"""
FAKE_TORCH = """
__version__ = {version!r}
class version: cuda = {cuda!r}
class cuda:
    device_count = lambda: {gpus}.__len__()
    get_device_capability = lambda i: {gpus}[i]
"""


@pytest.mark.parametrize(
    ("torch", "cuda", "environment", "message"),
    [
        ("2.12.0", "13.0", {"ANCHOROPS_CUDA": "on"}, "must be 0 .* or 1 .*, not 'on'"),
        ("2.12.0", "13.0", {"CXX": "/nonexistent"}, "requires .* no C.* '/nonexistent'"),
        ("2.9.1", "13.0", {}, "needs torch>=2.10, found 2.9.1"),
        ("2.12.0", None, {}, "requires .* torch 2.12.0 is a build without CUDA"),
        ("2.12.0", "13.0", {"CUDA_HOME": "/nonexistent"}, "requires .* nvcc was not found"),
        ("2.12.0", "13.0", {}, "requires .* nvcc is of CUDA 12.4, torch 2.12.0 of CUDA 13.0"),
        ("2.12.0", "12.9", {"CC": "gcc-99"}, "requires .* cannot use .*gcc-99.*: install one that"),
        ("2.12.0", "12.9", {"TORCH_CUDA_ARCH_LIST": "Hopper"}, "look like 8.0;.*, not 'Hopper'"),
        ("2.12.0", "12.9", {"TORCH_CUDA_ARCH_LIST": "7.5"}, "requires .* 8.0 or later, found 7.5"),
        (None, None, {}, "no torch here: install torch"),
    ],
)
def test_demands_that_cannot_be_met(toolkit, torch, cuda, environment, message):
    module = FAKE_TORCH.format(version=torch, cuda=cuda, gpus=[])
    answer = toolkit(module if torch else "raise ImportError('no torch here')", **environment)
    assert answer.returncode == 1
    assert re.search(f"^anchorops: .*{message}", answer.stderr, re.M), answer.stderr
    assert "Traceback" not in answer.stderr


BUILD_EXTENSION = """
from setuptools.command.build_ext import build_ext

class BuildExtension(build_ext):
    def build_extensions(self):
        print([extension.name for extension in self.extensions])
        print(dict(self.extensions[0].define_macros)["ANCHOROPS_CUDA_OBSTACLE"])

include_paths = library_paths = lambda device: []
"""


@pytest.mark.parametrize(
    ("environment", "modules", "obstacle"),
    [
        ({}, ["_cpu", "_cuda"], '""'),
        ({"ANCHOROPS_CUDA": 0, "CC": "gcc-99"}, ["_cpu"], '""'),
        (
            {"CC": "gcc-99"},
            ["_cpu"],
            "\"nvcc cannot use this machine's C++ compiler (host_config.h:137:2: error: #error -- "
            "'gcc-99' is a 'GNU'version!): install one that CUDA 12.4 supports, and name it with "
            'NVCC_CCBIN"',
        ),
    ],
)
def test_a_compiler_that_nvcc_refuses_leaves_the_cpu_library(
    toolkit, environment, modules, obstacle
):
    """The library records why it was built without CUDA, in a string that C and JSON can read."""
    torch = FAKE_TORCH.format(version="2.12.0", cuda="12.9", gpus=[])
    answer = toolkit(torch, extension=BUILD_EXTENSION, **({"ANCHOROPS_CUDA": ""} | environment))
    assert answer.returncode == 0, answer.stderr
    names, recorded = answer.stdout.splitlines()[-2:]
    assert names == str([f"anchorops.{module}" for module in modules])
    assert recorded == obstacle
    assert ("installing without the CUDA library" in answer.stderr) == (obstacle != '""')


def test_an_old_setuptools_is_refused(checkout, tmp_path):
    stand_in = "__version__ = '70.2.0'\nExtension = find_packages = setup = None\n"
    (tmp_path / "setuptools.py").write_text(stand_in)
    answer = run(sys.executable, "setup.py", "build_ext", cwd=checkout, PYTHONPATH=tmp_path)
    message = "anchorops: building needs setuptools>=77, found 70.2.0: upgrade it\n"
    assert (answer.returncode, answer.stderr) == (1, message)


@pytest.mark.parametrize(
    ("gpus", "requested", "expected"),
    [
        ([], "", "8.0;9.0;10.0;12.0+PTX"),
        ([(9, 0), (8, 9), (9, 0)], "", "8.9;9.0+PTX"),
        ([(7, 5), (8, 6)], "", "8.6+PTX"),  # no code for the older GPU
        ([(10, 3)], "", "10.0+PTX"),  # newer than this nvcc
        ([(7, 5)], "7.5 8.0 9.0+PTX", "8.0;9.0+PTX"),
    ],
)
def test_architectures(toolkit, gpus, requested, expected):
    torch = FAKE_TORCH.format(version="2.12.0", cuda="12.9", gpus=gpus)
    answer = toolkit(torch, TORCH_CUDA_ARCH_LIST=requested)
    assert answer.stderr.splitlines()[-1] == expected, answer.stderr
    assert ("no CUDA code for 7.5" in answer.stderr) == ((7, 5) in gpus)
