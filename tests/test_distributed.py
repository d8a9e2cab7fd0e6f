"""Statistics over ranks: R gloo ranks under DDP equal one process on the concatenated batch, and
make as many all-reduces as docs/cost.md lists."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

import anchorops as ao
from anchorops import Attachment
from anchorops.distributed import all_reduce
from anchorops.doctor.catalogue import cases
from anchorops.doctor.catalogue import features as catalogue
from anchorops.losses import Regularizer, occl, statistics
from tests.helpers.operators import Operators
from tests.helpers.ranks import process_group, run_ranks
from tests.test_messages import ONLY_SIZE

K, D = 6, 8
METHODS: dict[str, Callable[..., Regularizer]] = {
    **{name: x for name, x in catalogue.METHODS.items() if "CBP" not in name},
    "CBP, OCCL": lambda *sizes, **kw: ao.Combined(
        ao.CBP(*sizes, update="ema", momentum=0.5, **kw), ao.OCCL(*sizes, **kw)
    ),
}
UPDATES = ("frozen", "gradient", "ema", "penalty")
CBP = {f"CBP {x}": partial(ao.CBP, update=x, momentum=0.5) for x in UPDATES}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, D, 3, padding=1)
        self.classifier = nn.Conv2d(D, K, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


def build(method: str, process_group: str | None) -> tuple[Net, Attachment]:
    torch.manual_seed(0)
    model = Net()
    return model, ao.attach(model, (METHODS | CBP)[method](K, D, process_group=process_group))


def batch_of(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Ranks differ in batch size and classes; at step 1, rank 1 has nothing valid."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    images = 2 + rank % 2
    x = torch.randn(images, 3, 6, 5, generator=generator)
    labels = torch.randint(2 * rank, 2 * rank + 3, (images, 12, 10), generator=generator) % K
    labels[0, :2] = 255
    return x, torch.full_like(labels, 255) if (rank, step) == (1, 1) else labels


def draw_per_share(sizes: list[int], patch: pytest.MonkeyPatch) -> None:
    """Let one process draw random views like the ranks: within each rank's share of the batch."""
    moments, halves = statistics.unchecked_moments, occl._halves

    def shares(*tensors: Tensor) -> Any:
        return zip(*(tensor.split(sizes) for tensor in tensors), strict=True)

    def added(parts: list[ao.ops.ClassMoments]) -> ao.ops.ClassMoments:
        columns = zip(*parts, strict=True)
        totals = [None if c[0] is None else torch.stack(c).sum(0) for c in columns]
        return ao.ops.ClassMoments(*totals)  # pyright: ignore[reportArgumentType]

    def moments_of_shares(features: Tensor, labels: Tensor, *args: Any, **kw: Any) -> Any:
        if kw["groups"] == 1:
            return moments(features, labels, *args, **kw)
        return added([moments(f, y, *args, **kw) for f, y in shares(features, labels)])

    def halves_of_shares(counts: Tensor, sums: Tensor, seed: Tensor) -> ao.ops.ClassMoments:
        return added([halves(n, s, seed) for n, s in shares(counts, sums)])

    patch.setattr(statistics, "unchecked_moments", moments_of_shares)
    patch.setattr(occl, "_halves", halves_of_shares)


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    error = float((got - want).abs().max()) if got.numel() else 0.0
    assert error <= 1e-5 * max(float(want.abs().max()), 0.1), f"{what}: {error}"


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def check_method(method: str, rank: int, ranks: int, sharded: Sequence[str] | None = None) -> None:
    """Three steps under DDP, or FSDP2 with these layers sharded on their own, equal those of one
    process. FSDP shards the root's parameters, including the regulariser's, after the backward."""
    model, attached = build(method, "world")
    alone, alone_attached = build(method, None)
    for name in () if sharded is None else (*sharded, ""):
        fully_shard(model.get_submodule(name))
    parallel = DistributedDataParallel(model) if sharded is None else model
    # CBP needs the gradient of a loss of the logits; the others' own gradients are compared alone
    share, lr = (1.0, 0.01) if method in CBP else (0.0, 0.1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=lr) for m in (parallel, alone)]
    for step in range(3):
        batches = [batch_of(r, step) for r in range(ranks)]
        x, labels = batches[rank]
        logits, what = parallel(x), f"{method}, {ranks} ranks, {sharded}, step {step}"
        loss = attached(labels)
        with pytest.MonkeyPatch.context() as patch:
            draw_per_share([len(x) for x, _ in batches], patch)
            all_logits = alone(torch.cat([x for x, _ in batches]))
            expected = alone_attached(torch.cat([labels for _, labels in batches]))
        assert_same(loss.detach(), expected.detach(), what)
        loss = loss + share * logits.square().sum()  # in training, cross-entropy has a gradient
        expected = expected + share * all_logits.square().sum() / ranks
        for optimizer, value in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            value.backward()
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            if q.grad is not None and (q.grad.any() or sharded is None):
                assert p.grad is not None
                assert_same(whole(p.grad), q.grad, f"{what}, gradient of {name}")
        for optimizer in optimizers:
            optimizer.step()
        want = alone.state_dict()
        for name, value in model.state_dict().items():
            assert_same(whole(value).double(), want[name].double(), f"{what}, {name}")
    if method == "CBP ema":
        basis = alone.get_submodule("regularizer").basis
        assert not torch.equal(alone.state_dict()["classifier.weight"], basis)


