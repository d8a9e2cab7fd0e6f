"""The host's time of a call, forward and backward, beside that of torch's formula.

    python bench/host_time.py [--rows bench/results/host-time.json]

Tensors are so small that the kernels take no time: what remains is Python, autograd, torch's
dispatcher and Triton. All calls take turns, as in a training step, and the least time of each is
kept. The backends are `cpu`, with one thread; `triton` with a driver that names an H100, where
instead of a launch Triton only binds the arguments and looks the compiled kernel up; and on a GPU
what "auto" chooses, with its launches.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["ANCHOROPS_TRITON_ON_HOST"] = "1"  # which anchorops asks when it is imported

from record import DEVICE, finish, parser_of

import anchorops as ao
from anchorops.measure import in_turns

CROSS_ENTROPY, SQUARED_DISTANCE = "F.interpolate + F.cross_entropy", "F.mse_loss of anchors[labels]"


class Call(NamedTuple):
    """formula: the name of the call that takes part as torch's own; None: it is one."""

    name: str
    loss: Callable[[], Tensor]
    leaf: Tensor
    formula: str | None

    def step(self) -> None:
        self.leaf.grad = None
        self.loss().backward()


def calls(device: str) -> list[Call]:
    """Of logits (1, 3, 2, 2) and features (1, 3, 4, 4), with labels (1, 4, 4)."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 2, 2, device=device).requires_grad_()
    f = torch.randn(1, 3, 4, 4, device=device).requires_grad_()
    y = torch.arange(16, device=device).view(1, 4, 4) % 3
    anchors = torch.randn(3, 3, device=device)

    def formula() -> Tensor:
        return F.cross_entropy(F.interpolate(x, (4, 4), mode="bilinear"), y)

    def squared_distance() -> Tensor:
        return F.mse_loss(f.movedim(1, -1).flatten(0, 2), anchors[y.flatten()])

    def of(loss: Any) -> Callable[[], Tensor]:
        return lambda: loss(x, y)

    return [
        Call(CROSS_ENTROPY, formula, x, None),
        Call("pixel_cross_entropy", of(ao.pixel_cross_entropy), x, CROSS_ENTROPY),
        Call("CrossEntropy", of(ao.CrossEntropy()), x, CROSS_ENTROPY),
        Call("CrossEntropyDice", of(ao.CrossEntropyDice()), x, CROSS_ENTROPY),
        Call(SQUARED_DISTANCE, squared_distance, f, None),
        Call(
            "pixel_to_anchor_mse",
            lambda: ao.pixel_to_anchor_mse(f, y, anchors),
            f,
            SQUARED_DISTANCE,
        ),
    ]


def rows_of(backend: str, rounds: int) -> list[dict]:
    with ExitStack() as stack:
        stack.enter_context(ao.use_backend(backend))
        if backend == "triton":
            from without_gpu.machine_code import instead_of_launches

            def bind(self: Any, *args: Any, **kwargs: Any) -> None:
                self.run(*args, grid=None, warmup=True, **kwargs)

            stack.enter_context(instead_of_launches("sm_90", bind))
        all_calls = calls(DEVICE)
        steps = [call.step for call in all_calls]
        if DEVICE == "cuda":
            steps.append(torch.cuda.synchronize)  # otherwise the host waits for a full queue
        host = torch.device("cpu")
        times, _ = in_turns(steps, host, seconds=0, rounds=rounds)
    least = {call.name: 1e6 * min(seconds) for call, seconds in zip(all_calls, times, strict=False)}
    return [
        {
            "backend": backend,
            "name": call.name,
            "us": round(least[call.name], 1),
            "ratio": round(least[call.name] / least[call.formula or call.name], 2),
        }
        for call in all_calls
    ]


def main() -> None:
    arguments = parser_of(__doc__, devices=(DEVICE,)).parse_args()
    torch.set_num_threads(1)
    backends = ("auto",) if DEVICE == "cuda" else ("cpu", "triton")
    rounds = 20 if arguments.dry_run else 2000
    finish(arguments, "host_time", [row for x in backends for row in rows_of(x, rounds)])


if __name__ == "__main__":
    main()
