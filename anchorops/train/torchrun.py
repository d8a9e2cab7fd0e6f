"""What torchrun tells the processes that it starts."""

import os


def launched() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def is_first() -> bool:
    """Whether this is the first rank; also before the process group is created."""
    return os.environ.get("RANK", "0") == "0"
