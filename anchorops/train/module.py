"""The network, its loss, methods and optimizer, and the figures of a validation, as a
LightningModule."""

import sys
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor

import anchorops as ao

from . import IGNORED
from .data.loading import mixed_seed
from .data.module import SegmentationData
from .evaluation import check_stride, predict, summarize
from .networks.learner import (
    Learner,
    arguments_of,
    build_loss,
    build_optimizer,
    build_regularizer,
    class_weights,
    parameter_groups,
)
from .networks.models import CHECKPOINT_PREFIX, Segmenter, build_model, upsample_late
from .options import MODEL, check

RANDOM_WEIGHTS = (
    "WARNING: the network starts from random weights; trained ones are usually much better "
    "(--model.pretrained true: those of ImageNet, a download; --model.backbone_weights FILE; "
    "--model.weights FILE)"
)


class SegmentationModule(LightningModule):
    """A segmentation network with its training and validation.

    Args:
        network: hrnet-w18-small, hrnet-w18, hrnet-w48, …, segformer-b0 to segformer-b5, or
            ARCHITECTURE:ENCODER of segmentation-models-pytorch.
        pretrained: Start from ImageNet weights (downloaded).
        weights: Start from the weights in this file.
        backbone_weights: Start the backbone from the weights in this file, under the names of timm
            or of segmentation-models-pytorch; nothing is downloaded then.
        auxiliary_weight: Weight of the loss of an auxiliary head (3×3 convolution, classifier) on
            the second last map of the backbone; 0: no such head. The usual weight is 0.4.
        dropout: Share of the channels that are dropped before the classifier in training; the
            methods use all channels. mmsegmentation uses 0.1, except for HRNet. It replaces the
            own dropout of DeepLab, FPN and PSPNet, of channels that the methods use too, as DPT's
            always is.
        classifier_std: Standard deviation of the classifiers' initial weights, drawn from a normal
            distribution (mmsegmentation: 0.01); their biases are then 0. None: torch's default.
        channels_last: Use the channels-last memory layout for images, features and weights.
        compile: Compile the network and its losses with torch.compile.
        methods: Regularisers in addition to the cross-entropy; any number of them.
        setting: A named set of arguments of the methods. published: their defaults. from-scratch:
            smaller weights of OCCL and CeCo, for training from random weights. Arguments that it
            does not set are those that the preset's paper has for its network.
        paper_options: These arguments, of any methods, as METHOD.ARGUMENT: value.
        method_options: Additional arguments of the chosen methods, which override those of the
            setting: '{sar.momentum: 0.99, occl.split: images}'. sar.anchors, cr.anchors and
            cbp.init accept "@FILE.npy", an array [K, D] of numpy.save.
        loss: The loss of the logits at full resolution: cross-entropy, cross-entropy with the focal
            factor, Dice, or the sum of cross-entropy and Dice.
        focal_gamma: Exponent of the focal factor, with the loss focal.
        ohem_threshold: Online hard example mining: the cross-entropy uses only pixels whose true
            class has at most this probability.
        ohem_min_kept: At least this number of pixels is used in each batch: the hardest. Without
            ohem_threshold only these are used.
        class_weights: Weights of the loss from class frequencies f: 1/√f or 1/f, mean 1.
        optimizer: sgd has momentum 0.9.
        lr: Learning rate after warm-up.
        weight_decay: Weight decay; not applied to biases and normalisation layers.
        head_lr_factor: Learning rate of everything except the backbone and the methods, relative
            to lr.
        warmup: Steps of linear warm-up.
        power: Exponent of the polynomial decay to zero.
        evaluation: Predict whole images, or overlapping windows of the size of a crop.
        window_stride: With sliding windows: rows and columns from one to the next; two thirds of a
            crop if not given.
        eval_scales: Scales of the images in an evaluation, for example [0.5, 0.75, 1, 1.25]. There
            is one pass for each scale; the probabilities are averaged.
        eval_flip: Also average with the probabilities of the mirrored images: twice as many passes.
        seed: Random seed of the weights and of each step; the command line sets it to that of the
            run.

    Raises ValueError for a value out of range, and for a method that is chosen twice.
    """

    def __init__(
        self,
        network: str = "hrnet-w18-small",
        pretrained: bool = False,
        weights: str | None = None,
        backbone_weights: str | None = None,
        auxiliary_weight: float = 0.0,
        dropout: float = 0.0,
        classifier_std: float | None = None,
        channels_last: bool = False,
        compile: bool = False,
        methods: Sequence[Literal["cr", "sar", "cbp", "occl", "ceco", "mvsc"]] = (),
        setting: Literal["published", "from-scratch"] = "published",
        paper_options: dict[str, bool | int | float | str | None] | None = None,
        method_options: dict[str, bool | int | float | str | None] | None = None,
        loss: Literal["ce", "focal", "dice", "ce+dice"] = "ce",
        focal_gamma: float = 2.0,
        ohem_threshold: float | None = None,
        ohem_min_kept: int | None = None,
        class_weights: Literal["none", "inverse-sqrt", "inverse"] = "none",
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        head_lr_factor: float = 1.0,
        warmup: int = 0,
        power: float = 0.9,
        evaluation: Literal["whole", "sliding"] = "whole",
        window_stride: tuple[int, int] | None = None,
        eval_scales: Sequence[float] = (1.0,),
        eval_flip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.options: Any = self.hparams
        check("model", self.options, MODEL)
        if loss == "dice" and (ohem_threshold, ohem_min_kept) != (None, None):
            raise ValueError(
                "--model.loss: expected ce, focal or ce+dice with --model.ohem_threshold or "
                "--model.ohem_min_kept, got dice"
            )
        if loss != "focal" and focal_gamma != 2.0:
            raise ValueError(
                f"--model.focal_gamma: expected --model.loss focal, got {loss} with {focal_gamma:g}"
            )
        self.learner: Learner | None = None
        """Built where the data or a checkpoint tell the number of classes."""
        self.channels: int
        """Of the images."""
        self.from_checkpoint = False
        """Whether a training goes on, and needs no initial weights."""
        self.confusion: Tensor
        """int64 [K, K], pixels of a validation by their true and predicted classes."""
        self.figures: dict[str, Any] = {}
        """Results of the last validation: see `summarize`."""

    @property
    def network(self) -> Segmenter:
        assert self.learner is not None, "the network needs a training or a checkpoint"
        return self.learner.model

    @property
    def data(self) -> SegmentationData:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of images, features and weights."""
        return torch.channels_last if self.options.channels_last else torch.preserve_format

    def as_weights(self, images: Tensor) -> Tensor:
        """The images on the device of the weights, in their dtype and memory format."""
        weight = self.network.classifier.weight
        return images.to(weight.device, weight.dtype, memory_format=self.layout)

    @property
    def prediction(self) -> dict[str, Any]:
        """How images are predicted: arguments of `predict`."""
        options = self.options
        sliding = options.evaluation == "sliding"
        return {
            "window": self.data.options.crop if sliding else None,
            "stride": options.window_stride if sliding else None,
            "scales": tuple(options.eval_scales),
            "flip": options.eval_flip,
        }

    def setup(self, stage: str) -> None:
        """Find a stride that leaves gaps before the training, not at its first validation."""
        if self.prediction["stride"] is not None:
            check_stride(self.prediction["window"], self.prediction["stride"])
        warmup, steps = self.options.warmup, self.data.options.steps
        if stage == "fit" and warmup >= steps and self.trainer.is_global_zero:
            print(
                f"--model.warmup {warmup} is not shorter than --data.steps {steps}: the whole run "
                "is warm-up",
                file=sys.stderr,
            )

    def configure_model(self) -> None:
        """Build the network, its methods and its loss for a training. For a validation and for
        predictions, `on_load_checkpoint` builds the network alone."""
        # without a trainer: in load_from_checkpoint
        if self._trainer is None or self._trainer.state.fn != "fit":
            return
        if self.learner is None:
            self._build(from_checkpoint=self.from_checkpoint)

    def _build(self, *, from_checkpoint: bool) -> None:
        options, data = self.options, self.data
        assert data.training_set is not None
        num_classes, self.channels = len(data.classes), data.training_set.channels
        weights = None if from_checkpoint else options.weights
        backbone_weights = None if from_checkpoint else options.backbone_weights
        initial = options.pretrained or weights or backbone_weights
        random = not (initial or from_checkpoint)
        if random and data.options.dataset != "digits" and self.trainer.is_global_zero:
            print(RANDOM_WEIGHTS, file=sys.stderr)
        torch.manual_seed(options.seed)
        model = build_model(
            options.network,
            num_classes,
            channels=self.channels,
            pretrained=options.pretrained and not (from_checkpoint or weights or backbone_weights),
            weights=weights,
            backbone_weights=backbone_weights,
            auxiliary=options.auxiliary_weight > 0,
            dropout=options.dropout,
            classifier_std=options.classifier_std,
        )
        regularizer = build_regularizer(
            options.methods,
            arguments_of(
                options.methods,
                options.setting,
                options.paper_options or {},
                options.method_options or {},
            ),
            num_classes,
            model.classifier.in_channels,
            prior=data.prior,
            from_checkpoint=from_checkpoint,
        )
        loss = build_loss(
            options.loss,
            class_weights(options.class_weights, data.frequencies),
            focal_gamma=options.focal_gamma,
            ohem_threshold=options.ohem_threshold,
            ohem_min_kept=options.ohem_min_kept,
        )
        self.learner = Learner(model, regularizer, loss, options.auxiliary_weight)
        device = self.trainer.strategy.root_device
        self.learner.to(device).to(memory_format=self.layout)  # pyright: ignore
        self._upsample_late()
        on_gpus = device.type == "cuda"
        if self.trainer.world_size > 1 and on_gpus:  # torch has no other synchronised batch norm
            convert_sync_batchnorm(self.learner)
        if options.compile:
            self.learner.compile()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["channels"] = self.channels

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network alone, without its methods. CBP has removed the classifier's bias."""
        if self.learner is not None:
            return
        state = checkpoint["state_dict"]
        for name in list(state):
            if not name.startswith(CHECKPOINT_PREFIX) or name.startswith(
                f"{CHECKPOINT_PREFIX}regularizer."
            ):
                del state[name]
        weight = state[f"{CHECKPOINT_PREFIX}classifier.weight"]
        state.setdefault(f"{CHECKPOINT_PREFIX}classifier.bias", weight.new_zeros(len(weight)))
        options = self.options
        self.channels = checkpoint["channels"]
        model = build_model(
            options.network,
            len(weight),
            channels=self.channels,
            auxiliary=options.auxiliary_weight > 0,
            dropout=options.dropout,
        )
        self.learner = Learner(model, None, auxiliary_weight=options.auxiliary_weight)
        self.learner.to(memory_format=self.layout)  # pyright: ignore

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            first = " ".join("".join(str(error).splitlines()[1:2]).split())
            raise ValueError(
                f"the weights of the checkpoint are not those of --model.network "
                f"{self.options.network} with --model.auxiliary_weight "
                f"{self.options.auxiliary_weight:g}: expected the options of its run (--run). "
                f"{shorten(first, 200)}"
            ) from error

    def configure_optimizers(self) -> Any:
        options, steps = self.options, self.data.options.steps

        def factor(step: int) -> float:
            """Linear warm-up, then polynomial decay to zero."""
            warmup = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
            return warmup * max(0.0, 1 - step / steps) ** options.power

        groups = parameter_groups(
            self.network,
            options.lr,
            options.weight_decay,
            options.head_lr_factor,
        )
        # under autocast Lightning does not clip gradients for a fused optimizer
        fused = not self.trainer.gradient_clip_val
        optimizer = build_optimizer(options.optimizer, groups, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def seed_step(self) -> None:
        """Each step and rank has its own random numbers: an interruption does not change them."""
        step, rank = self.trainer.global_step, self.trainer.global_rank
        torch.manual_seed(mixed_seed("step", self.options.seed, step, rank))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.seed_step()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        assert self.learner is not None
        images, labels = batch
        loss, terms = self.learner(images.to(memory_format=self.layout), labels)
        step = self.trainer.global_step + 1
        self.log("loss", terms.pop("loss"), prog_bar=True)
        optimizer: Any = self.optimizers()
        self.log_dict({"step": float(step), "lr": optimizer.param_groups[0]["lr"], **terms})
        return loss

    def _upsample_late(self) -> None:
        """When the network is on its device: what runs later depends on that."""
        images = torch.zeros(1, self.channels, *self.data.options.crop)
        upsample_late(self.network, self.as_weights(images))

    def on_predict_start(self) -> None:
        self._upsample_late()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._upsample_late()
        if dist.is_initialized():  # statistics of batch normalisation: those of the first rank
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)
        num_classes = self.network.classifier.out_channels
        if num_classes != len(self.data.classes):
            raise ValueError(
                f"validate: expected data of {num_classes} classes, got {len(self.data.classes)}"
            )
        self.figures = {}
        self.confusion = torch.zeros(
            num_classes, num_classes, dtype=torch.int64, device=self.device
        )

    def _predict(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Classes int64 (B, *size), in the precision of the weights."""
        with torch.autocast(self.device.type, enabled=False):
            return predict(self.network, self.as_weights(images), size, **self.prediction)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        predictions = self._predict(images, labels.shape[1:])
        self.confusion += ao.confusion(
            predictions, labels, len(self.confusion), ignore_index=IGNORED
        )

    def results(self) -> dict[str, Any]:
        """The figures of a validation after its last image. All ranks call this."""
        if not self.figures:
            if dist.is_initialized():
                dist.all_reduce(self.confusion)
            self.figures = summarize(
                self.confusion.cpu(),
                self.data.classes,
                self.data.frequencies,
                self.data.options.head_tail,
            )
        return self.figures

    def on_validation_epoch_end(self) -> None:
        figures, split = self.results(), self.data.options.split
        values = {f"{split}/{k}": v for k, v in figures.items() if isinstance(v, float)}
        values |= {f"{split}/iou/{c['name']}": c["iou"] for c in figures["classes"]}
        known = {name: value for name, value in values.items() if value is not None}
        step = self.trainer.global_step
        if self.trainer.state.fn == "fit":
            known["step"] = float(step)
            self.print(f"step {step}: mIoU {100 * figures['miou']:.1f} %")
        self.log_dict(known)

    def predict_step(self, batch: tuple[Tensor, Tensor, list[Tensor]], batch_idx: int) -> Tensor:
        """The classes int64 (1, H, W) of an image."""
        _, images, (height, width) = batch
        return self._predict(images, (int(height), int(width)))
