"""Pixel losses of a softmax: values, gradients and options, compared with torch."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao
from anchorops._ops.kth_largest import kth_largest
from tests.helpers.operators import check_loss

K = 5
both_backends = pytest.mark.on("cpu", "reference")


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (3, K, 4, 6), the upsampled logits, and labels (3, 16, 24) without class 3; the last
    image has only class 0."""
    logits = (2 * torch.randn(3, K, 4, 6, dtype=dtype)).requires_grad_()
    labels = torch.randint(0, K, (3, 16, 24))
    labels[labels == 3] = 1
    labels[2] = 0
    return logits, F.interpolate(logits, (16, 24), mode="bilinear"), labels


def ignoring(labels: Tensor) -> Tensor:
    return torch.where(torch.rand(labels.shape) < 0.2, 255, labels)


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_dice_gradient_of_an_absent_class_of_almost_no_probability(absent):
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 2] = -60.0  # its score 1/Σp and the derivative of this are beyond float32
    logits.requires_grad_()
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    ao.Dice(smooth=1.0, smooth_denominator=0.0, absent=absent)(logits, labels).backward()
    assert logits.grad.isfinite().all() and logits.grad.any()


@both_backends
def test_kth_largest_is_that_of_sorting(backend):
    values = torch.rand(100_000) * torch.logspace(-30, 5, 100_000)  # more than a thread's part
    values[:50] = values[50]  # equal ones
    values[60:80] = 0
    ordered = values.sort(descending=True).values
    for k in (1, 2, 10, 33_333, len(ordered)):
        assert kth_largest(values, k) == ordered[k - 1]
    assert kth_largest(values, len(ordered) + 1) == 0
    assert kth_largest(values[:0], 1) == 0
    values[500] = -math.nan
    assert kth_largest(values, 1) == math.inf
    assert kth_largest(values, 2) == values[~values.isnan()].max()


@pytest.mark.parametrize(
    "loss",
    [
        ao.CrossEntropy(ohem_threshold=0.5, ohem_min_kept=10),
        ao.CrossEntropy(focal_gamma=0.5),
        ao.Dice(),
        ao.Dice(log=True, absent="zero"),
        ao.Dice(per_image=True, squared=True, gamma=0.5),
        ao.CrossEntropyDice(),
    ],
    ids=str,
)
def test_losses_do_not_swallow_nan(loss):
    logits, _, labels = inputs(torch.float32)
    with torch.no_grad():
        logits[0, 0, 0, 0] = math.nan
    value = loss(logits, labels)
    value.backward()
    assert value.isnan() and not logits.grad.isfinite().all()


def test_accuracy_is_logged():
    logits, z, labels = inputs()
    labels = ignoring(labels)
    loss = ao.CrossEntropyDice(ao.CrossEntropy(accuracy=True), ce_weight=0.5, dice_weight=2.0)
    total = loss(logits, labels)
    right = (z.argmax(1) == labels).sum() / (labels != 255).sum()
    counts = {"labels_out_of_range", "labels_ignored"}
    assert set(loss.terms) == {"ce", "dice", "accuracy", *counts}
    torch.testing.assert_close(loss.terms["accuracy"], right.to(total.dtype))
    parts = ao.CrossEntropy()(logits, labels), ao.Dice()(logits, labels)
    check_loss(total, 0.5 * parts[0] + 2 * parts[1], logits)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("settings", "defined"),
    [
        ({"alpha": 0.7, "beta": 0.3, "smooth": 1.0}, True),
        ({"alpha": 0.3, "beta": 0.7, "squared": True}, True),
        ({"alpha": 0.7, "beta": 0.7, "squared": True, "smooth_denominator": 1.0}, True),
        ({"alpha": 0.7, "beta": 0.3, "squared": True}, False),
        ({"smooth": 1.0, "smooth_denominator": 0.5}, False),
    ],
)
def test_power_of_a_negative_mean(settings, defined, log):
    """Settings with which the mean may be negative have no power."""
    labels = torch.randint(0, K, (2, 8, 9))
    truth = F.one_hot(labels, K).movedim(-1, 1).float()
    means = [ao.Dice(log=log, **settings)(a * truth, labels) for a in (0.0, 1.0, 2.0, 4.0, 30.0)]
    assert all(mean > -1e-6 for mean in means) == defined
    if defined:
        loss = ao.Dice(log=log, gamma=0.75, **settings)
        powers = [loss(a * truth, labels) for a in (0.0, 1.0, 2.0, 4.0)]
        torch.testing.assert_close(powers, [mean**0.75 for mean in means[:4]])
    else:
        with pytest.raises(ValueError, match="Dice: gamma: expected 1 with smooth above"):
            ao.Dice(log=log, gamma=0.75, **settings)


