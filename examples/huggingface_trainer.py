"""Segformer with Hugging Face's Trainer: cross-entropy without upsampled logits.

    python examples/huggingface_trainer.py [--steps 3] [--size 128]

Trains on random images and labels, to show the three functions that a Trainer needs. Segformer
upsamples its logits only for its own loss: without labels it returns them at low resolution, and a
Trainer with compute_loss_func does not pass the labels to the model.
"""

import argparse
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EvalPrediction,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
)

import anchorops as ao

K = 7


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = (torch.stack(tensors) for tensors in zip(*examples, strict=True))
    # the Trainer counts labels other than -100 as its num_items_in_batch
    return {"pixel_values": images, "labels": labels.masked_fill(labels == 255, -100)}


def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    # a mean over all accumulated batches and ranks: the Trainer has counted their labels
    options = {"ignore_index": -100, "align_corners": False}
    if num_items_in_batch is None:
        return ao.pixel_cross_entropy(outputs.logits, labels, **options)
    return ao.pixel_cross_entropy(outputs.logits, labels, reduction="sum", **options) / (
        num_items_in_batch
    )


def predictions(logits: Tensor, labels: Tensor) -> Tensor:
    # the Trainer keeps the predictions of the whole data set, instead of all logits
    height, width = labels.shape[1:]
    return ao.pixel_argmax(logits, (height, width))


def metrics(evaluated: EvalPrediction) -> dict[str, float]:
    predicted, labels = (
        torch.from_numpy(np.asarray(array))
        for array in (evaluated.predictions, evaluated.label_ids)
    )
    matrix = ao.confusion(predicted, labels, K, ignore_index=-100).double()
    hits, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return {"miou": float((hits / union.clamp(min=1))[union > 0].mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = SegformerConfig(hidden_sizes=[16, 32, 64, 128], depths=[1] * 4, decoder_hidden_size=64)
    config.num_labels = K
    size = (arguments.size, arguments.size)
    data: Any = [(torch.randn(3, *size), torch.randint(0, K, size)) for _ in range(4)]
    for _, labels in data:
        labels[:4] = 255  # ignored
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            SegformerForSemanticSegmentation(config),
            TrainingArguments(
                folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
            ),
            data_collator=collate,
            train_dataset=data,
            eval_dataset=data,
            compute_loss_func=compute_loss,
            preprocess_logits_for_metrics=predictions,
            compute_metrics=metrics,
        )
        trainer.train()
        print(trainer.evaluate())


if __name__ == "__main__":
    main()
