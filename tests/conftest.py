"""The backends of the cases, and what the memory and the kernels of a case need.

A test that takes `backend` runs in each place of its process. Usual processes have `reference` and
`cpu`, and `cuda` and `triton` where a case is marked for a GPU. With PTX_ARCH the kernels of one
backend of GPUs run without a GPU, on CPU tensors (helpers/simulated_gpu.py): the place is
`simulated_triton` or `simulated_cuda`. Such a process runs the tests that take `backend`, and no
others.

The mark on("cpu", "simulated_triton", …) limits a case, or the cases of a module that have no mark
of their own. "gpu" stands for both backends of a GPU, "cuda" and "triton" for one of them. Without
the mark, a case runs everywhere but on a GPU.
"""

import contextlib
import ctypes
from collections.abc import Iterator

import pytest
import torch

from tests.helpers.own_places import ROOT, Untouched, move_home
from tests.helpers.simulated_gpu import BACKEND, PTX_ARCH, SIMULATED

# isort: split
import anchorops as ao  # after simulated_gpu: it asks once where Triton's kernels run

M_PERTURB = -6  # glibc's <malloc.h>
GPU = ("cuda", "triton")
ON_A_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in GPU]
PLACES = {"triton": ["simulated_triton"], "cuda": ["simulated_cuda"]}.get(
    BACKEND, ["reference", "cpu", *ON_A_GPU]
)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist inherit the variables
        config.pluginmanager.register(Untouched(ROOT))
        move_home(config)
    if PTX_ARCH is not None:
        from ptx import report

        config.pluginmanager.register(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tables that tests have recorded as properties."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "table":
                terminalreporter.write_line(f"{report.nodeid}\n{value}")


def _is_chosen(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    place = callspec.params.get("backend") if callspec else None
    if place is None or (SIMULATED and place not in PLACES):
        return not SIMULATED
    names = {place, "gpu"} if place in GPU else {place}
    item_marks = [mark for mark in item.own_markers if mark.name == "on"]
    marks = item_marks or list(item.iter_markers("on"))  # of the module
    return all(names & set(mark.args) for mark in marks) if marks else place not in GPU


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = {item: _is_chosen(item) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not chosen[item]])
    items[:] = [item for item in items if chosen[item]]


@pytest.fixture(params=PLACES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend, which is chosen. On a GPU, tensors are created there."""
    name = BACKEND or request.param
    reason = ao.backends()[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    device = torch.device("cuda") if request.param in GPU else contextlib.nullcontext()
    with ao.use_backend(name), device:
        yield name


@pytest.fixture(scope="session", autouse=True)
def own_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("current-directory"))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=SIMULATED)
def poisoned() -> Iterator[None]:
    """Uninitialised tensors of torch contain NaN, or the largest integers, so that a test fails if
    a result was not written. In usual processes, other new memory has the bytes 0x7f (as float32
    3e38)."""
    libc = None if SIMULATED else ctypes.CDLL(None)
    if libc is not None:
        if not hasattr(libc, "mallopt"):
            pytest.skip("poisoned memory needs glibc's mallopt")
        libc.mallopt(M_PERTURB, 0x7F ^ 0xFF)
        assert (torch.empty(4096, dtype=torch.uint8, device="cpu") == 0x7F).all()
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    if libc is not None:
        libc.mallopt(M_PERTURB, 0)


@pytest.fixture
def set_order():
    """The order in which warps run in the PTX machine: a seed, or 0 for the usual one. Elsewhere it
    cannot be chosen."""
    if PTX_ARCH is not None:
        from ptx import triton_launches

        def set_order(seed: int) -> None:
            triton_launches.seed = seed or None
    else:

        def set_order(seed: int) -> None:
            pass

    yield set_order
    set_order(0)
