"""Triton's launchers as implementations of operators."""

import contextlib
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._libraries import TRITON_ON_HOST

_logger = logging.getLogger("anchorops")
_launched: set[str] = set()  # operators of triton, in this process


@contextlib.contextmanager
def compiling(operator: str, patience: float = 1.0) -> Iterator[None]:
    """Logs one line if the operator's first launch takes longer than `patience` seconds: then
    Triton compiles its kernels, and the program looks as if it hung."""
    if operator in _launched:
        yield
        return
    _launched.add(operator)
    from triton import knobs

    message = "Triton compiles the kernels of %s, which takes seconds, and stores them in %s"
    timer = threading.Timer(patience, _logger.warning, (message, operator, knobs.cache.dir))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def implement_by_triton(
    library: torch.library.Library, operator: str, call: Callable[..., Any]
) -> None:
    """Implement `operator`.triton by `call`, of the function `operator` of
    anchorops.kernels.`operator` and the arguments. The first call imports this module, and Triton
    with it."""
    kernel: Callable[..., Any] | None = None

    def launch(*args: Any) -> Any:
        nonlocal kernel
        if kernel is None:
            kernel = getattr(importlib.import_module(f"anchorops.kernels.{operator}"), operator)
        tensor = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device
            if operator in _launched:
                return call(kernel, *args)
            with compiling(operator):
                return call(kernel, *args)

    library.impl(f"{operator}.triton", launch, "CUDA")
    if TRITON_ON_HOST:
        _launched.add(operator)  # tests compile all the time
        library.impl(f"{operator}.triton", launch, "CPU")
