"""Memory of a training step on a GPU, counted without a GPU.

    python bench/counted_memory.py [--networks …] [--out bench/results/counted-memory.json]

A step (forward, loss, backward) with bf16 autocast runs on fake tensors, which have shapes but no
values. Each storage is logged when it is made and when it is freed; the peak is the largest sum of
bytes at one time.
Parameters, Adam's state, gradients, images and labels are in it. The network as it is, with
F.cross_entropy, is compared with the same network with pixel_cross_entropy of low-resolution
logits, with late_upsampling where it can be applied, with both, and with both and each method.

Every batch makes and frees the same storages, and the size of each is either the same for every
batch or proportional to the number of images. So one count gives the peak of every batch, and the
largest batch that fits.
"""

import argparse
import copy
import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases.networks import COUNTED, Candidate, Network, candidates
from record import save_counts
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from without_gpu.storages import Storages, as_on_cuda, largest_batch, make_fake

import anchorops as ao

# A frozen CBP needs no memory.
METHODS = tuple(name for name in ao.losses.METHODS if name != "CBP")
CAPACITIES = (24, 40, 80)  # GB: 10⁹ bytes
LARGEST = 3  # storages that a row lists
Loss = Callable[[Tensor], Tensor]  # of the labels


def attach(network: Network, model: Any, method: str) -> Loss:
    """The loss of a method."""
    regularizer = network.regularizer(method)
    if not network.volumes:
        return ao.attach(model, regularizer)
    features: list[Tensor] = []
    model.output_block.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    model.regularizer = regularizer

    def loss(labels: Tensor) -> Tensor:
        weight = model.output_block.conv.conv.weight.flatten(1)
        return regularizer(features.pop().flatten(2), labels.flatten(1), weight)

    return loss


def prepare(network: Network, model: nn.Module, candidate: Candidate) -> Loss | None:
    """Remove the last upsampling of a model on "meta", or let it run later, attach the method,
    checkpoint the blocks. Returns the method's loss."""
    model.train()
    network.arrange(model, network.images(), candidate)
    for module in model.modules():
        if candidate.checkpointing and type(module).__name__ in network.blocks:
            module.forward = functools.partial(  # the states of random numbers are not counted
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )
    return attach(network, model, candidate.method) if candidate.method else None


def step(
    network: Network,
    model: nn.Module,
    regularizer: Loss | None,
    ours: bool,
    batch: int,
    storages: Storages,
) -> None:
    """One training step after the first one, because Adam's state exists."""
    storages.phase = "parameters and buffers"
    for tensor in (*model.parameters(), *model.buffers()):
        storages.see(tensor, "parameter")
    storages.phase = "Adam's state"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _state = [torch.empty_like(parameter) for parameter in (*trained, *trained)]
    storages.phase = "images and labels"
    images = torch.empty(network.shape(batch))
    labels = torch.empty(batch, *network.size, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        storages.phase = "network, forward"
        outputs = network.outputs(model, images, low=ours)
        storages.phase = "loss, forward"
        loss = network.loss(outputs, labels, ours)
        if regularizer is not None:
            loss = loss + regularizer(labels)
    del outputs
    storages.phase = "backward"
    loss.backward()


def count(
    network: Network, model: nn.Module, candidate: Candidate, batch: int
) -> tuple[Storages, set[int]]:
    """The storages of a step, and which of them are gradients of parameters. The model, on "meta",
    is not changed."""
    model = copy.deepcopy(model)
    regularizer = prepare(network, model, candidate)
    gc.collect()
    gc.disable()  # so that every count frees the same storages at the same time
    try:
        with FakeTensorMode(), as_on_cuda(), ao.use_backend("cpu"):
            make_fake(model)
            with Storages() as storages:
                step(network, model, regularizer, candidate.ours, batch, storages)
            gradients = [parameter.grad for parameter in model.parameters()]
            indices = {storages.see(x, "") for x in gradients if x is not None}
    finally:
        gc.enable()
    return storages, indices


IMAGES = 101  # images in a count: a prime that divides no size of the networks' tensors


def row_of(network: Network, model: nn.Module, candidate: Candidate) -> dict[str, Any]:
    storages, gradients = count(network, model, candidate, IMAGES)
    fixed, per_image = storages.by_image(IMAGES)
    alive = fixed + network.batch * per_image
    peak = int(alive.argmax())

    def in_batch(size: int) -> int:
        return size // IMAGES * network.batch if size % IMAGES == 0 else size

    parts: dict[str, int] = Counter()
    indices = storages.alive_after(peak)
    for i in indices:
        made = storages.made[i]
        parts["gradients" if i in gradients else made.phase] += in_batch(made.bytes)
    largest = sorted((storages.made[i] for i in indices), key=lambda made: -made.bytes)[:LARGEST]
    return {
        "network": network.name,
        "sizes": f"{'×'.join(map(str, network.size))} B{network.batch} K{network.num_classes}",
        "name": candidate.method or candidate.name,
        "checkpointing": candidate.checkpointing,
        "loss": "anchorops" if candidate.ours else "torch",
        "late": candidate.late,
        "method": candidate.method,
        "peak_bytes": int(alive[peak]),
        "parts": parts,
        "largest": [
            made._asdict()
            | {"bytes": in_batch(made.bytes), "shape": [in_batch(size) for size in made.shape]}
            for made in largest
        ],
        "largest_batches": {
            f"{capacity} GB": largest_batch(capacity * 10**9, fixed, per_image)
            for capacity in CAPACITIES
        },
    }


def rows_of(network: Network) -> Iterator[dict[str, Any]]:
    model = network.build().to("meta")
    every = candidates(network.runs_later(model), METHODS if network.dim else ())
    for checkpointing, candidate in product((False, True)[: 1 + bool(network.blocks)], every):
        yield row_of(network, model, candidate._replace(checkpointing=checkpointing))


def line(row: dict[str, Any]) -> str:
    checkpointing = "checkpointing" if row["checkpointing"] else ""
    batches = ", ".join(f"{batch} in {gb}" for gb, batch in row["largest_batches"].items())
    return f"  {checkpointing:<14}{row['name']:<31}{row['peak_bytes'] / 1e9:7.2f} GB; {batches}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    names = sorted({network.name for network in COUNTED})
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for network in COUNTED:
        if network.name not in arguments.networks:
            continue
        print(network, flush=True)
        for row in rows_of(network):
            rows.append(row)
            print(line(row), flush=True)
            if arguments.out:
                save_counts(arguments.out, rows)


if __name__ == "__main__":
    main()
