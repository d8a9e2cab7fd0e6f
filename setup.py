"""Compiles anchorops/_cpu.so (C++) and anchorops/_cuda.so (CUDA), if this machine has compilers.

Both use LibTorch's stable ABI of torch 2.10 and do not link to Python, so one build is for several
versions of both (docs/install.md): the wheel's tag is py3-none-PLATFORM.
Without a C++ compiler the package installs as pure Python. ANCHOROPS_CUDA=0 skips the CUDA library,
ANCHOROPS_CUDA=1 requires it; TORCH_CUDA_ARCH_LIST selects its architectures.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from glob import glob

import setuptools
from setuptools import Extension, find_packages, setup

# version 77 is the first that supports `license = "Apache-2.0"`
if int(setuptools.__version__.split(".")[0]) < 77:
    got = f"found {setuptools.__version__}: upgrade it"
    sys.exit(f"anchorops: building needs setuptools>=77, {got}")

from setuptools.command.bdist_wheel import bdist_wheel

CUDA_CHOICE = os.environ.get("ANCHOROPS_CUDA", "")


def do_without(part: str, obstacle: object) -> None:
    if CUDA_CHOICE == "1":
        sys.exit(f"anchorops: ANCHOROPS_CUDA=1 requires the CUDA library, but {obstacle}")
    print(f"anchorops: installing without the {part}: {obstacle}", file=sys.stderr)


def compiler_obstacle() -> str | None:
    """Why C++20 cannot be compiled here, or None."""
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    command = shlex.split(os.environ.setdefault("CXX", compiler))
    command += ["-std=c++20", "-fsyntax-only", "-xc++", "-"]
    source = "#include <concepts>\n"
    try:
        probe = subprocess.run(command, input=source, text=True, capture_output=True)
    except OSError as error:
        return str(error)
    return (probe.stderr.strip() or shlex.join(command)) if probe.returncode else None


def installed_torch():
    # pip's isolated build hides the installed torch, which the extension will be loaded into
    sys.path.append(sysconfig.get_path("purelib"))
    try:
        import torch
    except ImportError as error:
        sys.exit(f"anchorops: {error}: install torch, or allow build isolation")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        sys.exit(f"anchorops: compiling needs torch>=2.10, found {torch.__version__}: upgrade it")
    return torch


def architectures(torch, nvcc: str) -> str:
    """Those of TORCH_CUDA_ARCH_LIST, or of the GPUs that torch sees, as far as nvcc knows them. The
    library records them, and is not called on other GPUs. Those before 8.0 have no asynchronous
    copies and no sums of a warp by one instruction, so they are left out. Raises LookupError if
    none remains."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if requested:
        if not re.fullmatch(r"(\d+\.\d[af]?(\+PTX)?[; ]*)+", requested):
            sys.exit(
                f"anchorops: TORCH_CUDA_ARCH_LIST must look like 8.0;9.0+PTX, not {requested!r}"
            )
        archs = re.findall(r"[\w.]+(?:\+PTX)?", requested)
    else:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], text=True, capture_output=True).stdout
        known = [(int(x), int(y)) for x, y in re.findall(r"compute_(\d+)(\d)\b", listed)]
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        # Without a GPU, the code is compiled for all GPUs. Code for 8.0 also runs on 8.6 and 8.9:
        # code for these would only be scheduled differently, and compiling would take 50 % longer.
        wanted = gpus or {(8, 0), (9, 0), (10, 0), (12, 0)}
        # GPUs that are too new for nvcc compile the PTX of the newest that it knows
        targets = {max((x for x in known if x <= gpu), default=gpu) for gpu in wanted}
        archs = [f"{major}.{minor}" for major, minor in sorted(targets)]
        archs[-1] += "+PTX"
    older = [arch for arch in archs if int(arch.partition(".")[0]) < 8]
    if older == archs:
        names = ", ".join(older)
        raise LookupError(f"it needs a GPU of compute capability 8.0 or later, found {names}")
    if older:
        print(f"anchorops: no CUDA code for {', '.join(older)}: it needs 8.0", file=sys.stderr)
    return ";".join(arch for arch in archs if arch not in older)


def cuda_toolkit(torch) -> tuple[str, str]:
    """nvcc's version and the architectures. Raises LookupError if CUDA cannot be compiled."""
    if torch.version.cuda is None:
        what = f"torch {torch.__version__} is a build without CUDA: install a CUDA build"
        raise LookupError(what)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        plan = subprocess.run(command, text=True, capture_output=True).stderr
    except OSError as error:
        raise LookupError(f"nvcc was not found ({error}): install it or set CUDA_HOME") from None
    top = re.search(r"TOP=(.*)", plan)
    release = re.search(r"VER_MAJOR__=(\d+).*?MINOR__=(\d+)", plan)
    if not top or not release:
        raise LookupError(f"{nvcc} does not work: {plan.strip()}")
    version = f"{release[1]}.{release[2]}"
    if release[1] != torch.version.cuda.split(".")[0]:
        raise LookupError(
            f"nvcc is of CUDA {version}, torch {torch.__version__} of CUDA {torch.version.cuda}: "
            "install a toolkit of torch's major version and set CUDA_HOME to it"
        )
    if refusal := compiler_refusal(nvcc):
        raise LookupError(
            f"nvcc cannot use this machine's C++ compiler ({refusal}): install one that CUDA "
            f"{version} supports, and name it with NVCC_CCBIN"
        )
    # torch looks for the toolkit near nvcc, but nvcc may be a wrapper in another directory
    os.environ["CUDA_HOME"] = os.path.normpath(top[1])

    archs = os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(torch, nvcc)
    return version, archs


