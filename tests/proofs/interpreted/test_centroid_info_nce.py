"""Loss and all gradients of centroid InfoNCE within the error budget: the error against float64 is
at most twice that of the reference in float32, plus four roundings of a term."""

import pytest
import torch
from emulator import BACKEND
from torch.utils._python_dispatch import TorchDispatchMode

import anchorops as ao

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def loss_and_gradients(queries, keys, positives, **options):
    given = {"queries": queries, "keys": keys, "positives": positives}
    leaves = {k: t.detach().requires_grad_() for k, t in given.items() if t is not None}
    loss = ao.ops.centroid_info_nce(**leaves, **options)
    inputs = list(leaves.values())
    weights = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), inputs)]


def check(queries, keys, positives=None, temperature=0.07, **options):
    options["temperature"] = temperature
    ours = loss_and_gradients(queries, keys, positives, **options)
    with ao.use_backend("reference"):
        tensors = queries, keys, positives
        formula = loss_and_gradients(
            *(None if t is None else t.float() for t in tensors), **options
        )
        exact = loss_and_gradients(*(None if t is None else t.double() for t in tensors), **options)
    finite = torch.cat([t[t.isfinite()].flatten().float() for t in tensors if t is not None])
    term = float(finite.abs().max()) / temperature
    given = [t for t in tensors if t is not None]
    for i, like in enumerate([None, *given]):
        dtype = torch.float32 if like is None else like.dtype
        assert ours[i].dtype == dtype and ours[i].shape == exact[i].shape
        assert ours[i].isfinite().all()
        allowed = 2 * (formula[i].double() - exact[i]).abs().max() + 2**-21 * term
        if dtype != torch.float32:  # one more rounding
            allowed = allowed + torch.finfo(dtype).eps * exact[i].abs()
        assert ((ours[i].double() - exact[i]).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("num_classes", "dim", "dtype", "reduction"),
    [(1, 3, FP32, "mean"), (19, 40, FP32, "sum"), (37, 130, BF16, "mean"), (33, 64, FP16, "none")],
)
@pytest.mark.parametrize("with_positives", [False, True])
def test_values_and_gradients(num_classes, dim, dtype, reduction, with_positives):
    queries, keys, positives = torch.randn(3, num_classes, dim).to(dtype) / 4
    check(queries, keys, positives if with_positives else None, reduction=reduction)


@pytest.mark.parametrize("with_positives", [False, True])
def test_several_tiles(with_positives):
    queries, keys, positives = torch.randn(3, 259, 9)
    present = torch.rand(259) < 0.9
    check(queries, keys, positives if with_positives else None, present=present)


def test_more_channels_than_a_block_has():
    check(*torch.randn(2, 20, 300) / 4)


@pytest.mark.parametrize("dtype", [FP16, torch.float64])
def test_keys_and_positives_of_another_dtype(dtype):
    queries, keys, positives = torch.randn(3, 20, 9)
    check(queries, keys.to(dtype))
    check(queries, keys.to(dtype), positives.to(dtype))
    check(queries.to(BF16), keys, positives.to(dtype))


