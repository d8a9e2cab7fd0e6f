"""Launches of a GPU in a whole step of each method and loss, counted without a GPU.

    python bench/counted_launches.py [--earlier FILE] [--out bench/results/counted-launches.json]

A step (forward, backward) runs on tensors of the CPU with the Triton backend, whose launches are
counted instead of made. What torch launches beside them is counted in the tree of the profiler's
events: an operator that has a kernel for CUDA launches one, views and new memory none, and the
others call operators. Copies, batch norms, sorts and scans count as one launch. The gradient's seed
is counted. RMS norms, which a CPU composes, run as on a GPU.
--earlier: the rows of an earlier commit, whose counts stand beside the new ones.
"""

import os
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["ANCHOROPS_TRITON_ON_HOST"] = "1"  # which anchorops asks when it is imported

import torch
from record import load, parser_of_counts, save_counts
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from without_gpu.machine_code import instead_of_launches

import anchorops as ao
from anchorops.losses import Regularizer

library = torch.library.Library("aten", "IMPL")


@partial(library.impl, "_fused_rms_norm", dispatch_key="CPU")
def _rms_norm(x: Tensor, shape: list[int], weight: None, eps: float) -> tuple[Tensor, Tensor]:
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * inverse, inverse


@partial(library.impl, "_fused_rms_norm_backward", dispatch_key="CPU")
def _rms_norm_backward(
    dy: Tensor, x: Tensor, shape: list[int], inverse: Tensor, weight: None, mask: list[bool]
) -> tuple[Tensor, None]:
    y = x * inverse
    return inverse * (dy - y * (dy * y).mean(-1, keepdim=True)), None


BATCH, K, D, LOW, HIGH = 2, 19, 64, 16, 64
FILLS = ("copy_", "scalar_tensor")  # they launch one kernel, though not one of this name
NEW_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_")
Step = Callable[[], Tensor]


def of_method(make: Callable[..., Regularizer]) -> Step:
    """A training step's loss, on features beside their classifier."""
    features = torch.randn(BATCH, D, LOW, LOW).requires_grad_()
    labels = torch.randint(0, K, (BATCH, HIGH, HIGH))
    classifier, method = nn.Conv2d(D, K, 1), make(K, D)
    method.install(classifier)

    def step() -> Tensor:
        method.before_classifier(classifier)
        return method(features, labels, classifier)

    return step


def of_loss(loss: nn.Module) -> Step:
    logits = torch.randn(BATCH, K, LOW, LOW).requires_grad_()
    labels = torch.randint(0, K, (BATCH, HIGH, HIGH))
    return lambda: loss(logits, labels)


def of_info_nce(**options: Any) -> Step:
    queries, keys, positives = torch.randn(K, 2, D), torch.randn(K, D), torch.randn(K, 2, D)
    inputs = [x.requires_grad_() for x in (queries, keys, positives)]
    options |= {"present": torch.rand(K, 2) < 0.8}
    return lambda: ao.ops.centroid_info_nce(inputs[0], inputs[1], positives=inputs[2], **options)


def cbp(*sizes: int) -> Regularizer:
    return ao.CBP(*sizes, update="ema")


STEPS: dict[str, Callable[[], Step]] = {
    "centroid InfoNCE": of_info_nce,
    **{
        name: partial(of_method, method)
        for name, method in ao.losses.METHODS.items()
        if name != "CBP"
    },
    "CBP, moving average": lambda: of_method(cbp),
    "CBP + OCCL": lambda: of_method(lambda *x: ao.Combined(cbp(*x), ao.OCCL(*x))),
    "CrossEntropy": lambda: of_loss(ao.CrossEntropy()),
    "Dice": lambda: of_loss(ao.Dice()),
    "CrossEntropyDice": lambda: of_loss(ao.CrossEntropyDice(ao.CrossEntropy(), ao.Dice())),
}


@cache
def _launches_alone(name: str) -> bool | None:
    """Whether an operator of torch has a kernel for CUDA; None if it gives a view, or memory."""
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, x) for x in packet.overloads()]
    results = [x.alias_info for overload in overloads for x in overload._schema.returns]
    if name in NEW_MEMORY or any(x is not None and not x.is_write for x in results):
        return None
    known = [x.name() for x in overloads if torch._C._dispatch_has_kernel(x.name())]
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(x, "CUDA") for x in known)


def _count(event: Any, found: Counter[str]) -> None:
    name = event.name.removeprefix("aten::")
    if name != event.name and (_launches_alone(name) or name in FILLS):
        found[name] += 1
        return
    for child in event.cpu_children:
        _count(child, found)


def launches(run: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Of torch and of Triton, by operator and kernel."""
    of_torch, of_triton = Counter(), Counter()

    def count(kernel: Any, *arguments: Any, **options: Any) -> None:
        of_triton[kernel.fn.__name__] += 1

    with instead_of_launches("sm_90", count), profile(activities=[ProfilerActivity.CPU]) as events:
        run()
    for event in events.events() or []:
        if event.cpu_parent is None:
            _count(event, of_torch)
    return of_torch, of_triton


def both_directions(step: Step) -> None:
    loss = step()
    if loss.requires_grad:  # CBP's moving average has no gradient
        loss.backward()


def row_of(name: str, make: Callable[[], Step]) -> dict[str, Any]:
    torch.manual_seed(0)
    with ao.use_backend("triton"):
        launches(make())  # what only the first call does
        step = make()
        of_torch, of_triton = launches(lambda: both_directions(step))
    total = of_torch.total() + of_triton.total()
    operators = dict(of_torch.most_common())
    return {"name": name, "launches": total, "ours": of_triton.total(), "operators": operators}


def main() -> None:
    parser = parser_of_counts(__doc__, "counted-launches")
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--earlier", type=Path)
    args = parser.parse_args()
    rows = [row_of(name, STEPS[name]) for name in args.steps]
    if args.earlier:
        earlier = {row["name"]: row["launches"] for row in load(args.earlier)["rows"]}
        rows = [row | {"earlier": earlier[row["name"]]} for row in rows]
    save_counts(args.out, rows)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
