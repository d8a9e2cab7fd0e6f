"""The host's time of a call, forward and backward, beside that of torch's formula.

    python bench/host_time.py [--rows bench/results/host-time.json]

Tensors are so small that the kernels take no time: what remains is Python, autograd, torch's
dispatcher and Triton. All calls take turns, as in a training step, and the least time of each is
kept. The backends are `cpu`, with one thread; `triton` with a driver that names an H100, where
instead of a launch Triton only binds the arguments and looks the compiled kernel up; and on a GPU
what "auto" chooses, with its launches.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["ANCHOROPS_TRITON_ON_HOST"] = "1"  # which anchorops asks when it is imported

from record import DEVICE, finish, parser_of

import anchorops as ao
from anchorops.measure import in_turns

Loss = Callable[[], Tensor]


def calls(device: str) -> Iterator[tuple[Tensor, dict[str, Loss]]]:
    """Calls that compute the gradient of the same tensor, torch's formula first: of logits
    (1, 3, 2, 2) and of features (1, 3, 4, 4), with labels (1, 4, 4)."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 2, 2, device=device).requires_grad_()
    f = torch.randn(1, 3, 4, 4, device=device).requires_grad_()
    y = torch.arange(16, device=device).view(1, 4, 4) % 3
    anchors = torch.randn(3, 3, device=device)
    cross_entropy, both = ao.CrossEntropy(), ao.CrossEntropyDice()
    yield (
        x,
        {
            "F.interpolate + F.cross_entropy": lambda: F.cross_entropy(
                F.interpolate(x, (4, 4), mode="bilinear"), y
            ),
            "pixel_cross_entropy": lambda: ao.pixel_cross_entropy(x, y),
            "CrossEntropy": lambda: cross_entropy(x, y),
            "CrossEntropyDice": lambda: both(x, y),
        },
    )
    yield (
        f,
        {
            "F.mse_loss of anchors[labels]": lambda: F.mse_loss(
                f.movedim(1, -1).flatten(0, 2), anchors[y.flatten()]
            ),
            "pixel_to_anchor_mse": lambda: ao.pixel_to_anchor_mse(f, y, anchors),
        },
    )


def rows_of(backend: str, rounds: int) -> Iterator[dict[str, Any]]:
    def step(leaf: Tensor, loss: Loss) -> None:
        leaf.grad = None
        loss().backward()

    with ExitStack() as stack:
        stack.enter_context(ao.use_backend(backend))
        if backend == "triton":
            from without_gpu.machine_code import instead_of_launches

            def bind(self: Any, *args: Any, **kwargs: Any) -> None:
                self.run(*args, grid=None, warmup=True, **kwargs)

            stack.enter_context(instead_of_launches("sm_90", bind))
        groups = [*calls(DEVICE)]
        steps: list[Any] = [
            partial(step, x, loss) for x, group in groups for loss in group.values()
        ]
        if DEVICE == "cuda":
            steps.append(torch.cuda.synchronize)  # otherwise the host waits for a full queue
        times, _ = in_turns(steps, torch.device("cpu"), seconds=0, rounds=rounds)
    least = iter([1e6 * min(seconds) for seconds in times])
    for _, group in groups:
        of_group = dict(zip(group, least, strict=False))
        first = next(iter(of_group.values()))
        for name, us in of_group.items():
            ratio = round(us / first, 2)
            yield {"backend": backend, "name": name, "us": round(us, 1), "ratio": ratio}


def main() -> None:
    arguments = parser_of(__doc__, devices=(DEVICE,)).parse_args()
    torch.set_num_threads(1)
    backends = ("auto",) if DEVICE == "cuda" else ("cpu", "triton")
    rounds = 20 if arguments.dry_run else 2000
    finish(arguments, "host_time", [row for x in backends for row in rows_of(x, rounds)])


if __name__ == "__main__":
    main()
