"""Predictions of a trained network for images that need no masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from ..config import Config
from ..data.folders import read_image, upright
from ..data.loading import evaluation_transform
from ..networks.models import Segmenter, build_model
from ..run.checkpoint import load_checkpoint
from ..run.directory import CONFIG
from .evaluate import predict

BEST = "best.pt"


def predict_files(
    run: Path, images: Sequence[Path], out: Path, *, device: torch.device
) -> list[Path]:
    """Write the classes of each image to out/NAME.png, as a mask of the image's size: 8 bits, or 16
    with more than 256 classes. They are computed as in the run's evaluations, by the weights with
    its best mIoU. Returns the paths.

    Raises ValueError if the run has no such weights, for an image that cannot be used, and for a
    file that exists.
    """
    if not (run / BEST).exists():
        raise ValueError(f"predict: expected the directory of a run, with its {BEST}, got {run}")
    masks = [out / f"{image.stem}.png" for image in images]
    for i, mask in enumerate(masks):
        if mask.exists() or mask in masks[:i]:
            what = "exists" if mask.exists() else "would be written twice"
            raise ValueError(f"predict: --out: {mask} {what}: give another directory")
    config = Config.load(run / CONFIG)
    model = _best_model(run, config).to(device).eval()
    transform = evaluation_transform(config.data, config.data.channels)
    out.mkdir(parents=True, exist_ok=True)
    for path, mask in zip(images, masks, strict=True):
        image = _read(path, config.data.channels)
        normalized = transform(tv_tensors.Image(image)).as_subclass(Tensor)[None].to(device)
        with torch.inference_mode():
            (classes,) = predict(model, normalized, image.shape[1:], **config.prediction)
        kind = np.uint8 if model.classifier.out_channels <= 256 else np.uint16
        Image.fromarray(classes.cpu().numpy().astype(kind)).save(mask)
    return masks


def _best_model(run: Path, config: Config) -> Segmenter:
    """The network without its methods. CBP has removed the classifier's bias."""
    state = load_checkpoint(run / BEST)["model"]
    state = {name: x for name, x in state.items() if not name.startswith("regularizer.")}
    weight = state["classifier.weight"]
    state.setdefault("classifier.bias", weight.new_zeros(len(weight)))
    model = build_model(
        config.model.model,
        len(weight),
        channels=config.data.channels,
        auxiliary=config.model.auxiliary_weight > 0,
        dropout=config.model.dropout,
    )
    model.load_state_dict(state)
    return model


def _read(path: Path, channels: int) -> Tensor:
    """An upright image (C, H, W)."""
    image, orientation = read_image(path, ())
    is_first = len(image) not in (1, channels) and image.shape[1] in (1, channels)
    if is_first and path.suffix.lower() in (".tif", ".tiff"):  # (C, H, W) was read as (H, W, C)
        image = image.movedim(0, 2)
    if len(image) == 1 and channels == 3:
        image = image.expand(3, -1, -1)
    if len(image) != channels:
        raise ValueError(f"{path}: expected an image of {channels} channels, got {len(image)}")
    return upright(image, orientation)
