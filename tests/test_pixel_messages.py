"""The message of every wrong argument of the functions and losses of logits."""

from typing import Any

import pytest
import torch

import anchorops as ao

LOGITS, LABELS = torch.zeros(2, 5, 4, 6), torch.zeros(2, 16, 24, dtype=torch.int64)
LOSSES = (ao.CrossEntropy, ao.Dice, ao.CrossEntropyDice)

INPUTS: list[tuple[dict[str, Any], str]] = [
    ({"logits": None}, r"logits: expected a tensor \(N, K\), .*, got None of type NoneType"),
    ({"logits": LOGITS[0, 0, 0]}, r"logits: expected a tensor .*, got .* of shape \(6,\) on cpu"),
    ({"logits": LOGITS.int()}, "logits: expected float32, .* or float64, got torch.int32"),
    ({"logits": LOGITS[:, :0]}, r"logits: expected 2 to 65536 classes .*, got .*\(2, 0, 4, 6\)"),
    ({"logits": LOGITS[:, :1]}, r"logits: expected at least 2 .*torch.cat.*, got shape"),
    ({"logits": LOGITS[:, :, :0]}, "logits: expected at least one pixel per image, got shape"),
    ({"labels": None}, r"labels: expected a tensor \(2, H, W\), as logits, got None of type"),
    ({"labels": LABELS[0]}, r"labels: expected .*, as logits, got .* \(16, 24\) on cpu"),
    ({"labels": LABELS[:1]}, r"labels: expected .*, as logits, got .* \(1, 16, 24\) on cpu"),
    ({"labels": LABELS.float()}, "labels: expected an integer dtype, got torch.float32"),
    ({"labels": LABELS.bool()}, "labels: expected an integer dtype, got torch.bool"),
    ({"ignore_index": 1.0}, "ignore_index: expected an int of 64 bits, got 1.0 of type float"),
    ({"align_corners": None}, "align_corners: expected True or False, got None of type NoneType"),
    ({"align_corners": "yes"}, "align_corners: expected True or False, got 'yes' of type str"),
    ({"check_labels": 1}, "check_labels: expected True or False, got 1 of type int"),
    ({"labels": LABELS + 5, "check_labels": True}, r"labels: expected values in \[0, 5\) .*\[5\]"),
]

FLAGS = [
    ({flag: 1}, f"{flag}: expected True or False, got 1 of type int")
    for flag in ("per_image", "correct", "probability_sums", "squares", "pixel_losses")
]

CROSS_ENTROPY: list[tuple[dict[str, Any], str]] = [
    ({"weight": [1.0] * 5}, r"weight: expected a tensor \[5\], got \[1.0, .* of type list"),
    ({"weight": torch.ones(4)}, r"weight: expected a tensor \[5\], got .* of shape \(4,\) on cpu"),
    ({"weight": torch.ones(5).int()}, "weight: expected a floating dtype on cpu, got torch.int32"),
    (
        {"label_smoothing": -0.1},
        r"label_smoothing: expected a float or an int in \[0, 1\], got -0.1",
    ),
    (
        {"label_smoothing": True},
        r"label_smoothing: expected a float or an int in \[0, 1\], got True",
    ),
    ({"reduction": None}, "reduction: expected 'mean' or 'sum' or 'none', got None"),
]

CASES = [
    *((f, *case) for f in ("softmax_moments", "pixel_cross_entropy") for case in INPUTS),
    *(("pixel_confusion", *case) for case in INPUTS[1:]),
    *(("softmax_moments", *case) for case in FLAGS),
    *(("pixel_cross_entropy", *case) for case in CROSS_ENTROPY),
]


@pytest.mark.on("cpu", "reference")
@pytest.mark.parametrize(("function", "arguments", "message"), CASES, ids=lambda v: str(v)[:50])
def test_functions_of_logits_and_labels(
    function: str, arguments: dict[str, Any], message: str, backend: str
):
    called = getattr(ao.ops if function in ao.ops.__all__ else ao, function)
    with pytest.raises(ValueError, match=f"^{function}: {message}"):
        called(**({"logits": LOGITS, "labels": LABELS} | arguments))


