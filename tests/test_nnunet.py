"""The examples for nnU-Net against its released code. `make check-nnunet` installs it."""
# pyright: reportMissingImports=false

import contextlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed: make check-nnunet")
EXAMPLES = Path(__file__).parents[1] / "examples" / "nnunet"
sys.path.insert(0, str(EXAMPLES))

import nnunet_export  # noqa: E402
from nnunet_trainer import LabelLoss, RegionLoss  # noqa: E402
from nnunetv2.inference import export_prediction  # noqa: E402
from nnunetv2.preprocessing.resampling.default_resampling import (  # noqa: E402
    resample_data_or_seg_to_shape,
)
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss  # noqa: E402
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss  # noqa: E402
from nnunetv2.utilities.label_handling.label_handling import LabelManager  # noqa: E402

theirs = nnunet_export._convert
LABELS = {"background": 0, "a": 1, "b": 2, "c": 3, "d": 4}
REGIONS: dict[str, Any] = {"background": 0, "whole": (1, 2, 3), "core": (2, 3), "active": (3,)}
MANY: dict[str, Any] = {"background": 0} | {str(k): k for k in range(1, 300)}


class Case(SimpleNamespace):
    """logits (d, h, w), with the axes in the network's order; the image before cropping."""

    labels: dict[str, Any] = LABELS
    regions_class_order: list[int] | None = None
    logits = (12, 14, 10)
    size = (20, 25, 17)  # of the crop, in the network's order
    before_cropping = (24, 25, 20)
    corner = (3, 0, 1)
    spacing = (1.0, 1.0, 1.0)  # of the image, in its own order
    planned: tuple[float, ...] = (1.7, 1.8, 1.7)
    forward, backward = (0, 1, 2), (0, 1, 2)
    dtype = torch.float32


CASES = {
    "labels": Case(),
    "half": Case(dtype=torch.float16),
    "transposed": Case(forward=(2, 0, 1), backward=(1, 2, 0)),
    "same size": Case(logits=(20, 25, 17)),
    "smaller": Case(logits=(30, 31, 40)),
    "thick slices, first axis": Case(logits=(7, 14, 10), planned=(5.0, 1.8, 1.7)),
    "thick slices of the image": Case(
        spacing=(1.0, 6.0, 1.0), planned=(1.7, 2.0, 1.7), logits=(12, 60, 10)
    ),
    "thick slices, last axis": Case(logits=(12, 14, 5), planned=(1.7, 1.8, 6.0)),
    "thick slices, as many": Case(logits=(20, 14, 10), planned=(6.0, 1.8, 1.7)),
    "two-dimensional plan": Case(logits=(20, 14, 10), planned=(1.8, 1.7)),
    "regions": Case(labels=REGIONS, regions_class_order=[1, 2, 3]),
    "regions, thick slices": Case(
        labels=REGIONS, regions_class_order=[1, 2, 3], logits=(7, 14, 10), planned=(5.0, 1.8, 1.7)
    ),
    "300 labels": Case(labels=MANY),
}


def arguments(case: Case) -> tuple[Any, ...]:
    label_manager = LabelManager(case.labels, case.regions_class_order)
    shape = label_manager.num_segmentation_heads, *case.logits
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    resampling = partial(
        resample_data_or_seg_to_shape, is_seg=False, order=1, order_z=0, force_separate_z=None
    )
    box = [[first, first + n] for first, n in zip(case.corner, case.size, strict=True)]
    properties = {
        "spacing": [*case.spacing],
        "shape_after_cropping_and_before_resampling": case.size,
        "shape_before_cropping": case.before_cropping,
        "bbox_used_for_cropping": box,
    }
    plans = SimpleNamespace(transpose_forward=case.forward, transpose_backward=case.backward)
    configuration = SimpleNamespace(spacing=[*case.planned], resampling_fn_probabilities=resampling)
    return logits, plans, configuration, label_manager, properties


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
@pytest.mark.parametrize("numpy", [False, True], ids=["tensor", "array"])
def test_export(case: Case, numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, *others = arguments(case)
    right = theirs(logits.float(), *others, num_threads_torch=1)
    monkeypatch.setattr(nnunet_export, "_convert", None)  # nothing is left to nnU-Net
    actual = nnunet_export.convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.numpy() if numpy else logits, *others, num_threads_torch=1
    )
    assert actual.shape == right.shape and actual.dtype == right.dtype
    assert (actual != right).mean() <= 1e-4  # ties; float64 there
    assert len(np.unique(actual)) > 3


def test_threads_and_what_is_left_to_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, plans, configuration, label_manager, properties = arguments(Case())
    convert = nnunet_export.convert_predicted_logits_to_segmentation_with_correct_shape
    threads = torch.get_num_threads()
    labels, probabilities = convert(
        logits, plans, configuration, label_manager, properties, True, threads + 1
    )
    assert torch.get_num_threads() == threads
    right = theirs(logits, plans, configuration, label_manager, properties, True, 1)
    assert np.array_equal(labels, right[0])
    assert np.allclose(probabilities, right[1], rtol=0, atol=1e-6)
    calls = []
    monkeypatch.setattr(nnunet_export, "_convert", lambda *args: calls.append(args))
    cubic = partial(resample_data_or_seg_to_shape, is_seg=False, order=3, order_z=0)
    other = SimpleNamespace(spacing=configuration.spacing, resampling_fn_probabilities=cubic)
    assert convert(logits, plans, other, label_manager, properties) is None

    class Own(LabelManager):
        pass

    assert convert(logits, plans, configuration, Own(LABELS, None), properties) is None
    assert len(calls) == 2