@both_backends
@pytest.mark.parametrize("of", ["pixel", "class"])
@pytest.mark.parametrize(
    "options", [{}, {"focal_gamma": 2.0}, {"ohem_threshold": 0.9}, {"ohem_min_kept": 2}]
)
def test_what_has_weight_0_may_have_an_infinite_loss(options, of, backend):
    """Loss and gradients are those without the first pixel."""
    logits = torch.tensor([[-torch.inf, 0, 1], [0, 1, 2], [3, 1, 0]], requires_grad=True)
    weights = torch.tensor([0.0 if of == "pixel" else 1, 2, 0.5], requires_grad=True)
    classes, labels = [0.0, 1, 1] if of == "class" else None, torch.tensor([0, 1, 2])
    loss = ao.CrossEntropy(classes, **options)(logits, labels, weights)
    few, kept = (x.detach()[1:].requires_grad_() for x in (logits, weights))
    expected = ao.CrossEntropy(**options)(few, labels[1:], kept)
    torch.testing.assert_close(loss, expected)
    dlogits, dweights = torch.autograd.grad(loss, (logits, weights))
    dfew, dkept = torch.autograd.grad(expected, (few, kept))
    torch.testing.assert_close(dlogits, torch.cat([torch.zeros(1, 3), dfew]))
    torch.testing.assert_close(dweights[1:], dkept)
    assert dweights[0].isfinite() and (of == "pixel" or dweights[0] == 0)


@both_backends
def test_sums_of_equal_weights_are_exact(backend):
    """Sums of float32 numbers would be wrong by 0.5 %."""
    logits, labels = torch.randn(2, 2, 256, 256), torch.randint(0, 2, (2, 1024, 1024))
    weighted = ao.CrossEntropy()(logits, labels, torch.full(labels.shape, 0.3))
    torch.testing.assert_close(weighted, ao.CrossEntropy()(logits, labels), rtol=1e-6, atol=0)


@both_backends
@pytest.mark.parametrize("num_classes", [5, 10, 19, 40])
def test_a_pixel_at_the_bound_is_used_in_both_passes_or_in_none(backend, num_classes):
    """All classes are equally probable, up to rounding."""
    for value in (0.0, 0.1, 3.3, 15.3):
        logits = torch.full((1, num_classes, 32, 32), value, requires_grad=True)
        labels = torch.randint(0, num_classes, (1, 128, 128))
        loss = ao.CrossEntropy(ohem_threshold=1 / num_classes)(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        share = loss.item() / math.log(num_classes)
        assert share == 0 or share == pytest.approx(1, 1e-5)
        assert gradient.any() == (share > 0)
        constant = 5 * torch.randn(1, num_classes, 1, 1)
        logits = constant.repeat(1, 1, 32, 32).requires_grad_()
        for threshold in constant.softmax(1)[0, 0].item() * torch.tensor([1 - 6e-8, 1, 1 + 6e-8]):
            loss = ao.CrossEntropy(ohem_threshold=float(threshold))(logits, 0 * labels)
            (gradient,) = torch.autograd.grad(loss, logits)
            assert gradient.any() == (loss > 0)


def test_class_weights_are_in_the_state_dict_as_in_torch():
    weight = torch.rand(K)
    theirs, ours = torch.nn.CrossEntropyLoss(weight), ao.CrossEntropy(torch.ones(K))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, weight)
    kept = ao.CrossEntropy(weight)
    weight[0] = 100
    assert kept.weight is not None and kept.weight[0] != 100


@pytest.mark.parametrize(
    "options", [{}, {"ohem_threshold": 0.9}, {"focal_gamma": 2.0}, {"ohem_min_kept": 9}]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_smoothing_is_0_where_all_classes_have_weight_0(weighted, options):
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    labels = torch.ones(1, 8, 8, dtype=torch.int64)
    weights = torch.ones(1, 8, 8) if weighted else None
    module = ao.CrossEntropy(torch.tensor([1.0, 0.0]), label_smoothing=0.1, **options)
    loss = module(logits, labels, weights)
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("gamma", [0.5, 0.75, 1.0, 2.0])
@pytest.mark.parametrize(("margin", "smoothing"), [(200.0, 0.0), (18.0, 0.1)])
def test_focal_gradient_where_the_network_is_sure(margin, smoothing, gamma, ratio):
    """Also where the loss is 0."""
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 1] = margin
    logits.requires_grad_()
    labels = torch.ones(1, 4 * ratio, 4 * ratio, dtype=torch.int64)
    ao.CrossEntropy(focal_gamma=gamma, label_smoothing=smoothing)(logits, labels).backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-3


