"""Every kernel of the CUDA library, and every kernel of Triton, is launched by the small samples of
the catalogue and those of kernels, whose results are compared with torch's formulas. `-rP` prints
the kernels with their cases."""

from functools import partial

import pytest
import torch

import anchorops as ao
from anchorops._backend import NOT_AUTO, OPERATORS
from anchorops.doctor.catalogue import ENTRIES, Case, Sample, cases
from anchorops.doctor.catalogue.features import Features
from anchorops.doctor.verify import run
from tests.helpers.launches import kernels_of, launched_by

pytestmark = pytest.mark.on("simulated_triton", "simulated_cuda", "gpu")
SEVERAL_RANGES = Features(3, (2, 20, 320), ratio=1)
SORTED = Sample("class moments, sorted", SEVERAL_RANGES, {"num_classes": 3})


def is_right(case: Case, backend: str) -> None:
    row = run(case, backend, torch.get_default_device())
    assert row.right, str(row)


def sorted_pixels(backend: str) -> None:
    """As with many keys: ranges of pixels that are sorted by key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anchorops.kernels.class_moments.chunks_of", lambda *_: 0)
        is_right(Case(ENTRIES["class_moments"], SORTED), backend)


def test_every_kernel_is_launched(backend: str):
    chosen = [
        case
        for case in (*cases("small"), *cases("kernels"))
        if backend in case.entry.backends
        and "cpu" not in case.sample.tags
        and (backend == "cuda" or "cuda" not in case.sample.tags)
    ]
    calls = {str(case): partial(is_right, case, backend) for case in chosen}
    if backend == "triton":
        calls[SORTED.name] = partial(sorted_pixels, backend)
    cases_of: dict[str, list[str]] = {}
    for name, call in calls.items():
        for kernel in launched_by(call, backend):
            cases_of.setdefault(kernel, []).append(name)
    for kernel, names in sorted(cases_of.items()):
        print(f"{kernel}: {names[0]}" + f", and {len(names) - 1} more" * (len(names) > 1))
    assert cases_of, "no launch was noticed"
    assert cases_of.keys() == kernels_of(backend)


@pytest.mark.on("simulated_triton")
def test_where_kernels_do_not_compile(backend: str, monkeypatch):
    """The exception of each operator has a note whose line takes it out of "auto"."""
    from ptx.triton_launches import _Driver
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", _Driver(86))  # nothing has been compiled for it
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")  # as on a full disk
    own = {case.entry.operators: case for case in cases("all") if "cpu" not in case.sample.tags}
    for name in (name for name, backends in OPERATORS.items() if backend in backends):
        case = own[name,]
        with pytest.raises(NotADirectoryError) as raised:
            case.ours(**case.sample.inputs())
        (note,) = vars(raised.value)["__notes__"]
        _, _, line = note.partition(f"export {NOT_AUTO}=")
        assert f"triton:{name}" in line.split(","), note


@pytest.mark.on("simulated_triton", "triton")
def test_volumes_launch_the_kernels_images(backend: str):
    """Volumes launch the kernels that images launch, forward and backward."""

    def cross_entropy(*size: int) -> None:
        logits, label_size = torch.randn(size, requires_grad=True), [4 * n for n in size[2:]]
        ao.pixel_cross_entropy(logits, torch.randint(0, 7, (size[0], *label_size))).backward()

    images = launched_by(lambda: cross_entropy(2, 7, 3, 5), backend)
    assert launched_by(lambda: cross_entropy(2, 7, 2, 3, 5), backend) == images != set()
