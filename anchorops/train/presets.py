"""Settings by name: those of the papers, and one that needs no files. Options on the command line
override their preset.

Settings that the papers do not give are those of mmsegmentation: scale 0.5 to 2, crop (drawn again
if one class covers 75 %), flip, photometric distortion, padding after normalisation; classifiers
that start from N(0, 0.01); an auxiliary head of weight 0.4 for FCN, DeepLab and UPerNet, and the
same weight for OCRNet's regions; dropout 0.1 before the classifier, except for HRNet and OCRNet;
for transformers warm-up of 1500 steps and a linear decay of the learning rate (power 1; 0.9 for
convolutional networks); for SegFormer the head has ten times the learning rate (the methods' own
parameters do not: SAR's release keeps them outside).

Differences from the settings of the papers and mmsegmentation:

- All: bf16 autocast. The learning rate decays to 0 (there to 1e-4 with SGD). Norms and biases have
  no weight decay (there they have it in convolutional networks, and biases in transformers).
- Images are scaled with antialiasing (there without). The photometric distortion is torchvision's,
  with the same ranges of contrast, saturation and hue; brightness is multiplied by 0.875 to 1.125
  (there shifted by up to 32 of 255). An evaluation pads images to multiples of 32 (there it does
  not).
- The convolutions of the heads start as torch, or segmentation-models-pytorch, starts them (there:
  Kaiming normal, fan-out; MVSC prints He initialisation). Only the classifiers start as there.
- Backbones start from the ImageNet weights of timm and segmentation-models-pytorch, which need not
  be mmsegmentation's.
- Pascal-Context: learning rate and weight decay of SAR's release (the paper prints 0.01 and 5e-4).
- DeepLab: the heads are those of segmentation-models-pytorch, with features of 256 channels (there
  512); DeepLabV3+ has a backbone of stride 16 (there 8), ResNet-18 the ordinary stem (timm has no
  other).
- Swin: stochastic depth 0.1 (there 0.3), weight decay on the relative positions, features of 256
  channels (there 512).
- Without a preset: UPerNet on Swin-B, Swin-L and ConvNeXt-B; BEiT; CeCo's OCRNet; point clouds.

Values that no paper prints, and that are assumed here:

- CeCo on DeepLab: loss_weight 0.8, Swin-T's; on Cityscapes also 80 000 steps, batch 8, crop
  512×1024.
- MVSC: learning rate 6e-5, weight decay 0.01, mmsegmentation's for SegFormer.
"""

from .config import Config, setting_options

DIGITS = Config().replace(
    dataset="digits",
    steps=500,
    batch_size=8,
    optimizer="adamw",
    lr=4e-3,
    weight_decay=0.01,
    warmup=20,
    head_tail=(0.025, 0.011),
    eval_batch_size=20,
    eval_every=100,
)

# A laptop needs minutes for this. SegFormer has half the learning rate of HRNet.
DEMO = {
    "hrnet-w18-small": DIGITS.replace(model="hrnet-w18-small", channels_last=True),
    "segformer-b0": DIGITS.replace(model="segformer-b0", lr=2e-3),
}

_PUBLISHED = Config().replace(
    dataset="folder",
    pretrained=True,
    classifier_std=0.01,
    scale=(0.5, 2.0),
    cat_max_ratio=0.75,
    flip=True,
    photometric=True,
    workers=8,
    bf16=True,
    eval_every=8_000,
    save_every=2_000,
    log_every=50,
)
_CONVOLUTIONAL = _PUBLISHED.replace(optimizer="sgd", lr=0.01, weight_decay=5e-4, channels_last=True)
_TRANSFORMER = _PUBLISHED.replace(
    optimizer="adamw", lr=6e-5, weight_decay=0.01, head_lr_factor=10.0, warmup=1_500, power=1.0
)

FOLDER = _CONVOLUTIONAL.replace(
    model="hrnet-w18",
    crop=(256, 256),
    steps=10_000,
    pretrained=False,
    cat_max_ratio=1.0,
    photometric=False,
    classifier_std=None,
    workers=4,
    bf16=False,
    eval_every=1_000,
    save_every=500,
    log_every=10,
)

