"""Every operator is registered as torch expects, on each backend that has it: its schema, its fake
tensors, autograd, compilation."""

import pytest
import torch
from torch import Tensor

CPU, OF_KERNELS, EVERYWHERE, WITHOUT_CUDA = (
    ["cpu"],
    ["interpreter", "emulator"],
    ["cpu", "interpreter", "emulator"],
    ["cpu", "interpreter"],
)


def leaf(*size: int) -> Tensor:
    return torch.randn(size, requires_grad=True)


LABELS, VOLUMES = torch.randint(0, 5, (2, 8, 12)), torch.randint(0, 4, (2, 5, 4, 6))
BYTES, SEED = LABELS.byte(), torch.tensor(5)
KEYS = torch.randint(-1, 6, (2, 12), dtype=torch.int32)
FEATURES, ANCHORS, LEARNABLE = torch.randn(2, 6, 12), torch.randn(3, 6), leaf(3, 6)
DSUMS, DSQDISTS = torch.randn(6, 6), torch.randn(6)
QUERIES, POSITIVES, PRESENT = leaf(6, 5), torch.randn(6, 5), torch.rand(6) < 0.7
LOGITS, OF_PIXELS = torch.randn(2, 5, 2, 3), torch.randn(3, 2, 8, 12)
TEACHER, VALID = torch.randn(2, 5, 2, 6), torch.rand(2, 8, 12) < 0.5
PLAIN = (None, None, None, 0.0)  # no smoothing, pixel weights, smallest loss and focal factor
CASES = [
    *(("class_keys", EVERYWHERE, (BYTES, 4, 5, 5, per_image, 255)) for per_image in (False, True)),
    *(
        ("class_keys", CPU, (LABELS.to(dtype), 4, 5, 5, per_image, 255))
        for dtype in (torch.int32, torch.uint64)
        for per_image in (False, True)
    ),
    ("split_groups", EVERYWHERE, (KEYS, KEYS[KEYS >= 0].bincount(minlength=6), SEED, 2)),
    ("kth_largest", CPU, (torch.rand(12, 6)[:, 1], 3)),
    *(
        ("class_moments", places, (features, keys, *others))
        for features, keys, places in (
            (leaf(2, 6, 12), KEYS, EVERYWHERE),
            (leaf(2, 6, 3, 4), KEYS, CPU),
            (leaf(12, 6), KEYS[:1], CPU),
        )
        for others in (
            (None, 6, 1, True),
            (ANCHORS, 6, 2, True),
            (ANCHORS, 6, 2, False),
            (LEARNABLE, 6, 2, True),
            (LEARNABLE, 6, 2, False),
        )
    ),
    *(
        ("class_moments_backward", EVERYWHERE, (*given, 2, (2, 6, 12), stride, torch.float32))
        for given in (
            (None, KEYS, None, DSUMS, None),
            (FEATURES, KEYS, ANCHORS, None, DSQDISTS),
            (FEATURES, KEYS, ANCHORS, DSUMS, DSQDISTS),
        )
        for stride in ((72, 12, 1), (72, 1, 6), ())
        if stride or given[0] is not None
    ),
    *(
        case
        for positives in (POSITIVES, None)
        for given in ((QUERIES.detach(), POSITIVES.flip(0), positives, PRESENT, None),)
        for case in (
            ("centroid_info_nce", OF_KERNELS, (QUERIES, *given[1:], 0.1)),
            (
                "centroid_info_nce_backward",
                OF_KERNELS,
                (torch.ones(6), *given, *torch.randn(2, 6), 0.1),
            ),
        )
    ),
    ("upsampled_sums", CPU, (leaf(2, 5, 4, 6), BYTES, 5, 5)),
    ("upsampled_sums", CPU, (leaf(2, 5, 4, 6), BYTES[:, :4, :6], 5, 5)),
    *(
        ("softmax_moments", places, (leaf(2, 5, 2, 3), LABELS, *PLAIN, 255, False, *asked))
        for places, asked in (
            (EVERYWHERE, (False, True, True, True, True, True, False)),
            (CPU, (True, True, True, True, True, True, True)),
            (CPU, (False, False, False, False, False, True, False)),
            (CPU, (True, False, False, False, False, True, True)),
        )
    ),
    *(
        ("softmax_moments_backward", places, (x, LABELS, OF_PIXELS[0], *given, *PLAIN, 255, False))
        for x, given, places in (
            (LOGITS, (*torch.randn(4, 5), *OF_PIXELS[1:]), EVERYWHERE),
            (
                LOGITS.to(memory_format=torch.channels_last),
                (torch.rand(5), None, torch.rand(5), None, None, None),
                CPU,
            ),
        )
    ),
    *(
        case
        for smoothing in (torch.rand(2, 5), torch.rand(2, 2, 5))
        for shaped in ((smoothing, None, 0.1, 2.0, 255, False),)
        for case in (
            (
                "softmax_moments",
                WITHOUT_CUDA,
                (LOGITS, LABELS, *shaped, *(False,) * 5, True, False),
            ),
            (
                "softmax_moments_backward",
                WITHOUT_CUDA,
                (LOGITS, LABELS, OF_PIXELS[0], torch.rand(5), *(None,) * 5, *shaped),
            ),
        )
    ),
    *(
        (
            "pixel_kl_divergence",
            ["cpu", "interpreter", "triton"],
            (leaf(2, 5, 2, 3), TEACHER, VALID, 8, 12, 2.0, False, *asked),
        )
        for asked in ((True, True), (False, True), (False, False))
    ),
    (
        "pixel_kl_divergence_backward",
        ["cpu", "interpreter", "triton"],
        (LOGITS, TEACHER, VALID, *OF_PIXELS[:2], torch.tensor(2.0), None, 2.0, False),
    ),
    *(
        case
        for least in (None, 0.1)
        for weights, rest in ((leaf(*LABELS.shape), (least, 2.0, 255, False)),)
        for case in (
            (
                "softmax_moments",
                CPU,
                (leaf(2, 5, 2, 3), LABELS, None, weights, *rest, *(False,) * 7),
            ),
            (
                "softmax_moments_backward",
                CPU,
                (
                    *(LOGITS, LABELS, OF_PIXELS[0], torch.rand(5), *(None,) * 6),
                    *(weights.detach(), *rest),
                ),
            ),
        )
    ),
    ("pixel_argmax", EVERYWHERE, (LOGITS, 8, 12, False)),
    ("pixel_argmax", CPU, (torch.randn(2, 5, 4, 6), 16, 13, True)),
    ("confusion", WITHOUT_CUDA, (LABELS, LABELS.flip(1), 5, 255)),
    ("volume_moments", CPU, (leaf(2, 4, 3, 2, 3), VOLUMES, *PLAIN, 255, False, *(True,) * 7)),
    ("volume_argmax", CPU, (torch.randn(2, 4, 3, 2, 3), 9, 11, 13, False)),
]


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        pytest.param(operator, arguments, marks=pytest.mark.on(*places), id=operator)
        for operator, places, arguments in CASES
    ],
)
def test_opcheck(operator: str, arguments: tuple, backend: str):
    device = torch.empty(0).device
    arguments = tuple(x.to(device) if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(getattr(getattr(torch.ops.anchorops, operator), backend), arguments)


# Outputs of other operators, which no compiler lays out: their kernels read them as contiguous.
FROM_OPERATORS = {"keys", "lse", "teacher_lse"}
ANY_STRIDES = {"class_moments", "softmax_moments", "pixel_kl_divergence", "pixel_argmax"}


def strided(x: Tensor) -> Tensor:
    """The same numbers in the opposite order of axes, with gaps between them."""
    axes = [*range(x.dim())][::-1]
    return torch.stack([x.permute(axes).contiguous()] * 2, -1)[..., 1].permute(axes)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        pytest.param(operator, arguments, marks=pytest.mark.on(*places), id=operator)
        for operator, places, arguments in CASES
        if operator.removesuffix("_backward") in ANY_STRIDES
    ],
)
def test_any_strides(operator: str, arguments: tuple, backend: str):
    """torch.compile chooses the strides of the arguments of these operators."""
    call = getattr(getattr(torch.ops.anchorops, operator), backend)
    assert torch.Tag.flexible_layout in call.tags
    expected = call(*arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for i, argument in enumerate(call._schema.arguments):
        given = arguments[i]
        if not isinstance(given, Tensor) or argument.name in FROM_OPERATORS or given.numel() < 2:
            continue
        changed = strided(given.detach())
        assert not changed.is_contiguous() and torch.equal(changed, given)
        found = call(*arguments[:i], changed, *arguments[i + 1 :])
        found = found if isinstance(found, tuple) else (found,)
        for ours, usual in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, usual, msg=lambda m, a=argument: f"{a.name}: {m}")
