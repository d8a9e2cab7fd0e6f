import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# before the training program is imported; it skips this directory
pytest.importorskip("torchvision", reason="the training program needs torchvision")

from anchorops.train.commands import main
from tests.helpers.image_files import image, mask, write
from tests.helpers.tiny_runs import TINY, fitted


@pytest.fixture(autouse=True, scope="session")
def one_thread_that_is_interruptible() -> Iterator[None]:
    """Of the session, because the runs that tests share are trained in it too. Ctrl-C interrupts,
    also if a shell started the tests in the background and ignores it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps without interruptions."""
    return fitted(f"{TINY} --run {tmp_path_factory.mktemp('runs')}/straight")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, images of different sizes in subfolders, JPEG and PNG."""
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/a/1.jpg", image())
        write(tmp_path / f"masks/{split}/a/1.png", mask(0, 1, 255))
        write(tmp_path / f"images/{split}/b.png", image(4, 5))
        write(tmp_path / f"masks/{split}/b.png", mask(1, height=4, width=5))
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    return tmp_path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that fails, and says one line, its last one. Returns all that is said."""

    def run(words: str, message: str) -> str:
        capsys.readouterr()
        assert main(words.split()) == 1
        said = capsys.readouterr().err
        (line,) = re.findall("^anchorops-train: .*", said, re.MULTILINE)
        assert re.search(message, line) and said.endswith(f"{line}\n")
        return said

    return run
