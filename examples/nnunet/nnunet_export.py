"""nnU-Net's export without resampled logits.

    python examples/nnunet/nnunet_export.py -i IMAGES -o LABELS -d DATASET -c CONFIGURATION …

The arguments are those of nnUNetv2_predict. In a program of your own call `install()` before you
predict. It needs nnunetv2, of which 2.8.1 was tested.

nnU-Net resamples the logits of each class to the original size, in float64, and takes the largest
one. `ao.pixel_argmax` reads them at the network's resolution and writes the labels. They are equal
except where two classes are almost equal.
"""
# pyright: reportMissingImports=false

from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference import export_prediction, predict_from_raw_data
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

import anchorops as ao

CONVERT = "convert_predicted_logits_to_segmentation_with_correct_shape"
_convert = export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape
_export = export_prediction.export_prediction_from_logits


def convert_predicted_logits_to_segmentation_with_correct_shape(
    predicted_logits: Tensor | np.ndarray,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    label_manager: LabelManager,
    properties_dict: dict[str, Any],
    return_probabilities: bool = False,
    num_threads_torch: int = default_num_processes,
) -> Any:
    """nnU-Net's function of this name, with the same arguments and result: labels uint8 or uint16
    of the image's shape.

    What it does not compute is left to nnU-Net: probabilities, another resampling than the linear
    one that nnU-Net plans by default, and another LabelManager.
    """
    resampling = configuration_manager.resampling_fn_probabilities
    if (
        return_probabilities
        or not _is_linear(resampling)
        or type(label_manager) is not LabelManager
    ):
        return _convert(
            predicted_logits,
            plans_manager,
            configuration_manager,
            label_manager,
            properties_dict,
            return_probabilities,
            num_threads_torch,
        )
    spacing = [properties_dict["spacing"][i] for i in plans_manager.transpose_forward]
    planned = [*configuration_manager.spacing]
    size = [int(n) for n in properties_dict["shape_after_cropping_and_before_resampling"]]
    options = {"force_separate_z": False} | resampling.keywords
    separate, axis = determine_do_sep_z_and_axis(
        options["force_separate_z"], [*spacing[: len(size) - len(planned)], *planned], spacing
    )
    dtype = "uint8" if len(label_manager.foreground_labels) < 255 else "uint16"
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads_torch)
    try:
        logits = torch.as_tensor(predicted_logits)[None]
        if separate and list(logits.shape[2:]) != size:
            labels = _by_slice(logits, size, int(axis), label_manager, dtype)
        else:
            labels = _labels(logits, size, label_manager, dtype)[0]
    finally:
        torch.set_num_threads(threads)
    whole = np.zeros(properties_dict["shape_before_cropping"], dtype)
    whole = insert_crop_into_image(whole, labels, properties_dict["bbox_used_for_cropping"])
    return whole.transpose(plans_manager.transpose_backward)


def _is_linear(resampling: Any) -> bool:
    options = {"is_seg": False, "order": 3, "order_z": 0} | resampling.keywords
    return (
        resampling.func is resample_data_or_seg_to_shape
        and (options["is_seg"], options["order"], options["order_z"]) == (False, 1, 0)
        and "separate_z_anisotropy_threshold" not in options
    )


def _labels(logits: Tensor, size: list[int], label_manager: LabelManager, dtype: str) -> np.ndarray:
    """(B, *size) from (B, K, …). Regions overwrite one another in their order."""
    if not label_manager.has_regions:
        return ao.pixel_argmax(logits, size, dtype=getattr(torch, dtype)).cpu().numpy()
    labels = np.zeros((logits.shape[0], *size), dtype)
    for channel, label in enumerate(label_manager.regions_class_order):
        region = logits[:, channel : channel + 1]
        inside = ao.pixel_argmax(region, size, sigmoid=True, dtype=torch.uint8)[:, 0]
        labels[inside.cpu().numpy().view(bool)] = label
    return labels


def _by_slice(
    logits: Tensor, size: list[int], axis: int, label_manager: LabelManager, dtype: str
) -> np.ndarray:
    """For anisotropic images: linear within the slices along the axis, and the nearest slice."""
    slices = logits[0].movedim(1 + axis, 0)
    labels = _labels(slices, size[:axis] + size[axis + 1 :], label_manager, dtype)
    scale = len(labels) / size[axis]
    nearest = np.floor(scale * (np.arange(size[axis]) + 0.5) - 0.5 + 0.5).astype(int)
    return np.moveaxis(labels[nearest.clip(0, len(labels) - 1)], 0, axis)


def export_prediction_from_logits(*args: Any, **kwargs: Any) -> None:
    """nnU-Net's function of this name. Its worker processes find this one by name, and install the
    conversion for themselves."""
    install()
    _export(*args, **kwargs)


def install() -> None:
    """nnU-Net's prediction, and the validation of its trainers, use these functions."""
    for module in (export_prediction, predict_from_raw_data):
        setattr(module, CONVERT, convert_predicted_logits_to_segmentation_with_correct_shape)
    for module in (predict_from_raw_data, nnUNetTrainer):
        module.export_prediction_from_logits = export_prediction_from_logits


if __name__ == "__main__":
    install()
    predict_from_raw_data.predict_entry_point()
