"""Every argument that is no tensor, of every function, loss and metric, refuses wrong values with
its own message."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import anchorops as ao
from anchorops import diagnostics

K, D = 5, 12
LOGITS, LABELS = torch.randn(2, K, 4, 6), torch.randint(0, 2, (2, 16, 24))
FEATURES, ROWS = torch.randn(2, D, 4, 6), torch.randn(K, D)
INFINITE, NAN = float("inf"), float("nan")

LARGE = 2**63  # an int of more than 64 bits
# wrong for a number of at least 0
NUMBER = ("foo", -1, None, True, INFINITE, NAN, LARGE, 2**70)
POSITIVE = (*NUMBER, 0)
TEMPERATURE = (*POSITIVE, 1e-38, 3.5e38)  # not normal in float32
SHARE = ("foo", -1, None, True, 2.5, NAN, torch.tensor(0.5))
NO_INT = ("foo", True, 2.5, 5.0, np.bool_(True), np.float64(5), np.array([5]))
NO_INT += (torch.tensor(True), torch.tensor(5.0), torch.tensor([5, 5]))
COUNT = (*NO_INT, -1, None, 0, LARGE)
FLAG = ("foo", -1, None, 2.5, 1)
NAME = ("foo", -1, None, True, 2.5)
GROUP = ("foo", -1, True, 2.5)
SEED = (*NO_INT, -1, None, 2**31)
IGNORE_INDEX = (*NO_INT, 2**63)
VECTORS = ("foo", -1, 2.5, [1.0], torch.zeros(K, D + 1))
WEIGHT = ("foo", -1, 2.5, [1.0, -1.0], [INFINITE], [[1.0]], torch.ones(5) * 1j)
SIZE = (16, (16,), "ab", ("a", "b"), (None, 3), (16.0, 24.0), (True, 4), (-1, 4), (16, 24, 4))
SIZE += ("88", {8: 1, 12: 2}, {8, 12}, torch.tensor(8), np.array(8), (10**30, 12))
SIZE += tuple([8, x] for x in NO_INT)
THRESHOLD = ("foo", None, True, 0.0, 1.0)
FEW_CLASSES = (*NO_INT, None, 1, 4097)
MANY_CLASSES = (*NO_INT, None, 0, 65_537)

METHOD_SETTINGS = {"num_classes": COUNT, "dim": COUNT, "ignore_index": IGNORE_INDEX}
METHOD_SETTINGS |= {"process_group": GROUP, "check_labels": FLAG}
LABEL_SETTINGS = {"ignore_index": IGNORE_INDEX, "check_labels": FLAG}
PIXEL_SETTINGS = LABEL_SETTINGS | {"align_corners": FLAG}
ACCURACY = {"accuracy": FLAG}
HARD_EXAMPLES = {"ohem_threshold": ("foo", -1, True, 2.5, NAN, 0)}
HARD_EXAMPLES |= {"ohem_min_kept": (*NO_INT, -1, 0, LARGE)}
CLASSES = ("foo", -1, True, 2.5, [1, 1], [-1], [], *([x] for x in NO_INT))
ARGUMENTS: dict[Callable[..., Any], dict[str, tuple[Any, ...]]] = {
    ao.SAR: METHOD_SETTINGS
    | dict.fromkeys(("loss_weight", "aux_weight"), NUMBER)
    | dict.fromkeys(("momentum", "tau", "delta"), SHARE)
    | dict.fromkeys(("embed", "reweight", "detach_weights"), FLAG)
    | {
        "gate": NAME,
        "layers": (*NO_INT, -1, None),
        "anchors": (*VECTORS, torch.zeros(K, D).long()),
    },
    ao.CBP: METHOD_SETTINGS
    | {"length": ("foo", -1, True, INFINITE, NAN, 0, LARGE), "init": VECTORS, "orthogonalize": FLAG}
    | {"update": NAME, "momentum": SHARE, "penalty_weight": NUMBER},
    ao.OCCL: METHOD_SETTINGS
    | dict.fromkeys(("centroid_weight", "category_weight"), NUMBER)
    | {"temperature": TEMPERATURE, "normalize": FLAG}
    | {"reduction": NAME, "split": NAME, "seed": SEED},
    ao.CeCo: METHOD_SETTINGS
    | {"loss_weight": NUMBER, "scale": POSITIVE, "dropout": (*SHARE, 1)}
    | {"reduced_dim": COUNT, "center_dim": (*COUNT, K - 2), "resolution": NAME}
    | {"prior": (*VECTORS, torch.zeros(K), torch.linspace(-1, 1, K), torch.full((K,), INFINITE))}
    | dict.fromkeys(("per_image", "freeze_projection"), FLAG),
    ao.MVSC: METHOD_SETTINGS
    | dict.fromkeys(("fca_weight", "cos_weight", "visual_weight"), NUMBER)
    | {"groups": COUNT, "enhance": FLAG, "temperature": TEMPERATURE, "seed": SEED},
    ao.CrossEntropy: PIXEL_SETTINGS
    | ACCURACY
    | {"weight": WEIGHT, "label_smoothing": SHARE, "focal_gamma": NUMBER}
    | HARD_EXAMPLES,
    ao.BinaryCrossEntropy: PIXEL_SETTINGS
    | ACCURACY
    | {"pos_weight": ("foo", -1, [1.0, -1.0], [INFINITE], [[1.0, 2.0]])}
    | {"label_smoothing": SHARE, "focal_gamma": NUMBER}
    | HARD_EXAMPLES,
    ao.MaskLoss: PIXEL_SETTINGS
    | dict.fromkeys(("ce_weight", "dice_weight", "focal_gamma"), NUMBER)
    | {"focal_alpha": ("foo", -0.1, True, 2.5, NAN)},
    ao.Lovasz: PIXEL_SETTINGS
    | dict.fromkeys(("sigmoid", "per_image"), FLAG)
    | {"classes": CLASSES, "absent": NAME, "bins": (*NO_INT, None, 1, 65_537)},
    ao.Dice: PIXEL_SETTINGS
    | ACCURACY
    | dict.fromkeys(("alpha", "beta", "smooth"), NUMBER)
    | {"smooth_denominator": ("foo", -1, True, INFINITE, NAN, LARGE), "gamma": POSITIVE}
    | dict.fromkeys(("squared", "per_image", "log", "sigmoid"), FLAG)
    | {"classes": CLASSES, "absent": NAME}
    | {"weight": WEIGHT, "process_group": GROUP},
    ao.CrossEntropyDice: {"cross_entropy": ("foo", -1, ao.Dice()), "dice": ("foo", -1, 2.5)}
    | dict.fromkeys(("ce_weight", "dice_weight"), NUMBER)
    | LABEL_SETTINGS,
    ao.MeanIoU: PIXEL_SETTINGS
    | {"num_classes": FEW_CLASSES, "sigmoid": FLAG, "average": ("foo", -1, True)},
    diagnostics.CentroidGeometry: {"num_classes": MANY_CLASSES, "dim": COUNT, "mean": NAME}
    | {"ignore_index": IGNORE_INDEX, "anchors": (*VECTORS, torch.zeros(K, D).long())},
    diagnostics.LabelImbalance: {"num_classes": MANY_CLASSES, "ignore_index": IGNORE_INDEX},
    diagnostics.CalibrationError: PIXEL_SETTINGS
    | {"num_classes": (*MANY_CLASSES, 1), "sigmoid": FLAG, "n_bins": (*COUNT, 8192), "norm": NAME},
    ao.ops.class_moments: LABEL_SETTINGS
    | {"num_classes": MANY_CLASSES, "per_image": FLAG, "anchors": (*VECTORS, ROWS[:4], ROWS.long())}
    | {"groups": COUNT, "seed": (*NO_INT, None, LARGE)},
    ao.class_centroids: LABEL_SETTINGS | {"num_classes": MANY_CLASSES, "per_image": FLAG},
    ao.pixel_to_anchor_mse: LABEL_SETTINGS | {"reduction": (*NAME, "none")},
    ao.ops.softmax_moments: PIXEL_SETTINGS
    | dict.fromkeys(("per_image", "correct", "probability_sums", "squares", "pixel_losses"), FLAG),
    ao.pixel_cross_entropy: PIXEL_SETTINGS
    | {"weight": (*WEIGHT, torch.ones(4), torch.ones(5).int())}
    | {"label_smoothing": SHARE, "reduction": NAME},
    ao.pixel_binary_cross_entropy: PIXEL_SETTINGS
    | {"pos_weight": ("foo", -1, [1.0, -1.0], [INFINITE], [[1.0, 2.0]], 1e300), "reduction": NAME},
    ao.pixel_confusion: PIXEL_SETTINGS | {"sigmoid": FLAG},
    ao.confusion: LABEL_SETTINGS | {"num_classes": FEW_CLASSES},
    ao.pixel_argmax: {"size": SIZE, "align_corners": FLAG, "confidence": FLAG, "sigmoid": FLAG}
    | {"dtype": ("uint8", torch.bool, None), "threshold": (*THRESHOLD, 0.3)},
    ao.pixel_kl_divergence: {"size": SIZE, "align_corners": FLAG, "reduction": (*NAME, "batchmean")}
    | {"temperature": TEMPERATURE, "valid": ([True], LABELS, LABELS[:1] > 0)},
    ao.mask_rle: {"size": SIZE, "threshold": THRESHOLD, "align_corners": FLAG},
    ao.ops.centroid_info_nce: {"temperature": TEMPERATURE, "reduction": NAME}
    | {"normalize": ("foo", 0.0, INFINITE, True, 1e-39)},
    ao.anchors.random_anchors: {"num_classes": COUNT, "dim": COUNT},
    ao.anchors.orthogonal_anchors: {"num_classes": COUNT, "dim": (*COUNT, K - 1)},
    ao.anchors.simplex_etf: {"num_classes": (*COUNT, 1), "dim": (*COUNT, K - 2)},
    ao.anchors.category_basis: {"num_classes": COUNT, "dim": (*COUNT, K - 1), "orthogonalize": FLAG}
    | {"length": ("foo", -1, True, INFINITE, NAN, 0), "init": (*VECTORS, torch.ones(K, D))},
}
PIXELS, MOMENTS = {"logits": LOGITS, "labels": LABELS}, {"features": FEATURES, "labels": LABELS}
RIGHT: dict[Callable[..., Any], dict[str, Any]] = {  # what the calls need besides
    ao.ops.class_moments: MOMENTS | {"num_classes": K, "groups": 2, "seed": 1},
    ao.class_centroids: MOMENTS | {"num_classes": K},
    ao.pixel_to_anchor_mse: MOMENTS | {"anchors": ROWS},
    **dict.fromkeys((ao.ops.softmax_moments, ao.pixel_cross_entropy, ao.pixel_confusion), PIXELS),
    ao.pixel_binary_cross_entropy: {"logits": LOGITS[:, :1], "labels": LABELS},
    ao.confusion: {"predictions": LABELS, "labels": LABELS, "num_classes": K},
    ao.pixel_argmax: {"logits": LOGITS, "size": (16, 24)},
    ao.pixel_kl_divergence: {"logits": LOGITS, "teacher_logits": LOGITS.sin(), "size": (16, 24)},
    ao.mask_rle: {"logits": LOGITS[0], "size": (16, 24), "boxes": None},
    ao.ops.centroid_info_nce: {"queries": ROWS, "keys": ROWS.sin()}
    | dict.fromkeys(("positives", "bias", "present", "present_keys")),
}
# CBP's classifier is made, and its arguments are checked, by a public function
NAMES: dict[Callable[..., Any], str] = {ao.CBP: "(CBP|category_basis)"}


@pytest.mark.parametrize("call", ARGUMENTS, ids=lambda call: call.__name__)
def test_wrong_settings(call: Callable[..., Any]) -> None:
    arguments, right = ARGUMENTS[call], RIGHT.get(call, {})
    right = right or {name: n for name, n in (("num_classes", K), ("dim", D)) if name in arguments}
    parameters = inspect.signature(call).parameters.keys()
    assert parameters - {"generator", "metric_arguments"} == arguments.keys() | right.keys()
    call(**right)
    for argument, values in arguments.items():
        for value in values:
            name = NAMES.get(call, call.__name__)
            with pytest.raises(ValueError, match=f"^{name}: {argument}: expected .*, got "):
                call(**right | {argument: value})
                pytest.fail(f"accepted {argument} = {value!r}")
