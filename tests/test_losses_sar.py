"""SAR compared with the numbers of the released code and with its equations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao
from tests.helpers.methods import oracle
from tests.helpers.operators import check_loss


def sar_of_release(vectors: dict[str, Tensor]) -> tuple[ao.SAR, nn.Conv2d]:
    num_classes, dim = int(vectors["C"]), int(vectors["D"])
    sar = ao.SAR(num_classes, dim, anchors=vectors["init/random_center"])
    names = {
        "projecter_linear.0": "0",
        "projecter_linear.1": "1",
        "projecter_linear.3": "3",
        "projecter_linear.4": "4",
        "projecter.conv": "6",
        "projecter.bn": "7",
    }
    state = {}
    for key, value in vectors.items():
        prefix, _, leaf = key.removeprefix("init/").rpartition(".")
        if prefix in names:
            state[f"{names[prefix]}.{leaf}"] = value.squeeze() if value.dim() == 4 else value
    sar.embedding.load_state_dict(state)
    classifier = nn.Conv2d(dim, num_classes, 1)
    classifier.load_state_dict(
        {leaf: vectors[f"init/decode_head.conv_seg.{leaf}"] for leaf in ("weight", "bias")}
    )
    return sar, classifier


def assert_within(got: Tensor | None, want: Tensor, error: float) -> None:
    """Largest error relative to the largest value."""
    assert got is not None and got.shape == want.shape
    assert float((got - want).abs().max()) <= error * float(want.abs().max())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sar_follows_the_release_step_by_step(memory_format: torch.memory_format) -> None:
    vectors = oracle("sar_official.npz")
    sar, classifier = sar_of_release(vectors)
    optimizer = torch.optim.SGD([*sar.parameters(), *classifier.parameters()], lr=0.5)
    for t in range(14):
        features = vectors[f"{t}/features"].clone(memory_format=memory_format).requires_grad_()
        loss = sar(features, vectors[f"{t}/labels"], classifier)
        optimizer.zero_grad()
        loss.backward()
        is_open = not vectors[f"{t}/p2a"].isnan()
        assert sar.terms["gate"] == float(is_open)
        assert sar.started.all() == is_open
        assert_within(sar.terms["aux"], vectors[f"{t}/aux"], 2e-6)
        assert_within(sar.terms["p2a"], vectors[f"{t}/p2a"].nan_to_num(), 1e-6)
        torch.testing.assert_close(loss.detach(), sar.terms["aux"] + sar.terms["p2a"])
        assert_within(features.grad, vectors[f"{t}/dfeatures"], 2e-6)
        assert features.grad is not None and features.grad.stride() == features.stride()
        assert_within(classifier.weight.grad, vectors[f"{t}/dclassifier"], 1e-5)
        assert_within(sar.semantic_anchors, vectors[f"{t}/momentum"], 2e-6)
        optimizer.step()


K, D = 6, 16


def batch() -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(0)
    features = torch.randn(2, D, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, K, (2, 4, 5))
    labels[0, :2] = 255
    return features, labels, nn.Linear(D, K).double()


def log_p_of_anchors(sar: ao.SAR, classifier: nn.Linear) -> Tensor:
    """log p_k of the embedded anchors, layer by layer; [K, K]."""
    h = sar.anchors
    for linear, norm, _ in zip(*[iter(sar.embedding)] * 3, strict=True):
        h = linear(h)
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + norm.eps).sqrt()
        h = (norm.weight * h + norm.bias).relu()
    return classifier(h).log_softmax(1)


@pytest.mark.parametrize("reweight", [True, False])
@pytest.mark.parametrize("detach_weights", [True, False])
@pytest.mark.parametrize("tau", [0.15, 1.0])
def test_auxiliary_loss(reweight: bool, detach_weights: bool, tau: float) -> None:
    features, labels, classifier = batch()
    sar = ao.SAR(
        K, D, aux_weight=0.7, tau=tau, reweight=reweight, detach_weights=detach_weights
    ).double()
    log_p = log_p_of_anchors(sar, classifier)
    unsure = [k for k in range(K) if log_p[k, k].exp() <= tau]
    assert 0 < len(unsure) < K or tau == 1
    ce = -torch.stack([log_p[k, k] for k in unsure])
    weights = ce / ce.sum() if reweight else torch.full_like(ce, 1 / len(ce))
    if detach_weights:
        weights = weights.detach()
    expected = 0.7 * (weights * ce).sum()
    loss = sar(features, labels, classifier)
    assert sar.terms["unsure"] == len(unsure)
    inputs = [*sar.parameters(), *classifier.parameters()]
    check_loss(loss, expected, *inputs, rtol=1e-6, atol=1e-9)


def test_nothing_unsure_costs_nothing() -> None:
    features, labels, classifier = batch()
    sar = ao.SAR(K, D, tau=0.0, delta=1.0).double()
    loss = sar(features, labels, classifier)
    assert not loss.any() and sar.terms["unsure"] == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sar.parameters())


@pytest.mark.parametrize("gate", ["all", "per_class"])
@pytest.mark.parametrize(("momentum", "layers"), [(0.9, 3), (0.0, 2)])
def test_gate_and_moving_average(gate: str, momentum: float, layers: int) -> None:
    """Two layers: the embedding of the paper's appendix A."""
    features, labels, classifier = batch()
    options = {"gate": gate, "momentum": momentum, "layers": layers}
    sar = ao.SAR(K, D, delta=0.3, aux_weight=1.0, **options).double()
    assert len(sar.embedding) == 3 * layers
    optimizer = torch.optim.SGD([*sar.parameters(), *classifier.parameters()], lr=0.3)
    average, started, seen = torch.zeros(K, D, dtype=torch.float64), [False] * K, set()
    for _ in range(30):
        log_p = log_p_of_anchors(sar, classifier).detach()
        recognised = [log_p[k].argmax() == k and log_p[k, k].exp() > 0.3 for k in range(K)]
        is_open = [all(recognised)] * K if gate == "all" else [bool(r) for r in recognised]
        seen.add(sum(is_open))
        state = copy.deepcopy(sar.state_dict())
        h = sar.embedding(sar.anchors).detach()
        sar.load_state_dict(state)  # the embedding's running statistics had changed
        for k in range(K):
            if is_open[k]:
                average[k] = momentum * average[k] + (1 - momentum) * h[k] if started[k] else h[k]
                started[k] = True
        loss = sar(features, labels, classifier)
        torch.testing.assert_close(sar.semantic_anchors, average)
        assert sar.started.tolist() == started
        used = torch.isin(labels, torch.tensor(is_open).nonzero())
        rows = features.movedim(1, -1)[used]
        mse = F.mse_loss(rows, average[labels[used]]) if used.any() else features.sum() * 0
        torch.testing.assert_close(sar.terms["p2a"], 0.1 * mse.detach())
        (dfeatures,) = torch.autograd.grad(0.1 * mse, features)
        optimizer.zero_grad()
        features.grad = None
        loss.backward()
        torch.testing.assert_close(features.grad, dfeatures)
        optimizer.step()
    assert seen == {0, K} if gate == "all" else len(seen) > 2


