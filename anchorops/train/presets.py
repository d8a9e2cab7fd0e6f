"""Settings by name: those of the papers, and one that needs no files. Options on the command line
override their preset.

Settings that the papers do not give are those of mmsegmentation: scale 0.5 to 2, crop (drawn again
if one class covers 75 %), flip, photometric distortion; an auxiliary head of weight 0.4 for DeepLab
and UPerNet; for transformers warm-up of 1500 steps and no weight decay on norms; for SegFormer the
head has ten times the learning rate.

Differences from the settings of the papers and mmsegmentation:

- all: bf16 autocast; the learning rate decays to 0 (there to 1e-4 with SGD) with power 0.9 (there 1
  for SegFormer); neither norms nor biases have weight decay, in convolutional networks either;
  images are scaled to their short side whatever the long one becomes (there at most 2048).
- Pascal-Context: short side 480, as the papers say (mmsegmentation's 520 is the long side's).
- Cityscapes with SegFormer: windows overlap by a third (there by a quarter).
- DeepLab: dropout in the decoder is 0.5 (there 0.1 before the classifier), features have 256
  channels (512 in DeepLabV3); DeepLabV3+ has a backbone of stride 16 (there 8), ResNet-18 the
  ordinary stem (timm has no other).
- CeCo on DeepLab: its loss_weight is not printed; the default is Swin-T's 0.8.
- Swin: stochastic depth 0.1 (there 0.3), weight decay on the relative positions, features of 256
  channels (there 512).
- Without a preset: FCN and OCRNet, which segmentation-models-pytorch does not have; ConvNeXt; BEiT;
  multi-scale testing; point clouds.
"""

from .config import Config

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
    pretrained=True,
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
    optimizer="adamw", lr=6e-5, weight_decay=0.01, head_lr_factor=10.0, warmup=1_500
)

FOLDER = _CONVOLUTIONAL.replace(
    dataset="folder",
    model="hrnet-w18",
    crop=(256, 256),
    steps=10_000,
    pretrained=False,
    cat_max_ratio=1.0,
    photometric=False,
    workers=4,
    bf16=False,
    eval_every=1_000,
    save_every=500,
    log_every=10,
)

_DEEPLAB = _CONVOLUTIONAL.replace(auxiliary_weight=0.4)
_CECO = _DEEPLAB.replace(weight_decay=1e-3)

_CITYSCAPES = {"dataset": "cityscapes", "batch_size": 8, "steps": 80_000}
_ADE20K = {
    "dataset": "ade20k",
    "crop": (512, 512),
    "short_side": 512,
    "batch_size": 16,
    "steps": 160_000,
}
_PASCAL_CONTEXT = _ADE20K | {
    "dataset": "pascal-context",
    "crop": (480, 480),
    "short_side": 480,
    "steps": 40_000,
}
_COCO_STUFF_10K = _ADE20K | {"dataset": "coco-stuff-10k", "steps": 80_000}
_COCO_STUFF_164K = _ADE20K | {"dataset": "coco-stuff-164k", "steps": 320_000}

PRESETS = {
    "digits": ("Scenes of handwritten digits, 64×64: minutes on a laptop, no files.", DIGITS),
    "folder": ("Your own images and masks, of any size, in the folder --root.", FOLDER),
    "cityscapes-hrnet-w48": (
        "SAR's Table 3: 79.9 mIoU, 81.4 with --methods sar.",
        _CONVOLUTIONAL.replace(model="hrnet-w48", crop=(512, 1024), **_CITYSCAPES),
    ),
    "cityscapes-segformer-b4": (
        "SAR: 81.9 mIoU, 82.3 with --methods sar.",
        _TRANSFORMER.replace(
            model="segformer-b4", crop=(1024, 1024), evaluation="sliding", **_CITYSCAPES
        ),
    ),
    "cityscapes-deeplabv3-r101": (
        "SAR: 80.2 mIoU, 80.6 with --methods sar --method-options sar.loss_weight 0.05.",
        _DEEPLAB.replace(model="deeplabv3:tu-resnet101c", crop=(512, 1024), **_CITYSCAPES),
    ),
    "cityscapes-deeplabv3plus-r18": (
        "CeCo's Table 9: 76.3 mIoU, 77.5 with --methods ceco.",
        _CECO.replace(model="deeplabv3plus:tu-resnet18", crop=(512, 1024), **_CITYSCAPES),
    ),
    "cityscapes-deeplabv3plus-r50": (
        "CeCo's Table 9: 79.8 mIoU, 80.3 with --methods ceco.",
        _CECO.replace(model="deeplabv3plus:tu-resnet50c", crop=(512, 1024), **_CITYSCAPES),
    ),
    "ade20k-hrnet-w48": (
        "SAR: 42.0 mIoU, 42.8 with --methods sar.",
        _CONVOLUTIONAL.replace(model="hrnet-w48", **_ADE20K),
    ),
    "ade20k-segformer-b5": (
        "SAR: 49.1 mIoU, 49.5 with --methods sar; CBP+OCCL: 48.9, 49.9 with --methods cbp occl "
        "--method-options cbp.length 1 occl.category_weight 0.1.",
        _TRANSFORMER.replace(model="segformer-b5", **_ADE20K),
    ),
    "ade20k-segformer-b0": (
        "CBP+OCCL's ablation: 33.4 mIoU, 35.1 with --methods cbp occl --method-options "
        "cbp.length 2 occl.centroid_weight 1 occl.category_weight 0.3.",
        _TRANSFORMER.replace(model="segformer-b0", **(_ADE20K | {"steps": 40_000})),
    ),
    "ade20k-segformer-b0-20k": (
        "MVSC's ablation: 30.9 mIoU, 32.6 with --methods mvsc.",
        _TRANSFORMER.replace(model="segformer-b0", **(_ADE20K | {"steps": 20_000})),
    ),
    "ade20k-deeplabv3plus-r101": (
        "CeCo's convolutional setting: --methods ceco.",
        _CECO.replace(model="deeplabv3plus:tu-resnet101c", **_ADE20K),
    ),
    "ade20k-upernet-swin-t": (
        "CeCo's setting with a transformer: --methods ceco.",
        _TRANSFORMER.replace(
            model="upernet:tu-swin_tiny_patch4_window7_224",
            head_lr_factor=1.0,
            auxiliary_weight=0.4,
            **_ADE20K,
        ),
    ),
    "pascal-context-hrnet-w48": (
        "SAR, 59 classes: 50.3 mIoU, 51.1 with --methods sar.",
        _CONVOLUTIONAL.replace(model="hrnet-w48", **_PASCAL_CONTEXT),
    ),
    "coco-stuff-10k-segformer-b5": (
        "CBP+OCCL: 43.4 mIoU, 44.9 with --methods cbp occl --method-options cbp.length 1 "
        "occl.category_weight 0.1.",
        _TRANSFORMER.replace(model="segformer-b5", **_COCO_STUFF_10K),
    ),
    "coco-stuff-10k-segformer-b4": (
        "MVSC: 42.9 mIoU, 43.6 with --methods mvsc.",
        _TRANSFORMER.replace(model="segformer-b4", **_COCO_STUFF_10K),
    ),
    "coco-stuff-164k-deeplabv3plus-r101": (
        "CeCo's convolutional setting: --methods ceco.",
        _CECO.replace(model="deeplabv3plus:tu-resnet101c", **_COCO_STUFF_164K),
    ),
}
