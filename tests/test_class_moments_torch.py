"""Class moments together with torch: gradcheck, compile, autocast, saved tensors. Also the
functions that use them, compared with torch's own."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import anchorops as ao
from anchorops._ops.class_moments import unchecked_moments

pytestmark = pytest.mark.usefixtures("sorted_by_numpy")
fused = pytest.mark.on("cpu", "interpreter", "emulator")
F64 = torch.float64
SECOND = (
    "class_moments: second derivatives are not implemented in the fused operators; "
    'use anchorops.use_backend\\("reference"\\) for them'
)
ROOMS = [  # size of features, and arguments
    ((2, 3, 3, 4), {}),
    ((2, 3, 3, 4), {"groups": 2, "seed": 1}),
    ((2, 3, 3, 4), {"per_image": True}),
    ((2, 3, 5), {"groups": 2, "seed": 1, "per_image": True}),
    ((9, 2), {}),
]


def some_labels(size: tuple[int, ...], num_classes: int = 3) -> Tensor:
    labels = torch.randint(0, num_classes, size[:1] + size[2:])
    labels.view(-1)[3] = 255
    return labels


def leaves(size: tuple[int, ...], num_classes: int = 3) -> tuple[Tensor, Tensor]:
    features = torch.randn(size, dtype=F64, requires_grad=True)
    return features, torch.randn(num_classes, size[1], dtype=F64, requires_grad=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("size", "arguments"), ROOMS)
def test_gradcheck(backend: str, size, arguments):
    labels, inputs = some_labels(size), leaves(size)

    def statistics(features: Tensor, anchors: Tensor):
        return ao.ops.class_moments(features, labels, 3, anchors=anchors, **arguments)[1:]

    with ao.use_backend(backend):
        assert torch.autograd.gradcheck(statistics, inputs)
        features = inputs[0].detach()
        assert torch.autograd.gradcheck(lambda a: statistics(features, a)[1], inputs[1])
        anchors = inputs[1].detach()
        assert torch.autograd.gradcheck(lambda f: statistics(f, anchors), inputs[0])


def test_gradcheck_channels_last():
    features, anchors = leaves((2, 3, 4, 3))
    features = features.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    labels = some_labels((2, 3, 8, 6))
    with ao.use_backend("cpu"):
        assert torch.autograd.gradcheck(
            lambda f, a: ao.ops.class_moments(f, labels, 3, anchors=a)[1:], (features, anchors)
        )


@pytest.mark.parametrize(("size", "arguments"), ROOMS)
def test_second_derivatives_of_the_reference(size, arguments):
    labels = some_labels(size)
    with ao.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda f, a: ao.ops.class_moments(f, labels, 3, anchors=a, **arguments)[1:],
            leaves(size),
        )


@pytest.mark.parametrize("wrt", ["features", "anchors"])
@pytest.mark.parametrize("of", ["features", "anchors"])
def test_second_derivatives_are_right_or_raise(wrt: str, of: str):
    """The gradient of anchors is computed from the sums by torch."""
    features, anchors = leaves((9, 2))
    inputs, labels = {"features": features, "anchors": anchors}, some_labels((9, 2))

    def second() -> Tensor:
        sqdists = ao.ops.class_moments(features, labels, 3, anchors=anchors).sqdists
        assert sqdists is not None
        (first,) = torch.autograd.grad(sqdists.sum(), inputs[of], create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs[wrt])[0]

    if of == "features":
        with pytest.raises(RuntimeError, match=SECOND):
            second()
    else:
        ours = second()
        with ao.use_backend("reference"):
            torch.testing.assert_close(ours, second())


@pytest.mark.parametrize("of", ["features", "anchors"])
def test_second_derivatives_raise_through_the_statistics(of: str):
    features, anchors = leaves((9, 2))
    inputs = {"features": features, "anchors": anchors}
    sqdists = ao.ops.class_moments(features, some_labels((9, 2)), 3, anchors=anchors).sqdists
    assert sqdists is not None
    (first,) = torch.autograd.grad(sqdists.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(first.square().sum(), inputs[of])


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize(
    "known", [False, True], ids=["traced without gradients", "called with them"]
)
def test_gradient_of_anchors_with_and_without_sums(with_sums: bool, known: bool):
    """Where the sums were not computed, backward computes them."""
    features, anchors = leaves((2, 3, 4, 5))
    labels = some_labels((2, 3, 4, 5))
    options = {"groups": 2, "per_image": True, "seed": 1, "ignore_index": 255}

    def moments(features: Tensor, anchors: Tensor) -> Tensor:
        _, sums, sqdists = unchecked_moments(
            features, labels, 3, anchors=anchors, with_sums=with_sums, **options
        )
        assert sqdists is not None
        return (sqdists * torch.arange(12.0).view(2, 3, 2)).sum() + (sums.sum() if with_sums else 0)

    traced = moments if known else make_fx(moments)(features.detach(), anchors.detach())
    ours = torch.autograd.grad(traced(features, anchors), (features, anchors))
    with ao.use_backend("reference"):
        expected = torch.autograd.grad(moments(features, anchors), (features, anchors))
    torch.testing.assert_close(ours, expected)


def test_second_derivatives_raise_where_another_input_is_fixed():
    features, anchors = leaves((9, 2))
    labels = some_labels((9, 2))
    sums = ao.ops.class_moments(features, labels, 3).sums
    (first,) = torch.autograd.grad(sums.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(first.square().sum(), features)
    mse = ao.pixel_to_anchor_mse(features, labels, anchors.detach())
    (first,) = torch.autograd.grad(mse, features, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(first.square().sum(), features)
    # torch computes the gradient of anchors from the sums, so its derivative is right.
    mse = ao.pixel_to_anchor_mse(features.detach(), labels, anchors)
    (first,) = torch.autograd.grad(mse, anchors, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), anchors)
    counts = torch.bincount(labels[labels != 255], minlength=3)
    expected = (2 * counts / (2 * counts.sum()))[:, None].expand(3, 2).to(second.dtype)  # D = 2
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("of", ["features", "anchors"])
def test_forward_mode_derivatives_are_right_or_raise(of: str):
    features, anchors = (leaf.detach() for leaf in leaves((9, 2)))
    labels = some_labels((9, 2))
    with forward_ad.dual_level():
        given = {"features": features, "anchors": anchors}
        given[of] = forward_ad.make_dual(given[of], given[of])
        with pytest.raises(RuntimeError, match="class_moments: forward-mode derivatives"):
            ao.ops.class_moments(labels=labels, num_classes=3, **given)
        with ao.use_backend("reference"):
            dual = ao.ops.class_moments(labels=labels, num_classes=3, **given).sqdists
        _, tangent = forward_ad.unpack_dual(dual)
    leaf = given[of].detach().clone().requires_grad_()
    primal = ao.ops.class_moments(
        labels=labels, num_classes=3, **(given | {of: leaf})
    ).sqdists.sum()
    (gradient,) = torch.autograd.grad(primal, leaf)
    torch.testing.assert_close(tangent.sum(), (gradient * leaf).sum())


@fused
@pytest.mark.parametrize("keys", [torch.zeros(6, 2).T, torch.zeros(2, 5)], ids=["strided", "few"])
def test_keys_that_do_not_follow_each_other_are_refused(backend: str, keys):
    features, anchors = torch.randn(2, 4, 6), torch.randn(3, 4)
    operators = torch.ops.anchorops
    forward = getattr(operators.class_moments, backend)
    backward = getattr(operators.class_moments_backward, backend)
    refused = pytest.raises((RuntimeError, ValueError), match="keys: expected a contiguous key for")
    with refused:
        forward(features, keys.int(), anchors, 3, 1, True)
    gradients = anchors, anchors[:, 0]
    with refused:
        backward(features, keys.int(), anchors, *gradients, 1, (2, 4, 6), (24, 6, 1), torch.float32)


def compiled_loss(features: Tensor, labels: Tensor, anchors: Tensor, step: Tensor) -> Tensor:
    num_classes = anchors.shape[0]
    _, sums, sqdists = ao.ops.class_moments(
        features, labels, num_classes, anchors=anchors, groups=2, seed=step
    )
    assert sqdists is not None
    centroids, counts = ao.class_centroids(features, labels, num_classes, per_image=True)
    mse = ao.pixel_to_anchor_mse(features, labels, anchors)
    nce = ao.ops.centroid_info_nce(sums, anchors, present=sums.detach().any(2), temperature=9.0)
    return sqdists.sum() + mse + nce + (centroids * counts[..., None]).square().sum()


@fused
@pytest.mark.parametrize(
    ("compiler", "channels_last"),
    [
        ("aot_eager", False),
        pytest.param("aot_eager", True, marks=pytest.mark.on("cpu")),
        pytest.param("inductor", False, marks=pytest.mark.on("cpu")),
    ],
)
def test_compiled_as_one_graph(backend: str, compiler: str, channels_last: bool):
    torch._dynamo.reset()
    graph = torch.compile(compiled_loss, backend=compiler, fullgraph=True, dynamic=True)
    for step, (batch, height) in enumerate([(2, 6), (3, 10)]):
        features = torch.randn(batch, 5, height, 7)
        if channels_last:
            features = features.contiguous(memory_format=torch.channels_last)
        labels, anchors = some_labels((batch, 5, 2 * height, 14), 4), torch.randn(4, 5)
        results = []
        for function in (compiled_loss, graph):
            leaf, fixed = features.clone().requires_grad_(), anchors.clone().requires_grad_()
            loss = function(leaf, labels, fixed, torch.tensor(step))
            loss.backward()
            assert leaf.grad is not None and leaf.grad.stride() == features.stride()
            results.append((loss.detach(), leaf.grad, fixed.grad))
        torch.testing.assert_close(results[1], results[0])


def test_features_are_not_kept_without_anchors():
    features = torch.randn(2, 4, 5, 6, requires_grad=True) * 1
    pointer, saved = features.data_ptr(), []
    labels = some_labels((2, 4, 5, 6))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sums = ao.ops.class_moments(features, labels, 3).sums
        assert saved and all(t.data_ptr() != pointer for t in saved)
        saved.clear()
        ao.ops.class_moments(features, labels, 3, anchors=torch.randn(3, 4))
        assert any(t.data_ptr() == pointer for t in saved)
    saved.clear()
    gone = weakref.ref(features)
    del features
    gc.collect()
    assert gone() is None and sums.requires_grad
    sums.sum().backward()


def test_sums_are_kept_only_for_the_gradient_of_anchors():
    saved = []
    anchors = torch.randn(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ao.ops.class_moments(
            torch.randn(9, 4, requires_grad=True), some_labels((9, 4)), 3, anchors=anchors
        )
        assert sorted(t.numel() for t in saved) == [9, 12, 36]  # keys, anchors, features
        saved.clear()
        ao.ops.class_moments(
            torch.randn(9, 4), some_labels((9, 4)), 3, anchors=anchors.clone().requires_grad_()
        )
        assert sorted(t.numel() for t in saved) == [9, 12, 12, 36]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing(dtype: torch.dtype, backend: str):
    features = torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=True)
    labels, anchors = some_labels((2, 4, 5, 6)), torch.randn(3, 4)

    def everything() -> list[Tensor]:
        counts, sums, sqdists = ao.ops.class_moments(features, labels, 3, anchors=anchors)
        assert sqdists is not None
        mse = ao.pixel_to_anchor_mse(features, labels, anchors)
        centroids, _ = ao.class_centroids(features, labels, 3)
        nce = ao.ops.centroid_info_nce(centroids, anchors)
        return [counts, sums, sqdists, mse, nce]

    with ao.use_backend(backend):
        expected = everything()
        with torch.autocast("cpu", torch.bfloat16):
            ours = everything()
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert all(t.dtype == torch.float32 for t in ours[1:])
    with_autocast, without = (
        torch.autograd.grad(torch.stack([t.sum() for t in s[1:]]).sum(), features)[0]
        for s in (ours, expected)
    )
    assert with_autocast.dtype == dtype and torch.equal(with_autocast, without)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_anchors_of_another_dtype(dtype: torch.dtype):
    features, labels = torch.randn(20, 4), some_labels((20, 4))
    anchors = torch.randn(3, 4).to(dtype).requires_grad_()
    as_given = anchors.detach().float().requires_grad_()
    ao.pixel_to_anchor_mse(features, labels, anchors).backward()
    ao.pixel_to_anchor_mse(features, labels, as_given).backward()
    assert anchors.grad is not None and as_given.grad is not None
    assert anchors.grad.dtype == dtype and torch.equal(anchors.grad, as_given.grad.to(dtype))


@pytest.mark.parametrize("anchors_t", [False, True])
def test_strided_anchors_and_gradients(anchors_t: bool):
    """Anchors and incoming gradients need not be contiguous."""
    features, labels = torch.randn(2, 4, 5, 6), some_labels((2, 4, 5, 6))
    anchors = torch.randn(4, 3).T if anchors_t else torch.randn(1, 4).expand(3, 4)
    results = []
    for given in (anchors, anchors.contiguous()):
        leaf, fixed = features.clone().requires_grad_(), given.detach().requires_grad_()
        _, sums, sqdists = ao.ops.class_moments(leaf, labels, 3, anchors=fixed)
        assert sqdists is not None
        outputs = (sums, sqdists)
        weights = torch.arange(4.0).expand(3, 4), torch.tensor(0.5).expand(3)
        weights = weights if given is anchors else tuple(w.contiguous() for w in weights)
        results.append(torch.autograd.grad(outputs, (leaf, fixed), weights))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# The functions that use class moments


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [(2, 5, 6, 7), (3, 5, 20), (40, 5)])
def test_pixel_to_anchor_mse_is_mse_loss(backend: str, size):
    features = torch.randn(size, dtype=F64, requires_grad=True)
    anchors = torch.randn(4, 5, dtype=F64, requires_grad=True)
    labels = some_labels(size, 4)
    valid = labels != 255
    rows, targets = features.movedim(1, -1)[valid], anchors[labels[valid]]
    with ao.use_backend(backend):
        for reduction in ("mean", "sum"):
            ours = ao.pixel_to_anchor_mse(features, labels, anchors, reduction=reduction)
            expected = F.mse_loss(rows, targets, reduction=reduction)
            torch.testing.assert_close(ours, expected)
            torch.testing.assert_close(
                torch.autograd.grad(ours, (features, anchors), retain_graph=True),
                torch.autograd.grad(expected, (features, anchors), retain_graph=True),
            )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_class_centroids_are_masked_average_pooling(backend: str):
    features = torch.randn(3, 5, 6, 7, requires_grad=True)
    labels = torch.randint(0, 4, (3, 12, 14))
    labels[1][labels[1] == 2] = 255
    mask = F.interpolate(labels[:, None].float(), (6, 7), mode="nearest")
    mask = mask == torch.arange(5).view(1, 5, 1, 1)  # [B, K, H, W]; class 4 is absent
    total = torch.einsum("bkhw,bdhw->bkd", mask.float(), features)
    weight = torch.randn(3, 5, 5)
    with ao.use_backend(backend):
        centroids, counts = ao.class_centroids(features, labels, 5, per_image=True)
        pooled = total / mask.sum((2, 3)).clamp(min=1)[..., None]
        assert torch.equal(counts, mask.sum((2, 3)))
        torch.testing.assert_close(centroids, pooled)
        assert not centroids[1, 2].any() and not centroids[:, 4].any()
        torch.testing.assert_close(
            torch.autograd.grad((centroids * weight).sum(), features),
            torch.autograd.grad((pooled * weight).sum(), features),
        )
        centroids, counts = ao.class_centroids(features, labels, 5)
        assert torch.equal(counts, mask.sum((0, 2, 3)))
        torch.testing.assert_close(centroids, total.sum(0) / counts.clamp(min=1)[:, None])