@pytest.mark.parametrize("logits", [None, LOGITS[0, 0, 0], LOGITS[0]])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: ao.pixel_argmax(x, (16, 24)),
        lambda x: ao.pixel_kl_divergence(x, LOGITS, (16, 24)),
        lambda x: ao.pixel_confusion(x, LABELS),
    ],
    ids=["pixel_argmax", "pixel_kl_divergence", "pixel_confusion"],
)
def test_functions_that_take_no_points_do_not_offer_them(call: Any, logits: Any):
    message = r"logits: expected a tensor \(B, K, h, w\) or \(B, K, d, h, w\), got"
    with pytest.raises(ValueError, match=message):
        call(logits)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize(("arguments", "message"), INPUTS[:-5], ids=lambda v: str(v)[:50])
def test_inputs_of_losses(make: Any, arguments: dict[str, Any], message: str):
    for more in ({}, {"pixel_weights": torch.ones(2, 16, 24)}):
        with pytest.raises(ValueError, match=f"^{make.__name__}: {message}"):
            make()(**({"logits": LOGITS, "labels": LABELS} | more | arguments))


@pytest.mark.parametrize("make", LOSSES)
def test_label_values_are_checked_on_request(make: Any):
    shifted = LABELS + 5
    assert make()(LOGITS, shifted) == 0  # ignored
    with pytest.raises(ValueError, match=rf"^{make.__name__}: labels: expected values in \[0, 5\)"):
        make(check_labels=True)(LOGITS, shifted)
    make(check_labels=True)(LOGITS, torch.where(shifted == 5, 255, shifted))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"size": size}, r"size: expected \(H, W\), two ints of at least 0, got ")
            for size in (16, (16,), "ab", ("a", "b"), (None, 3), (16.0, 24.0), (True, 4), (-1, 4))
        ),
        (
            {"logits": LOGITS[:, :1]},
            r"logits: expected at least 2 classes .*torch.cat.*, got shape",
        ),
        ({"align_corners": "yes"}, "align_corners: expected True or False, got 'yes' of type str"),
        ({"confidence": 0.9}, "confidence: expected True or False, got 0.9 of type float"),
    ],
    ids=str,
)
def test_pixel_argmax(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^pixel_argmax: {message}"):
        ao.pixel_argmax(**({"logits": LOGITS, "size": (16, 24)} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None}, "labels: expected a tensor of at least one axis, got None"),
        ({"labels": LABELS.float()}, "labels: expected an integer dtype, got torch.float32"),
        *(
            ({"predictions": x}, "predictions: expected an int64 tensor of shape .*, as lab")
            for x in (LABELS.int(), None)
        ),
        ({"num_classes": 5.0}, "num_classes: expected 2 to 4096 classes .*, got 5.0"),
        ({"num_classes": 1}, "num_classes: expected 2 to 4096 classes .*two.*, got 1"),
        ({"num_classes": 4097}, "num_classes: expected 2 to 4096 classes .*, got 4097"),
        ({"check_labels": None}, "check_labels: expected True or False, got None"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_confusion(arguments: dict[str, Any], message: str):
    defaults = {"predictions": LABELS, "labels": LABELS, "num_classes": 5}
    with pytest.raises(ValueError, match=f"^confusion: {message}"):
        ao.confusion(**(defaults | arguments))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (ao.Dice, {"per_image": True, "process_group": "world"}, "process_group: expected"),
        (
            ao.CrossEntropyDice,
            {"cross_entropy": ao.CrossEntropy(ignore_index=0), "ignore_index": 1},
            r"ignore_index: expected one label for all parts, got \[0, 1\]",
        ),
        (
            ao.CrossEntropyDice,
            {"cross_entropy": ao.BinaryCrossEntropy(), "dice": ao.Dice()},
            "dice: expected sigmoid=True, as BinaryCrossEntropy has it",
        ),
        (
            ao.CrossEntropyDice,
            {"cross_entropy": ao.CrossEntropy(), "dice": ao.Dice(sigmoid=True)},
            "dice: expected sigmoid=False, as CrossEntropy has it",
        ),
    ],
    ids=lambda v: str(v)[:50],
)
def test_settings_of_losses(make: Any, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{make.__name__}: {message}"):
        make(**arguments)
