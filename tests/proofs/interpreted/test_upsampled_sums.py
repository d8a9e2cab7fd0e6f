import pytest
import torch
from emulator import BACKEND

from anchorops import reference
from anchorops._ops.upsampled_sums import upsampled_sums

SIZES = [  # of the features and of the labels; whether sums are per image
    ((3, 5), (6, 10), True),
    ((2, 5), (5, 8), False),  # odd ratios
    ((5, 4), (3, 2), True),  # fewer labels than features
    ((1, 3), (4, 6), False),
    ((3, 3), (1, 2), True),
    ((2, 2), (5, 1), False),
    ((2, 130), (3, 150), True),  # more than one tile in a row
    ((3, 4), (3, 4), False),
]


def check(features, labels, num_classes, per_image, upsample=True):
    """Sums, mean, variance and gradient, compared with the reference in float64."""
    options = {"per_image": per_image, "upsample": upsample, "ignore_index": 255}
    wide = features.detach().double().requires_grad_()
    features = features.detach().requires_grad_()
    counts, *found = upsampled_sums(features, labels, num_classes, **options)
    expected_counts, *expected = reference.upsampled_sums(wide, labels, num_classes, **options)
    gradients = [torch.randn(x.shape) for x in found]
    for i in (1, 2):  # as large in dfeatures as those of the sums
        gradients[i] *= features.numel() / features.shape[1]
    (dfeatures,) = torch.autograd.grad(found, features, gradients)
    (dwide,) = torch.autograd.grad(expected, wide, [g.double() for g in gradients])
    assert torch.equal(counts, expected_counts) and found[0].dtype == torch.float32
    torch.testing.assert_close(found, [x.float() for x in expected], rtol=1e-5, atol=1e-5)
    assert dfeatures.stride() == features.stride() and dfeatures.dtype == features.dtype
    rounding = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[features.dtype]
    torch.testing.assert_close(dfeatures.double(), dwide, rtol=rounding, atol=1e-5)


def example(size, label_size, channels=5, dtype=torch.float32):
    labels = torch.randint(-1, 6, (2, *label_size))
    labels[1] = 2  # one key
    labels[0, 0, 0] = 255
    return (3 + torch.randn(2, channels, *size)).to(dtype), labels


@pytest.mark.parametrize(("size", "label_size", "per_image"), SIZES)
def test_sizes(size, label_size, per_image):
    check(*example(size, label_size), 5, per_image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(dtype):
    features, labels = example((2, 5), (4, 9), 20, dtype)
    check(features, labels, 5, False)
    check(features.contiguous(memory_format=torch.channels_last), labels, 5, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sixteen_bytes_at_once(dtype):
    """Rows of a multiple of 8 pixels, and pixels of a multiple of 8 channels."""
    features, labels = example((2, 136), (4, 290), 24, dtype)
    check(features, labels, 5, True)
    check(features.contiguous(memory_format=torch.channels_last), labels, 5, True)


@pytest.mark.usefixtures("other_gpu")
def test_several_tiles_in_a_chunk():
    check(*example((20, 5), (40, 9)), 5, False)


def test_several_blocks_of_channels():
    check(*example((2, 2), (3, 4), 140), 5, True)


def test_many_keys_in_a_tile():
    features, _ = example((1, 9), (2, 18))
    labels = torch.arange(72).view(2, 2, 18)
    check(features, labels, 72, False)
    check(features, labels % 36, 36, True)


@pytest.mark.parametrize(("num_classes", "per_image"), [(255, True), (256, True), (256, False)])
def test_last_classes_of_8_and_16_bits(num_classes, per_image):
    features, labels = example((2, 3), (4, 6))
    labels = torch.where((labels >= 0) & (labels < 5), labels + num_classes - 5, -1)
    check(features, labels, num_classes, per_image)


def test_labels_at_the_features_size():
    check(*example((3, 4), (6, 8)), 5, False, upsample=False)


def test_variance_does_not_cancel():
    features, labels = example((2, 6), (3, 8))
    options = {"per_image": False, "upsample": True, "ignore_index": 255}
    shifted = upsampled_sums(features + 2**12, labels, 5, **options)
    expected = (features + 2**12).double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(shifted.variance.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_that_no_valid_label_uses(value):
    """If they are not finite, neither are mean and variance of their channel; all else is equal."""
    features, labels = example((4, 20), (8, 60))
    labels[:, :, :30] = 255  # the next ones are between columns 9 and 10
    spoilt = features.detach().clone()
    spoilt[:, 1, :, :9] = value
    results = []
    for x in (features.detach(), spoilt):
        x.requires_grad_()
        _, sums, mean, variance = upsampled_sums(
            x, labels, 5, per_image=True, upsample=True, ignore_index=255
        )
        dsums = torch.arange(sums.numel(), dtype=torch.float32).view(sums.shape)
        results.append((sums, *torch.autograd.grad(sums, x, dsums), mean, variance))
    others = torch.arange(features.shape[1]) != 1
    for i, (clean, ours) in enumerate(zip(*results, strict=True)):
        if i < 2:
            assert torch.equal(ours, clean)
        else:
            assert torch.equal(ours[others], clean[others]) and not ours[1].isfinite()


def test_nothing():
    options = {"per_image": False, "upsample": True, "ignore_index": 255}
    features, labels = example((2, 3), (4, 6))
    assert not upsampled_sums(features, torch.full_like(labels, 255), 5, **options).sums.any()
    nothing = upsampled_sums(features[:0], labels[:0], 5, **options)
    assert [x.shape for x in nothing] == [(5,), (5, 5), (5,), (5,)]
    dsums = torch.ones(5, 5)
    operator = getattr(torch.ops.anchorops.upsampled_sums_backward, BACKEND)
    keys = labels[:0].int()
    assert operator(features[:0], keys, dsums, dsums[0], None, None, 5).shape == (0, 5, 2, 3)
