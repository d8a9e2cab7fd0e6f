"""The suite does not touch what the user has, and notices if a test does."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import own_places
from tests.helpers.own_places import ROOT, Untouched


def test_directory_home_and_caches() -> None:
    for place in (Path.cwd(), Path.home()):
        assert place != ROOT and ROOT not in place.parents, place
    assert all(ROOT / "build" in Path(os.environ[x]).parents for x in own_places.VARIABLES)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("runs/demo/best.ckpt", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of the user")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "change", "git"),
    [
        ("runs/demo/best.ckpt", lambda path: path.write_text("of a test"), True),
        ("runs/demo/best.ckpt", lambda path: path.write_text("of a test"), False),
        ("predictions", Path.mkdir, True),
        ("README.md", Path.unlink, True),
        ("", Path.stat, True),
    ],
)
def test_changes_are_noticed(
    name: str,
    change: Callable[[Path], Any],
    git: bool,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if git:
        for command in (["init", "-q"], ["add", "README.md"]):
            subprocess.run(["git", "-C", checkout, *command], check=True)
    else:
        monkeypatch.setenv("PATH", str(checkout))
    untouched = Untouched(checkout)
    session: Any = SimpleNamespace(exitstatus=0)
    change(checkout / name)
    untouched.pytest_sessionfinish(session)
    assert untouched.changed == ([name] if name else [])
    assert session.exitstatus == bool(name)
