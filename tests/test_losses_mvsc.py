"""MVSC against its equations, written out class by class and group by group."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao
from anchorops.reference import class_keys, split_groups
from tests.helpers.operators import check_loss

K, D = 5, 8


def batch() -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(0)
    features = torch.randn(2, D, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, K - 1, (2, 4, 5))  # class K − 1 is absent
    labels[0, 0] = 255
    labels[labels == 2] = 0
    labels[1, 2, :2] = 2  # two pixels: some of its groups are empty
    return features, labels, nn.Linear(D, K).double()


def naive_loss(mvsc: ao.MVSC, features: Tensor, labels: Tensor, classifier: nn.Linear) -> Tensor:
    groups, prototypes, seed = mvsc.groups, mvsc.prototypes, mvsc.step + (mvsc.seed << 32)
    keys, counts = class_keys(features, labels, K, per_image=False, ignore_index=255)
    if groups > 1:
        keys = split_groups(keys, counts, groups, seed)
    rows = features.movedim(1, -1).flatten(0, -2)
    r = {
        (k, g): rows[keys.flatten() == k * groups + g].mean(0)
        for k in range(K)
        for g in range(groups)
        if (keys == k * groups + g).any()
    }
    present = sorted({k for k, _ in r})
    middle = [prototypes[:, k].mean(0) for k in range(K)]
    fca, visual = [], []
    for (k, g), centroid in r.items():
        logits = torch.stack(
            [F.cosine_similarity(centroid, middle[j], dim=0) / mvsc.temperature for j in present]
        )
        fca.append(logits.logsumexp(0) - logits[present.index(k)])
        vector = prototypes[g, k]
        if mvsc.enhance:
            vector = vector + centroid - centroid.detach()
        visual.append(F.cross_entropy(classifier(vector)[None], torch.tensor([k])))
    loss = (
        mvsc.fca_weight * torch.stack(fca).mean() + mvsc.visual_weight * torch.stack(visual).mean()
    )
    if groups > 1:
        drawn = split_groups(
            torch.zeros(1, groups).long(), torch.tensor([groups]), 2, seed
        ).flatten()
        half = [g for g in range(groups) if drawn[g] == 1]
        rest = [g for g in range(groups) if drawn[g] == 0]
        assert len(half) == groups // 2
        cosines = [
            F.cosine_similarity(prototypes[half, k].mean(0), prototypes[rest, k].mean(0), dim=0)
            for k in range(K)
        ]
        loss = loss + mvsc.cos_weight * (1 - torch.stack(cosines)).mean()
    return loss


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("enhance", [True, False])
def test_loss_and_gradients(groups: int, enhance: bool) -> None:
    features, labels, classifier = batch()
    mvsc = ao.MVSC(K, D, groups=groups, enhance=enhance, seed=1).double()
    inputs = [features, mvsc.prototypes, *classifier.parameters()]
    for _ in range(2):
        expected = naive_loss(mvsc, features, labels, classifier)
        check_loss(mvsc(features, labels, classifier), expected, *inputs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("off", ["fca_weight", "cos_weight", "visual_weight"])
def test_terms_can_be_off(off: str) -> None:
    features, labels, classifier = batch()
    mvsc = ao.MVSC(K, D, **{off: 0.0}).double()  # type: ignore[arg-type]
    expected = naive_loss(mvsc, features, labels, classifier)
    torch.testing.assert_close(mvsc(features, labels, classifier), expected)
    assert mvsc.terms[off.removesuffix("_weight")] == 0


@pytest.mark.parametrize("dim", [64, 720])
def test_prototypes_start_with_one_length(dim: int) -> None:
    """Root mean square √2, as the docstring says."""
    rows = ao.MVSC(19, dim).prototypes.detach()
    assert float(rows.square().sum(-1).mean()) == pytest.approx(2, rel=0.1)