_OCRNET = _CONVOLUTIONAL.replace(auxiliary_weight=0.4)
_FCN = _OCRNET.replace(dropout=0.1)
_DEEPLAB = _FCN
_CECO = _DEEPLAB.replace(weight_decay=1e-3)
_SEGFORMER = _TRANSFORMER.replace(dropout=0.1)
_NETWORKS = {
    "hrnet-w48": _CONVOLUTIONAL.replace(model="hrnet-w48"),
    "ocrnet-hrnet-w48": _OCRNET.replace(model="mmseg-ocrnet:hrnet-w48"),
    "fcn-r101": _FCN.replace(model="mmseg-fcn:tu-resnet101c"),
    "deeplabv3-r101": _DEEPLAB.replace(model="deeplabv3:tu-resnet101c"),
    "deeplabv3plus-r18": _CECO.replace(model="deeplabv3plus:tu-resnet18"),
    "deeplabv3plus-r50": _CECO.replace(model="deeplabv3plus:tu-resnet50c"),
    "deeplabv3plus-r101": _CECO.replace(model="deeplabv3plus:tu-resnet101c"),
    "segformer-b0": _SEGFORMER.replace(model="mmseg-segformer:mit_b0"),
    "segformer-b0-20k": _SEGFORMER.replace(model="mmseg-segformer:mit_b0"),
    "segformer-b4": _SEGFORMER.replace(model="mmseg-segformer:mit_b4"),
    "segformer-b5": _SEGFORMER.replace(model="mmseg-segformer:mit_b5"),
    "upernet-swin-t": _TRANSFORMER.replace(
        model="upernet:tu-swin_tiny_patch4_window7_224",
        head_lr_factor=1.0,
        auxiliary_weight=0.4,
        dropout=0.1,
    ),
}

_ADE20K = {
    "crop": (512, 512),
    "short_side": 512,
    "long_side": 2048,
    "batch_size": 16,
    "steps": 160_000,
}
_DATA = {
    "cityscapes": {"crop": (512, 1024), "batch_size": 8, "steps": 80_000},
    "ade20k": _ADE20K,
    "pascal-context": _ADE20K
    | {
        "crop": (480, 480),
        "short_side": None,
        "long_side": 520,
        "evaluation": "sliding",
        "window_stride": (320, 320),
        "steps": 40_000,
        "lr": 0.004,
        "weight_decay": 1e-4,
    },
    "coco-stuff-10k": _ADE20K | {"steps": 80_000},
    "coco-stuff-164k": _ADE20K | {"steps": 320_000},
}

# options of one preset alone
_CHANGES = {
    "cityscapes-segformer-b4": {
        "crop": (1024, 1024),
        "evaluation": "sliding",
        "window_stride": (768, 768),
    },
    "ade20k-segformer-b0": {"steps": 40_000},
    "ade20k-segformer-b0-20k": {"steps": 20_000},
}
# data set, network, and what the papers print
_PAPERS = {
    "cityscapes": {
        "hrnet-w48": "SAR's Table 1: 79.9 mIoU, 81.4 with --methods sar.",
        "ocrnet-hrnet-w48": "SAR's Table 1: 80.7 mIoU, 81.7 with --methods sar.",
        "fcn-r101": "SAR's Table 1: 75.1 mIoU, 75.9 with --methods sar.",
        "segformer-b4": (
            "SAR's Table 1: 81.9 mIoU, which is mmsegmentation's after 160 000 steps (--steps "
            "160000); 82.3 with --methods sar."
        ),
        "deeplabv3-r101": "SAR's Table 1: 80.2 mIoU, 80.6 with --methods sar.",
        "deeplabv3plus-r18": "CeCo's Table 9: 76.3 mIoU, 77.5 with --methods ceco.",
        "deeplabv3plus-r50": "CeCo's Table 9: 79.8 mIoU, 80.3 with --methods ceco.",
    },
    "ade20k": {
        "hrnet-w48": "SAR's Table 2: 42.0 mIoU, 42.8 with --methods sar.",
        "ocrnet-hrnet-w48": "SAR's Table 2: 43.2 mIoU, 43.7 with --methods sar.",
        "fcn-r101": (
            "CBP+OCCL's Table 1: 39.9 mIoU, 41.2 with --methods cbp occl; SAR's Table 2: 40.4 with "
            "--methods sar."
        ),
        "deeplabv3-r101": "SAR's Table 2: 45.0 mIoU, 45.3 with --methods sar.",
        "segformer-b5": (
            "SAR's Table 2: 49.1 mIoU, 49.5 with --methods sar; CBP+OCCL's Table 1: 48.9, 49.9 "
            "with --methods cbp occl."
        ),
        "segformer-b0": "CBP+OCCL's Table 3, an ablation: 33.4 mIoU, 35.1 with --methods cbp occl.",
        "segformer-b0-20k": "MVSC's Table 2, an ablation: 30.9 mIoU, 32.6 with --methods mvsc.",
        "deeplabv3plus-r101": "CeCo's convolutional setting: --methods ceco.",
        "upernet-swin-t": "CeCo's setting with a transformer: --methods ceco.",
    },
    "pascal-context": {
        "hrnet-w48": "SAR's Table 4, 59 classes: 50.3 mIoU, 51.1 with --methods sar.",
        "ocrnet-hrnet-w48": (
            "SAR's Table 4: 52.0 mIoU, measured by its authors; 52.4 with --methods sar."
        ),
        "fcn-r101": "SAR's Table 4: 48.4 mIoU, 49.7 with --methods sar.",
        "deeplabv3-r101": "SAR's Table 4: 52.6 mIoU, 53.3 with --methods sar.",
    },
    "coco-stuff-10k": {
        "fcn-r101": "CBP+OCCL's Table 1: 32.5 mIoU, 33.0 with --methods cbp occl.",
        "segformer-b5": "CBP+OCCL's Table 1: 43.4 mIoU, 44.9 with --methods cbp occl.",
        "segformer-b4": "MVSC's Table 1: 42.9 mIoU, 43.6 with --methods mvsc.",
    },
    "coco-stuff-164k": {
        "deeplabv3plus-r101": "CeCo's convolutional setting: --methods ceco.",
    },
}