def gradients(loss: torch.nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("batch_dice", [False, True], ids=["images", "batch"])
@pytest.mark.parametrize("ignored", [False, True], ids=["", "ignored"])
@pytest.mark.parametrize("size", [(9, 10, 11), (20, 21)], ids=["3d", "2d"])
def test_losses(batch_dice: bool, ignored: bool, size: tuple[int, ...]) -> None:
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "ddp": False}
    logits = torch.randn(2, 4, *size)
    labels = torch.randint(0, 4 + ignored, (2, 1, *size)).float()
    right = DC_and_CE_loss(
        dice | {"do_bg": False},
        {},
        ignore_label=4 if ignored else None,
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    if ignored:  # nnU-Net's cross-entropy gets integers
        labels = labels.long()
    actual = gradients(LabelLoss(4, batch_dice, 4 if ignored else None), logits, labels)
    torch.testing.assert_close(actual, gradients(right, logits, labels), rtol=1e-4, atol=1e-7)

    target = torch.randint(0, 2, (2, 4 + ignored, *size)).float()
    right = DC_and_BCE_loss({}, dice | {"do_bg": True}, use_ignore_label=ignored)
    actual = gradients(RegionLoss(4, batch_dice, ignored, None), logits, target)
    torch.testing.assert_close(actual, gradients(right, logits, target), rtol=1e-4, atol=1e-7)


TRAINER = """
from nnunet_trainer import nnUNetTrainerAnchorops


class nnUNetTrainerTwoEpochs(nnUNetTrainerAnchorops):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 8, 1
"""


@pytest.mark.slow
def test_whole_program(tmp_path: Path) -> None:
    """Planned, trained, validated and predicted: a data set of six small volumes."""
    import SimpleITK

    images, labels = (tmp_path / "raw/Dataset001_Cubes" / name for name in ("imagesTr", "labelsTr"))
    images.mkdir(parents=True)
    labels.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        label = np.zeros((28, 30, 26), np.uint8)
        x, y, z = rng.integers(3, 12, 3)
        label[x : x + 10, y : y + 12, z : z + 10] = 1
        label[x + 3 : x + 7, y + 3 : y + 8, z + 3 : z + 7] = 2
        image = (label + rng.normal(0, 0.3, label.shape)).astype(np.float32)
        for path, array in (
            (images / f"c{i}_0000.nii.gz", image),
            (labels / f"c{i}.nii.gz", label),
        ):
            volume = SimpleITK.GetImageFromArray(array)
            volume.SetSpacing((1.0 + 0.1 * i, 1.0, 1.2))
            SimpleITK.WriteImage(volume, str(path))
    description = {
        "channel_names": {"0": "noisy"},
        "labels": {"background": 0, "outer": 1, "inner": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (images.parent / "dataset.json").write_text(json.dumps(description))
    trainers = tmp_path / "trainers"
    trainers.mkdir()
    (trainers / "nnunet_trainer.py").write_text((EXAMPLES / "nnunet_trainer.py").read_text())
    (trainers / "two_epochs.py").write_text(TRAINER)
    environment = os.environ | {
        "nnUNet_raw": str(tmp_path / "raw"),
        "nnUNet_preprocessed": str(tmp_path / "preprocessed"),
        "nnUNet_results": str(tmp_path / "results"),
        "nnUNet_extTrainer": str(trainers),
        "nnUNet_n_proc_DA": "1",
        "OMP_NUM_THREADS": "1",
    }
    programs = Path(sys.executable).parent

    def run(*command: object) -> None:
        subprocess.run([*map(str, command)], env=environment, check=True, cwd=tmp_path)

    run(
        programs / "nnUNetv2_plan_and_preprocess", "-d", 1, "-c", "3d_fullres", "-np", 1, "-npfp", 1
    )
    trainer = "nnUNetTrainerTwoEpochs"
    run(programs / "nnUNetv2_train", 1, "3d_fullres", 0, "-tr", trainer, "-device", "cpu")
    common = ["-i", images, "-d", 1, "-c", "3d_fullres", "-tr", trainer, "-f", 0, "-device", "cpu"]
    common += ["-npp", 1, "-nps", 1, "--disable_tta"]
    run(programs / "nnUNetv2_predict", "-o", tmp_path / "theirs", *common)
    run(sys.executable, EXAMPLES / "nnunet_export.py", "-o", tmp_path / "ours", *common)
    for i in range(6):
        read = [
            SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / name / f"c{i}.nii.gz")))
            for name in ("ours", "theirs")
        ]
        assert read[0].shape == (28, 30, 26) and (read[0] != read[1]).mean() <= 1e-3
        assert (read[1] > 0).mean() > 0.01  # not all are background


def test_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        for module in (export_prediction, nnunet_export.predict_from_raw_data):
            stack.callback(setattr, module, nnunet_export.CONVERT, theirs)
        for module in (nnunet_export.predict_from_raw_data, nnunet_export.nnUNetTrainer):
            stack.callback(setattr, module, "export_prediction_from_logits", nnunet_export._export)
        nnunet_export.install()
        ours = nnunet_export.convert_predicted_logits_to_segmentation_with_correct_shape
        assert export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape is ours
