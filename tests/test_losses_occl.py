"""OCCL and CBP against their equations, written out class by class."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao
from anchorops import Attachment
from anchorops.reference import class_keys, split_groups
from tests.helpers.operators import check_loss
from tests.helpers.small_networks import D, K, Net


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, D, 4, 5, dtype=dtype, generator=generator, requires_grad=True)
    labels = torch.randint(0, K - 1, (4, 4, 5), generator=generator)  # class K − 1 is absent
    labels[0, 0] = 255
    weight = torch.randn(K, D, dtype=dtype, generator=generator, requires_grad=True)
    return features, labels, weight


def views_by_loops(occl: ao.OCCL, features: Tensor, labels: Tensor) -> dict[int, list[Tensor]]:
    """The two view centroids of each class that is in both."""
    seed = occl.step + (occl.seed << 32)
    if occl.split == "pixels":
        keys, counts = class_keys(features, labels, K, per_image=False, ignore_index=255)
        view = split_groups(keys, counts, 2, seed) % 2
    else:
        images = split_groups(
            torch.zeros(1, len(labels)).long(), torch.tensor([len(labels)]), 2, seed
        )
        view = images.view(-1, 1).expand(-1, labels[0].numel())
    rows, labels = features.movedim(1, -1).flatten(0, -2), labels.flatten()
    views = {}
    for k in range(K):
        masks = [(labels == k) & (view.flatten() == x) for x in range(2)]
        if all(mask.any() for mask in masks):
            views[k] = [rows[mask].mean(0) for mask in masks]
    return views


def naive_loss(occl: ao.OCCL, features: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    views = views_by_loops(occl, features, labels)
    middle = {k: (a + b).detach() / 2 for k, (a, b) in views.items()}
    if occl.normalize:
        views = {k: [v / v.norm() for v in both] for k, both in views.items()}
        middle = {k: s / s.norm() for k, s in middle.items()}
        weight = weight / weight.norm(dim=1, keepdim=True)
    tau = occl.temperature
    centroid, category = [], []
    for x in range(2):
        for i, both in views.items():
            positive = both[0] @ both[1] / tau
            negatives = [both[x] @ middle[j] / tau for j in views if j != i]
            centroid.append(torch.stack([positive, *negatives]).logsumexp(0) - positive)
            logits = torch.stack([both[x] @ weight[j] / tau for j in range(K)])
            category.append(logits.logsumexp(0) - logits[i])
    size = 1 if occl.reduction == "sum" else len(views)
    return (
        occl.centroid_weight * torch.stack(centroid).sum() / size
        + occl.category_weight * torch.stack(category).sum() / size
    ) / 2


@pytest.mark.parametrize("split", ["pixels", "images"])
@pytest.mark.parametrize(
    ("normalize", "reduction"), [(True, "mean"), (False, "mean"), (True, "sum")]
)
def test_loss_and_gradients(split: str, normalize: bool, reduction: str) -> None:
    features, labels, weight = batch()
    occl = ao.OCCL(
        K,
        D,
        centroid_weight=0.4,
        category_weight=0.2,
        temperature=0.07 if normalize else 1.0,
        normalize=normalize,
        reduction=reduction,
        split=split,
        seed=3,
    )
    for step in range(3):
        assert occl.step == step
        expected = naive_loss(occl, features, labels, weight)
        loss = occl(features, labels, weight)
        check_loss(loss, expected, features, weight, rtol=1e-6, atol=1e-9)


def rows(net: Net) -> Tensor:
    return net.classifier.weight.detach().flatten(1)


def train(net: Net, cbp: Attachment, steps: int = 3) -> list[Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    history = [rows(net).clone()]
    for _ in range(steps):
        x, labels = torch.randn(2, 3, 8, 8), torch.randint(0, K - 1, (2, 4, 4))
        loss = F.cross_entropy(net(x), labels) + cbp(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(rows(net).clone())
    return history


@pytest.mark.parametrize("update", ["frozen", "gradient"])
def test_learned_cbp_moves(update: str) -> None:
    net = Net()
    first, *others = train(net, ao.attach(net, ao.CBP(K, D, update=update)))
    assert all(torch.equal(first, weight) == (update == "frozen") for weight in others)


def test_penalised_cbp_keeps_its_length_and_pays_for_cosines() -> None:
    net = Net()
    cbp = ao.attach(net, ao.CBP(K, D, update="penalty", penalty_weight=0.5))
    train(net, cbp)
    with torch.no_grad():
        net.classifier.weight.mul_(torch.rand(K, 1, 1, 1) + 0.5)
    net(torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(rows(net).norm(dim=1), torch.full((K,), 2.0))
    unit = rows(net) / 2
    pairs = [(unit[i] @ unit[j]) ** 2 for i in range(K) for j in range(K) if i != j]
    loss = cbp(torch.zeros(2, 4, 4, dtype=torch.long))
    torch.testing.assert_close(loss.detach(), 0.5 * torch.stack(pairs).mean())
    assert loss > 0


def test_moving_average_cbp_follows_centroids_at_the_next_forward() -> None:
    net = Net()
    cbp = ao.attach(net, ao.CBP(K, D, update="ema", momentum=0.9))
    x, labels = torch.randn(2, 3, 8, 8), torch.randint(0, K - 1, (2, 4, 4))
    before = rows(net).clone()
    loss = F.cross_entropy(net(x), labels) + cbp(labels)
    loss.backward()  # the weight that the forward used is still there
    assert torch.equal(rows(net), before)
    features = net.body(x).detach().relu().movedim(1, -1)
    expected = before.clone()
    for k in range(K - 1):
        expected[k] = 0.9 * before[k] + 0.1 * features[labels == k].mean(0)
    net(x)
    torch.testing.assert_close(rows(net), expected)
    net(x)  # once
    torch.testing.assert_close(rows(net), expected)
    net.eval()
    net(x)
    torch.testing.assert_close(rows(net), expected)
