"""The all-reduces of each method with process_group="world", as docs/cost.md lists them."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import anchorops as ao

SIZES = ((19, 720), (150, 768))  # classes, channels
METHODS = {
    "SAR": ao.SAR,
    "CR": partial(ao.SAR, embed=False),
    "CBP": partial(ao.CBP, update="ema"),
    "OCCL": ao.OCCL,
    "CeCo": ao.CeCo,
    "MVSC": ao.MVSC,
}


def transfers(method: str, classes: int, dim: int) -> tuple[list[int], list[int]]:
    """Bytes of each all-reduce of a step, in the forward and in the backward pass: sums and squared
    distances are float32, counts int64."""
    if method in ("SAR", "CR"):  # squared distances [K], counts [K]
        return [4 * classes, 8 * classes], [4 * classes]
    if method == "CBP":  # sums [K, D], counts [K]; without a gradient
        return [4 * classes * dim, 8 * classes], []
    if method == "CeCo":  # sums [K, 128], counts [K]; batch norm: means and pixels, variances
        sums, means, variances = 4 * classes * 128, 4 * (128 + 1), 4 * 128
        return [sums, 8 * classes, means, variances], [sums, means, variances]
    # sums [K, G, D], counts [K, G]: the two views of OCCL, the four groups of MVSC
    keys = classes * {"OCCL": 2, "MVSC": 4}[method]
    return [4 * keys * dim, 8 * keys], [4 * keys * dim]


class Collectives(TorchDispatchMode):
    """Records the bytes of each all-reduce; any other collective is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("_c10d_functional", "c10d"):
            name = func.overloadpacket.__name__
            if name == "all_reduce":
                self.sizes.append(args[0].numel() * args[0].element_size())
            else:
                assert name == "wait_tensor" or name.startswith("_wrap_tensor"), name
        return func(*args, **(kwargs or {}))


def counted(method: str, classes: int, dim: int, rank: int) -> tuple[list[int], list[int]]:
    torch.manual_seed(rank)  # ranks have different batches, and rank 1 has nothing valid
    features = torch.randn(1 + rank % 2, dim, 3, 4, requires_grad=True)
    labels = torch.randint(0, classes, (len(features), 6, 8))
    labels = torch.full_like(labels, 255) if rank == 1 else labels
    loss_of = METHODS[method](classes, dim, process_group="world")
    classifier = nn.Conv2d(dim, classes, 1)
    with Collectives() as forward:
        loss = loss_of(features, labels, classifier)
    with Collectives() as backward:
        if loss.requires_grad:
            loss.backward()
    return forward.sizes, backward.sizes


def run_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=100),
    )
    try:
        for size in SIZES:
            for method in METHODS:
                actual, expected = counted(method, *size, rank), transfers(method, *size)
                for got, want in zip(actual, expected, strict=True):  # autograd chooses the order
                    assert sorted(got) == sorted(want), (size, method, got, want)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_reduces(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the ranks import this file as tests.test_all_reduces, and inherit the path
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    multiprocessing.spawn(run_rank, (ranks, str(tmp_path)), nprocs=ranks)  # pyright: ignore
