"""What values options may have. Types are checked by the command line."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Expected(NamedTuple):
    """A constraint on the value of an option, except None."""

    text: str
    holds: Callable[[Any], bool]


AT_LEAST_0 = Expected("a finite number, at least 0", lambda x: 0 <= x < math.inf)
AT_LEAST_1 = Expected("at least 1", lambda x: x >= 1)
ABOVE_0 = Expected("a finite number above 0", lambda x: 0 < x < math.inf)
SHARE = Expected("a share above 0, at most 1", lambda x: 0 < x <= 1)
SHARE_BELOW_1 = Expected("a share below 1", lambda x: 0 <= x < 1)


def check_values(
    section: str, options: Mapping[str, Any], expected: Mapping[str, Expected]
) -> None:
    """Raises ValueError for an option of the section ("model" or "data") with a wrong value."""
    for name, (text, holds) in expected.items():
        if options[name] is not None and not holds(options[name]):
            raise ValueError(f"--{section}.{name}: expected {text}, got {options[name]}")


class With(NamedTuple):
    """An option that has an effect only where another one has one of these values, or any but None
    and 0. Elsewhere it would be ignored without a word, so it must have its default."""

    option: str
    values: tuple[str, ...] = ()


def check_effects(
    section: str,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    needed: Mapping[str, With],
) -> None:
    """Raises ValueError for an option that would have no effect."""
    for name, (other, values) in needed.items():
        has_effect = options[other] in values if values else options[other]
        if not has_effect and options[name] != defaults[name]:
            expected = f"--{section}.{other} {' or '.join(values)}".rstrip()
            raise ValueError(
                f"--{section}.{name}: expected {expected} with it, got {options[other]}"
            )
