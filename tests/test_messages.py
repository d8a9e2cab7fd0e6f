"""What the messages of wrong arguments say. test_settings.py has every argument that is no tensor,
test_check_labels.py the labels' values."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops import diagnostics, plots
from anchorops.doctor.catalogue import ENTRIES, Case, cases

LOGITS, LABELS = torch.zeros(2, 5, 4, 6), torch.zeros(2, 16, 24, dtype=torch.int64)
CHANNELS = LABELS[:, None].expand(2, 5, 16, 24)
VOLUME, VOLUME_LABELS = LOGITS[:, :, None], LABELS[:, None].expand(2, 4, 16, 24)
FEATURES, ANCHORS, COUNTS = torch.zeros(2, 3, 4, 6), torch.zeros(5, 3), torch.arange(3)
POINTS, POINT_LABELS = torch.zeros(7, 3), torch.zeros(7, dtype=torch.int64)
MASKS, MAPS = torch.ones(3, 8, 10, dtype=torch.uint8), torch.ones(2, 8, 10, dtype=torch.int32)
IDS, IMAGES = torch.ones(3, dtype=torch.int64), torch.tensor([0, 1, 1])
MATCHED = {"labels": MAPS, "ids": IDS, "images": IMAGES}
VALID, LONG = LABELS > 0, LOGITS[0, :, :1, :1].expand(5, 2**23 + 1, 1)
ONE_BIAS = torch.nn.Linear(3, 5)
ONE_BIAS.bias = torch.nn.Parameter(torch.zeros(1))
Rows = list[tuple[dict[str, Any], str]]
METHOD = {"num_classes": 5, "dim": 3, "features": FEATURES, "labels": LABELS, "classifier": ANCHORS}
RIGHT: dict[str, dict[str, Any]] = {  # by the names of what is called
    "class_moments class_centroids": {"features": FEATURES, "labels": LABELS, "num_classes": 5},
    "pixel_to_anchor_mse": {"features": FEATURES, "labels": LABELS, "anchors": ANCHORS},
    "softmax_moments pixel_cross_entropy pixel_confusion": {"logits": LOGITS, "labels": LABELS},
    "CrossEntropy Dice CrossEntropyDice Lovasz": {"logits": LOGITS, "labels": LABELS},
    "pixel_binary_cross_entropy BinaryCrossEntropy": {"logits": LOGITS, "labels": CHANNELS},
    "pixel_argmax": {"logits": LOGITS, "size": (16, 24)},
    "pixel_kl_divergence": {"logits": LOGITS, "teacher_logits": LOGITS, "size": (16, 24)},
    "mask_rle": {"logits": LOGITS[0], "size": (8, 10)},
    "confusion": {"predictions": LABELS, "labels": LABELS, "num_classes": 5},
    "MeanIoU": {"num_classes": 5, "predictions": LOGITS, "labels": LABELS},
    "centroid_info_nce": {"queries": ANCHORS, "keys": ANCHORS},
    "MaskLoss": {"logits": torch.zeros(3, 4, 5), "labels": MASKS},
    "SAR OCCL MVSC CeCo": METHOD,
    "CentroidGeometry": {"num_classes": 3, "dim": 2},
    "LabelImbalance": {"num_classes": 3},
    "CalibrationError": {"num_classes": 5, "logits": LOGITS, "labels": LABELS},
    "reliability": dict.fromkeys(("counts", "hits", "confidence_sums"), COUNTS),
    "features_with_anchors": {"features": FEATURES, "labels": LABELS, "anchors": ANCHORS},
}
OF_FEATURES: Rows = [
    ({"features": [[1.0] * 99] * 9}, r"features: expected .*, got \[\[1.0, .{,80} … of type list$"),
    ({"features": torch.zeros(3)}, r"features: expected a tensor .*, got .* of shape \(3,\) on"),
    ({"features": FEATURES.int()}, "features: expected float32, .* or float64, got torch.int32"),
    ({"features": FEATURES[:, :0]}, r"features: expected at least one channel, got .*\(2, 0, 4, 6"),
    ({"labels": LABELS.bool()}, "labels: expected an integer dtype, got torch.bool"),
    ({"labels": None}, r"labels: expected \(B, H', W'\) for .* \(2, 3, 4, 6\), got None"),
    ({"labels": LABELS[0]}, r"labels: expected \(B, H', W'\) for .*, got .* \(16, 24\) on cpu"),
    ({"labels": LABELS[:1]}, "labels: expected batch size 2, as features, got 1"),
    ({"labels": LABELS[:, :0]}, r"labels: expected at least one label per image, got .*\(2, 0, 24"),
    (
        {"features": FEATURES.flatten(2), "labels": LABELS.flatten(1)},
        "labels: expected 24 points, as features, got 384",
    ),
    ({"features": FEATURES.flatten(2)}, r"labels: expected \(B, N\) for features of shape \(2, 3,"),
    ({"features": POINTS, "labels": POINT_LABELS[:6]}, "labels: expected 7 points, .*, got 6"),
    ({"features": POINTS}, r"labels: expected \(N,\) for features of shape \(7, 3\), got .*"),
]
OF_ANCHORS: Rows = [
    ({"anchors": ANCHORS[:, :2]}, r"anchors: expected \[.*, 3\] \(features have D = 3\), got .*"),
]
OF_LOGITS: Rows = [
    ({"logits": None}, r"logits: expected a tensor .*\(B, K, h, w\) .*, got None of type NoneType"),
    ({"logits": LOGITS[0, 0, 0]}, r"logits: expected a tensor .*, got .* of shape \(6,\) on cpu"),
    ({"logits": LOGITS[:, :0]}, r"logits: expected 2 to 65536 classes .*, got .*\(2, 0, 4, 6\)"),
    ({"logits": LOGITS[:, :1]}, r"logits: expected at least 2 .*torch.cat.*, got shape"),
    ({"logits": LOGITS[:, :, :0]}, "logits: expected at least one pixel per image, got shape"),
    ({"labels": None}, r"labels: expected a tensor \(2, H, W\), as logits, got None of type"),
    ({"labels": LABELS[0]}, r"labels: expected .*, as logits, got .* \(16, 24\) on cpu"),
    ({"labels": LABELS.bool()}, "labels: expected an integer dtype, got torch.bool"),
    ({"labels": VOLUME_LABELS}, r"labels: expected a tensor \(2, H, W\)"),
    ({"labels": LABELS.byte().view(torch.bits8)}, "labels: expected an integer dtype, got torch."),
]
OF_VOLUMES: Rows = [
    ({"logits": VOLUME, "labels": LABELS[:, 0]}, r"labels: expected a tensor \(2, D, H, W\)"),
    (
        {"logits": VOLUME, "labels": VOLUME_LABELS[:, None].expand(-1, 2, -1, -1, -1)},
        r"labels: expected a tensor \(2, D, H, W\)",
    ),
]
NO_POINTS: Rows = [
    ({"logits": x}, r"logits: expected a tensor \(B, K, h, w\) or \(B, K, d, h, w\), got")
    for x in (None, LOGITS[0, 0, 0], LOGITS[0])
]
EACH_NUMBER = "a finite float or int, above 0"
# Names of what is called, changes of its right arguments, and what the message says.
TABLE: dict[str, Rows] = {
    "class_moments class_centroids pixel_to_anchor_mse": OF_FEATURES,
    "class_moments pixel_to_anchor_mse": OF_ANCHORS,
    "class_moments": [
        ({"anchors": ANCHORS[:4]}, r"anchors: expected \[5, 3\] .*, got .* of shape \(4, 3\)"),
        ({"groups": 0}, "groups: expected an int of at least 1, got 0 of type int"),
        ({"groups": 2}, "seed: expected an int of 64 bits or an int64 tensor .*, got None"),
        ({"groups": 2, "seed": torch.zeros(1)}, "seed: expected one int64 on cpu, got torch.float"),
        (
            {"num_classes": 2**15, "groups": 2**15, "seed": 1, "per_image": True}
            | {"ignore_index": -1},
            r"num_classes: expected fewer than 2\^31 images × classes × groups, got 2147483648",
        ),
        ({"num_classes": 0}, "num_classes: expected an int from 1 to 65536, got 0"),
        ({"ignore_index": 1.0}, "ignore_index: expected an int of 64 bits, got 1.0 of type fl"),
    ],
    "softmax_moments pixel_cross_entropy CrossEntropy Dice CrossEntropyDice": OF_LOGITS,
    "softmax_moments pixel_cross_entropy pixel_confusion": OF_VOLUMES,
    "pixel_argmax pixel_kl_divergence pixel_confusion": NO_POINTS,
    "pixel_argmax pixel_kl_divergence": OF_LOGITS[4:5],
    "pixel_cross_entropy": [
        ({"weight": torch.ones(4)}, r"weight: expected a tensor \[5\], got .* of shape \(4,\)"),
        ({"weight": torch.ones(5).int()}, "weight: expected a floating dtype on cpu, got torch"),
        ({"label_smoothing": -0.1}, r"label_smoothing: expected .* in \[0, 1\], got -0.1"),
        ({"reduction": None}, "reduction: expected 'mean' or 'sum' or 'none', got None"),
        ({"align_corners": "yes"}, "align_corners: expected True or False, got 'yes' of type"),
        ({"logits": {"out": LOGITS, "aux": LOGITS}}, ".* got a dict with the keys 'out', 'aux'"),
    ],
    "CrossEntropy": [
        ({"weight": torch.ones(4)}, "weight: expected one number"),
        ({"weight": 19}, "weight: .* for each class, got 19 of type int$"),
        ({"weight": torch.tensor([1.0, -3.0])}, "weight: .* for each class, got -3.0$"),
        ({"logits": (LOGITS, LOGITS)}, "logits: .* got a tuple of torch.float32 tensor of sha"),
        ({"logits": LOGITS[0], "labels": LABELS[0]}, r"labels: .* of one image \(K, h, w\) give l"),
        ({"pixel_weights": torch.ones(1, 16, 24)}, "pixel_weights: expected a floating tensor .*,"),
    ],
    "Dice Lovasz": [
        ({"pixel_weights": torch.ones(2, 16, 24)}, "pixel_weights: expected None"),
        ({"classes": [7]}, "logits: expected at least 8 classes"),
    ],
    "Dice": [({"per_image": True, "process_group": "world"}, "process_group: expected")],
    "CrossEntropyDice": [
        (
            {"cross_entropy": ao.CrossEntropy(ignore_index=0), "ignore_index": 1},
            r"ignore_index: expected one label for all parts, got \[0, 1\]",
        ),
        (
            {"cross_entropy": ao.BinaryCrossEntropy(), "dice": ao.Dice()},
            "dice: expected sigmoid=True, as BinaryCrossEntropy has it",
        ),
        (
            {"cross_entropy": ao.CrossEntropy(), "dice": ao.Dice(sigmoid=True)},
            "dice: expected sigmoid=False, as CrossEntropy has it",
        ),
    ],
    "pixel_binary_cross_entropy BinaryCrossEntropy": [
        ({"labels": LABELS}, r"labels: expected a tensor \(2, 5, H, W\)"),
        *(
            ({"pos_weight": torch.ones(shape)}, "pos_weight: expected a")
            for shape in ((3,), (1, 2, 1), (2, 2, 1, 1))
        ),
    ],
    "pixel_binary_cross_entropy": [
        ({"pos_weight": [1e300]}, "pos_weight: expected a number that float32 can hold"),
        ({"pos_weight": torch.ones(5).requires_grad_()}, "pos_weight: expected no gradient"),
    ],
    "pixel_confusion": [
        *OF_LOGITS[1:],
        ({"logits": LOGITS[:, :1]}, r"logits: .* 2 classes .*_confusion\(sigmoid=True\)"),
    ],
    "pixel_argmax": [
        ({"size": 16}, r"size: expected \(H, W\), two ints of at least 0, got 16 of type int"),
        ({"logits": VOLUME}, r"size: expected \(D, H, W\), three ints of at least 0, got \(16"),
        ({"dtype": torch.bool}, "dtype: expected uint8, .* or int64, got torch.bool"),
        ({"threshold": 0.3}, "threshold: expected 0.5 without sigmoid=True, got 0.3"),
        ({"threshold": 0.0}, r"threshold: expected a float in \(0, 1\), got 0.0"),
    ],
    "pixel_kl_divergence": [
        ({"teacher_logits": None}, r"teacher_logits: expected a tensor \(2, 5, h, w\), .* None"),
        ({"teacher_logits": LOGITS[:, :4]}, r"teacher_logits: expected .*\(2, 5, h, w\).*\(2, 4, "),
        ({"teacher_logits": LOGITS.double()}, "teacher_logits: expected float32 or bfloat16 or fl"),
        ({"logits": LOGITS.double()}, "teacher_logits: expected float64, got torch.float32 wit"),
        ({"teacher_logits": LOGITS[..., :0]}, "teacher_logits: expected at least one pixel per"),
        ({"logits": VOLUME}, r"teacher_logits: expected a tensor \(2, 5, d, h, w\)"),
        ({"valid": VALID[:1]}, r"valid: expected a bool tensor \(2, 16, 24\), or None, got .*1"),
        ({"temperature": 0.0}, f"temperature: expected {EACH_NUMBER}, got 0.0"),
        ({"temperature": 1e-40}, "temperature: expected a normal number of float32, 1.2e-38 t"),
    ],
    "mask_rle": [
        ({"logits": [1.0]}, r"logits: expected a tensor \(N, h, w\), got \[1.0\]"),
        ({"logits": LOGITS[0, :, :0]}, r"logits: expected at least one pixel per mask, got .*5"),
        ({"logits": LONG}, r"logits: expected axes of at most 2\^23, got \(8388609, 1\)"),
        ({"size": (2**23 + 1, 1)}, r"size: expected axes of at most 2\^23, got \(8388609, 1\)"),
        ({"boxes": [[0, 0, 1, 1]]}, r"boxes: expected a tensor \(5, 4\), as logits, got \[\[0"),
        ({"boxes": torch.zeros(1, 4)}, r"boxes: expected a tensor \(5, 4\), .* shape \(1, 4\)"),
        ({"boxes": torch.zeros(5, 4).bool()}, "boxes: expected a real dtype, got torch.bool"),
        ({"boxes": torch.zeros(5, 4) * 1j}, "boxes: expected a real dtype, got torch.complex"),
        ({"boxes": torch.zeros(5, 4).fill_(math.nan)}, "boxes: expected numbers, .* in box 0"),
    ],
    "confusion": [
        ({"labels": None}, "labels: expected a tensor of at least one axis, got None"),
        ({"labels": LABELS.float()}, "labels: expected an integer dtype, got torch.float32"),
        *(
            ({"predictions": x}, "predictions: expected an int64 tensor of shape .*, as lab")
            for x in (LABELS.int(), None, LABELS[:, None].expand(2, 2, 16, 24))
        ),
    ],
    "MeanIoU": [
        ({"predictions": None}, "predictions: expected a tensor of logits or classes, got None"),
        ({"predictions": LOGITS[:, 1:]}, "predictions: expected 5 channels .*, as num_classes"),
        ({"predictions": LOGITS[:, :1]}, r"predictions: expected 5 .*MeanIoU\(1, sigmoid=True"),
        ({"predictions": LOGITS[..., 0]}, r"predictions: expected logits \(B, K, h, w\)"),
        ({"predictions": LABELS[1:]}, r"predictions: expected an int64 tensor of shape \(2, 16"),
        ({"predictions": LABELS * 1j}, "predictions: expected an integer dtype, got"),
        ({"labels": LABELS.float()}, "labels: expected an integer dtype, got torch.float32"),
        ({"labels": LABELS[1:]}, r"labels: expected a tensor \(2, H, W\), as logits, got"),
        ({"num_classes": 1}, r"num_classes: .* 2 to 4096 .*two.*MeanIoU\(1, sigmoid=True\).*, "),
    ],
    "centroid_info_nce": [
        ({"queries": [1.0]}, r"queries: expected a tensor \[K, D\] or \[K, G, D\], got \[1.0\]"),
        ({"queries": torch.zeros(3)}, r"queries: .* got torch.float32 tensor of shape \(3,\)"),
        ({"keys": torch.zeros(5, 2)}, r"keys: expected \(5, 3\) on cpu, got .* \(5, 2\) on cpu"),
        ({"keys": None}, r"keys: expected \(5, 3\) on cpu, got None"),
        ({"positives": torch.zeros(4)}, r"positives: expected \(5, 3\) on cpu, got .* \(4,\)"),
        ({"present": torch.ones(3) > 0}, r"present: expected \(5,\) on cpu, got .* \(3,\)"),
        ({"present_keys": torch.ones(5, 1) > 0}, r"present_keys: expected \(5,\) on cpu"),
        ({"present_keys": torch.ones(5)}, "present_keys: expected a bool tensor"),
        ({"bias": torch.ones(3)}, r"bias: expected \(5,\) on cpu, got .* \(3,\)"),
        ({"bias": torch.ones(5) > 0}, "bias: expected float32, bfloat16, .*, got torch.bool"),
        (
            {"bias": torch.ones(5), "present_keys": torch.ones(5) > 0},
            "bias: expected None with positives, present_keys or normalize, got ",
        ),
    ],
    "MaskLoss": [
        ({"logits": LOGITS[0, 0]}, r"logits: expected a tensor \(N, h, w\), got .* \(4, 6\)"),
        ({"labels": MASKS[0]}, r"labels: expected a tensor \(N, H, W\) of masks, or .*\(8, 10"),
        ({"labels": MASKS[:2]}, r"labels: expected 3 masks, as logits .*, got .* \(2, 8, 10\)"),
        (MATCHED | {"labels": MAPS.float()}, "labels: expected an integer dtype, got torch.fl"),
        (MATCHED | {"ids": IDS[:2]}, r"ids: expected a tensor \[3\], .*, got .* \(2,\)"),
        (MATCHED | {"images": IMAGES[:2]}, r"images: expected a tensor \[3\], .* \(2,\)"),
        (MATCHED | {"images": IMAGES > 0}, "images: expected an integer dtype, got torch.bool"),
        (MATCHED | {"images": IMAGES + 1}, r"images: .* from 0 to 1, .*got \[1, 2\]"),
        (MATCHED | {"images": IMAGES - 1}, r"images: .* from 0 to 1, .*got \[-1, 0\]"),
        (MATCHED | {"images": None}, "images: expected the number of each mask's map, of 2 ma"),
        ({"images": IMAGES}, "images: expected None without ids, got "),
        ({"num_masks": -1.0}, f"num_masks: expected {EACH_NUMBER}, got -1.0"),
        ({"num_masks": torch.ones(2)}, r"num_masks: expected one number, .* \(2,\)"),
        *(
            (row | {"check_labels": True}, message)
            for row, message in (
                ({"labels": MASKS + 1}, r"labels: expected values in \[0, 2\) or .*, got \[2\]"),
                (MATCHED | {"ids": IDS * 5}, r"ids: expected ids that are in their maps, got "),
                ({"num_masks": torch.tensor(0.0)}, "num_masks: expected a number above 0, got"),
            )
        ),
    ],
    "SAR OCCL MVSC CeCo": [
        ({"features": FEATURES[:, 1:]}, "features: expected 3 channels"),
        ({"labels": LABELS.float()}, "labels: expected an integer dtype, got torch.float32"),
    ],
    "SAR OCCL MVSC": [
        ({"classifier": None}, "classifier: expected the model's classifier or its weight, got N"),
        ({"classifier": ANCHORS[:4]}, "classifier: expected a module or weight"),
        ({"classifier": ONE_BIAS}, r"classifier: expected a bias \[5\], got .* of shape \(1,\)"),
    ],
    "SAR": [
        ({"num_classes": 1}, "num_classes"),  # without batch statistics
        ({"loss_weight": 2**70}, "loss_weight: .* an int of 64 bits, got an int of 71 bits"),
    ],
    "CeCo": [
        ({"center_dim": 3}, "center_dim: .* at least num_classes - 1 = 4, the rank of a simpl"),
        ({"per_image": True, "features": POINTS, "labels": POINT_LABELS}, "features: .* images"),
        ({"features": FEATURES[:, :, :0], "labels": LABELS[:, :0]}, "features: expected at least "),
        (
            {"features": FEATURES[:1, :, :1, :1], "labels": LABELS[:1]},
            "features: expected more than one pixel",
        ),
    ],
    "CentroidGeometry": [
        ({"features": torch.zeros(4, 3), "labels": COUNTS}, "features: expected 2 channels, as"),
        ({"features": torch.zeros(3, 2, 1, 1), "labels": COUNTS[:, None]}, "labels: expected"),
    ],
    "LabelImbalance": [({"labels": x}, "labels: expected") for x in (torch.eye(3), COUNTS)],
    "CalibrationError": [
        ({"num_classes": 4}, "logits: expected 4 channels in dimension 1, as num_classes, got "),
        ({"num_classes": 1}, r"num_classes: .* from 2 .*\(1, sigmoid=True\)\), got 1"),
        ({"logits": LOGITS[:, :1]}, r"logits: .* at least 2 .*CalibrationError\(1, sigmoid=True"),
    ],
    "reliability": [
        ({"counts": [1]}, r"counts: expected a real tensor \[N\], as counts, got \[1\]"),
        ({"hits": COUNTS[:2]}, r"hits: expected a real tensor \[N\], as counts, got "),
        ({"confidence_sums": COUNTS * 1j}, "confidence_sums: expected a real tensor"),
        (dict.fromkeys(("counts", "hits", "confidence_sums"), 0 * COUNTS), "counts: expected at"),
    ],
    "features_with_anchors": [
        (
            {"features": FEATURES.flatten(2), "labels": LABELS[:1, 0]},
            "labels: expected batch size 2",
        ),
        ({"anchors": ANCHORS * 1j}, r"anchors: expected a real tensor \[K, D\] or \[K, D, 1, 1\]"),
    ],
    "imbalance_factor": [({"counts": np.arange(3)}, "counts: expected a re")],
    "pearson": [
        ({"x": COUNTS, "y": np.arange(3)}, r"y: expected a real tensor \[K\]"),
        ({"x": COUNTS, "y": COUNTS[:2]}, r"y: expected a tensor \[3\], as x, got"),
        ({"x": COUNTS * 1j, "y": COUNTS}, "x: expected a real tensor"),
    ],
    "norm_correlation": [
        ({"weight": torch.eye(3), "counts": None}, "counts: exp"),
        ({"weight": torch.eye(3), "counts": COUNTS[:2]}, r"counts: expected a tensor \[3\]"),
    ],
    "class_separability": [
        ({"weight": x}, "weight: expected") for x in (COUNTS, torch.eye(3) * 1j)
    ],
    "equiangularity maximal_angle": [
        ({"vectors": torch.eye(3), "mean": x}, r"mean: expected a real tensor \[3\] on")
        for x in (COUNTS[:2], [0.0] * 3, COUNTS * 1j)
    ],
}


def call(name: str, arguments: dict[str, Any]) -> None:
    """A function; or a loss, method or metric, which is made of its settings first."""
    modules = (ao, ao.ops, ao.anchors, diagnostics, plots)
    function = next(getattr(module, name) for module in modules if hasattr(module, name))
    if not isinstance(function, type):
        function(**arguments)
        return
    inputs = ("logits", "labels", "pixel_weights", "ids", "images", "num_masks", "predictions")
    given = {x: arguments.pop(x) for x in (*inputs, "features", "classifier") if x in arguments}
    module = function(**arguments)
    getattr(module, "update", module)(**given)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        pytest.param(name, *row, id=f"{name}: {row[1][:50]}")
        for names, rows in TABLE.items()
        for name in names.split()
        for row in rows
    ],
)
def test_messages(name: str, changed: dict[str, Any], message: str):
    right = next((given for names, given in RIGHT.items() if name in names.split()), {})
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        call(name, right | changed)


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


MAPS_OF_CLASSES = Case(ENTRIES["confusion"], ENTRIES["confusion"].samples[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("case", [*cases("small"), MAPS_OF_CLASSES], ids=str)
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
