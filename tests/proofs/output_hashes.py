"""Do all outputs and gradients have the same bits as before a change?

    python tests/proofs/output_hashes.py FILE

Writes the hashes of all cases to FILE. If FILE exists, it compares them with those, lists the
differences, and fails if there are any. The places are the reference, and the C++ kernels with each
instruction set of this processor. These run with one thread and with two, which must give the same
bits (but for products of matrices, which are torch's). Only public functions are called. A file is
for one processor and one version of torch.
"""

import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import anchorops as ao

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
INSTRUCTIONS = ("default", "avx2", "avx512")
Results = dict[str, Tensor | None]

# sizes of the logits and of the labels, and align_corners
RATIOS: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "same size": ((9, 13), (9, 13), False),
    "×1.5": ((8, 22), (12, 33), False),
    "×2": ((7, 19), (14, 38), False),
    "×4": ((9, 18), (36, 72), False),
    "×8": ((5, 18), (40, 144), False),
    "×11 and ×3": ((4, 7), (44, 21), True),
    "rows alone": ((9, 20), (9, 50), False),
    "down": ((21, 30), (8, 11), False),
}
LARGE = ((65, 65), (257, 257), True)
ALONE: list[dict[str, bool]] = [
    {
        "correct": correct,
        "probability_sums": probability_sums,
        "squares": squares,
        "pixel_losses": pixel_losses,
    }
    for correct, probability_sums, squares, pixel_losses in (
        (False, False, False, False),
        (True, False, False, False),
        (False, True, False, False),
        (False, False, True, False),
        (False, False, False, True),
    )
]
TOGETHER = dict.fromkeys(ALONE[0], True)
CASES: dict[str, Callable[[], Results]] = {}
OF_PRODUCTS: set[str] = set()  # cases with products of matrices: they run with one thread


def case(name: str, run: Callable[[], Results]) -> None:
    assert name not in CASES, name
    CASES[name] = run


def in_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "cropped":
        around = torch.randn([n + 3 for n in x.shape]).to(x)
        crop = around[tuple(slice(1, n + 1) for n in x.shape)]
        return crop.copy_(x)
    return x.contiguous()


def randn(*size: int, dtype: torch.dtype = F32, layout: str = "") -> Tensor:
    return in_layout((3 * torch.randn(size)).to(dtype), layout).requires_grad_()


