"""Do the tests notice wrong code? Plants each fault of planted_faults.toml in a copy of the
repository in build/faults, and runs the tests that must fail there. Without a fault they must pass.

    python tests/proofs/planted_faults.py [TEXT ...]  (faults whose file or name contains a TEXT)"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import tomllib  # Python 3.11
import torch
import triton.language  # noqa: F401  # once, for the forked processes that run the tests

ROOT = Path(__file__).parents[2]
COPY = ROOT / "build/faults"


def prepare() -> None:
    """A copy of the repository as it is now. Objects that were compiled of these sources stay."""
    same = subprocess.getstatusoutput(f"diff -r '{ROOT}/csrc' '{COPY}/csrc'")[0] == 0
    shutil.rmtree(COPY / "anchorops" if same else COPY, ignore_errors=True)
    left_out = [".*", "__pycache__", "*.so", "build", "site", "dist", "data", "runs"]
    ignored = shutil.ignore_patterns(*left_out, *["csrc"] * same)
    shutil.copytree(ROOT, COPY, symlinks=True, dirs_exist_ok=True, ignore=ignored)
    (COPY / "setup.py").write_text((ROOT / "setup.py").read_text().replace("-O3", "-O1"))  # quick
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=COPY, env=os.environ | {"ANCHOROPS_CUDA": "0"}, check=True)
    shutil.copytree(COPY / "build", COPY / "right", dirs_exist_ok=True)


def compile_changes() -> None:
    """Compile what changed; kernels only for this processor's best instruction set."""
    folder = COPY / "build/objects" / torch.__version__
    best = torch.backends.cpu.get_cpu_capability().lower().replace("default", "baseline")
    others = tuple(f"_{x}.o" for x in {"baseline", "avx2", "avx512"} - {best})
    objects = [str(path) for path in folder.rglob("*.o")]
    made = ["ninja", "-C", folder, *(x for x in objects if not x.endswith(others))]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    linked = [*objects, f"-L{Path(torch.__file__).parent}/lib", "-ltorch_cpu"]
    subprocess.run(["c++", "-shared", *linked, "-o", COPY / "anchorops/_cpu.so"], check=True)


def run_pytest(variables: str, *arguments: str) -> None:
    os.environ |= dict(word.split("=") for word in variables.split()) | {"PYTHONPATH": str(COPY)}
    sys.path.insert(0, str(COPY))
    os.chdir(COPY)
    with (COPY / "output.txt").open("w") as output, contextlib.redirect_stdout(output):
        sys.exit(pytest.main(["-q", *arguments]))


def failures(variables: str, *arguments: str) -> list[str]:
    """The tests that fail, with these variables of the environment, or how the process ends."""
    failed = COPY / ".pytest_cache/v/cache/lastfailed"
    failed.unlink(missing_ok=True)
    process = get_context("fork").Process(target=run_pytest, args=(variables, *arguments))
    process.start()
    process.join(1200)  # seconds: it may never end
    if process.exitcode is None or process.exitcode < 0:
        process.kill()
        return [f"exit status {process.exitcode}"]
    if process.exitcode > 1:
        sys.exit(f"{arguments}: {(COPY / 'output.txt').read_text()[-4000:]}")
    return list(json.loads(failed.read_text())) if process.exitcode else []


if __name__ == "__main__":
    prepare()
    noticed, missed = {}, []
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    for file, name in ((file, name) for file, faults in table.items() for name in faults):
        if not any(text in f"{file} {name}" for text in sys.argv[1:] or [""]):
            continue
        (tests, right, wrong), path, start = table[file][name], COPY / file, time.monotonic()
        source, times = path.read_text(), path.stat()
        assert source.count(right) == 1, f"{file}, {name}: {right!r} does not occur once"
        path.write_text(source.replace(right, wrong))
        compile_changes()
        variables, test, others = tests.partition("test_")
        failed = failures(variables, "-x", *shlex.split(f"tests/{test}{others}"))
        shutil.copytree(COPY / "right", COPY / "build", dirs_exist_ok=True)  # the objects
        path.write_text(source)
        if "cuda" not in file:  # the machine for PTX compiles what is newer than its objects
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        noticed.setdefault(variables, set()).update(x for x in failed if x.startswith("tests/"))
        missed += [] if failed else [name]
        seconds = f"{time.monotonic() - start:4.0f} s"
        print(seconds, f"{file}, {name}: {failed or 'NOT NOTICED'}", flush=True)
    compile_changes()
    for variables, tests in noticed.items():
        missed += [f"{test} fails without a fault" for test in failures(variables, *sorted(tests))]
    sys.exit(f"not noticed: {', '.join(missed)}" if missed else 0)
