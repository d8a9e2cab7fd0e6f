"""The memory that without_gpu/storages.py counts, compared with what torch's allocator reports on a
CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from record import BASELINE, BOTH, compared
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from without_gpu.storages import Storages, largest_batch, make_fake

import anchorops as ao
from tests.helpers.memory import peak_allocated_bytes

ROWS = Path(__file__).parents[1] / "bench/results/counted-memory.json"
CASE = ("network", "sizes", "checkpointing")
B, K, D, SIZE = 3, 19, 48, (96, 128)


class Residual(nn.Module):
    """A network of linear layers: the CPU's kernels of convolutions allocate buffers, as
    cuDNN's do on a GPU."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.first, self.norm, self.second = nn.Linear(3, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.classifier = nn.Linear(D, K)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(F.avg_pool2d(images, 4).movedim(1, -1))
        if self.checkpointing:
            return self.classifier(checkpoint(self.block, x, use_reentrant=False)).movedim(-1, 1)
        x = self.block(x)
        return self.classifier(x).movedim(-1, 1)

    def block(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.gelu(self.norm(x))))


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels)


def step(model: nn.Module, loss_of: Callable[..., Tensor], method: str, batch: int) -> None:
    images = torch.zeros(batch, 3, *SIZE)
    labels = torch.zeros(batch, *SIZE, dtype=torch.int64)
    loss = loss_of(model(images), labels)
    if hasattr(model, "regularizer"):
        loss = loss + model.regularizer.attachment(labels)  # pyright: ignore
    loss.backward()


def build(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = Residual(method == "checkpointing")
    if method and method != "checkpointing":
        ao.attach(model, getattr(ao, method)(K, D))
    return model


def counted(loss_of: Callable[..., Tensor], method: str, batch: int = B) -> Storages:
    """The storages of a step. Parameters are not counted, because the allocator does not report
    what existed before."""
    model = build(method)
    with FakeTensorMode():
        make_fake(model)
        existing = [*model.parameters(), *model.buffers()]
        with Storages() as storages:
            for tensor in existing:
                storages.see(tensor, "existing")
            step(model, loss_of, method, batch)
    on_gpu = ("workspace", "existing")
    storages.made = [
        made._replace(bytes=0) if made.operator.startswith(on_gpu) else made
        for made in storages.made
    ]
    return storages


@pytest.mark.parametrize(
    ("loss_of", "method"),
    [
        (plain, ""),
        (ao.pixel_cross_entropy, ""),
        (ao.pixel_cross_entropy, "SAR"),
        (ao.pixel_cross_entropy, "OCCL"),
        (ao.pixel_cross_entropy, "MVSC"),
        (plain, "checkpointing"),
        (ao.pixel_cross_entropy, "checkpointing"),
    ],
)
def test_equals_what_the_allocator_reports(loss_of, method):
    model = build(method)
    reported = peak_allocated_bytes(lambda: step(model, loss_of, method, B))
    assert counted(loss_of, method).bytes_alive().max() == pytest.approx(reported, rel=0.02)


@pytest.mark.parametrize("loss_of", [plain, ao.pixel_cross_entropy], ids=["plain", "ours"])
def test_one_count_gives_the_peak_of_every_batch(loss_of):
    fixed, per_image = counted(loss_of, "SAR", 101).by_image(101)
    for batch in (2, 7):
        expected = counted(loss_of, "SAR", batch).bytes_alive()
        assert (fixed + batch * per_image).tolist() == expected.tolist()
    capacity = counted(loss_of, "SAR", 7).bytes_alive().max()
    assert largest_batch(capacity, fixed, per_image) == 7
    assert largest_batch(capacity - 1, fixed, per_image) == 6


def test_late_upsampling_is_in_the_rows():
    """The goals of memory: at most 0.70 of plain, with checkpointing 0.42."""
    groups = compared(json.loads(ROWS.read_text())["rows"], *CASE)
    for checkpointing, most in ((False, 0.70), (True, 0.42)):
        rows = groups["SegFormer-B5", "512×512 B16 K150", checkpointing]
        assert rows[BOTH]["peak_bytes"] <= most * rows[BASELINE]["peak_bytes"]
