"""The presets compared with the settings of the papers' frameworks."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from anchorops.train.commands import PRESETS, parse
from anchorops.train.networks import build_model, build_regularizer
from anchorops.train.options import Model

# section 4.2 of CBP and OCCL names families of networks, not only the one of its table
CATEGORY_WEIGHTS = {
    "ade20k-segformer-b5": 0.1,
    "coco-stuff-10k-segformer-b4": 0.1,
    "ade20k-upernet-swin-t": 0.2,
}
NAMES = sorted({path.stem for path in PRESETS.glob("*.yaml")} - {"shared"})


def test_networks_of_presets():
    networks = {parse("fit", ["--config", x])[0].model.network for x in NAMES}
    for network in sorted(x for x in networks if "segformer" not in x):
        with torch.device("meta"):
            model = build_model(Model(network, auxiliary_weight=0.4), 19)
            assert model(torch.empty(2, 3, 64, 96)).shape[:2] == (2, 19), network
            assert model.auxiliary_logits().shape[:2] == (2, 19), network


@pytest.mark.parametrize("preset", NAMES)
def test_presets(preset: str):
    """Their options exist, those of the methods too. Transformers have a linear warm-up and decay;
    windows are those of mmsegmentation: on Pascal-Context 480 by steps of 320, on Cityscapes with
    SegFormer 1024 by 768."""
    options, *_ = parse("fit", ["--config", preset])
    model, data = options.model, options.data
    paper = model.paper_options or {}
    methods: Any = sorted({option.partition(".")[0] for option in paper})
    made = build_regularizer(replace(model, methods=methods), 11, 240)
    assert made is not None or not paper
    if (weight := CATEGORY_WEIGHTS.get(preset)) is not None:
        assert paper == {"cbp.length": 1, "occl.centroid_weight": 1, "occl.category_weight": weight}
    if data.dataset in ("digits", "folder", "camvid"):  # without a published result
        return
    transformer = model.optimizer == "adamw"
    assert (model.warmup, model.power) == ((1_500, 1.0) if transformer else (0, 0.9))
    strides = {"pascal-context": (320, 320), "cityscapes-segformer-b4": (768, 768)}
    stride = strides.get(data.dataset) or strides.get(preset)
    assert model.window_stride == stride
    assert (model.evaluation == "sliding") == (stride is not None)
