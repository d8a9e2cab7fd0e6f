"""Modules whose state needs values: `to_empty()` leaves whatever the memory contains."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getmembers, signature
from typing import Any

from torch import Tensor, nn

from .._checks import fail


class InitializedModule(nn.Module):
    """A module that raises an error after `to_empty()`, until a checkpoint with all its state is
    loaded."""

    _emptied = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        # torch.jit.script compiles the others, also of a module that the model does not call.
        properties = getmembers(cls, lambda member: isinstance(member, property))
        cls.__jit_unused_properties__ = [name for name, _ in properties]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `_apply` alone is called for the modules inside the one whose `to_empty` was called.
        if getattr(fn, "__qualname__", "").startswith("Module.to_empty."):
            self._emptied = True
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._emptied:
            self._emptied = any(f"{prefix}{key}" not in state_dict for key in self.state_dict())

    def extra_repr(self) -> str:
        """The arguments of the constructors that became attributes, except tensors and modules."""
        signatures = (signature(kind.__init__) for kind in type(self).__mro__)
        names = dict.fromkeys(name for one in signatures for name in one.parameters)
        shown = {name: vars(self)[name] for name in names if name in vars(self)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def check_initialized(self) -> None:
        """Raise ValueError if the state has no values."""
        if self._emptied:
            expected = (
                "values: load a checkpoint of all its state with load_state_dict, or build and "
                "attach it after to_empty()"
            )
            fail(type(self).__name__, "state", expected, "memory that to_empty() has not filled")
