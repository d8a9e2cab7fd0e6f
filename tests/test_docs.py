"""The README and docs/ are correct: snippets run, commands parse, links and files exist, quoted
messages are in the sources, the tables of the evidence are those of its rows."""

import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from anchorops.losses import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(language: str) -> list:
    params = []
    for page in PAGES:
        for i, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)):
            params.append(pytest.param(text, id=f"{page.stem}-{i}"))
    return params


def commands() -> list:
    lines = []
    for block in blocks("sh"):
        (text,) = block.values
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                lines.append(pytest.param(words, id=f"{block.id}: {shlex.join(words)}"))
    return lines


@pytest.mark.parametrize("snippet", blocks("python"))
def test_snippet_runs(snippet: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for package in re.findall(r"^(?:import|from) (\w+)", snippet, re.M):
        pytest.importorskip(package, reason="it is not installed")
    torchrun = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)  # some write a file
    exec(compile(snippet, "snippet", "exec"), {})


@pytest.mark.parametrize("words", commands())
def test_command_parses(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys, pytestconfig: pytest.Config
):
    exported = words[0] == "export"
    words = words[exported:]
    while words and "=" in words[0]:
        variable, words = words[0].partition("=")[0], words[1:]
        of_tools = ("ATEN_CPU_CAPABILITY", "PTX_ARCH", "PTX_BACKEND")
        assert variable in sources() or variable in of_tools
    if exported:
        assert not words
        return
    program, *rest = words[words[0] == "srun" :]
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif program == "pip":
        check_pip(rest)
    elif program == "anchorops-train":
        check_train(rest, monkeypatch)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        assert options.module and options.training_script == "anchorops.train"
        check_train(options.training_script_args, monkeypatch)
    elif program == "anchorops-doctor":
        from anchorops.doctor import __main__ as doctor

        check_options(rest, lambda: doctor.main(["--help"]), capsys)
    elif program == "pytest":
        check_pytest(rest, pytestconfig)
    elif program == "python":
        script = ROOT / rest[0]
        monkeypatch.setattr(sys, "argv", [str(script), "--help"])
        monkeypatch.syspath_prepend(str(script.parent))  # as python does
        if any(word.startswith("-") for word in rest):
            with mock.patch.dict(os.environ):  # which some scripts set for themselves
                check_options(
                    rest, lambda: runpy.run_path(str(script), run_name="__main__"), capsys
                )
        assert script.is_file() and all((ROOT / w).exists() for w in rest if w.endswith(".json"))
    else:
        script = ROOT / program
        assert os.access(script, os.X_OK), f"what is {program}?"
        assert all(w in script.read_text() for w in rest if w.startswith("--"))


def check_options(words: list[str], show_help, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        show_help()
    assert end.value.code == 0
    known = capsys.readouterr().out
    assert all(word in known for word in words if word.startswith("-"))


def check_pip(words: list[str]) -> None:
    assert words[0] == "install" and "-e" in words
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"\[(.*?)\]", words[-1]):
        assert all(re.search(rf"^{extra} = ", project, re.M) for extra in extras.split(","))


