"""How much memory the tensors of a function need."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_allocated_bytes(run: Callable[[], object]) -> int:
    """The largest number of bytes that tensors on the CPU have at one time, outputs included, but
    not those that existed before. `run` must not free these.

    It counts what torch's allocator gives to this thread, which is the same in each run. The memory
    of the process is not the same, because malloc keeps freed blocks. Buffers of oneDNN and of our
    own C++ code are not counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _ = run()  # so that outputs exist until the end
    result: Any = profiler.profiler
    events = [event for event in result.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
