"""The all-reduces of each method, as bench/statistics_of_ranks.py counts them: at 2 and 4 ranks."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from statistics_of_ranks import CORRECTION, METHODS, NETWORKS, Transfers, microseconds, transfers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


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


def counted(method: str, classes: int, dim: int, rank: int) -> Transfers:
    torch.manual_seed(rank)  # ranks have different batches, and rank 1 has nothing valid
    features = torch.randn(1 + rank % 2, dim, 3, 4, requires_grad=True)
    labels = torch.randint(0, classes, (len(features), 6, 8))
    labels = torch.full_like(labels, 255) if rank == 1 else labels
    loss_of = METHODS[method](classes, dim)
    classifier = nn.Conv2d(dim, classes, 1)
    with Collectives() as forward:
        loss = loss_of(features, labels, classifier)
    with Collectives() as backward:
        if loss.requires_grad:
            loss.backward()
    return Transfers(forward.sizes, backward.sizes)


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
        for network in NETWORKS:
            for method in METHODS:
                size = network.classes, network.dim
                actual, expected = counted(method, *size, rank), transfers(method, *size)
                for got, want in zip(actual, expected, strict=True):  # autograd chooses the order
                    assert sorted(got) == sorted(want), (network.name, method, got, want)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_transfers(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the ranks import this file as tests.test_statistics_of_ranks, and inherit the path
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    multiprocessing.spawn(run_rank, (ranks, str(tmp_path)), nprocs=ranks)  # pyright: ignore


def test_the_model_of_nccl() -> None:
    """Latencies by hand: within a node 6.8 + 2·7·0.6 µs, and 2·5 µs more each time the nodes
    double."""
    for gpus, latency in ((8, 15.2), (16, 25.2), (64, 45.2), (1024, 85.2)):
        assert microseconds(64, gpus) == pytest.approx(latency, abs=0.01)
    # 1 MiB is 2^14 times 64 bytes
    assert microseconds(2**20, 64) == pytest.approx(45.2 + 2**20 / (9500 * CORRECTION[14]))
    times = [microseconds(2**20, gpus) for gpus in (8, 16, 32, 64, 1024)]
    assert times == sorted(times)
