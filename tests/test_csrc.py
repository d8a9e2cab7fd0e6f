"""What the sources of csrc/ say, without running them: includes, targets, names of arguments."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from anchorops._libraries import CPU_LIBRARY

CSRC = Path(__file__).parents[1] / "csrc"
HEADERS = sorted([*CSRC.glob("*.h"), *(CSRC / "cpu").glob("*.h")])
SOURCES = {str(path.relative_to(CSRC)): path.read_text() for path in CSRC.rglob("*.c[pu]*")}
SHORTEST_AND_LONGEST = (16, 64) if platform.machine() == "x86_64" else (16,)
OPERATORS = [
    pytest.param(source, *operator, id=operator[0])
    for source, text in SOURCES.items()
    for operator in re.findall(r'impl\("(\w+\.\w+)",\s*TORCH_BOX\(&([\w:]+)\)', text)
]


def fields(text: str, struct: str) -> list[str]:
    """The names of a struct's data, in its order."""
    (body,) = re.findall(rf"^struct {struct} {{\n(.*?)^}};", text, re.M | re.S)
    lines = re.sub(r"//.*", "", body).split(";")
    return [name.split()[-1] for line in lines if line.split() for name in line.split(",")]


def parameters(text: str, function: str) -> list[str]:
    """Their names; instead of `options` those of Options' fields."""
    (found,) = re.findall(rf"(?:^| ){function}\(\s*(\w[^)]*)\) {{", text, re.M)
    names = [parameter.split()[-1] for parameter in found.split(",")]
    return [*names[:-1], *fields(text, "Options")] if names[-1] == "options" else names


@pytest.mark.parametrize(("source", "operator", "function"), OPERATORS)
def test_arguments_have_the_names_of_the_schema(source: str, operator: str, function: str):
    """Arguments are passed by position: two of one type could be exchanged."""
    name, overload = operator.split(".")
    schema = getattr(getattr(torch.ops.anchorops, name), overload)._schema
    names = parameters(SOURCES[source], function.split("::")[-1])
    assert names == [argument.name for argument in schema.arguments]


def test_every_operator_is_compared():
    assert len(OPERATORS) == sum(text.count(".impl(") for text in SOURCES.values())


def test_results_have_the_names_of_the_schema():
    text = SOURCES["cpu/softmax_moments.cpp"]
    schema = torch.ops.anchorops.softmax_moments.cpu._schema
    returned = re.findall(r"x\.(\w+)", text.split("make_tuple")[1].split(";")[0])
    assert returned == fields(text, "Results") == [result.name for result in schema.returns]


def test_nothing_is_included_under_a_target():
    """It would be compiled for AVX."""
    for header in HEADERS:
        for code in re.findall(r"^BEGIN_TARGET$(.*?)^END_TARGET$", header.read_text(), re.M | re.S):
            assert "#include" not in code, header


@pytest.mark.slow
@pytest.mark.parametrize("vector_bytes", SHORTEST_AND_LONGEST)
def test_headers_include_what_they_use(vector_bytes: int):
    """Each compiles alone, for the shortest vectors and the longest. It is slow: the compiler reads
    the headers of the standard library and of torch as often."""
    from torch.utils.cpp_extension import include_paths

    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("it needs a C++ compiler")
    command = [compiler, "-fsyntax-only", "-std=c++20", "-xc++", "-"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-DVECTOR_BYTES={vector_bytes}"]
    command += [x for path in include_paths("cpu") for x in ("-isystem", path)]
    under_a_target = [path for path in HEADERS if "BEGIN_TARGET" in path.read_text()]
    assert under_a_target
    for header in HEADERS if vector_bytes == 16 else under_a_target:
        source = f'#include "{header}"\n'
        run = subprocess.run(command, input=source, text=True, capture_output=True)
        assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not CPU_LIBRARY.exists(), reason="nothing was compiled")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="it needs objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX is of x86-64")
def test_only_kernels_are_compiled_for_avx():
    """What headers define is linked once, and portable code calls it too."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(CPU_LIBRARY)]
    listing = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    functions = re.findall(r"^\w+ <(.*)>:\n((?:.+\n)*)", listing, re.M)
    uses_avx = {name for name, code in functions if re.search(r"\t *v[a-z]|%[yz]mm", code)}
    kernels = {name for name, _ in functions if re.search("4avx2|6avx512", name)}
    assert uses_avx & kernels
    assert uses_avx - kernels == set()
