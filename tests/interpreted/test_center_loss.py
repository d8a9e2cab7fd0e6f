import torch
from emulator import BACKEND

from anchorops import reference
from anchorops.ops.center_loss import center_loss
from anchorops.reference import UpsampledSums


def example(images, classes, channels, dim, absent):
    """Moments, tensors of the layers, simplex, prior and noise."""
    rows = (images, classes) if images else (classes,)
    counts = torch.randint(1, 50, rows)
    counts[..., :absent] = 0
    sums = counts[..., None] * (1 + torch.randn(*rows, channels))
    moments = [sums, torch.randn(channels), torch.rand(channels)]
    layers = [torch.randn(n) for n in ((channels,), (channels,), (dim, channels), (dim,))]
    etf, prior = torch.randn(classes, dim), torch.rand(classes)
    return counts, [*moments, *layers], etf, prior, torch.rand(*rows, dim)


def check(images, classes, channels, dim, absent, dropout, train_projection=True):
    """Loss, number and every gradient, compared with the reference in float64."""
    counts, tensors, etf, prior, noise = example(images, classes, channels, dim, absent)
    noise = noise if dropout else None
    options = {"eps": 1e-5, "scale": 5.0, "dropout": dropout, "loss_weight": 0.7}
    results = []
    for dtype, function in ((torch.float32, center_loss), (torch.float64, reference.center_loss)):
        given = [x.to(dtype).requires_grad_() for x in tensors[: 7 if train_projection else 5]]
        sums, mean, variance, *layers = given
        layers += [x.to(dtype) for x in tensors[len(given) :]]
        loss, number = function(
            UpsampledSums(counts, sums, mean, variance),
            *(tuple(layers[:2]), tuple(layers[2:]), etf.to(dtype), prior.to(dtype), noise),
            **options,
        )
        gradients = torch.autograd.grad(3 * loss, given)
        results.append([loss, *gradients])
        assert number == (counts > 0).sum()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-6)


def test_centers():
    check(0, 5, 20, 33, 0, 0.0)
    check(0, 19, 7, 40, 3, 0.3)


def test_centers_of_images():
    check(3, 4, 5, 12, 1, 0.5)


def test_frozen_projection():
    check(0, 6, 9, 17, 0, 0.1, train_projection=False)


def test_more_classes_than_threads():
    check(0, 260 if BACKEND == "cuda" else 20, 3, 8, 1, 0.0)


def test_nothing_present():
    counts, tensors, etf, prior, _ = example(0, 5, 6, 7, 5)
    sums, *rest = (x.requires_grad_() for x in tensors)
    options = {"eps": 1e-5, "scale": 5.0, "dropout": 0.0, "loss_weight": 0.7}
    moments = UpsampledSums(counts, sums, *rest[:2])
    loss, number = center_loss(
        moments, tuple(rest[2:4]), tuple(rest[4:]), etf, prior, None, **options
    )
    loss.backward()
    assert loss == 0 and number == 0
    assert not any(x.grad.any() for x in tensors)


def test_a_hidden_layer_of_zeros_has_no_gradient():
    counts, tensors, etf, prior, _ = example(0, 5, 6, 7, 0)
    tensors[6] = torch.full((7,), -1e3)  # ReLU gives 0
    sums, *rest = (x.requires_grad_() for x in tensors)
    options = {"eps": 1e-5, "scale": 5.0, "dropout": 0.0, "loss_weight": 0.7}
    moments = UpsampledSums(counts, sums, *rest[:2])
    loss, _ = center_loss(moments, tuple(rest[2:4]), tuple(rest[4:]), etf, prior, None, **options)
    loss.backward()
    expected = -0.7 * (prior + 1e-12).log().log_softmax(0).mean()
    torch.testing.assert_close(loss, expected)
    assert not any(x.grad.any() for x in tensors)


def test_a_center_that_is_nan_is_in_the_loss_and_the_gradient():
    counts, tensors, etf, prior, _ = example(0, 5, 6, 7, 1)
    tensors[0][2] = torch.nan
    options = {"eps": 1e-5, "scale": 5.0, "dropout": 0.0, "loss_weight": 0.7}
    for function in (center_loss, reference.center_loss):
        sums, *rest = (x.detach().requires_grad_() for x in tensors)
        moments = UpsampledSums(counts, sums, *rest[:2])
        loss, number = function(
            moments, tuple(rest[2:4]), tuple(rest[4:]), etf, prior, None, **options
        )
        loss.backward()
        assert loss.isnan() and number == 4
        assert sums.grad.isnan().any(1).tolist() == [False, False, True, False, False]


def test_operator():
    counts, tensors, etf, prior, noise = example(0, 5, 6, 7, 1)
    operator = getattr(torch.ops.anchorops.center_loss, BACKEND)
    sums, *rest = (x.requires_grad_() for x in tensors)
    torch.use_deterministic_algorithms(False)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = sums, counts, *rest, etf, prior, noise, 1e-5, 5.0, 0.1, 0.7
    torch.library.opcheck(operator, given, test_utils=tests)


def test_layers_of_other_dtypes():
    counts, tensors, etf, prior, _ = example(0, 5, 6, 7, 1)
    half = [x.bfloat16() for x in tensors[3:]]
    results = []
    for layers in (half, [x.float() for x in half]):
        moments = UpsampledSums(counts, *tensors[:3])
        options = {"eps": 1e-5, "scale": 5.0, "dropout": 0.0, "loss_weight": 0.7}
        given = tuple(layers[:2]), tuple(layers[2:]), etf, prior, None
        results.append(center_loss(moments, *given, **options)[0])
    assert torch.equal(*results)
