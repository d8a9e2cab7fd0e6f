"""Argument checks. Messages name the function, the argument, what was expected and received."""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._torch_state import has_values, is_traced, traces_sizes

# The positive normal numbers of float32.
SMALLEST_NORMAL, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    *(torch.int64, torch.uint8, torch.int32, torch.int16),
    *(torch.int8, torch.uint16, torch.uint32, torch.uint64),
)
MAX_CLASSES = 65_536  # of the backends cpu and reference


def fail(function: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{function}: {argument}: expected {expected}, got {got}")


def missing_extra(
    part: str, error: ModuleNotFoundError, *, extra: str | None = None
) -> ModuleNotFoundError:
    """The error of a part whose dependencies are in an extra, that of the same name by default."""
    command = f"pip install 'anchorops[{extra or part}]'"
    message = f"anchorops.{part}: {error}: install it with: {command}"
    return ModuleNotFoundError(message, name=error.name)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        keys = shorten(", ".join(map(repr, value)), 160, placeholder=" …")
        return f"a {type(value).__name__} with the keys {keys}"
    if isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
        parts = shorten(", ".join(map(describe, value)), 160, placeholder=" …")
        return f"a {type(value).__name__} of {parts}"
    text = shorten(repr(value), 80, placeholder=" …")  # on one line
    return f"{text} of type {type(value).__name__}"


def as_int(value: object) -> int | None:
    """The int that `operator.index` gives for a value, or None; a bool is none. Of a tensor this is
    its only number: reading it synchronises with a GPU, and torch.jit.trace records a constant and
    warns. A torch.SymInt, the size of an exported program, is returned as it is, and so is a size
    that torch.onnx.export traces."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # pyright: ignore[reportReturnType]
    if isinstance(value, bool):
        return None
    if isinstance(value, Tensor):
        if traces_sizes():
            return value  # pyright: ignore[reportReturnType]
        is_int = value.numel() == 1 and not (value.is_floating_point() or value.is_complex())
        return int(value) if is_int and value.dtype != torch.bool else None
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def as_ints(values: Any) -> tuple[int, ...] | None:
    """`as_int` of each value of a sequence or an array; None if it is neither, or one is no int."""
    if not isinstance(values, (tuple, list, Sequence)) and getattr(values, "ndim", 0) != 1:
        return None
    ints = [number for number in map(as_int, values) if number is not None]
    return tuple(ints) if len(ints) == len(values) else None


def check_int(
    function: str,
    argument: str,
    value: object,
    expected: str,
    minimum: int = -(2**63),
    maximum: int = 2**63 - 1,
) -> int:
    """The value `as_int`, from minimum to maximum."""
    number = as_int(value)
    if number is None or not minimum <= number <= maximum:
        fail(function, argument, expected, describe(value))
    return number


def check_strided(function: str, argument: str, tensor: object) -> None:
    """A tensor, if it is one, has strides and all its elements: it is not sparse, not nested and
    not a DTensor. torch.compile traces it."""
    if not isinstance(tensor, Tensor):
        return
    if tensor.is_nested:
        expected = "a tensor of one shape (pad it: to_padded_tensor)"
        fail(function, argument, expected, "a nested tensor")
    if type(tensor) is not Tensor and hasattr(tensor, "placements"):
        expected = "a tensor of this rank (its to_local() or full_tensor())"
        fail(function, argument, expected, "a DTensor")
    if tensor.layout != torch.strided:
        fail(function, argument, "a strided tensor", tensor.layout)


def check_floating(
    function: str, argument: str, x: object, dims: Sequence[int], shapes: str
) -> None:
    """A floating tensor, strided, with one of these numbers of axes."""
    check_strided(function, argument, x)
    if not isinstance(x, Tensor) or x.dim() not in dims:
        fail(function, argument, f"a tensor {shapes}", describe(x))
    if x.dtype not in FLOATING:
        fail(function, argument, "float32, bfloat16, float16 or float64", x.dtype)


def check_device(function: str, argument: str, x: Tensor, like: Tensor, name: str) -> None:
    if x.device != like.device:
        fail(function, argument, f"device {like.device}, as {name}", x.device)


def check_not_empty(
    function: str, argument: str, x: Tensor, pixels: int, of: str = "image"
) -> None:
    """Nothing can be upsampled to some pixels."""
    if x.numel() == 0 and pixels > 0:
        fail(function, argument, f"at least one pixel per {of}", f"shape {tuple(x.shape)}")


def check_features(function: str, features: Tensor) -> None:
    """features: floating, (N, D), (B, D, N) or (B, D, H, W), D at least 1."""
    shapes = "(N, D), (B, D, N) or (B, D, H, W)"
    check_floating(function, "features", features, (2, 3, 4), shapes)
    if features.shape[1] == 0:
        fail(function, "features", "at least one channel", f"shape {tuple(features.shape)}")


def check_labels(function: str, labels: Tensor, features: Tensor) -> None:
    """labels: integer, (N,), (B, N) or (B, H', W') to match features, on the same device."""
    check_strided(function, "labels", labels)
    dim = features.dim()
    expected = {2: "(N,)", 3: "(B, N)", 4: "(B, H', W')"}[dim]
    if not isinstance(labels, Tensor) or labels.dim() != dim - 1:
        if dim == 4 and isinstance(labels, Tensor) and labels.dim() == 4 and labels.shape[1] == 1:
            expected += " (labels.squeeze(1) removes the channel)"
        shape = tuple(features.shape)
        fail(function, "labels", f"{expected} for features of shape {shape}", describe(labels))
    check_integers(function, "labels", labels)
    check_device(function, "labels", labels, features, "features")
    points = features.shape[0] if dim == 2 else features.shape[2]
    if dim < 4 and labels.shape[-1] != points:
        fail(function, "labels", f"{points} points, as features", labels.shape[-1])
    if dim > 2 and labels.shape[0] != features.shape[0]:
        fail(function, "labels", f"batch size {features.shape[0]}, as features", labels.shape[0])
    if dim == 4 and labels.numel() == 0 and features.numel() > 0:
        fail(function, "labels", "at least one label per image", f"shape {tuple(labels.shape)}")


def check_logits(
    function: str, logits: Tensor, *, sigmoid: bool = False, points: bool = True
) -> None:
    """logits: floating, (B, K, h, w) or (B, K, d, h, w), with `points` also (N, K) or (B, K, N); K
    at least 2, for sigmoids at least 1."""
    shapes = "(N, K), (B, K, N), " * points + "(B, K, h, w) or (B, K, d, h, w)"
    check_floating(function, "logits", logits, range(2 if points else 4, 6), shapes)
    num_classes, min_classes = logits.shape[1], 1 if sigmoid else 2
    if num_classes == 1 and not sigmoid:
        # its softmax is 1: the loss would be 0, and each prediction right
        expected = (
            "at least 2 classes in dimension 1 (for one sigmoid: pixel_binary_cross_entropy, "
            "BinaryCrossEntropy, Dice(sigmoid=True), pixel_confusion(sigmoid=True), MeanIoU(1, "
            "sigmoid=True), CalibrationError(1, sigmoid=True), pixel_argmax(sigmoid=True); "
            "elsewhere give the logits of two classes, torch.cat([torch.zeros_like(x), x], 1))"
        )
        fail(function, "logits", expected, f"shape {tuple(logits.shape)}")
    if not min_classes <= num_classes <= MAX_CLASSES:
        expected = f"{min_classes} to {MAX_CLASSES} classes in dimension 1"
        fail(function, "logits", expected, f"shape {tuple(logits.shape)}")


def without_channel(labels: Tensor, axes: int) -> Tensor:
    """Labels (B, 1, …) of images and volumes, of `axes` axes without the channel, as (B, …)."""
    if axes > 2 and isinstance(labels, Tensor) and labels.dim() == axes + 1:
        return labels.squeeze(1)
    return labels


def _labels_of_logits(function: str, labels: Tensor, logits: Tensor) -> Tensor:
    """The labels: (N,) or (B, N) as logits, or (B, H, W) or (B, D, H, W) of any size. Those of
    images and volumes may have a channel, which is removed."""
    axes = logits.dim() - 1
    labels = without_channel(labels, axes)
    if (
        not isinstance(labels, Tensor)
        or labels.dim() != axes
        or labels.shape[0] != logits.shape[0]
        or not (axes > 2 or labels.shape[1:] == logits.shape[2:])
    ):
        shape = (logits.shape[0], *logits.shape[2:])
        images = {3: f"({shape[0]}, H, W)", 4: f"({shape[0]}, D, H, W)"}
        expected = f"a tensor {images.get(axes, shape)}, as logits"
        if axes == 2 and isinstance(labels, Tensor) and labels.dim() == 2:
            expected += " (B, K, N); of one image (K, h, w) give logits[None] and labels[None]"
        fail(function, "labels", expected, describe(labels))
    return labels


def clean_bools(x: Tensor) -> Tensor:
    """Of bytes 0 and 1: NumPy's bools of a bilevel Pillow image have 255, and torch keeps it."""
    return x.view(torch.uint8) != 0


def _labels_of_channels(function: str, labels: Tensor, logits: Tensor) -> Tensor:
    """The labels as (B, C, H, W), or the logits' shape if these are not images. With one channel,
    its axis may be absent."""
    images, shape = logits.dim() >= 4, logits.shape
    axes = ", ".join("DHW"[5 - logits.dim() :]) if images else str(tuple(shape[2:]))[1:-1]
    if isinstance(labels, Tensor) and labels.dim() == logits.dim() - 1 and shape[1] == 1:
        labels = labels.unsqueeze(1)
    if (
        not isinstance(labels, Tensor)
        or labels.dim() != logits.dim()
        or labels.shape[:2] != shape[:2]
        or not (images or labels.shape == shape)
    ):
        expected = f"a tensor ({shape[0]}, {shape[1]}, {axes})".replace(", )", ")")
        fail(function, "labels", f"{expected}, one for each channel of logits", describe(labels))
    return clean_bools(labels).view(torch.uint8) if labels.dtype == torch.bool else labels


def flat_pos_weight(function: str, pos_weight: object) -> Tensor:
    """[1] or [C], from numbers [C], (C, 1, …) or (1, C, 1, 1, …) in a tensor, an array or a
    sequence."""
    check_strided(function, "pos_weight", pos_weight)
    expected = "a number, or one for each channel"
    dtype = None if hasattr(pos_weight, "dtype") else torch.float32
    try:
        # as_tensor would move a tensor to torch's default device
        is_tensor = isinstance(pos_weight, Tensor)
        weights = pos_weight if is_tensor else torch.as_tensor(pos_weight, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        fail(function, "pos_weight", expected, describe(pos_weight))
    shape = weights.shape[1:] if weights.dim() > 3 and weights.shape[0] == 1 else weights.shape
    if weights.is_complex() or weights.numel() != shape[:1].numel():
        fail(function, "pos_weight", expected, describe(pos_weight))
    return weights.reshape(-1)


def check_pos_weight(function: str, pos_weight: object, logits: Tensor) -> Tensor | float:
    """A number of at least 0; or [1] or [C], from numbers for all or each of the C channels of
    logits. A tensor is on their device, without a gradient."""
    if isinstance(pos_weight, int | float):
        return check_number(function, "pos_weight", pos_weight)
    if isinstance(pos_weight, list | tuple):
        for number in pos_weight:
            check_number(function, "pos_weight", number)
    original, pos_weight = pos_weight, flat_pos_weight(function, pos_weight)
    channels = logits.shape[1]
    if pos_weight.numel() not in (1, channels):
        expected = f"a number, or one for each of {channels} channels"
        fail(function, "pos_weight", expected, describe(original))
    if not isinstance(original, Tensor):
        return pos_weight.to(logits.device)
    check_device(function, "pos_weight", pos_weight, logits, "logits")
    if pos_weight.requires_grad:
        fail(function, "pos_weight", "no gradient (its detach())", "requires_grad = True")
    return pos_weight


def check_integers(function: str, argument: str, values: Tensor) -> None:
    """Any integer dtype, and strided."""
    check_strided(function, argument, values)
    if values.dtype not in INTEGERS:
        fail(function, argument, "an integer dtype", values.dtype)


def check_label_values(function: str, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Every label is a class or ignore_index. With two classes, labels of 0 and 255 alone are
    refused where 255 is ignored: they may be masks in which 255 is the object. This synchronises
    with the device, and torch.compile breaks the graph here."""
    if not (torch.compiler.is_compiling() or has_values(labels)):
        return
    labels = labels.long()  # torch has no comparisons for uint16 to uint64
    valid = (labels == ignore_index) | ((labels >= 0) & (labels < num_classes))
    if not valid.all():
        wrong = labels[~valid].unique().tolist()
        expected = f"values in [0, {num_classes}) or ignore_index = {ignore_index}"
        fail(function, "labels", expected, wrong[:8] + (["…"] if len(wrong) > 8 else []))
    if num_classes == 2 and ignore_index == 255:
        has_0, has_1, has_255 = (bool((labels == value).any()) for value in (0, 1, 255))
        if has_0 and has_255 and not has_1:
            expected = (
                "a label 1 beside 0 and ignore_index = 255 (of masks in which 255 is the object: "
                "labels = (mask > 0).long(); a crop of background and padding is right: leave "
                "check_labels out)"
            )
            fail(function, "labels", expected, "[0, 255]")


def check_num_classes(function: str, num_classes: object) -> int:
    expected = f"an int from 1 to {MAX_CLASSES}"
    return check_int(function, "num_classes", num_classes, expected, 1, MAX_CLASSES)


def check_ignore_index(function: str, ignore_index: object, num_classes: int) -> int:
    """The label to ignore; the default is 255. A class may be ignored, but only if it is given
    explicitly: with more than 255 classes the default would silently ignore class 255."""
    if ignore_index is None:
        if num_classes > 255:
            expected = "a value where num_classes > 255 (the default, 255, is a class there)"
            fail(function, "ignore_index", expected, f"none, with num_classes = {num_classes}")
        return 255
    return check_int(function, "ignore_index", ignore_index, "an int of 64 bits")


def check_pixels(
    function: str,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int | None,
    check_labels: bool,
    *,
    sigmoid: bool = False,
    points: bool = True,
    **flags: bool,
) -> tuple[Tensor, int]:
    """What all pixel losses take: integer labels on the logits' device, as (B, …) without a
    channel, or with sigmoids (B, C, …), and the label to ignore."""
    check_logits(function, logits, sigmoid=sigmoid, points=points)
    check_strided(function, "labels", labels)
    labels = (_labels_of_channels if sigmoid else _labels_of_logits)(function, labels, logits)
    check_integers(function, "labels", labels)
    check_device(function, "labels", labels, logits, "logits")
    if logits.dim() > 3:
        check_not_empty(function, "logits", logits, labels.numel())
    num_classes = 2 if sigmoid else logits.shape[1]
    ignore_index = check_ignore_index(function, ignore_index, num_classes)
    check_flags(function, check_labels=check_labels, **flags)
    if check_labels:
        check_label_values(function, labels, num_classes, ignore_index)
    return labels, ignore_index


def check_anchors(
    function: str, anchors: Tensor, features: Tensor, num_classes: int | None = None
) -> None:
    """anchors: floating [K, D] on the features' device; K is num_classes, if this is given."""
    check_strided(function, "anchors", anchors)
    dim = features.shape[1]
    fits = isinstance(anchors, Tensor) and anchors.dim() == 2 and anchors.shape[1] == dim
    if not fits or num_classes not in (None, anchors.shape[0]):
        shape = f"[{num_classes or 'K'}, {dim}] (features have D = {dim})"
        fail(function, "anchors", shape, describe(anchors))
    if not anchors.is_floating_point():
        fail(function, "anchors", "a floating dtype", anchors.dtype)
    check_device(function, "anchors", anchors, features, "features")


def rows_of_classes(function: str, argument: str, vectors: Tensor) -> Tensor:
    """[K, D], detached, from the weight of a classifier, anchors or centroids."""
    if not isinstance(vectors, Tensor) or vectors.dim() not in (2, 4) or vectors.is_complex():
        fail(function, argument, "a real tensor [K, D] or [K, D, 1, 1]", describe(vectors))
    return vectors.detach().flatten(1)


def as_number(value: object) -> Any:
    """The value as a Python float or int, or None: NumPy's numbers become floats, and a bool is no
    number."""
    if isinstance(value, float):
        return float(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return float(value) if isinstance(value, numbers.Real) else None


def check_number(function: str, argument: str, value: object, *, above: bool = False) -> float:
    """A finite float, or an int of 64 bits, of at least 0, or above 0."""
    number = as_number(value)
    if isinstance(number, int) and not -(2**63) <= number < 2**63:  # torch takes no larger ints
        fail(function, argument, "a float or an int of 64 bits", describe(value))
    # Comparisons alone: torch.compile cannot trace math.isfinite of a dynamic number.
    if isinstance(number, float) and LARGEST < number < math.inf:
        fail(function, argument, "a number that float32 can hold", describe(value))
    if number is None or not (number > 0 if above else number >= 0) or not number < math.inf:
        least = "above 0" if above else "at least 0"
        fail(function, argument, f"a finite float or int, {least}", describe(value))
    return number


def check_normal(function: str, argument: str, value: object) -> float:
    """A number by which float32 can be divided: the reciprocal of a smaller one may be infinite."""
    number = check_number(function, argument, value, above=True)
    if not SMALLEST_NORMAL <= number <= LARGEST:
        expected = "a normal number of float32, 1.2e-38 to 3.4e38"
        fail(function, argument, expected, describe(value))
    return number


def check_temperature(function: str, value: object) -> float:
    return check_normal(function, "temperature", value)


def check_share(function: str, argument: str, value: object, *, below_one: bool = False) -> float:
    """An int or float from 0 to 1, or below 1."""
    number = as_number(value)
    if number is None or not (number >= 0 and (number < 1 if below_one else number <= 1)):
        expected = "a float or an int in [0, 1)" if below_one else "a float or an int in [0, 1]"
        fail(function, argument, expected, describe(value))
    return number


def check_threshold(function: str, threshold: object) -> float:
    """The threshold of a probability as a float. Raises unless it lies in (0, 1)."""
    number = as_number(threshold)
    if number is None or not 0 < number < 1:
        fail(function, "threshold", "a float in (0, 1)", describe(threshold))
    return number


def check_size(function: str, size: object, axes: int = 2) -> tuple[int, ...]:
    """size: (H, W) of upsampled logits, or (D, H, W): a sequence or an array of what
    `as_int` takes."""
    lengths = as_ints(size)
    # only plain ints have 64 bits at most by themselves, not those of a trace
    too_long = any(type(n) is int and n >= 2**63 for n in lengths or ())
    if lengths is None or len(lengths) != axes or too_long or not all(n >= 0 for n in lengths):
        expected = "(H, W), two ints" if axes == 2 else "(D, H, W), three ints"
        fail(function, "size", f"{expected} of at least 0", describe(size))
    return lengths


def check_axes(
    function: str, logits: Tensor, size: Sequence[int], argument: str = "logits"
) -> None:
    """Logits (B, K, …) and the size to which they are upsampled: pixel + 1/2 must be exact in
    float32. Sizes in a trace may not be numbers, and are not checked."""
    if logits.dtype == torch.float64 or is_traced():
        return
    for source, pixels in zip(logits.shape[2:], size, strict=True):
        if source != pixels and max(source, pixels) > 2**23:
            expected = "axes of at most 2^23 logits and labels"
            fail(function, argument, expected, f"{source} and {pixels}")


def check_count(function: str, argument: str, value: object) -> int:
    number = as_int(value)
    expected = "an int of at least 1" if number is None or number < 1 else "an int of 64 bits"
    return check_int(function, argument, number if number is not None else value, expected, 1)


def check_flags(function: str, **flags: object) -> None:
    for argument, value in flags.items():
        if not isinstance(value, bool):
            fail(function, argument, "True or False", describe(value))


def check_choice(function: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        fail(function, argument, " or ".join(repr(c) for c in choices), repr(value))
