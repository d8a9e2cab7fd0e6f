"""Tests leave alone what the user has: they have a current directory, a home and caches of their
own, and the suite fails if it changed the checkout."""

import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OF_USERS = ("runs", "data", "predictions")  # directories of what was trained, downloaded, predicted
CACHES = ROOT / "build/test-caches"  # kept, because compiled kernels are of use to the next suite
VARIABLES = (
    *("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "MPLCONFIGDIR"),
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
)


def move_home(config: pytest.Config) -> None:
    """Until pytest ends, HOME is an empty directory. Called before tests import libraries, some of
    which ask for it once."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    home = tempfile.TemporaryDirectory(prefix="anchorops-home-", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    patch.setenv("HOME", home.name)
    for name in VARIABLES:
        patch.setenv(name, str(CACHES / name.lower()))


class Untouched:
    """A plugin: the suite fails if tracked files of a checkout changed, or what its user made. Git,
    if it is there, is asked once which files are tracked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        command = ["git", "-C", str(root), "ls-files", "-z"]
        try:
            listed = subprocess.run(command, capture_output=True, text=True).stdout
        except FileNotFoundError:
            listed = ""
        self.tracked = [root / name for name in listed.split("\0") if name]
        self.before = self._seen()
        self.changed: list[str] = []

    def _seen(self) -> dict[Path, tuple[int, int]]:
        """Sizes and times of the files that exist."""
        folders = [self.root / name for name in OF_USERS]
        found = folders + [path for folder in folders for path in folder.rglob("*")]
        states = {path: path.lstat() for path in self.tracked + found if path.exists()}
        return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        after = self._seen()
        different = {path for path, _ in self.before.items() ^ after.items()}
        self.changed = sorted(str(path.relative_to(self.root)) for path in different)
        if self.changed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.changed:
            terminalreporter.section("The tests changed files of the checkout", red=True)
            terminalreporter.write_line("(unless another program did it meanwhile)")
            for name in self.changed:
                terminalreporter.write_line(name)
