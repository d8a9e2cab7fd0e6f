"""Public names: those that have moved warn, and no function hides a module."""

import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import anchorops as ao

MOVED = [(module, name) for module in (ao.ops, ao.anchors) for name in module.__all__]


@pytest.mark.parametrize(("module", "name"), MOVED, ids=[name for _, name in MOVED])
def test_old_names_warn(module: ModuleType, name: str) -> None:
    message = f"^anchorops.{name} is removed in version 0.2; use {module.__name__}.{name}$"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        found = getattr(ao, name)
    assert found is getattr(module, name)
    assert caught[0].filename == __file__
    assert name not in ao.__all__


def test_old_names_compile() -> None:
    features, labels = torch.randn(8, 3), torch.arange(8) % 2

    @torch.compile(fullgraph=True, backend="eager")
    def sums() -> torch.Tensor:
        return ao.class_moments(features, labels, 2).sums  # type: ignore[attr-defined]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = sums()
    assert torch.equal(found, ao.ops.class_moments(features, labels, 2).sums)


def test_present_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(getattr(ao, name) for name in ao.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ao.nothing  # type: ignore[attr-defined]


def test_no_function_hides_a_module() -> None:
    modules = {path.stem for path in Path(ao.__file__).parent.iterdir()}
    assert "_attach" in modules and not modules & set(ao.__all__)