@pytest.mark.parametrize("anchors", ["normal", "orthogonal", "simplex", "given"])
def test_cr_pulls_to_fixed_anchors(anchors: str) -> None:
    features, labels, _ = batch()
    fixed = torch.randn(K, D)
    cr = ao.SAR(K, D, embed=False, anchors=fixed if anchors == "given" else anchors).double()
    assert not list(cr.parameters())
    ao.SAR(1, D, embed=False)  # which needs no batch statistics
    if anchors == "given":
        torch.testing.assert_close(cr.anchors, fixed.double())
    valid = labels < K
    expected = 0.1 * F.mse_loss(features.movedim(1, -1)[valid], cr.anchors[labels[valid]])
    torch.testing.assert_close(cr(features, labels), expected)


def test_parameters_of_the_paper() -> None:
    assert sum(p.numel() for p in ao.SAR(19, 720).parameters()) == 1_560_960


def test_embedding_starts_as_the_release_does() -> None:
    """Two layers as nn.Linear, U(−1/√D, 1/√D); the third, mmcv's ConvModule, N(0, 2/D)."""
    torch.manual_seed(0)
    embedding = ao.SAR(19, 720).embedding
    first, second, third = (layer.weight for layer in embedding if isinstance(layer, nn.Linear))
    for weight in (first, second):
        assert weight.abs().max() <= 720**-0.5
        assert float(weight.detach().std()) == pytest.approx((3 * 720) ** -0.5, rel=0.01)
    assert float(third.detach().std()) == pytest.approx((2 / 720) ** 0.5, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_anchors_of_another_dtype(dtype: torch.dtype) -> None:
    anchors, features = torch.randn(K, D).to(dtype), torch.randn(9, D)
    sar, classifier = ao.SAR(K, D, anchors=anchors), nn.Linear(D, K)
    same = ao.SAR(K, D, anchors=anchors.float())
    same.embedding.load_state_dict(sar.embedding.state_dict())
    losses = [x(features, torch.arange(9) % K, classifier) for x in (sar, same)]
    torch.testing.assert_close(*losses)