def check_train(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The training program parses its arguments to the end; nothing is trained."""
    pytest.importorskip("jsonargparse", reason="the packages for training are not installed")
    from anchorops.train import commands
    from anchorops.train.networks import build_regularizer

    command, *rest = words[words[0] == "--" :]
    if command in ("demo", "compare", "presets"):
        with monkeypatch.context() as patched:
            for name in ("train", "comparison"):
                patched.setattr(commands, name, lambda *_, **__: "")
            assert commands.main([command, *rest]) == 0
    elif rest == ["--help"]:
        with pytest.raises(SystemExit, match=r"^0$"):
            commands.main([command, *rest])
    else:  # of a run that is not there
        monkeypatch.setattr(commands, "CONFIG", commands.PRESETS / "folder.yaml")
        options = commands.parse(command, rest)[0].model
        build_regularizer(options, 19, 64)


def check_pytest(words: list[str], config: pytest.Config) -> None:
    assert (ROOT / words[0]).exists()
    for option in (word for word in words if word.startswith("--")):
        config.getoption(option)


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as on GitHub."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not heading or heading in anchors(linked), target


def test_every_example_is_linked():
    linked = set(re.findall(r"\]\((\w+\.\w+)\)", (ROOT / "examples/README.md").read_text()))
    examples = {
        path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")
    }
    assert len(examples) > 10 and examples <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path):
    known = ("anchorops/", "csrc/", "kernels/", "tests/", "bench/", "examples/")
    for name in re.findall(r"`([\w./]+)`", page.read_text()):
        if name.startswith(known) and "NAME" not in name:
            assert (ROOT / name).exists(), name


def test_functions_in_the_drawing_exist():
    """Each box of docs/call.svg: a function, and its file."""
    texts = r"<text [^>]*>(\w+)[^<]*</text>\s*<text class=\"file\"[^>]*>([^<]*)</text>"
    boxes = re.findall(texts, (ROOT / "docs/call.svg").read_text())
    in_files = [(name, text.split()[-1]) for name, text in boxes if "/" in text]
    assert len(in_files) == 9
    for name, file in in_files:
        source = (ROOT / file).read_text()
        assert name in source or file == "anchorops/_ops/registration.py", (name, file)


@cache
def sources() -> str:
    """All sources; strings on several lines are joined."""
    files = [ROOT / "setup.py", *(ROOT / "anchorops").rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))


def quoted_messages() -> list[str]:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 10
    return messages


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_message_is_in_the_sources(message: str):
    # … stands for the values in an f-string; a colon may join the messages of two functions
    for piece in re.split("…|: ", message):
        assert piece.strip(" :") in sources(), piece


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_argument_is_explained(method: type):
    for argument in inspect.signature(method).parameters:
        assert re.search(rf"\b{argument}\b", method.__doc__ or ""), argument


def test_evidence_is_that_of_the_rows():
    pytest.importorskip("jsonargparse", reason="the packages for training are not installed")
    evidence = json.loads((ROOT / "docs/evidence.json").read_text())
    page = importlib.import_module("trainings.report").page(evidence)
    assert (ROOT / "docs/evidence.md").read_text() == page


def test_tables_of_the_cost_are_those_of_the_rows():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    cost_tables = importlib.import_module("cost_tables")
    pages = [page.read_text() for page in cost_tables.PAGES]
    names = re.findall(r"<!-- rows: (\w+) -->", "".join(pages))
    assert sorted(names) == sorted(cost_tables.TABLES) == sorted(set(names))
    assert "".join(pages).count("<!-- end of rows -->") == len(names)
    for page in pages:
        assert page == cost_tables.with_tables(page), "python bench/cost_tables.py writes them"
        assert not list(cost_tables.missing_figures(page))


def test_versions_that_were_tested():
    """One list of versions; no page speaks of all later ones."""
    page = (ROOT / "docs/install.md").read_text()
    listed = re.findall(r"^(?:ABI_TORCHES|TORCH) \?= (.*)", (ROOT / "Makefile").read_text(), re.M)
    for *others, last in map(str.split, listed):
        assert f"torch {', '.join(others)} and {last} |" in page
    for name, link in (("README.md", "docs/install.md"), ("docs/install.md", "")):
        assert f"({link}#what-was-tested)" in (ROOT / name).read_text()
    versions = " ".join(listed).split()
    newest = max(tuple(map(int, name.split("."))) for name in versions)
    assert f"\ntorch<{newest[0]}.{newest[1] + 1}\n" in (ROOT / "constraints.txt").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        claims = re.findall(
            r"every (?:later )?version of (?:PyTorch|torch|Python)", path.read_text()
        )
        assert not claims, (path, claims)
