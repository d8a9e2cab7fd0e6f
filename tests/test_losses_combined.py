"""Combined: several methods in one pass over the features."""

import copy

import pytest
import torch
from torch import nn

import anchorops as ao
from anchorops._ops import class_moments as class_moments_module
from anchorops.losses import Regularizer
from anchorops.losses.statistics import Request, class_statistics
from tests.helpers.methods import METHODS, D, K, batch, open_gate
from tests.helpers.operators import check_loss


def methods_of(together: Regularizer) -> nn.ModuleList:
    assert isinstance(together, ao.Combined)
    return together.methods


def test_combined_equals_its_parts_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, classifier = batch()
    together = open_gate(METHODS["combined"]())
    apart = [copy.deepcopy(method) for method in methods_of(together)]
    passes = []
    moments = class_moments_module.unchecked_moments

    def counted(*args: object, **kwargs: object) -> ao.ops.ClassMoments:
        passes.append(kwargs["groups"])
        return moments(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("anchorops.losses.statistics.unchecked_moments", counted)
    for _ in range(2):
        loss = together(features, labels, classifier)
        assert passes == [4]  # OCCL's views are pairs of MVSC's groups
        expected = torch.stack([method(features, labels, classifier) for method in apart]).sum()
        passes.clear()
        check_loss(loss, expected, features, rtol=1e-5, atol=1e-7)


def test_sums_only_for_methods_that_request_them() -> None:
    """Statistics that SAR does not request are not reduced over the ranks."""
    features, labels, _ = batch()
    anchored = Request(anchors=torch.randn(K, D), with_sums=False)
    views = Request(groups=2, seed=torch.zeros((), dtype=torch.int64))
    for requests in ([anchored], [anchored, views]):
        moments = class_statistics(features, labels, K, requests, 255)[0]
        assert moments.sums.numel() == 0 and moments.sqdists.shape == (K,)


def test_combined_with_images_and_two_sets_of_anchors() -> None:
    features, labels, classifier = batch()
    together = ao.Combined(
        ao.SAR(K, D, gate="per_class", delta=0.0),
        ao.SAR(K, D, embed=False),
        ao.OCCL(K, D, split="images"),
        ao.MVSC(K, D, groups=3),
        ao.CeCo(K, D, reduced_dim=7, center_dim=9, dropout=0.0, resolution="feature"),
    )
    apart = [copy.deepcopy(method) for method in methods_of(together)]
    expected = torch.stack([method(features, labels, classifier) for method in apart]).sum()
    torch.testing.assert_close(together(features, labels, classifier), expected)
    assert {"sar1.aux", "sar1.p2a", "sar2.p2a", "occl.centroid"} < set(together.terms)


def test_combined_refuses_what_does_not_fit() -> None:
    for other, message in (
        (ao.OCCL(K + 1, D), "num_classes"),
        (ao.OCCL(K, D + 1), "dim"),
        (ao.OCCL(K, D, ignore_index=0), "ignore_index"),
        (ao.OCCL(K, D, seed=1), "seed"),
    ):
        with pytest.raises(ValueError, match=f"Combined: regularizers: expected one {message}"):
            ao.Combined(ao.MVSC(K, D), other)
    for regularizers, message in (
        ((), "at least one"),
        ((ao.CBP(K, D), ao.CBP(K, D, update="ema")), "at most one CBP"),
    ):
        with pytest.raises(ValueError, match=f"Combined: regularizers: expected {message}"):
            ao.Combined(*regularizers)
