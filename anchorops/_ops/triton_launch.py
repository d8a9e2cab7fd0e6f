"""Operators that Triton implements. A call goes from torch to the implementation of the overload
`triton`, from there to the function that the operator's file names, `launcher(NAME)` or one that
calls it with other arguments, and from there to kernels/NAME.py."""

import contextlib
import importlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor

from .._backend import CALLERS, not_auto_line
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


def _is_of_triton(error: Exception) -> bool:
    """Whether Triton raised it, and not a launcher, which refuses a call, or torch, which has no
    memory left; or whether this Triton lacks something that a file of kernels imports."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    packages = {frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames}
    return "triton" in packages or isinstance(error, ImportError)


def _add_note(error: Exception, operator: str, device: torch.device) -> None:
    """Of what Triton says, nothing names the operator, and how a program runs without its
    kernels."""
    triton = getattr(sys.modules.get("triton"), "__version__", "unknown")
    gpu = str(device)
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        gpu = f"{found.name}, compute capability {found.major}.{found.minor}"
    name = operator.removesuffix("_backward")
    line = not_auto_line(*(("triton", caller) for caller in CALLERS.get(name, (name,))))
    add = getattr(error, "add_note", _logger.error)  # Python 3.10 has no notes
    add(
        f"Triton raised this in {operator} of anchorops (torch {torch.__version__}, Triton "
        f"{triton}, {gpu}). If its kernels do not compile here, this line takes it out of "
        f'"auto": {line}'
    )


def launcher(name: str) -> Callable[..., Any]:
    """The function NAME of kernels/NAME.py. Its first call imports the file, and Triton with it."""
    find = cache(lambda: getattr(importlib.import_module(f"anchorops.kernels.{name}"), name))
    return lambda *args: find()(*args)


def implement_by_triton(
    library: torch.library.Library, operator: str, launch: Callable[..., Any]
) -> None:
    """Implement `operator`.triton by `launch`, on the device of the first tensor."""

    def implementation(*args: Any) -> Any:
        tensor = next(x for x in args if isinstance(x, Tensor))
        try:
            with torch.cuda.device_of(tensor):  # Triton launches on the current device
                if operator in _launched:
                    return launch(*args)
                with compiling(operator):
                    return launch(*args)
        except Exception as error:
            if _is_of_triton(error):
                _add_note(error, operator, tensor.device)
            raise

    library.impl(f"{operator}.triton", implementation, "CUDA")
    if TRITON_ON_HOST:
        _launched.add(operator)  # tests compile all the time
        library.impl(f"{operator}.triton", implementation, "CPU")
