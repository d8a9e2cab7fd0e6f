"""Every argument of every loss refuses wrong values with its own message."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import anchorops as ao

K, D = 5, 12
INFINITE, NAN = float("inf"), float("nan")

LARGE = 2**63  # an int of more than 64 bits
# wrong for a number of at least 0
NUMBER = ("foo", -1, None, True, INFINITE, NAN, LARGE, 2**70)
POSITIVE = (*NUMBER, 0)
TEMPERATURE = (*POSITIVE, 1e-38, 3.5e38)  # not normal in float32
SHARE = ("foo", -1, None, True, 2.5, NAN, torch.tensor(0.5))
COUNT = ("foo", -1, None, True, 2.5, 0, LARGE)
FLAG = ("foo", -1, None, 2.5, 1)
NAME = ("foo", -1, None, True, 2.5)
GROUP = ("foo", -1, True, 2.5)
SEED = ("foo", -1, None, True, 2.5, 2**31)
IGNORE_INDEX = ("foo", True, 2.5, 2**63)
VECTORS = ("foo", -1, 2.5, [1.0], torch.zeros(K, D + 1))
WEIGHT = ("foo", -1, 2.5, [1.0, -1.0], [INFINITE], [[1.0]], torch.ones(5) * 1j)

METHOD_SETTINGS = {"num_classes": COUNT, "dim": COUNT, "ignore_index": IGNORE_INDEX}
METHOD_SETTINGS |= {"process_group": GROUP, "check_labels": FLAG}
PIXEL_SETTINGS = {"ignore_index": IGNORE_INDEX}
PIXEL_SETTINGS |= dict.fromkeys(("align_corners", "check_labels"), FLAG)
ACCURACY = {"accuracy": FLAG}
HARD_EXAMPLES = {"ohem_threshold": ("foo", -1, True, 2.5, NAN, 0)}
HARD_EXAMPLES |= {"ohem_min_kept": ("foo", -1, True, 2.5, 0, LARGE)}
CLASSES = ("foo", -1, True, 2.5, [1, 1], [-1], [1.0], [])
ARGUMENTS: dict[type[nn.Module], dict[str, tuple[Any, ...]]] = {
    ao.SAR: METHOD_SETTINGS
    | dict.fromkeys(("loss_weight", "aux_weight"), NUMBER)
    | dict.fromkeys(("momentum", "tau", "delta"), SHARE)
    | dict.fromkeys(("embed", "reweight", "detach_weights"), FLAG)
    | {"gate": NAME, "layers": (*NAME, 2.0), "anchors": (*VECTORS, torch.zeros(K, D).long())},
    ao.CBP: METHOD_SETTINGS
    | {"length": ("foo", -1, True, INFINITE, NAN, 0, LARGE), "init": VECTORS, "orthogonalize": FLAG}
    | {"update": NAME, "momentum": SHARE, "penalty_weight": NUMBER},
    ao.OCCL: METHOD_SETTINGS
    | dict.fromkeys(("centroid_weight", "category_weight"), NUMBER)
    | {
        "temperature": TEMPERATURE,
        "normalize": FLAG,
        "reduction": NAME,
        "split": NAME,
        "seed": SEED,
    },
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
    | {"classes": CLASSES, "absent": NAME, "bins": ("foo", None, True, 10.0, 1, 65_537)},
    ao.Dice: PIXEL_SETTINGS
    | ACCURACY
    | dict.fromkeys(("alpha", "beta", "smooth"), NUMBER)
    | {"smooth_denominator": ("foo", -1, True, INFINITE, NAN, LARGE), "gamma": POSITIVE}
    | dict.fromkeys(("squared", "per_image", "log", "sigmoid"), FLAG)
    | {"classes": CLASSES, "absent": NAME}
    | {"weight": WEIGHT, "process_group": GROUP},
    ao.CrossEntropyDice: {"cross_entropy": ("foo", -1, ao.Dice()), "dice": ("foo", -1, 2.5)}
    | dict.fromkeys(("ce_weight", "dice_weight"), NUMBER)
    | {"ignore_index": IGNORE_INDEX, "check_labels": FLAG},
}


@pytest.mark.parametrize("loss", ARGUMENTS, ids=lambda loss: loss.__name__)
def test_wrong_settings(loss: type[nn.Module]) -> None:
    arguments = ARGUMENTS[loss]
    assert arguments.keys() == inspect.signature(loss).parameters.keys()
    right = {"num_classes": K, "dim": D} if "dim" in arguments else {}
    loss(**right)
    # CBP's classifier is made, and its arguments are checked, by a public function
    name = "(CBP|category_basis)" if loss is ao.CBP else loss.__name__
    for argument, values in arguments.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}: {argument}: expected .*, got "):
                loss(**right | {argument: value})
                pytest.fail(f"accepted {argument} = {value!r}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ao.CeCo(10, D, center_dim=8),
            "center_dim: expected at least num_classes - 1 = 9, the rank of a simplex, got 8",
        ),
        (
            lambda: ao.SAR(K, D, loss_weight=2**70),
            "loss_weight: expected a float or an int of 64 bits, got an int of 71 bits",
        ),
    ],
)
def test_messages(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