@pytest.mark.on("cpu", "reference", "simulated_triton")
@pytest.mark.parametrize("margin", [18.0, 40.0])
def test_smallest_focal_factor(margin: float, backend: str):
    """1 − p_y is at least 2^-24, and constant below."""
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 1] = margin
    logits.requires_grad_()
    loss = ao.CrossEntropy(focal_gamma=0.5, label_smoothing=0.3)
    value = loss(logits, torch.ones(1, 4, 4, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(value, logits)
    smoothing, factor = 0.1, 2.0**-12
    torch.testing.assert_close(value, torch.tensor(2 * smoothing * margin * factor))
    expected = smoothing * factor * torch.tensor([-1.0, 2.0, -1.0])
    torch.testing.assert_close(gradient.sum((0, 2, 3)), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dtype", "classes"), [(torch.int8, 150), (torch.uint8, 300)])
def test_classes_beyond_the_labels_dtype(dtype, classes):
    logits = torch.randn(1, classes, 4, 4)
    labels = torch.randint(0, 100, (1, 8, 8))
    for module in (
        ao.CrossEntropy(ignore_index=-1),
        ao.CrossEntropy(ohem_min_kept=9, ignore_index=-1),
    ):
        for weights in (None, torch.rand(1, 8, 8)):
            expected = module(logits, labels, weights)
            assert torch.equal(module(logits, labels.to(dtype), weights), expected) and expected > 0


@pytest.mark.parametrize(
    "make", [ao.BinaryCrossEntropy, lambda w, **o: ao.CrossEntropy([w, 1], **o)]
)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_hard_examples_with_pixel_weights_of_1(make, label_smoothing):
    module = make(0.0, ohem_threshold=0.7, label_smoothing=label_smoothing)
    logits = torch.randn(1, 1 if module.sigmoid else 2, 8, 8)
    labels = torch.randint(0, 2, (1, 16, 16))
    torch.testing.assert_close(
        module(logits, labels), module(logits, labels, torch.ones(labels.shape))
    )


def test_what_a_caller_changes_in_place_does_not_change_the_terms() -> None:
    """The loss, and the terms that were returned."""
    x, labels = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 10))
    for make in (ao.CrossEntropy, ao.Dice, ao.CrossEntropyDice, ao.Lovasz):
        module = make()
        before = module(x, labels).detach().clone()
        loss = module(x, labels)
        loss.mul_(3)
        parts = [x for name, x in module.terms.items() if not name.startswith("labels")]
        torch.testing.assert_close(torch.stack(parts).sum(), before)
        terms = copy.deepcopy(module.terms)
        for term in module.terms.values():
            term += 1
        module.terms.clear()
        assert module.terms == terms


@pytest.mark.on("cpu")
def test_squares_above_probabilities(backend: str) -> None:
    """With squared and alpha above beta a denominator may be below beta."""
    p = torch.tensor([0.4375, 0.28125, 0.28125])
    x = p.log().view(1, 3, 1, 1).requires_grad_()
    for alpha, beta in ((2.0, 0.5), (1.0, 0.25), (1.0, 1.0)):
        dice = ao.Dice(alpha=alpha, beta=beta, squared=True)
        denominator = p[0] + alpha * (p[0] ** 2 - p[0]) + beta * (1 - p[0])
        loss = dice(x, torch.zeros(1, 1, 1, dtype=torch.long))
        torch.testing.assert_close(loss.detach(), 1 - p[0] / denominator)


def with_a_sum(base: Any) -> Any:
    """A subclass whose loss has one part more."""

    class Sum(base):
        def parts(self, moments: ao.ops.SoftmaxMoments, logits: Tensor) -> Any:
            return super().parts(moments, logits) | {"sum": moments.losses.sum()}

    return Sum


@pytest.mark.on("cpu")
@pytest.mark.parametrize("base", [ao.CrossEntropy, ao.Dice, ao.CrossEntropyDice])
def test_a_subclass_with_other_parts(base: Any, backend: str) -> None:
    x, labels = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 10))
    added = ao.pixel_cross_entropy(x, labels, reduction="sum")
    check_loss(with_a_sum(base)()(x, labels), base()(x, labels) + added, x)
    if base is ao.Dice:
        whole = ao.CrossEntropyDice(dice=with_a_sum(base)())
        torch.testing.assert_close(whole(x, labels), ao.CrossEntropyDice()(x, labels) + added)
        assert {"ce", "dice", "sum"} < whole.terms.keys()


def test_parts_of_equal_names() -> None:
    x, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 6, 10))
    with pytest.raises(ValueError, match="parts of other names than the cross-entropy's, got sum"):
        ao.CrossEntropyDice(with_a_sum(ao.CrossEntropy)(), with_a_sum(ao.Dice)())(x, labels)


@pytest.mark.on("cpu")
def test_statistics_that_a_part_of_a_sum_needs(backend: str) -> None:
    class Focus(ao.CrossEntropy):
        def wanted(self) -> Any:
            return super().wanted()._replace(correct=True)

        def parts(self, moments: ao.ops.SoftmaxMoments, logits: Tensor) -> Any:
            assert moments.correct is None  # the sum decides on the accuracy
            return super().parts(moments, logits)

    ao.CrossEntropyDice(Focus())(torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 6, 10)))