def compiler_refusal(nvcc: str) -> str | None:
    """nvcc's first error on an empty program, or None. torch gives nvcc the compiler of CC."""
    command = [nvcc, "-std=c++20", "-include", "concepts", "-x", "cu", "-c", os.devnull]
    command += ["-o", os.devnull]
    if compiler := os.environ.get("CC"):
        command += ["-ccbin", compiler]
    probe = subprocess.run(command, text=True, capture_output=True)
    if not probe.returncode:
        return None
    lines = (probe.stderr + probe.stdout).strip().splitlines() or [shlex.join(command)]
    return next((line for line in lines if re.search("error|fatal", line, re.I)), lines[0]).strip()


def compiled_parts() -> dict:
    """The arguments of setup() for everything that can be compiled here."""
    if CUDA_CHOICE not in ("", "0", "1"):
        sys.exit(f"anchorops: ANCHOROPS_CUDA must be 0 (skip) or 1 (require), not {CUDA_CHOICE!r}")
    if obstacle := compiler_obstacle():
        do_without("compiled backends", f"no C++20 compiler: {obstacle}")
        return {}
    torch = installed_torch()
    cuda_sources = sorted(glob("csrc/cuda/**/*.cu", recursive=True))
    cuda = archs = missing = ""
    try:
        if CUDA_CHOICE == "1" and not cuda_sources:
            raise LookupError("this release has no CUDA sources (csrc/cuda/**/*.cu)")
        if CUDA_CHOICE != "0" and cuda_sources:
            cuda, archs = cuda_toolkit(torch)
    except LookupError as obstacle:
        do_without("CUDA library", obstacle)
        # it becomes a string of C and of JSON, and passes through ninja and a shell
        missing = re.sub(r'["\\$`]|[^ -~]', "'", str(obstacle))

    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    def extension(name: str, sources: list[str], device: str, libraries: list[str]) -> Extension:
        flags = {
            "cxx": ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden"],
            "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"],
        }
        return Extension(
            name,
            sources,
            include_dirs=include_paths(device),
            library_dirs=library_paths(device),
            libraries=libraries,
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000ULL")],  # 2.10
            extra_compile_args=flags,  # pyright: ignore[reportArgumentType]
            language="c++",
        )

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # The objects are kept, which an editable install would delete: then only what changed
            # is compiled again. Those of each torch lie apart, because its headers may be older
            # than objects of another.
            self.build_temp = os.path.join("build", "objects", torch.__version__)

        def build_extensions(self):
            info = {"VERSION": self.distribution.get_version(), "CUDA": cuda, "CUDA_ARCHS": archs}
            info |= {"CUDA_CHOICE": CUDA_CHOICE, "CUDA_OBSTACLE": missing}
            macros = [(f"ANCHOROPS_{key}", f'"{value}"') for key, value in info.items()]
            self.extensions[0].define_macros += macros
            start = time.monotonic()
            super().build_extensions()
            seconds = time.monotonic() - start
            print(f"anchorops: compiled in {seconds:.0f} seconds", file=sys.stderr)

        def get_ext_filename(self, ext_name):
            # torch.ops.load_library opens these files: their names contain no version of Python
            return re.sub(r"(_cpu|_cuda)\..*", r"\1.so", super().get_ext_filename(ext_name))

    class Wheel(bdist_wheel):
        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    cpp_sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    ext_modules = [extension("anchorops._cpu", cpp_sources, "cpu", ["torch_cpu"])]
    if cuda:
        libraries = ["torch_cpu", "torch_cuda", "cudart"]
        ext_modules.append(extension("anchorops._cuda", cuda_sources, "cuda", libraries))
    return {"ext_modules": ext_modules, "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}


# the wheel contains the sources too, because debuggers and profilers show them
parts = {"anchorops.kernels": "kernels", "anchorops.csrc": "csrc"}
describing = {"egg_info", "dist_info", "sdist"} & {*sys.argv}
setup(
    packages=sorted({*find_packages(include=["anchorops", "anchorops.*"]), *parts}),
    package_dir=parts,
    package_data={
        "": ["*.pyi", "py.typed"],
        "anchorops.csrc": ["**/*"],
        "anchorops.train": ["presets/*.yaml"],
    },
    include_package_data=False,
    **({} if describing else compiled_parts()),
)
