"""Data workers that end when the training process no longer needs them."""

import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from multiprocessing import forkserver, parent_process, resource_tracker
from traceback import clear_frames
from typing import Any

from torch.utils.data import DataLoader

from .signals import STOPPING

# modules that workers need; importing torch takes seconds; "__main__" is multiprocessing's default
PRELOADED = ["__main__", f"{__package__}.loop"]


@contextmanager
def batches_of(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """The loader's batches. Its workers always end with the block. Otherwise multiprocessing would
    send SIGTERM at exit, and wait forever for processes that do not handle it.

    Raises ValueError in the block if a worker is killed.
    """
    if loader.num_workers:
        _start_server()
    with closing(_only_owner(loader)) as batches:
        yield _or_why_not(batches) if loader.num_workers else batches


def _only_owner(loader: DataLoader) -> Generator[Any, None, None]:
    """The loader's iterator, with no other reference to it: torch ends the workers when the
    iterator is garbage collected. The loader must not have persistent workers, because then it
    refers to the iterator itself."""
    try:
        yield from loader
    except BaseException as error:
        clear_frames(error.__traceback__)  # those of torch refer to the iterator
        raise


def _or_why_not(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        message = str(error)
        if message.startswith("Caught "):  # the data set's own, from the worker
            raise
        cut = isinstance(error, ConnectionError | EOFError)
        if not (cut or "exited unexpectedly" in message or "killed by signal" in message):
            raise
        raise ValueError(
            f"{message or 'no data'}: a process that loads images was killed, usually because of "
            "too little memory (or /dev/shm, in a container): use fewer --workers, or none"
        ) from error


def _start_server() -> None:
    """Start the server that workers are forked from, with all modules imported and with the stop
    signals blocked. Ctrl-C, SLURM and `timeout` send these signals to the whole group of processes,
    but only the training process should react. The workers inherit the blocked signals."""
    forkserver.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # otherwise the server starts it, and this unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(worker: int) -> None:
    """End this worker when the training process ends, even if it is killed."""

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
