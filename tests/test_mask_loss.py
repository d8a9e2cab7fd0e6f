"""The loss of matched masks: maps of ids, numbers of masks, messages; and examples/mask_losses.py,
compared with Transformers' own losses."""

import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import anchorops as ao
from anchorops.doctor.catalogue.masks import mask_loss
from tests.helpers.operators import check_loss
from tests.helpers.ranks import process_group, run_ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "mask_losses.py"
LOGITS = torch.zeros(3, 4, 5)
MAPS, IDS = torch.ones(2, 8, 10, dtype=torch.int32), torch.ones(3, dtype=torch.int64)
IMAGES = torch.tensor([0, 1, 1])


def example() -> dict[str, Any]:
    for package in ("transformers", "scipy"):
        pytest.importorskip(package, reason="it is not installed")
    return runpy.run_path(str(EXAMPLE))


def maps_of_ids(dtype: torch.dtype, scale: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps (2, 33, 50) with void pixels, ids and images of five masks, and their labels. The third
    id is not in its map."""
    numbers = torch.randint(0, 4, (2, 33, 50))
    numbers[1] = numbers[1].clamp(max=2)
    ids, images = torch.tensor([1, 3, 3, 2, 1]), torch.tensor([0, 0, 1, 1, 1])
    labels = (numbers[images] == ids[:, None, None]).long()
    labels[numbers[images] == 0] = -1
    return (scale * numbers).to(dtype), scale * ids, images, labels


@pytest.mark.on("cpu", "reference", "simulated_triton")
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.uint8, 1), (torch.int16, -7), (torch.uint16, 9000), (torch.int64, 2**40)],
    ids=str,
)
def test_maps_of_ids(dtype: torch.dtype, scale: int, backend: str) -> None:
    """Ids of any size, also those that masks of uint8 could not have; 0 is void."""
    maps, ids, images, labels = maps_of_ids(dtype, scale)
    logits = torch.randn(5, 9, 13, requires_grad=True)
    loss = ao.MaskLoss(focal_alpha=0.25, focal_gamma=2.0, ignore_index=0)
    value = loss(logits, maps, ids, images)
    check_loss(value, mask_loss(logits, labels, focal_alpha=0.25, focal_gamma=2.0), logits)
    assert loss.terms["labels_out_of_range"] == 0
    assert loss.terms["labels_ignored"] == (labels == -1).sum()
    torch.testing.assert_close(loss.terms["ce"] + loss.terms["dice"], value.detach())


def test_one_map() -> None:
    """It needs no images; and by default no id is void, also not 255."""
    maps = torch.where(torch.rand(1, 8, 8) < 0.5, 255, 254)
    loss, expected = ao.MaskLoss(), ao.MaskLoss()(LOGITS[:1], (maps == 255).byte())
    assert torch.equal(loss(LOGITS[:1], maps, torch.tensor([255])), expected)
    ids, images = torch.tensor([255], dtype=torch.int16), torch.tensor([1])
    assert torch.equal(loss(LOGITS[:1], torch.cat([254 - maps, maps]), ids, images), expected)
    assert loss.terms["labels_ignored"] == 0


@pytest.mark.parametrize("number", [7, 3.5, torch.tensor(3.5), torch.tensor([7])], ids=str)
def test_num_masks(number: Any) -> None:
    logits, labels = torch.randn(3, 4, 5), torch.randint(0, 2, (3, 8, 10))
    loss = ao.MaskLoss()
    expected = 3 * loss(logits, labels) / float(number)
    value = loss(logits, labels, num_masks=number)
    torch.testing.assert_close(value, expected)
    assert value.dtype == torch.float32 and value.shape == ()
    torch.testing.assert_close(sum(loss.terms[x] for x in ("ce", "dice")), expected)


@pytest.mark.on("cpu", "reference")
def test_nothing_matched(backend: str) -> None:
    """Of maps; test_guarantees.py has no masks."""
    queries = torch.randn(2, 6, 4, 5, requires_grad=True)
    loss = ao.MaskLoss(ignore_index=0)(queries[IMAGES[:0], IMAGES[:0]], MAPS, IDS[:0], IMAGES[:0])
    loss.backward()
    assert loss == 0 and queries.grad is not None and not queries.grad.any()


def test_compiled() -> None:
    """One graph for every number of masks."""
    maps, ids, images, _ = maps_of_ids(torch.int32)
    loss = ao.MaskLoss(ignore_index=0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (5, 4):
            z = torch.randn(n, 9, 13)
            given = z, maps, ids[:n].clone(), images[:n].clone()
            torch.testing.assert_close(compiled(*given), loss(*given))
    masks = {0: torch.export.Dim("masks", min=2, max=9)}
    given = z, torch.ones(4, 9, 13, dtype=torch.int32)
    program = torch.export.export(loss, given, dynamic_shapes=dict(logits=masks, labels=masks))
    given = given[0][:3], given[1][:3]
    torch.testing.assert_close(program.module()(*given), loss(*given))


SIZES = {
    "padded": ([3, 5], [(64, 96), (90, 70)]),
    "odd sizes": ([4, 2], [(61, 83), (61, 83)]),
    "more than queries": ([12, 1], [(64, 64), (64, 64)]),
    "an image without": ([0, 4], [(64, 64), (50, 64)]),
    "nothing": ([0, 0], [(64, 64), (64, 64)]),
}


@pytest.mark.parametrize("model", ["small_maskformer", "small_detr"])
@pytest.mark.parametrize("case", SIZES)
def test_transformers(model: str, case: str) -> None:
    names = example()
    network = names[model]().eval()
    batch = names["batch_of"](network, *SIZES[case])
    loss, gradient = names["differences"](network, names["with_our_loss"](network), **batch)
    assert loss < 1e-6 and gradient < 1e-5


def test_loop() -> None:
    """With MaskFormer's loss, of the float masks that it needs."""
    names = example()
    from transformers.models.maskformer import modeling_maskformer as maskformer

    weights = {"loss_cross_entropy": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
    matcher = maskformer.MaskFormerHungarianMatcher(1.0, cost_mask=20.0, cost_dice=1.0)
    theirs = maskformer.MaskFormerLoss(3, matcher, weights, 0.1)
    _, maps, ids, classes = names["scenes"](2, (61, 83))
    ids[1], classes[1] = ids[1][:0], classes[1][:0]
    logits = [torch.randn(2, 8, *size, requires_grad=True) for size in ((4,), (16, 21))]
    masks = [(maps[i] == x[:, None, None]).float() for i, x in enumerate(ids)]
    losses = theirs(logits[1], logits[0], masks, classes)
    expected: Any = sum(weights[name] * loss for name, loss in losses.items())
    value = names["Criterion"](3)(*logits, maps, ids, classes)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    for found, right in zip(
        *(torch.autograd.grad(loss, logits) for loss in (value, expected)), strict=True
    ):
        assert (found - right).norm() < 1e-5 * right.norm()


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example()
    monkeypatch.setattr("sys.argv", ["mask_losses.py", "--steps", "9"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    first, last = (float(x) for x in re.findall(r"step \d: loss (\d\.\d+)", printed))
    assert last < first and "MaskFormer" in printed and "Detr" in printed


def run_rank(rank: int, folder: str) -> None:
    """Each rank has Transformers' loss with its number of masks. And DDP's mean of the loop's
    gradients is the gradient of one process."""
    from accelerate import PartialState

    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # accelerate asks for them
    with process_group(folder, rank, 2):
        PartialState(cpu=True)  # Transformers sums the number of masks over its processes
        assert PartialState().num_processes == 2
        names = example()
        torch.manual_seed(0)
        for model in ("small_maskformer", "small_detr"):
            network = names[model]().eval()
            for counts in ([3, 1], [0, 0]):  # of rank 1
                batch = names["batch_of"](network, counts if rank else [2, 0], [(50, 64), (64, 40)])
                after = names["with_our_loss"](network)
                assert max(names["differences"](network, after, **batch)) < 1e-5

        _, maps, ids, classes = names["scenes"](2, (48, 64))
        ids[0], classes[0] = ids[0][:1], classes[0][:1]
        logits, masks = torch.zeros(2, 8, 4), torch.randn(2, 8, 12, 16, requires_grad=True)
        criterion, chosen = names["Criterion"](3), slice(rank, rank + 1)
        own = masks.detach()[chosen].requires_grad_()
        criterion(logits[chosen], own, maps[chosen], ids[chosen], classes[chosen]).backward()
    criterion(logits, masks, maps, ids, classes).backward()  # one process
    assert own.grad is not None and masks.grad is not None
    torch.testing.assert_close(own.grad / 2, masks.grad[chosen])


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="it is not installed")
    example()
    run_ranks(2, run_rank, str(tmp_path))
