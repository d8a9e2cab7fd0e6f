"""The launches of each operator are those that bench/launches.py declares."""

import ctypes
import os

import pytest
import torch
from emulator import BACKEND
from torch.utils._python_dispatch import _disable_current_modes

launches = pytest.importorskip("launches")


def count(monkeypatch, operator, *args):
    """The results of an operator, and its launches."""
    if BACKEND == "cuda":
        library = ctypes.CDLL(os.environ["ANCHOROPS_CUDA_ON_HOST"])
        before = library.anchorops_launches()
        result = getattr(torch.ops.anchorops, operator).cuda(*args)
        return result, library.anchorops_launches() - before
    from importlib import import_module

    from triton.runtime.interpreter import GridExecutor

    started, launch = [], GridExecutor.__call__

    def counted(self, *args, **kwargs):
        started.append(self)
        with _disable_current_modes():  # the interpreter copies tensors
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    kernels = import_module(f"anchorops.kernels.{operator}")
    with launches.Counts("triton") as of_torch:
        result = getattr(kernels, operator)(*args)
    monkeypatch.undo()
    return result, len(started) + sum(of_torch.launches.values())


def test_declared_launches(monkeypatch, sorted_by_numpy):
    def run(operator, *args):
        result, found = count(monkeypatch, operator, *args)
        assert found == launches.OWN[operator][launches.BACKENDS.index(BACKEND)], operator
        return result

    torch.use_deterministic_algorithms(False)  # which fills new memory
    run("next_seed", torch.tensor(1), 1 << 32, True)
    labels = torch.randint(0, 3, (2, 8, 6))
    keys, counts = run("class_keys", labels, 4, 3, 3, False, 255)
    run("split_groups", keys, counts, torch.tensor(1), 2)
    if BACKEND == "cuda":
        run("group_keys", labels, 4, 3, 3, False, 255, torch.tensor(1), 2)
    features, anchors = torch.randn(2, 16, 4, 3), torch.randn(3, 16)
    grid = keys.view(2, 4, 3)
    sums, mean, variance = run("upsampled_sums", features, grid, 3, 3)
    run("upsampled_sums_backward", features, grid, sums, mean, mean, variance, 3)
    sums, sqdists, _ = run("class_moments", features, keys, anchors, 3, 1, True, False)
    if BACKEND == "cuda":  # with as many keys, random labels have a kernel of their own
        many = features, keys, torch.randn(33, 16), 33, 1, True, False
        assert count(monkeypatch, "class_moments", *many)[1] == 3
    given = features, keys, anchors, sums, sqdists, 1, list(features.shape), features.stride()
    run("class_moments_backward", *given, torch.float32)
    units, means, _, norms, _ = run("unit_rows", sums[:, None], counts[:, None], 1e-6, True, True)
    run("unit_rows_backward", units, means, units, norms, counts[:, None], 1e-6)
    seed, options = torch.tensor(1), (1 << 31, 1e-6, 1.0)
    centroids, distances, rows, products = run("prototype_halves", units, seed, *options)
    saved = units, seed, centroids, products
    run("prototype_halves_backward", centroids, distances, rows, *saved, *options)
    moments = sums, counts, mean, variance, *torch.rand(2, 16)
    given = *torch.rand(1, 8, 16), torch.rand(8), torch.rand(3, 8), torch.rand(3), None
    loss, number, _, dcenters, _ = run("center_loss", *moments, *given, 1e-5, 5.0, 0.0, 1.0)
    run("center_loss_backward", loss, number, dcenters, *moments[:5], 1e-5, 1.0)
    inputs, options = (sums, anchors, *(None,) * 4), (False, False, 0.07)
    loss, *saved = run("centroid_info_nce", *inputs, *options, 1.0, "mean", 100)
    run("centroid_info_nce_backward", loss, *inputs, *saved, *options, 100)
    if BACKEND == "cuda":
        present, options = torch.ones(3, 1) > 0, (False, 0.07, 1.0)
        inputs = units, means[:, 0], None, anchors, None
        loss, _, *saved = run("centroid_losses", *inputs, None, present, *options, 1.0, 1.0, True)
        run("centroid_losses_backward", loss, *inputs, present, *saved, *options, True, True)
    losses, recognised = run("anchor_cross_entropy", torch.randn(3, 3), 0.8)
    run("anchor_cross_entropy_backward", losses, torch.randn(3, 3))
    _, gate = run("gated_average", sums.clone(), sums, recognised, 0.9, False, True)
    options = 16, 0.1, 1.0, 0.9, True, False
    p2a, aux, _, slopes = run("anchor_losses", sqdists, counts, gate, losses, *options)
    run("anchor_losses_backward", p2a, aux, slopes)
