"""The message of every wrong argument; which labels are ignored."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops import diagnostics, plots
from anchorops.doctor.catalogue import ENTRIES, Case, cases

FEATURES, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 10, dtype=torch.int64)
ANCHORS = torch.zeros(6, 3)
POINTS, POINT_LABELS = torch.zeros(7, 3), torch.zeros(7, dtype=torch.int64)


def call(function: str, **arguments: Any) -> Any:
    defaults: dict[str, Any] = {"features": FEATURES, "labels": LABELS}
    if function == "pixel_to_anchor_mse":
        defaults["anchors"] = ANCHORS
    else:
        defaults["num_classes"] = 6
    module = ao.ops if function in ao.ops.__all__ else ao
    return getattr(module, function)(**(defaults | arguments))


EVERYWHERE: list[tuple[dict[str, Any], str]] = [
    ({"features": [1.0]}, r"features: expected a tensor \(N, D\), .*, got \[1.0\] of type list"),
    ({"features": [[1.0] * 99] * 9}, r"features: expected .*, got \[\[1.0, .{,80} … of type list$"),
    ({"features": torch.zeros(3)}, r"features: expected a tensor .*, got .* of shape \(3,\) on"),
    ({"features": FEATURES.int()}, "features: expected float32, .* or float64, got torch.int32"),
    (
        {"features": FEATURES.to(torch.complex64)},
        "features: expected float32, .*, got torch.complex64",
    ),
    (
        {"features": FEATURES[:, :0], "labels": LABELS[:, :0]},
        r"features: expected at least one channel, got shape \(2, 0, 4, 5\)",
    ),
    ({"labels": LABELS.float()}, "labels: expected an integer dtype, got torch.float32"),
    ({"labels": LABELS.bool()}, "labels: expected an integer dtype, got torch.bool"),
    ({"labels": None}, r"labels: expected \(B, H', W'\) for .* \(2, 3, 4, 5\), got None"),
    ({"labels": LABELS[0]}, r"labels: expected \(B, H', W'\) for .*, got .* \(8, 10\) on cpu"),
    ({"labels": LABELS[:1]}, "labels: expected batch size 2, as features, got 1"),
    (
        {"labels": LABELS[:, :0]},
        r"labels: expected at least one label per image, got shape \(2, 0, 10\)",
    ),
    (
        {"features": FEATURES.flatten(2), "labels": LABELS.flatten(1)},
        "labels: expected 20 points, as features, got 80",
    ),
    (
        {"features": FEATURES.flatten(2), "labels": LABELS},
        r"labels: expected \(B, N\) for features of shape \(2, 3, 20\), got .* \(2, 8, 10\)",
    ),
    ({"features": POINTS, "labels": POINT_LABELS[:6]}, "labels: expected 7 points, .*, got 6"),
    ({"features": POINTS}, r"labels: expected \(N,\) for features of shape \(7, 3\), got .*"),
    ({"ignore_index": 1.0}, "ignore_index: expected an int of 64 bits, got 1.0 of type float"),
    ({"ignore_index": True}, "ignore_index: expected an int of 64 bits, got True of type bool"),
    ({"ignore_index": 2**63}, "ignore_index: expected an int of 64 bits, got 9223372036854775808"),
    ({"check_labels": 1}, "check_labels: expected True or False, got 1 of type int"),
    (
        {"labels": LABELS + 6, "check_labels": True},
        r"labels: expected values in \[0, 6\) or ignore_index = 255, got \[6\]",
    ),
]


NUM_CLASSES: list[tuple[dict[str, Any], str]] = [
    ({"num_classes": 0}, "num_classes: expected 1 to 65536, got 0"),
    ({"num_classes": 65_537}, "num_classes: expected 1 to 65536, got 65537"),
    ({"num_classes": 6.0}, "num_classes: expected an int, got 6.0 of type float"),
    ({"num_classes": True}, "num_classes: expected an int, got True of type bool"),
]


PER_IMAGE = ({"per_image": 1}, "per_image: expected True or False, got 1 of type int")


ANCHOR_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"anchors": ANCHORS[:, :2]}, r"anchors: expected \[.*, 3\] \(features have D = 3\), got .*"),
    ({"anchors": ANCHORS[0]}, r"anchors: expected \[.*, 3\] .*, got .* of shape \(3,\) on cpu"),
    ({"anchors": [0.0]}, r"anchors: expected \[.*, 3\] .*, got \[0.0\] of type list"),
    ({"anchors": ANCHORS.long()}, "anchors: expected a floating dtype, got torch.int64"),
]


MOMENTS_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"anchors": ANCHORS[:5]}, "anchors: expected 6 rows, as num_classes, got 5"),
    ({"groups": 0}, "groups: expected an int of at least 1, got 0 of type int"),
    ({"groups": True}, "groups: expected an int of at least 1, got True of type bool"),
    ({"groups": 2.0}, "groups: expected an int of at least 1, got 2.0 of type float"),
    ({"groups": 2}, "seed: expected an int of 64 bits or an int64 tensor .*, got None"),
    ({"groups": 2, "seed": 1.0}, "seed: expected an int of 64 bits or .*, got 1.0 of type float"),
    ({"groups": 2, "seed": 2**63}, "seed: expected an int of 64 bits or .*, got 92233720368547758"),
    ({"groups": 2, "seed": torch.zeros(1)}, "seed: expected one int64 on cpu, got torch.float32"),
    ({"groups": 2, "seed": torch.zeros(2).long()}, r"seed: expected one int64 .* \(2,\) on cpu"),
    (
        {
            "groups": 2**15,
            "seed": 1,
            "num_classes": 2**15,
            "per_image": True,
            "ignore_index": -1,
        },
        r"num_classes: expected fewer than 2\^31 images × classes × groups, got 2147483648",
    ),
]


CASES = [
    *(
        (function, *case)
        for function in ("class_moments", "class_centroids", "pixel_to_anchor_mse")
        for case in EVERYWHERE
    ),
    *((f, *case) for f in ("class_moments", "class_centroids") for case in NUM_CLASSES),
    *((f, *PER_IMAGE) for f in ("class_moments", "class_centroids")),
    *((f, *case) for f in ("class_moments", "pixel_to_anchor_mse") for case in ANCHOR_ARGUMENTS),
    *(("class_moments", *case) for case in MOMENTS_ONLY),
    (
        "pixel_to_anchor_mse",
        {"reduction": "none"},
        "reduction: expected 'mean' or 'sum', got 'none'",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "message"), CASES, ids=lambda v: str(v)[:50])
def test_messages(function: str, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{function}: {message}"):
        call(function, **arguments)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int64, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_check_labels(dtype: torch.dtype):
    labels = torch.arange(80).remainder(6).view(1, 8, 10).expand(2, 8, 10).to(dtype)
    call("class_moments", labels=labels, check_labels=True)
    call("class_moments", labels=labels, check_labels=True, ignore_index=5, num_classes=5)
    message = r"labels: expected values in \[0, 4\) or ignore_index = 255, got \[4, 5\]$"
    with pytest.raises(ValueError, match=message):
        call("class_moments", labels=labels, check_labels=True, num_classes=4)
    with pytest.raises(ValueError, match=r"got \[4, 5\]$"):  # of another image only
        ones = torch.ones_like(labels)
        call(
            "class_moments", labels=torch.cat([ones, labels])[1:3], check_labels=True, num_classes=4
        )


def test_check_labels_compares_values_not_bits():
    """255 as int8 would be −1, and −1 as uint8 would be 255."""
    labels = torch.full_like(LABELS, -1, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"got \[-1\]"):
        call("class_moments", labels=labels, check_labels=True)
    labels = torch.full_like(LABELS, 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"got \[255\]"):
        call("class_moments", labels=labels, check_labels=True, ignore_index=-1)


NONE_GIVEN = "ignore_index: expected a value where num_classes > 255 .*, got none, with .* = 256$"


ANY_IGNORE_INDEX: dict[str, Callable[..., Any]] = {
    "class_moments": lambda k, **i: ao.ops.class_moments(FEATURES, LABELS, k, **i),
    "class_centroids": lambda k, **i: ao.class_centroids(FEATURES, LABELS, k, **i),
    "pixel_to_anchor_mse": lambda k, **i: ao.pixel_to_anchor_mse(
        FEATURES, LABELS, torch.zeros(k, 3), **i
    ),
    **{
        function.__name__: lambda k, function=function, **i: function(
            torch.zeros(2, k, 4, 5), LABELS, **i
        )
        for function in (ao.ops.softmax_moments, ao.pixel_cross_entropy, ao.pixel_confusion)
    },
    **{
        loss.__name__: lambda k, loss=loss, **i: loss(**i)(torch.zeros(2, k, 4, 5), LABELS)
        for loss in (ao.CrossEntropy, ao.Dice, ao.CrossEntropyDice, ao.Lovasz)
    },
    "confusion": lambda k, **i: ao.confusion(LABELS, LABELS, k, **i),
    "MeanIoU": lambda k, **i: ao.MeanIoU(k, **i),
    "SAR": lambda k, **i: ao.SAR(k, 3, **i),
    "CBP": lambda k, **i: ao.CBP(k, 256, **i),
    "OCCL": lambda k, **i: ao.OCCL(k, 3, **i),
    "CeCo": lambda k, **i: ao.CeCo(k, 3, **i),
    "MVSC": lambda k, **i: ao.MVSC(k, 3, **i),
    "CentroidGeometry": lambda k, **i: diagnostics.CentroidGeometry(k, 3, **i),
    "LabelImbalance": lambda k, **i: diagnostics.LabelImbalance(k, **i),
    "features_with_anchors": lambda k, **i: plots.features_with_anchors(
        FEATURES, LABELS, torch.zeros(k, 3), **i
    ),
}


@pytest.mark.parametrize("function", ANY_IGNORE_INDEX)
def test_the_default_ignore_index_never_is_a_class(function: str):
    call = ANY_IGNORE_INDEX[function]
    call(255)
    with pytest.raises(ValueError, match=f"^{function}: {NONE_GIVEN}"):
        call(256)
    for ignored in (-1, 255):  # a class is ignored if it is given explicitly
        call(256, ignore_index=ignored)
    with pytest.raises(ValueError, match=f"^{function}: ignore_index: expected an int of 64 bits"):
        call(6, ignore_index=2.0)


def test_class_255_counts():
    labels = torch.full_like(LABELS, 255)
    for ignored, count in ((-1, 40), (255, 0)):
        assert (
            ao.ops.class_moments(FEATURES, labels, 256, ignore_index=ignored).counts[255] == count
        )
    both = ao.Combined(ao.OCCL(256, 3, ignore_index=-1), ao.SAR(256, 3, ignore_index=-1))
    assert both.ignore_index == -1
    both(FEATURES, labels, torch.randn(256, 3))
    assert both.terms["occl.present"] == 1


def test_check_labels_shows_eight_values():
    with pytest.raises(ValueError, match=r"got \[6, 7, 8, 9, 10, 11, 12, 13, '…'\]"):
        call(
            "class_moments",
            labels=torch.arange(80).view(1, 8, 10).repeat(2, 1, 1),
            check_labels=True,
        )


def nested(x: Tensor, **options: Any) -> Tensor:
    return torch.nested.nested_tensor([*x], **options)


ONE_SHAPE = "a tensor of one shape"
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {  # and what is expected instead
    "dtype": (lambda x: x.long() if x.is_floating_point() else x.double(), ""),
    "sparse": (lambda x: x.to_sparse(), "a strided tensor"),
    "nested": (nested, ONE_SHAPE),
    "jagged": (lambda x: nested(x, layout=torch.jagged), ONE_SHAPE),
    "device": (lambda x: x.to("meta"), ""),
    "images": (lambda x: x[1:], ""),
}
ONLY_SIZE = {  # what a call of the catalogue reads only the size of; CeCo checks upsampled_sums
    "pixel_argmax with confidence": ("labels",),
    "pixel_kl_divergence": ("valid",),
    "upsampled_sums": ("features", "labels"),
}


MAPS = Case(ENTRIES["confusion"], ENTRIES["confusion"].samples[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("case", [*cases("small"), MAPS], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_wrong_tensors(case: Case, change: str):
    """Each tensor of another kind is named; if it is unlike the others, one of them."""
    inputs, (convert, expected) = case.sample.inputs(), CHANGES[change]
    read = [name for name in inputs if name not in ONLY_SIZE.get(case.entry.name, ())]
    unlike_others = change in ("device", "images")
    few = len(read) < 2 or (change == "images" and case.entry.tables)
    if not read or (unlike_others and few):
        pytest.skip("it reads no such tensors")
    for name in read:
        named = r"\w+" if unlike_others else f"{name}(_logits)?"
        with pytest.raises(ValueError, match=rf"^\w+: {named}: expected {expected}.*, got "):
            case.ours(**inputs | {name: convert(inputs[name])})
            pytest.fail(f"{name} was accepted")


def test_class_weights_on_the_meta_device():
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"^Dice: weight: .* build the loss outside"),
    ):
        ao.Dice(weight=[1.0, 2.0, 3.0])
    loss, plain = ao.CrossEntropy(weight=torch.ones(3)), ao.CrossEntropy()
    expected, state = loss(FEATURES, LABELS), copy.deepcopy(loss.state_dict())
    plain.to_empty(device="cpu")
    plain(FEATURES, LABELS)  # it has no state
    loss.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"^CrossEntropy: state: expected values: .* to_empty"):
        loss(FEATURES, LABELS)
    loss.load_state_dict(state)
    assert torch.equal(loss(FEATURES, LABELS), expected)


def test_labels_of_bits() -> None:
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8).view(torch.bits8)
    with pytest.raises(ValueError, match="labels: expected an integer dtype, got"):
        ao.pixel_cross_entropy(torch.randn(2, 3, 4, 4), labels)