def check_all_reduce(rank: int, ranks: int) -> None:
    """The gradient of a sum over ranks is the sum of the ranks' gradients."""
    x = torch.tensor([rank + 1.0], requires_grad=True)
    total = all_reduce(x, "world")
    assert total == ranks * (ranks + 1) / 2
    ((rank + 1) * total).backward()
    assert x.grad == ranks * (ranks + 1) / 2
    halves = dist.new_group([0, 1])
    if isinstance(halves, dist.ProcessGroup):  # a number on ranks outside the group
        method = ao.OCCL(K, D, process_group=halves)
        assert method.process_group == halves.group_name  # a name can be copied and pickled
        assert all_reduce(x.detach(), copy.deepcopy(method).process_group) == 3
    else:
        with pytest.raises(ValueError, match=r"OCCL: process_group: .* this rank belongs to"):
            ao.OCCL(K, D, process_group=halves)


def check_dice(rank: int, ranks: int) -> None:
    """Each rank has the loss of the concatenated batch, and R times its gradient."""
    parts = [batch_of(r, 1) for r in range(ranks)]  # rank 1 has nothing valid
    logits = [
        torch.randn(len(x), K, 6, 5, generator=torch.Generator().manual_seed(r))
        for r, (x, _) in enumerate(parts)
    ]
    whole, local = torch.cat(logits).requires_grad_(), logits[rank].clone().requires_grad_()
    expected = ao.Dice()(whole, torch.cat([labels for _, labels in parts]))
    expected.backward()
    loss = ao.Dice(process_group="world")(local, parts[rank][1])
    loss.backward()
    assert local.grad is not None and whole.grad is not None
    torch.testing.assert_close(loss, expected)
    share = whole.grad.split([len(x) for x in logits])[rank]
    torch.testing.assert_close(local.grad, ranks * share)


def check_compiled(rank: int) -> None:
    model, attached = build("combined", "world")
    eager, eager_attached = copy.deepcopy((model, attached))
    compiled = torch.compile(attached, fullgraph=True, backend="aot_eager")
    x, labels = batch_of(rank, 0)
    model(x)
    eager(x)
    torch.testing.assert_close(compiled(labels), eager_attached(labels))


def check_wrapped(rank: int) -> None:
    """Only methods without parameters and anchors, which would differ between ranks, can be
    attached to a wrapped model."""
    parallel = DistributedDataParallel(Net())
    for method in (ao.SAR(K, D), ao.SAR(K, D, embed=False), ao.MVSC(K, D), ao.CeCo(K, D)):
        with pytest.raises(ValueError, match="not yet wrapped"):
            ao.attach(parallel, method)
    with pytest.raises(ValueError, match="not yet wrapped: CBP replaces the classifier"):
        ao.attach(parallel, ao.CBP(K, D))
    occl = ao.attach(parallel, ao.OCCL(K, D))
    x, labels = batch_of(rank, 0)
    loss = F.cross_entropy(parallel(x), labels[:, ::2, ::2], ignore_index=255) + occl(labels)
    loss.backward()


def check_refusals_of_sharded_models(rank: int) -> None:
    x, labels = batch_of(rank, 0)
    for method, reshard, message in (
        ("SAR", None, r"SAR: classifier: .* not sharded .* got a DTensor"),
        ("CeCo", True, r"CeCo: state: .* reshard_after_forward=True, got DTens"),
        # rows would be made equal in a copy that is thrown away
        ("CBP penalty", None, r'CBP: classifier: .* update="penalty" .*use DDP'),
    ):
        model, attached = build(method, None)
        if method == "SAR":
            fully_shard(model.classifier)
        fully_shard(model, reshard_after_forward=reshard)
        with pytest.raises(ValueError, match=message):
            model(x)
            attached(labels)
    model, attached = build("CBP gradient", None)
    fully_shard(model)
    with pytest.raises(ValueError, match=r"CBP: classifier: .* not sharded: call detach\(\)"):
        attached.detach()
    assert model.get_submodule("regularizer") is attached.regularizer  # nothing was removed
    model = Net()
    fully_shard(model.classifier)
    with pytest.raises(ValueError, match=r"CBP: classifier: .* not sharded: attach first"):
        ao.attach(model, ao.CBP(K, D))