def labels_of(classes: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Runs of one class and single pixels; some are ignored."""
    labels = torch.randint(0, classes, size)
    labels[..., : size[-1] // 2] = labels[..., :1]
    labels[torch.rand(size) < 0.1] = 255
    return labels.to(dtype)


def with_gradients(outputs: Results, **inputs: Tensor | None) -> Results:
    """The outputs, and the gradients of the inputs from all outputs."""
    leaves = {name: x for name, x in inputs.items() if x is not None}
    differentiable = [x for x in outputs.values() if x is not None and x.requires_grad]
    grads = [torch.linspace(0.5, 1.5, x.numel()).view(x.shape).to(x) for x in differentiable]
    gradients = torch.autograd.grad(differentiable, list(leaves.values()), grads, allow_unused=True)
    return outputs | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def loss_and_gradients(loss: nn.Module, *inputs: Tensor, **leaves: Tensor | None) -> Results:
    outputs: Results = {"loss": loss(*inputs)}
    leaves |= {name: x for name, x in loss.named_parameters() if x.requires_grad}
    terms: dict[str, Tensor] = getattr(loss, "terms", {})
    state = {name: x.clone() for name, x in loss.named_buffers()}
    return with_gradients(outputs, **leaves) | terms | state


def softmax_moments(
    size: tuple[int, ...],
    labels_size: tuple[int, ...],
    dtype: torch.dtype = F32,
    layout: str = "",
    labels_dtype: torch.dtype = torch.int64,
    **options: Any,
) -> Results:
    logits = randn(*size, dtype=dtype, layout=layout)
    labels = labels_of(size[1], *labels_size, dtype=labels_dtype)
    ignore_index = {"ignore_index": 255}
    moments = ao.ops.softmax_moments(logits, labels, **ignore_index, **options)
    names = (
        "counts",
        "correct",
        "losses",
        "intersections",
        "probability_sums",
        "squares",
        "pixel_losses",
    )
    return with_gradients({name: getattr(moments, name) for name in names}, logits=logits)


def name_of(*parts: object) -> str:
    return ", ".join(str(part).removeprefix("torch.") for part in parts if part not in ("", False))


def cases_of_softmax_moments() -> None:
    for classes in (2, 5, 19, 300):
        for ratio, (size, labels, align) in RATIOS.items():
            for i, flags in enumerate([*ALONE, TOGETHER]):
                results = name_of(*(key for key, value in flags.items() if value))
                options = flags | {"align_corners": align, "per_image": i % 2 == 1}
                case(
                    f"softmax moments, {classes} classes, {ratio}: {results}",
                    lambda shape=((2, classes, *size), (2, *labels)), options=options: (
                        softmax_moments(*shape, **options)
                    ),
                )
    for classes in (2, 19):
        size, labels, align = LARGE
        case(
            f"softmax moments, {classes} classes, 65 to 257",
            lambda shape=((1, classes, *size), (1, *labels)), align=align: softmax_moments(
                *shape, **TOGETHER, align_corners=align
            ),
        )
        for ratio in ("same size", "×1.5", "×4"):
            size, labels, _ = RATIOS[ratio]
            for dtype in (F32, BF16, F16, F64):
                for layout in ("", "channels last", "cropped"):
                    labels_dtype = torch.uint8 if layout else torch.int64
                    arguments = (2, classes, *size), (2, *labels), dtype, layout, labels_dtype
                    case(
                        f"softmax moments, {classes} classes, {ratio}, {name_of(dtype, layout)}",
                        lambda arguments=arguments, align=layout == "cropped": softmax_moments(
                            *arguments, **TOGETHER, align_corners=align, per_image=align
                        ),
                    )
    shapes = {
        "points": ((70, 5), (70,)),
        "points of a batch": ((2, 5, 90), (2, 90)),
        "volume": ((2, 5, 3, 4, 5), (2, 7, 9, 11)),
        "volume of two classes": ((2, 2, 3, 4, 5), (2, 6, 8, 20)),
        "volume of the labels' size": ((2, 5, 3, 4, 5), (2, 3, 4, 5)),
    }
    for name, (size, labels) in shapes.items():
        for dtype in (F32, BF16, F64):
            for align in (False, True):
                case(
                    f"softmax moments, {name_of(name, dtype, align and 'aligned')}",
                    lambda arguments=(size, labels, dtype), align=align: softmax_moments(
                        *arguments, **TOGETHER, align_corners=align, per_image=align
                    ),
                )


def pixel_losses(classes: int) -> dict[str, Callable[[], nn.Module]]:
    """One class: sigmoids."""
    if classes == 1:
        cross_entropy, weights = ao.BinaryCrossEntropy, {"pos_weight": 1.7}
        dice: dict[str, Any] = {"sigmoid": True}
    else:
        weight = torch.linspace(0, 2, classes)
        cross_entropy, weights, dice = ao.CrossEntropy, {"weight": weight}, {"weight": weight}
    losses: dict[str, Callable[[], nn.Module]] = {}
    for options in (
        {},
        weights,
        {"accuracy": True, "label_smoothing": 0.1},
        *({"focal_gamma": gamma} for gamma in (0.5, 1.0, 2.0, 2.7)),
        {"ohem": 0.3},
        {"ohem_kept": 100},
        weights | {"label_smoothing": 0.1, "focal_gamma": 1.5},
        weights | {"label_smoothing": 0.1, "ohem": 0.3, "ohem_kept": 100},
    ):
        name = name_of("cross-entropy", *(f"{k} {v}" for k, v in options.items() if k != "weight"))
        name += ", weight" * ("weight" in options)
        losses[name] = lambda options=options: cross_entropy(ignore_index=255, **options)
    for options in (
        {},
        {"squared": True, "per_image": True},
        {"alpha": 0.3, "beta": 0.7, "smooth": 1.0, "gamma": 0.75},
        {"log": True, "absent": "zero"},
        {"classes": [0]} if classes == 1 else {"classes": [0, 1], "absent": "keep", "smooth": 0.1},
    ):
        name = name_of("Dice", *(f"{key} {value}" for key, value in options.items()))
        arguments = dice | options | {"ignore_index": 255}
        losses[name] = lambda arguments=arguments: ao.Dice(**arguments)
    losses["both"] = lambda: ao.CrossEntropyDice(
        cross_entropy(**weights, label_smoothing=0.1, focal_gamma=2.0),
        ao.Dice(**dice, squared=True),
        ignore_index=255,
    )
    return losses


def pixel_loss(
    make: Callable[[], nn.Module],
    size: tuple[int, ...],
    labels_size: tuple[int, ...],
    dtype: torch.dtype,
    weighted: bool,
) -> Results:
    classes = (
        2 if len(labels_size) == len(size) else size[1]
    )  # sigmoids have labels for each channel
    logits, labels = randn(*size, dtype=dtype), labels_of(classes, *labels_size)
    if not weighted:
        return loss_and_gradients(make(), logits, labels, logits=logits)
    weights = torch.rand(labels_size)
    weights[..., :2] = 0
    weights.requires_grad_()
    return loss_and_gradients(make(), logits, labels, weights, logits=logits, weights=weights)


def cases_of_pixel_losses() -> None:
    for classes in (1, 2, 5, 19):
        channels = 3 if classes == 1 else classes
        batch = (2, 3) if classes == 1 else (2,)
        places: list[tuple[str, tuple, tuple, torch.dtype]] = [
            (name_of(ratio, dtype), RATIOS[ratio][0], RATIOS[ratio][1], dtype)
            for ratio, dtype in (("×4", F32), ("×1.5", BF16), ("same size", F32), ("down", F64))
        ]
        places.append(("volume", (3, 4, 5), (6, 8, 11), F32))
        for place, size, labels_size, dtype in places:
            for name, make in pixel_losses(classes).items():
                shape = (2, channels, *size), (*batch, *labels_size), dtype
                for weighted in (False,) if name.startswith("Dice") else (False, True):
                    kind = "sigmoids" if classes == 1 else f"{classes} classes"
                    case(
                        f"{kind}, {place}: {name_of(name, weighted and 'pixel weights')}",
                        lambda arguments=(make, *shape, weighted): pixel_loss(*arguments),
                    )
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.2):

            def cross_entropy(reduction: str = reduction, smoothing: float = smoothing) -> Results:
                logits, labels = randn(2, 5, 9, 18), labels_of(5, 2, 36, 72)
                weight = torch.rand(5, requires_grad=smoothing == 0)
                loss = ao.pixel_cross_entropy(
                    logits, labels, weight=weight, label_smoothing=smoothing, reduction=reduction
                )
                weights = weight if weight.requires_grad else None
                return with_gradients({"loss": loss}, logits=logits, weight=weights)

            case(f"pixel_cross_entropy, {reduction}, smoothing {smoothing}", cross_entropy)

        def binary(reduction: str = reduction) -> Results:
            logits, labels = randn(2, 3, 9, 18), labels_of(2, 2, 3, 36, 72)
            arguments = {"pos_weight": [0.5, 1.0, 3.0], "reduction": reduction}
            loss = ao.pixel_binary_cross_entropy(logits, labels, **arguments)
            return with_gradients({"loss": loss}, logits=logits)

        case(f"pixel_binary_cross_entropy, {reduction}", binary)


def divergence(
    size: tuple[int, ...],
    teacher_size: tuple[int, ...],
    pixels: tuple[int, ...],
    dtype: torch.dtype = F32,
    layout: str = "",
    masked: bool = False,
    **options: Any,
) -> Results:
    logits = randn(*size, dtype=dtype, layout=layout)
    teacher = randn(*size[:2], *teacher_size, dtype=dtype).detach()
    valid = torch.rand(size[0], *pixels) < 0.7 if masked else None
    value = ao.pixel_kl_divergence(logits, teacher, pixels, valid=valid, **options)
    return with_gradients({"divergence": value}, logits=logits)


def cases_of_divergences() -> None:
    for classes in (2, 19):
        for ratio, (size, pixels, align) in RATIOS.items():
            for i, reduction in enumerate(("mean", "sum", "none")):
                options = {"align_corners": align, "reduction": reduction, "masked": i > 0}
                arguments = (2, classes, *size), size, pixels
                case(
                    f"divergence, {classes} classes, {ratio}, {reduction}",
                    lambda arguments=arguments, options=options: divergence(*arguments, **options),
                )
    for dtype in (F32, BF16, F16, F64):
        for layout in ("", "channels last", "cropped"):
            case(
                f"divergence from a smaller teacher, {name_of(dtype, layout)}",
                lambda arguments=((2, 7, 9, 12), (5, 6), (36, 48), dtype, layout): divergence(
                    *arguments, masked=True, temperature=2.5, reduction="none"
                ),
            )
        case(
            f"divergence of volumes, {name_of(dtype)}",
            lambda arguments=((2, 5, 3, 4, 5), (2, 3, 4), (6, 8, 11), dtype): divergence(
                *arguments, masked=True, temperature=0.5, reduction="none"
            ),
        )


def predictions(
    size: tuple, pixels: tuple, dtype: torch.dtype, layout: str, align: bool
) -> Results:
    logits = randn(*size, dtype=dtype, layout=layout)
    options: dict[str, Any] = {"align_corners": align}
    labels = labels_of(size[1], size[0], *pixels, dtype=torch.uint8)
    classes, confidence = ao.pixel_argmax(logits, pixels, confidence=True, **options)
    ignored = {"ignore_index": 255}
    matrix = ao.pixel_confusion(logits, labels, **options, **ignored)
    class_confusion = ao.confusion(classes, labels, size[1], **ignored)
    binary = (labels[:, None] % 2).expand(-1, size[1], *pixels[: len(size) - 2])
    sigmoid_confusion = ao.pixel_confusion(logits, binary, sigmoid=True, **options)
    maps = {"classes": classes, "confidence": confidence}
    return {
        **maps,
        "matrix": matrix,
        "of_classes": class_confusion,
        "of_sigmoids": sigmoid_confusion,
    }


def cases_of_predictions() -> None:
    for classes in (2, 5, 19, 300):
        for ratio, (size, pixels, align) in RATIOS.items():
            for dtype, layout in ((F32, ""), (BF16, "channels last"), (F64, "cropped")):
                arguments = (2, classes, *size), pixels, dtype, layout, align
                case(
                    f"predictions, {classes} classes, {name_of(ratio, dtype, layout)}",
                    lambda arguments=arguments: predictions(*arguments),
                )
    case(
        "predictions of volumes",
        lambda: predictions((2, 5, 3, 4, 5), (6, 8, 11), F32, "", False),
    )


def class_moments(
    size: tuple[int, ...],
    labels_size: tuple[int, ...],
    classes: int,
    dtype: torch.dtype,
    layout: str,
    anchored: bool,
    **options: Any,
) -> Results:
    features, labels = randn(*size, dtype=dtype, layout=layout), labels_of(classes, *labels_size)
    anchors = torch.randn(classes, size[1], requires_grad=True) if anchored else None
    arguments = features, labels, classes
    options |= {"ignore_index": 255}
    moments = ao.ops.class_moments(*arguments, anchors=anchors, seed=5, **options)
    return with_gradients(moments._asdict(), features=features, anchors=anchors)


def distances(size: tuple[int, ...], labels_size: tuple[int, ...], reduction: str) -> Results:
    features, labels = randn(*size), labels_of(7, *labels_size)
    anchors = torch.randn(7, size[1], requires_grad=True)
    loss = ao.pixel_to_anchor_mse(features, labels, anchors, reduction=reduction)
    centroids, counts = ao.class_centroids(features, labels, 7, per_image=True)
    outputs: Results = {"loss": loss, "centroids": centroids, "counts": counts}
    return with_gradients(outputs, features=features, anchors=anchors)


def cases_of_class_moments() -> None:
    shapes = {
        "labels of the same size": ((2, 20, 9, 33), (2, 9, 33), 5),
        "larger labels": ((2, 20, 9, 33), (2, 36, 132), 40),
        "smaller labels": ((2, 3, 30, 41), (2, 7, 9), 5),
        "many classes": ((2, 17, 9, 33), (2, 9, 33), 300),
        "points": ((700, 20), (700,), 5),
        "points of a batch": ((2, 33, 90), (2, 90), 5),
    }
    for name, (size, labels, classes) in shapes.items():
        for dtype in (F32, BF16, F16, F64):
            for layout in ("", "channels last", "cropped"):
                for anchored in (False, True):
                    i = len(CASES)
                    options = {"groups": 1 + 2 * (i % 2), "per_image": i % 3 == 0}
                    arguments = size, labels, classes, dtype, layout, anchored
                    parts = (
                        name,
                        dtype,
                        layout,
                        anchored and "anchors",
                        f"{options['groups']} groups",
                    )
                    case(
                        f"class moments, {name_of(*parts)}",
                        lambda arguments=arguments, options=options: class_moments(
                            *arguments, **options
                        ),
                    )
        for reduction in ("mean", "sum"):
            case(
                f"distances and centroids, {name}, {reduction}",
                lambda arguments=(size, labels, reduction): distances(*arguments),
            )


def info_nce(groups: int, with_positives: bool, reduction: str) -> Results:
    queries, keys = randn(7, groups, 12), randn(7, 12)
    positives = randn(7, groups, 12) if with_positives else None
    present = torch.rand(7, groups) < 0.7
    options = {"positives": positives, "present": present, "reduction": reduction}
    loss = ao.ops.centroid_info_nce(queries, keys, **options)
    return with_gradients({"loss": loss}, queries=queries, keys=keys, positives=positives)


K, D = 5, 12
METHODS: dict[str, Callable[[], nn.Module]] = {
    "SAR": lambda: ao.SAR(K, D, gate="per_class", delta=0.0),
    "CR": lambda: ao.SAR(K, D, embed=False),
    "OCCL": lambda: ao.OCCL(K, D),
    "OCCL of images": lambda: ao.OCCL(K, D, split="images", reduction="sum"),
    "MVSC": lambda: ao.MVSC(K, D, groups=3),
    "CeCo": lambda: ao.CeCo(K, D, reduced_dim=7, center_dim=9, dropout=0.0),
    "CeCo of images": lambda: ao.CeCo(
        K, D, reduced_dim=7, center_dim=9, dropout=0.0, per_image=True
    ),
    "CeCo of features": lambda: ao.CeCo(
        K, D, reduced_dim=7, center_dim=9, dropout=0.0, resolution="feature"
    ),
    "CBP": lambda: ao.CBP(K, D, update="penalty"),
    "combined": lambda: ao.Combined(ao.SAR(K, D, delta=0.0), ao.OCCL(K, D), ao.MVSC(K, D)),
}


def method(make: Callable[[], nn.Module], dtype: torch.dtype, layout: str) -> Results:
    """The second step, which reads the state of the first."""
    loss, classifier = make(), nn.Conv2d(D, K, 1)
    features, labels = randn(3, D, 6, 7, dtype=dtype, layout=layout), labels_of(K, 3, 24, 28)
    arguments = features, labels, classifier
    loss(*arguments)
    return loss_and_gradients(loss, *arguments, features=features, weight=classifier.weight)  # pyright: ignore


def cases_of_methods() -> None:
    before = set(CASES)
    for groups in (1, 3):
        for with_positives in (False, True):
            for reduction in ("mean", "sum", "none"):
                case(
                    f"InfoNCE, {groups} groups, {reduction}" + ", positives" * with_positives,
                    lambda arguments=(groups, with_positives, reduction): info_nce(*arguments),
                )
    for name, make in METHODS.items():
        for dtype, layout in ((F32, ""), (F32, "channels last"), (BF16, "cropped"), (F64, "")):
            case(
                f"{name}, {name_of(dtype, layout)}",
                lambda arguments=(make, dtype, layout): method(*arguments),
            )
    OF_PRODUCTS.update(CASES.keys() - before)


def hash_of(x: Tensor) -> str:
    kind = f"{x.dtype} {tuple(x.shape)} {x.stride()}"
    numbers = x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(kind.encode() + numbers).hexdigest()[:12]


def hashes(name: str, threads: int) -> dict[str, str]:
    """Of the results of a case."""
    torch.set_num_threads(threads)
    torch.manual_seed(zlib.crc32(name.encode()))
    results = CASES[name]().items()
    return {result: "none" if x is None else hash_of(x) for result, x in results}


def run_here(backend: str) -> dict[str, dict[str, str]]:
    """The hashes of all cases. Fails if they depend on the number of threads."""
    cases_of_softmax_moments()
    cases_of_pixel_losses()
    cases_of_divergences()
    cases_of_predictions()
    cases_of_class_moments()
    cases_of_methods()
    with ao.use_backend(backend):
        hashes_by_case = {name: hashes(name, 1) for name in CASES}
        for name in CASES.keys() - OF_PRODUCTS if backend == "cpu" else ():
            if hashes(name, 2) != hashes_by_case[name]:
                sys.exit(f"{backend}: {name}: other bits of two threads")
    return hashes_by_case


def run_everywhere() -> dict[str, str]:
    """By place, case and result. The places run at the same time."""
    here = INSTRUCTIONS.index(torch.backends.cpu.get_cpu_capability().lower())
    places = [("reference", INSTRUCTIONS[here])]
    places += [("cpu", instructions) for instructions in INSTRUCTIONS[: here + 1]]
    processes = []
    for backend, instructions in places:
        environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
        command = [sys.executable, "-W", "ignore", __file__, "--backend", backend]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    hashes_by_result = {}
    for (backend, instructions), process in zip(places, processes, strict=True):
        output, _ = process.communicate()
        if process.returncode != 0:
            sys.exit(f"{backend}, {instructions}: the run failed")
        place = backend if backend == "reference" else instructions
        for name, results in json.loads(output).items():
            hashes_by_result |= {f"{place}: {name}: {result}": x for result, x in results.items()}
    return hashes_by_result


def main(file: Path) -> int:
    now = run_everywhere()
    if not file.exists():
        file.write_text(json.dumps(now, indent=0, ensure_ascii=False) + "\n")
        print(f"{len(now)} hashes written to {file}")
        return 0
    before = json.loads(file.read_text())
    different = [x for x in sorted({*before, *now}) if before.get(x) != now.get(x)]
    for name in different:
        print(f"{name}: {before.get(name)} → {now.get(name)}")
    print(f"{len(different)} of {len(now)} hashes differ")
    return int(bool(different))


if __name__ == "__main__":
    if sys.argv[1] == "--backend":
        print(json.dumps(run_here(sys.argv[2])))
    else:
        sys.exit(main(Path(sys.argv[1])))