@pytest.mark.parametrize("with_positives", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_groups(with_positives, reduction):
    queries, positives = torch.randn(2, 21, 3, 20) / 2
    present = torch.rand(21, 3) < 0.6
    positives = positives if with_positives else None
    check(queries, torch.randn(21, 20), positives, present=present, reduction=reduction)


@pytest.mark.parametrize("with_positives", [False, True])
@pytest.mark.parametrize("with_keys", [False, True])
def test_absent_classes_may_hold_nan(with_positives, with_keys):
    queries, keys, positives = torch.randn(3, 40, 24) / 2
    present = torch.rand(40) < 0.5
    present_keys = torch.rand(40) < 0.7 if with_keys else None
    queries[~present] = torch.nan
    positives[~present] = torch.inf
    unused = ~present if present_keys is None else ~present & ~present_keys
    keys[unused] = torch.nan
    check(
        queries,
        keys,
        positives if with_positives else None,
        present=present,
        present_keys=present_keys,
    )


def test_a_positive_is_another_query():
    """As in OCCL: both gradients of a query are added."""
    given, keys = torch.randn(35, 2, 20) / 2, torch.randn(35, 20)
    present = torch.rand(35, 2) < 0.8

    def gradient(queries):
        queries = queries.requires_grad_()
        loss = ao.ops.centroid_info_nce(queries, keys, positives=queries.flip(1), present=present)
        return torch.autograd.grad(loss, queries)[0]

    ours = gradient(given.clone())
    with ao.use_backend("reference"):
        torch.testing.assert_close(ours, gradient(given.clone()))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_classifier(dtype):
    """Logits of all keys, whether their class is present or not; and of some."""
    queries, keys = torch.randn(70, 2, 24).to(dtype), torch.randn(70, 24).to(dtype)
    present = torch.rand(70, 2) < 0.3
    for present_keys in torch.ones(70) > 0, torch.arange(70) % 2 == 0:
        options = {"present": present, "present_keys": present_keys, "temperature": 1.0}
        check(queries, keys, **options)
        check(queries, keys, positives=queries.flip(0), **options)


def test_no_channels():
    given = torch.randn(40, 2, 0), torch.randn(40, 0), None
    ours = loss_and_gradients(*given)
    with ao.use_backend("reference"):
        torch.testing.assert_close(ours, loss_and_gradients(*given))


def test_no_class_present():
    none = torch.zeros(5, dtype=torch.bool)
    check(torch.full((5, 8), torch.nan), torch.randn(5, 8), present=none)


def test_strides_and_temperature():
    queries = torch.randn(50, 2, 33)[:, 1, ::2]
    keys = torch.randn(17, 33).T[:17].T[::1][:, :17]
    check(queries[:17], keys, temperature=0.5)
    check(torch.randn(20, 9).T, torch.randn(1, 20).expand(9, 20), temperature=2.0)
    present, present_keys = (torch.rand(2, 40) < 0.6)[:, ::2].unbind()
    check(torch.randn(20, 9), torch.randn(20, 9), present=present, present_keys=present_keys)


def test_offsets_are_64_bit():
    """Strides of 2^30 elements: the last channel is beyond 2^31. Few pages are touched."""
    torch.use_deterministic_algorithms(False)  # otherwise torch.empty would write all of it
    far = torch.empty(2**31 + 4).as_strided((2, 2, 3), (2, 1, 2**30))
    near = far.copy_(torch.randn(far.shape)).clone()
    forward = getattr(torch.ops.anchorops.centroid_info_nce, BACKEND)
    backward = getattr(torch.ops.anchorops.centroid_info_nce_backward, BACKEND)
    results = []
    for queries, keys in (far, near):
        given = queries, keys, None, None, None
        losses, lse = forward(*given, 0.5)
        results.append((losses, *backward(losses, *given, losses, lse, 0.5)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_large_logits():
    check(30 * torch.randn(20, 16), 30 * torch.randn(20, 16), temperature=0.07, reduction="sum")


class Allocated(TorchDispatchMode):
    """The largest number of elements of a new tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "empty" in func.overloadpacket.__name__:
            self.largest = max(self.largest, result.numel())
        return result


def test_no_logits_in_memory():
    """No new tensor is larger than the inputs."""
    queries, keys = torch.randn(2, 300, 4)
    operators, on_cpu = torch.ops.anchorops, torch._C.DispatchKey.CPU
    given = queries, keys, None, None, None
    with Allocated() as allocated:
        losses, lse = getattr(operators.centroid_info_nce, BACKEND)._op_dk(on_cpu, *given, 0.5)
        backward = getattr(operators.centroid_info_nce_backward, BACKEND)
        backward._op_dk(on_cpu, losses, *given, losses, lse, 0.5)
    assert allocated.largest == 300 * 4


def test_operators_are_registered_as_torch_expects():
    forward = getattr(torch.ops.anchorops.centroid_info_nce, BACKEND)
    backward = getattr(torch.ops.anchorops.centroid_info_nce_backward, BACKEND)
    queries, keys, positives = torch.randn(3, 6, 5)
    present = torch.rand(6) < 0.7
    for given in (positives, None):
        inputs = queries.requires_grad_(), keys, given, present, None
        torch.library.opcheck(forward, (*inputs, 0.1))
        saved = (t.detach() for t in forward(*inputs, 0.1))
        inputs = torch.ones(6), queries.detach(), *inputs[1:], *saved
        torch.library.opcheck(backward, (*inputs, 0.1))


def test_second_derivatives_raise():
    queries, keys = torch.randn(2, 6, 5)
    loss = ao.ops.centroid_info_nce(queries.requires_grad_(), keys)
    (dqueries,) = torch.autograd.grad(loss, queries, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dqueries.sum().backward()