def check_tensors_of_all_ranks(rank: int, ranks: int) -> None:
    """Operators and losses refuse DTensors."""
    mesh = init_device_mesh("cpu", (ranks,))
    x, labels = batch_of(0, 0)
    features, anchors = torch.randn(len(x), D, 6, 5), torch.randn(K, D)

    def distributed(tensor: Tensor) -> DTensor:
        return DTensor.from_local(tensor, mesh, [Replicate()])

    calls: list[Callable[[], Any]] = [
        lambda: ao.pixel_cross_entropy(features, labels, weight=distributed(torch.ones(D))),
        lambda: ao.confusion(distributed(labels), labels, K),
        lambda: ao.OCCL(K, D)(distributed(features), labels, anchors),
        lambda: ao.OCCL(K, D)(features, distributed(labels), anchors),
        lambda: ao.OCCL(K, D)(features, labels, distributed(anchors)),
        lambda: ao.CrossEntropy(distributed(torch.ones(K))),
        lambda: ao.BinaryCrossEntropy(distributed(torch.ones(K))),
        lambda: ao.Dice(weight=distributed(torch.ones(K))),
        lambda: ao.CBP(K, D, init=distributed(anchors)),
        lambda: ao.SAR(K, D, anchors=distributed(anchors)),
        lambda: ao.CeCo(K, D, prior=distributed(torch.ones(K))),
        lambda: ao.ops.class_moments(
            features, labels, K, groups=2, seed=distributed(torch.tensor(3))
        ),
    ]
    for case in cases("small"):
        inputs = case.sample.inputs()
        for name in inputs:
            if name not in ONLY_SIZE.get(case.entry.name, ()):
                changed = inputs | {name: distributed(inputs[name])}
                calls.append(partial(case.ours, **changed))
    for call in calls:
        with pytest.raises(ValueError, match=r"expected .*(of this rank|not sharded).* a DTensor"):
            call()


def check_metrics(rank: int, ranks: int) -> None:
    """They reduce over ranks automatically, for `compute` alone."""
    for make, repeats in (
        (partial(ao.diagnostics.CentroidGeometry, K, 3), 1),
        (partial(ao.MeanIoU, K), 2),
        (partial(ao.diagnostics.CalibrationError, K), 2),
    ):
        shared, whole = make(), make()
        whole.sync = lambda *_, **__: None  # as with a single process
        for r in range(ranks):
            images, labels = batch_of(r, 0)
            for metric in (shared, whole) if r == rank else (whole,):
                metric.update(images.repeat(1, repeats, 1, 1), labels)
        states = copy.deepcopy(shared.metric_state)
        torch.testing.assert_close(shared.compute(), whole.compute())
        torch.testing.assert_close(shared.metric_state, states, rtol=0, atol=0)
        with shared.sync_context():
            torch.testing.assert_close(shared.metric_state, whole.metric_state)


ALL_REDUCES = {"SAR": 3, "CR": 3, "CBP, OCCL": 5, "OCCL": 3, "CeCo": 7, "MVSC": 3}


def check_number_of_all_reduces(method: str, rank: int) -> None:
    """Of a forward and a backward pass. There is no other collective."""
    model, attached = build(method, "world")
    x, labels = batch_of(rank, 1)  # rank 1 has nothing valid
    with Operators() as operators:
        model(x)
        attached(labels).backward()
    local = ("wait_tensor", "_wrap_tensor_autograd")
    found = [x for x in operators.names if "c10d" in x and x.split(".")[1] not in local]
    assert found == ["_c10d_functional.all_reduce.default"] * ALL_REDUCES[method], method


def run_rank(rank: int, ranks: int, folder: str) -> None:
    with process_group(folder, rank, ranks):
        check_all_reduce(rank, ranks)
        check_dice(rank, ranks)
        check_metrics(rank, ranks)
        for method in METHODS:
            check_method(method, rank, ranks)
        if ranks == 2:
            for method in ALL_REDUCES:
                check_number_of_all_reduces(method, rank)
            check_compiled(rank)
            check_wrapped(rank)
            for method in ("SAR", "OCCL", "MVSC"):
                check_method(method, rank, ranks, sharded=[])
            for update in UPDATES[:3]:
                for layers in ([], ["classifier"]):
                    check_method(f"CBP {update}", rank, ranks, sharded=layers)
            check_refusals_of_sharded_models(rank)
            check_tensors_of_all_ranks(rank, ranks)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, run_rank, ranks, str(tmp_path))
