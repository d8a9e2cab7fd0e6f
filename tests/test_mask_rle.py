"""Run lengths of masks: against pycocotools and torch, pixel_argmax and the reference; and on a GPU
those of the CPU."""

import json
import os
import pickle
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao
from anchorops import reference
from anchorops._ops import mask_rle as module
from anchorops._shared.upsampling import upsample
from anchorops.measure import peak_extra_bytes
from tests.helpers.cpu_kernels import same_for_all_threads

coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
ON_CPU = pytest.mark.on("reference", "cpu")
ON_TRITON = pytest.mark.on("simulated_triton", "triton")


def pixels_of(codes: list[dict[str, Any]]) -> Tensor:
    """By pycocotools, bool [N, H, W]."""
    return torch.from_numpy(coco.decode(codes)).bool().permute(2, 0, 1)


def codes_of(masks: Tensor) -> list[dict[str, Any]]:
    columns = np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))
    return [code | {"counts": code["counts"].decode()} for code in coco.encode(columns)]


def box_of(mask: Tensor) -> list[int]:
    y, x = (mask.any(axis).nonzero()[:, 0].tolist() or [0, -1] for axis in (1, 0))
    return [x[0], y[0], x[-1] + 1, y[-1] + 1]


def in_boxes(masks: Tensor, boxes: Tensor) -> Tensor:
    x0, y0, x1, y1 = boxes.double()[:, :, None, None].unbind(1)
    y, x = torch.meshgrid(*map(torch.arange, masks.shape[1:]), indexing="ij")
    return masks & (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def check(masks: ao.MaskRLE, pixels: Tensor) -> None:
    """The results are those of the pixels."""
    assert masks.coco() == codes_of(pixels)
    assert torch.equal(masks.dense(), pixels)
    assert torch.equal(masks.areas(), pixels.sum((1, 2)))
    assert masks.boxes().tolist() == [box_of(mask) for mask in pixels]
    for code in masks.coco(compressed=False):
        counts, (height, width) = code["counts"], code["size"]
        assert sum(counts) == height * width and all(n > 0 for n in counts[1:])


# Largest side of the logits, ratio of the sizes, number of cases.
KINDS = {
    "smooth": (24, 12.0, 60),
    "noisy": (24, 8.0, 60),
    "ties": (12, 8.0, 60),  # small integers, so that many upsampled values are 0
    "large": (200, 5.0, 6),
    "tiny": (3, 30.0, 60),
    "down": (60, 1.0, 60),
    "one axis down": (40, 4.0, 60),
    "extreme": (12, 8.0, 60),
}


def logits_of(kind: str, h: int, w: int) -> Tensor:
    z = torch.randn(4, h, w)
    if kind in ("smooth", "large"):
        z = 5 * F.interpolate(torch.randn(1, 4, 4, 4), (h, w), mode="bicubic")[0]
    if kind == "ties":
        z = torch.randint(-2, 3, (4, h, w)).float()
    return z * 10 ** torch.randint(-30, 30, (4, 1, 1)) if kind == "extreme" else z


Case = tuple[Tensor, tuple[int, int], dict[str, Any]]


def case_of(kind: str, case: int) -> Case:
    """Logits, size and options."""
    most, ratio, _ = KINDS[kind]
    h, w = torch.randint(1, most + 1, (2,)).tolist()
    height, width = (1 + int(n * ratio * torch.rand(()).item()) for n in (h, w))
    if kind == "one axis down":
        height = 1 + h // 3
    z = logits_of(kind, h, w)
    if case % 4 == 1:
        z = z.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # channels last
    boxes = None
    if case % 5 == 2:  # some are empty, some beyond the image
        boxes = (torch.rand(4, 4) * 1.5 - 0.25) * torch.tensor([width, height] * 2)
        boxes[0] = torch.tensor([-torch.inf, 0.5, torch.inf, height + 1])
        if case % 2 == 0:
            boxes = boxes.clamp(0, 999).to((torch.uint16, torch.half)[case % 4 // 2])
    options = {"threshold": (0.5, 0.5, 0.2)[case % 3], "align_corners": case % 2 == 1}
    return z, (height, width), options | {"boxes": boxes}


@ON_CPU
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_pycocotools(kind: str):
    """Where a pixel differs from that of F.interpolate, its value is the threshold, up to
    rounding."""
    cases = KINDS[kind][2]
    differing = pixels = 0
    for case in range(cases):
        z, size, options = case_of(kind, case)
        threshold, align_corners, boxes = options.values()
        masks = ao.mask_rle(z, size, **options)
        actual = pixels_of(masks.coco())
        check(masks, actual)
        up = F.interpolate(z[None], size, mode="bilinear", align_corners=align_corners)
        level = float(np.log(threshold / (1 - threshold)))
        expected = up[0] > level
        if boxes is not None:
            expected = in_boxes(expected, boxes)
        exact = upsample(z[None], size, align_corners)[0]
        scale = z.abs().amax((1, 2), keepdim=True).clamp(min=abs(level)) * 2**-24
        differ = actual != expected
        assert ((exact - level).abs() <= 4 * scale)[differ].all()
        assert masks.coco() == codes_of(expected) or differ.any()
        differing, pixels = differing + int(differ.sum()), pixels + differ.numel()
    assert differing <= pixels * (1e-3 if kind == "ties" else 1e-5)


def check_same_as_on_the_cpu(z: Tensor, size: tuple[int, int], **options: Any) -> None:
    """Bit for bit."""
    masks = ao.mask_rle(z, size, **options)
    with ao.use_backend("cpu"):
        expected = ao.mask_rle(z.cpu(), size, **options)
    assert masks.coco() == expected.coco()
    assert masks.areas().device == masks.boxes().device == z.device
    assert torch.equal(masks.areas().cpu(), expected.areas())
    assert torch.equal(masks.boxes().cpu(), expected.boxes())


SIZES = ((37, 50), (12, 17), (5, 40), (12, 40))


def not_finite(dtype: torch.dtype) -> Tensor:
    z = 2 * torch.randn(6, 12, 17)
    z[0, 3:5, 3], z[1, 2, 2], z[2, 5, 5], z[3] = torch.nan, torch.inf, -torch.inf, -torch.inf
    z[4, 4, 4:6] = torch.tensor([torch.inf, -torch.inf])
    return z.to(dtype)


def at_the_edges() -> Iterator[Case]:
    boxes = [[0, 0, 30, 40], [3, 0, 9, 40], [3, 2, 9, 40], [3, 0, 9, 5], [0, 4, 30, 9]]
    for z in (torch.ones(6, 4, 5), torch.randn(6, 4, 5) + 1):
        yield z, (40, 30), {"boxes": torch.tensor([*boxes, [5, 6, 5, 9]])}


def of_halves(threshold: float, align_corners: bool) -> Iterator[Case]:
    options = {"threshold": threshold, "align_corners": align_corners}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from ((not_finite(dtype), size, options) for size in SIZES)


ALIGNED: dict[str, Any] = {"align_corners": True}
SAME: dict[str, Callable[[], Iterable[Case]]] = {
    **{kind: lambda kind=kind: (case_of(kind, i) for i in range(KINDS[kind][2])) for kind in KINDS},
    "not finite": lambda: of_halves(0.5, False),
    "not finite, aligned": lambda: of_halves(0.3, True),
    # the smallest number, halved twice: with aligned corners, weights are 0 and ½
    "rounded_to_0": lambda: [(torch.randint(-1, 2, (3, 9, 11)) * 2.0**-149, (17, 21), ALIGNED)],
    "boxes_at_the_edges": at_the_edges,
    # the most rows of pixels, whose positions float32 hardly tells apart
    "most rows": lambda: [(torch.randn(2, 5, 3), (2**23, 3), {})],
    "most rows, aligned": lambda: [(torch.randn(2, 5, 3), (2**23, 3), ALIGNED)],
}


@ON_TRITON
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", SAME)
def test_triton_is_equal_to_the_cpu(name: str):
    for z, size, options in SAME[name]():
        check_same_as_on_the_cpu(z, size, **options)


@pytest.mark.on("simulated_triton")
def test_every_operation_of_triton_is_rounded(backend: str):
    """The machine for PTX is more exact than GPUs where an instruction may be approximate."""
    from ptx.triton_launches import programs

    from anchorops.kernels import mask_rle

    exact = {"cvt", "setp", "selp", "min", "max", "mov", "ld"}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for align_corners in (False, True):
            z = torch.randn(1, 4, 5).to(dtype)
            ao.mask_rle(z, (9, 11), boxes=torch.tensor([[0, 0, 9, 9]]), align_corners=align_corners)
    kernels = {name for name in vars(mask_rle) if name.endswith("_kernel")}
    found = [x.kernel for x in programs.values() if x.kernel.name in kernels]
    assert {kernel.name for kernel in found} == kernels
    for instruction in (i for x in found for block in x.blocks for i in block.instructions):
        floating = {"f16", "bf16", "f32", "f64"} & {*instruction.types}
        if floating and instruction.name not in exact:
            assert instruction.name in ("add", "sub", "mul"), instruction.text
            assert instruction.modifiers == ("rn",), instruction.text


@pytest.mark.slow
def test_every_operation_of_the_cpu_is_rounded():
    """Nothing is fused on a processor that could."""
    from torch.utils.cpp_extension import include_paths

    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("it needs a C++ compiler")
    command = [compiler, "-O2", "-S", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    command += ["-mfma"] if platform.machine() == "x86_64" else []
    command += [x for path in include_paths("cpu") for x in ("-isystem", path)]
    source = Path(__file__).parents[1] / "csrc/cpu/mask_rle.cpp"
    run = subprocess.run([*command, "-o-", source], text=True, capture_output=True)
    assert "mulss" in run.stdout or "fmul" in run.stdout, run.stderr
    assert re.findall(r"\bv?fn?m(?:add|sub|la|ls)\w*", run.stdout) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("threshold", "align_corners"), [(0.5, False), (0.3, True)])
def test_equal_to_pixel_argmax_and_reference(
    dtype: torch.dtype, threshold: float, align_corners: bool
):
    """With any number of threads, and without a gradient."""
    options: dict[str, Any] = {"threshold": threshold, "align_corners": align_corners}
    for size in SIZES:
        z = not_finite(dtype).requires_grad_()
        masks = ao.mask_rle(z, size, **options)
        dense = ao.pixel_argmax(z[None], size, sigmoid=True, dtype=torch.uint8, **options)[0]
        assert (masks.dense() != dense).sum() <= 1
        same_for_all_threads(lambda z=z, size=size: [ao.mask_rle(z, size, **options).dense()])
        with ao.use_backend("reference"):
            by_reference = ao.mask_rle(z, size, **options)
        assert (by_reference.dense() != masks.dense()).sum() <= 1
        check(by_reference, by_reference.dense())


@pytest.mark.on("reference", "cpu", "simulated_triton", "triton")
@pytest.mark.usefixtures("backend")
def test_empty():
    none = ao.mask_rle(torch.zeros(0, 4, 5), (8, 10))
    assert len(none) == 0 and none.coco() == none.coco(compressed=False) == []
    assert none.dense().shape == (0, 8, 10) and none.boxes().shape == (0, 4)
    assert len(ao.mask_rle(torch.zeros(0, 0, 5), (8, 10))) == 0
    for size in ((0, 5), (5, 0), (0, 0)):
        masks = ao.mask_rle(torch.ones(2, 3, 4), size, boxes=torch.ones(2, 4))
        assert masks.coco() == [{"size": [*size], "counts": "0"}] * 2
        assert masks.dense().shape == (2, *size) and masks.coco(False)[0]["counts"] == [0]
        assert not masks.areas().any() and not masks.boxes().any()
    assert ao.mask_rle(torch.ones(2, 0, 4), (0, 4)).areas().tolist() == [0, 0]
    zeros, ones = ao.mask_rle(torch.tensor([-1.0, 1.0]).view(2, 1, 1), (3, 4)).coco(False)
    assert zeros["counts"] == [12] and ones["counts"] == [0, 12]


@pytest.mark.on("cpu", "simulated_triton", "triton")
@pytest.mark.usefixtures("backend")
def test_more_than_2_to_the_31_pixels():
    side = 2**16
    masks = ao.mask_rle(torch.tensor([[[-1.0, 1.0]]]), (side, side))
    assert masks.areas().item() == 2**31
    assert masks.boxes().tolist() == [[side // 2, 0, side, side]]
    assert masks.coco(compressed=False)[0]["counts"] == [2**31, 2**31]


@pytest.mark.filterwarnings("error")
def test_result():
    z = torch.randn(5, 6, 7)
    masks = ao.mask_rle(z, (20, 30))
    assert repr(masks) == "MaskRLE(5 masks of 20 × 30)" and masks.size == (20, 30)
    codes = masks.coco()
    assert json.loads(json.dumps(codes)) == codes
    assert pickle.loads(pickle.dumps(masks)).coco() == codes
    dense = masks.dense()
    for index in (slice(1, 4), slice(0, 0), [3, 0], torch.tensor([4, 4]), dense.any(2).any(1)):
        check(masks[index], dense[index])
    assert masks[-1].coco() == codes[-1:]
    assert [mask.coco()[0] for mask in masks] == codes
    assert len(pickle.dumps(masks[:1])) < len(pickle.dumps(masks))
    for index, got in ((99, "99"), (-6, "-6"), ([99], r"\[99\]"), ("x", "'x'")):
        error = TypeError if index == "x" else IndexError
        with pytest.raises(error, match=rf"^MaskRLE: index: .* indices of 5 masks, got {got}"):
            masks[index]  # pyright: ignore
    with pytest.raises(ValueError, match=r"^MaskRLE: index: .* got slice\(None, None, -1\)"):
        masks[::-1]
    with pytest.raises(ValueError, match=r"^MaskRLE.coco: compressed: expected True or False"):
        masks.coco(1)  # pyright: ignore[reportArgumentType]


def test_what_a_result_returns_is_the_callers():
    masks = ao.mask_rle(torch.randn(3, 6, 7), (20, 30))
    expected = masks.boxes().clone(), masks.areas().clone()
    masks.boxes().zero_()
    masks.areas().zero_()
    masks.coco()[0]["size"].clear()
    masks[1:].boxes().zero_()
    assert torch.equal(masks.boxes(), expected[0]) and torch.equal(masks.areas(), expected[1])
    assert torch.equal(masks[:2].boxes(), expected[0][:2])
    assert masks.coco()[0]["size"] == [20, 30]


def test_compiled():
    """The graph breaks at the call."""
    z, box = torch.randn(3, 9, 12), torch.tensor([[0.0, 0, 30, 20]] * 3)

    def codes(z: Tensor) -> tuple[list[dict[str, Any]], Tensor]:
        masks = ao.mask_rle(2 * z - 0.5, (36, 48), boxes=box)
        return masks.coco(), masks.areas() + 1

    with pytest.raises(Exception, match="the size of the result depends on the data"):
        torch.compile(codes, backend="aot_eager", fullgraph=True)(z)
    compiled = torch.compile(codes, backend="aot_eager")(z)
    assert compiled[0] == codes(z)[0] and torch.equal(compiled[1], codes(z)[1])


@ON_TRITON
@pytest.mark.usefixtures("backend")
def test_where_no_library_is_compiled(monkeypatch: pytest.MonkeyPatch):
    """Then PyTorch writes the codes."""
    monkeypatch.setattr(module, "unusable", lambda: {"cpu": "it was not compiled", "triton": None})
    monkeypatch.delattr(torch.ops.anchorops.mask_codes, "cpu", raising=False)
    check_same_as_on_the_cpu(torch.randn(3, 4, 5), (30, 20))


@pytest.mark.on("gpu")
def test_float64_of_a_gpu(backend: str):
    """It is computed on the CPU."""
    z = torch.randn(3, 4, 5, dtype=torch.float64)
    with ao.use_backend("auto"):
        check_same_as_on_the_cpu(z, (30, 20))


def test_codes():
    """Of changes: those of the reference."""
    changes, offsets = torch.tensor([0, 40, 41, 5, 9, 1000, 2**40, 2**40 + 1]), [0, 3, 3, 8]
    arguments = changes, torch.tensor(offsets), 2**41
    operator = torch.ops.anchorops.mask_codes.cpu
    torch.library.opcheck(operator, arguments)
    for ours, expected in zip(operator(*arguments), reference.mask_codes(*arguments), strict=True):
        assert torch.equal(ours, expected)
    for wrong in ([0, 9], [1, 8], [0, 9, 8], []):
        with pytest.raises(RuntimeError, match=r"mask_codes.cpu: offsets"):
            operator(changes, torch.tensor(wrong, dtype=torch.int64), 2**41)
    with pytest.raises(RuntimeError, match=r"mask_codes.cpu: expected int64"):
        operator(changes.int(), torch.tensor(offsets), 2**41)


@pytest.mark.on("cpu", "simulated_triton", "triton")
def test_operator(backend: str):
    operator = getattr(torch.ops.anchorops.mask_rle, backend)
    boxes = torch.tensor([[0, 0, 5, 6], [2, 1, 8, 8]], device="cpu")
    for limits in (None, boxes):
        torch.library.opcheck(operator, (torch.randn(2, 4, 5), 8, 10, 0.4, limits, False))
    for wrong in ([[0, 0, 11, 8]], [[0, 0, 10, 9]], [[-1, 0, 5, 5]], [[0, -1, 5, 5]], [[0.0] * 4]):
        if backend == "cpu":
            with pytest.raises(RuntimeError, match="boxes"):
                operator(torch.randn(1, 4, 5), 8, 10, 0.4, torch.tensor(wrong), False)


@pytest.mark.skipif(ao.backends()["cpu"] is not None, reason="the reference stores masks")
def test_memory():
    """The memory is of the order of the runs, not of the pixels, 1.4 GB."""
    z = 5 * F.interpolate(torch.randn(1, 20, 6, 6), (64, 64), mode="bicubic")[0]
    size = (6000, 12000)
    characters = sum(len(code["counts"]) for code in ao.mask_rle(z, size).coco())
    peak = peak_extra_bytes(lambda: ao.mask_rle(z, size), torch.device("cpu"))
    if peak is None:
        pytest.skip("the memory of a process needs Linux's /proc")
    assert peak < 4 * characters + 2**22  # huge pages have 2 MiB


def test_what_is_refused():
    """Logits of another device, with and without Triton: only "auto" copies them."""
    z = torch.zeros(2, 4, 5)
    with ao.use_backend("cpu"), pytest.raises(ValueError, match="supports cpu tensors, the input"):
        ao.mask_rle(z.to("meta"), (8, 10))
    with pytest.raises(ValueError, match=r"^mask_rle: logits: expected a tensor outside"):
        torch.vmap(lambda z: ao.mask_rle(z, (8, 10)).areas())(z[None])
