"""Cases of about a second, of which `make test` runs a few, and `make proofs` all."""

from collections.abc import Mapping
from typing import Any

import pytest


def slow_but(*few: str, of: Mapping[str, object]) -> list[Any]:
    """All cases by name; those that are not among the few are slow."""
    return [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (name not in few))
        for name, case in of.items()
    ]