PRESETS = {
    "digits": ("Scenes of handwritten digits, 64×64: minutes on a laptop, no files.", DIGITS),
    "folder": (
        "Your own images and masks, of any size, in the folder --root; from random weights, unless "
        "--pretrained or --weights is given.",
        FOLDER,
    ),
}
for _data, _texts in _PAPERS.items():
    for _network, _text in _texts.items():
        _preset = f"{_data}-{_network}"
        _options = _DATA[_data] | _CHANGES.get(_preset, {})
        PRESETS[_preset] = (_text, _NETWORKS[_network].replace(dataset=_data, **_options))


def _cbp_occl(length: str, centroid: str, category: str) -> dict[str, str]:
    return {
        "cbp.length": length,
        "occl.centroid_weight": centroid,
        "occl.category_weight": category,
    }


# λ, φ and T of CBP+OCCL's section 4.2 and its ablations, λ2 of SAR's section 4.1: options of the
# methods that the presets add where the method is chosen and the option is not given. All others
# are the methods' own defaults.
_SAR_DEEPLAB = {"sar.loss_weight": "0.05"}
METHOD_OPTIONS: dict[str, dict[str, str]] = {
    "cityscapes-deeplabv3-r101": _SAR_DEEPLAB,
    "ade20k-deeplabv3-r101": _SAR_DEEPLAB,
    "pascal-context-deeplabv3-r101": _SAR_DEEPLAB,
    "ade20k-fcn-r101": _cbp_occl("2", "0.4", "0.1"),
    "coco-stuff-10k-fcn-r101": _cbp_occl("0.3", "1", "0.3"),
    "ade20k-segformer-b5": _cbp_occl("1", "1", "0.1"),
    "coco-stuff-10k-segformer-b4": _cbp_occl("1", "1", "0.1"),
    "coco-stuff-10k-segformer-b5": _cbp_occl("1", "1", "0.1"),
    "ade20k-upernet-swin-t": _cbp_occl("1", "1", "0.2"),
    "ade20k-segformer-b0": _cbp_occl("2", "1", "0.3"),
}


def with_published_options(preset: str, config: Config) -> Config:
    """The configuration, with the preset's options of the chosen methods added, except those that
    --setting sets: from-scratch has its own weights of OCCL, but no length of CBP."""
    methods = config.model.methods
    setting = setting_options(config.model.setting, methods)
    published = {
        option: value
        for option, value in METHOD_OPTIONS.get(preset, {}).items()
        if option.partition(".")[0] in methods and option not in setting
    }
    return config.replace(method_options=published | config.model.method_options)
