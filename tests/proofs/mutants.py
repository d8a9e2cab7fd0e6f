"""Do the tests notice wrong code? They run with one mutant after the other.

    python tests/proofs/mutants.py [NAME ...] [--json FILE]
    python tests/proofs/mutants.py --verify [NAME ...]

A mutant replaces a piece of a source file, in a copy of the repository in build/mutants. A test has
caught it if it fails with the mutant, and passes without. The Triton kernels run in Triton's
interpreter. Of C++ only the kernels of this processor's best instruction set are compiled again.
It prints one line for each mutant: the test that caught it, or SURVIVED.

With --verify it asks whether `anchorops-doctor --verify` notices the mutants in VERIFIED. They were
chosen before its checks were written. It fails if more than two are not noticed.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
COPY = ROOT / "build/mutants"
MOST_UNNOTICED = 2
MOST_SECONDS = 3600  # of the tests of a mutant, which may never end


class Tests(NamedTuple):
    """Which tests should catch a mutant."""

    names: str  # of files, without "test_" and ".py"
    chosen: str = ""  # as pytest's -k
    interpreted: bool = False  # the Triton kernels, in the interpreter
    slow: bool = False  # also tests that are marked so


class Mutant(NamedTuple):
    name: str
    file: str
    right: str  # occurs once in the file
    wrong: str
    tests: Tests


CLASS = Tests("class_moments class_moments_torch guarantees", "cpu or gradient_of_anchors")
SOFTMAX = Tests("softmax_moments softmax_not_finite pixel_losses guarantees", "cpu")
DIVERGENCE = Tests("pixel_kl_divergence guarantees", "cpu and not instruction_sets")
KEYS = Tests("class_keys guarantees", "cpu")
SUMS = Tests("upsampled_sums guarantees", "cpu")
RANK = Tests("pixel_losses", "kth_largest or hard_examples")
CONFUSION = Tests("confusion guarantees", "cpu and not instruction_sets")
VOLUMES = Tests("volumes wrong_labels guarantees")
DIVERGENCE_OF_VOLUMES = Tests("pixel_kl_divergence guarantees", "volumes")
SIGMOIDS = Tests("sigmoid_losses torch_cases guarantees")
LOSSES = Tests("pixel_losses softmax_moments_torch sigmoid_losses other_libraries guarantees")
TRACES = Tests("func_transforms guarantees_of_torch")
SECOND = Tests("guarantees_of_torch", "other_derivatives")
OPERATORS = Tests("guarantees_of_torch", "cpu")
BACKENDS = Tests("backend")
METHODS = Tests("losses_common losses_combined losses_recomputation")

T_CLASS = Tests("class_moments", "values_and_gradients or lengths_of_keys", True)
T_CLASS_GRADIENT = Tests("class_moments_backward", "", True)
T_SOFTMAX = Tests("softmax_moments", "values_and_gradients", True)
T_SOME = Tests("softmax_moments", "through_some or ignored", True)
T_SHAPED = Tests("softmax_moments", "shaped_losses", True)
T_DIVERGENCE = Tests("pixel_kl_divergence", "", True)
T_SUMS = Tests("upsampled_sums", "", True)
T_INFO_NCE = Tests("centroid_info_nce", "", True)
T_KEYS = Tests("class_keys", "", True)
T_CONFUSION = Tests("confusion guarantees", "confusion", True)
T_LAUNCHED = Tests("every_kernel", "", True)
T_WEIGHTS = Tests("pixel_losses", "weights", True)
T_REFUSED = Tests("class_moments softmax_moments", "float64_is_refused", True)
T_WRONG_LABELS = Tests("wrong_labels", "", True)

CLASS_MOMENTS = (
    Mutant(
        "both gradients of a tile of one key",
        "csrc/cpu/class_moments_kernel.h",
        "if (dsums) plane[i] += dsums[k * dim + c + i];",
        "if (dsums) plane[i] = Vec{} + dsums[k * dim + c + i];",
        CLASS,
    ),
    Mutant(
        "pixels of several keys in C++",
        "csrc/cpu/class_moments_kernel.h",
        "add(k, tile.pixel[i], difference * difference);",
        "add(key[0], tile.pixel[i], difference * difference);",
        CLASS,
    ),
    Mutant(
        "anchors of groups in C++",
        "csrc/cpu/class_moments.cpp",
        "static_cast<int32_t>(k / groups % num_classes)",
        "static_cast<int32_t>(k % num_classes)",
        CLASS,
    ),
    Mutant(
        "gradient of anchors",
        "anchorops/_ops/class_moments.py",
        "torch.where(counts > 0, -2 * dsqdists * differences, 0)",
        "torch.where(counts > 0, -dsqdists * differences, 0)",
        CLASS,
    ),
    Mutant(
        "gradient of anchors of groups",
        "anchorops/_ops/class_moments.py",
        "danchors.sum((0, 2))",
        "danchors.sum(0)[:, 0]",
        CLASS,
    ),
    Mutant(
        "squared distances in tiles of several keys",
        "kernels/class_moments_backward.py",
        "out = 2 * dsqdists[None, :] * (x - a)",
        "out = dsqdists[None, :] * (x - a)",
        T_CLASS_GRADIENT,
    ),
    Mutant(
        "gradient of tiles of ignored pixels",
        "kernels/class_moments_backward.py",
        "taken = d < tl.where(k >= 0, features.dim, 0)",
        "taken = d < features.dim",
        T_CLASS_GRADIENT,
    ),
    Mutant(
        "float32 rounded to bfloat16",
        "kernels/class_moments.py",
        "sums = _product(low, member) + _product(middle, member) + _product(high, member)",
        "sums = _product(high, member)",
        T_CLASS,
    ),
    Mutant(
        "the last key of a chunk",
        "kernels/class_moments.py",
        "        key = tl.where(tile < last_tile, key, -1)\n",
        "",
        T_CLASS,
    ),
    Mutant(
        "anchors of groups",
        "kernels/features.py",
        "key // anchors.groups % anchors.num_classes",
        "key % anchors.num_classes",
        T_CLASS,
    ),
    Mutant(
        "strides of one column",
        "kernels/launch.py",
        "s[2] if width == 1 else s[3]",
        "s[3]",
        T_CLASS,
    ),
    Mutant(
        "a key that began in an earlier range",
        "kernels/class_moments_sorted.py",
        "goes_on = (key == pixels.before) | (key == pixels.after)",
        "goes_on = key == pixels.after",
        T_CLASS,
    ),
    Mutant(
        "the first row of a key in several ranges",
        "kernels/class_moments_sorted.py",
        "total = tl.load(ends_ptr + (2 * part + 1) * width + column",
        "total = tl.load(ends_ptr + 2 * part * width + column",
        T_CLASS,
    ),
)

SOFTMAX_MOMENTS = (
    Mutant(
        "slope of squared probabilities in C++",
        "csrc/cpu/softmax_cells_backward.h",
        "rest -= (totals[n] + 2 * q * squares[n]) * q;",
        "rest -= (totals[n] + q * squares[n]) * q;",
        SOFTMAX,
    ),
    Mutant(
        "last column of a tile",
        "csrc/cpu/softmax_cells_backward.h",
        "        below[column + L] += sums.right_below[L - 1];\n",
        "",
        SOFTMAX,
    ),
    Mutant(
        "slope of the focal factor in C++",
        "csrc/cpu/softmax_losses.h",
        "alpha = m.factor * alpha + (c - c == 0 ? by_factor : Vec{});",
        "alpha = m.factor * alpha + (c - c == 0 ? Vec{} : by_factor);",
        SOFTMAX,
    ),
    Mutant(
        "number of hard examples",
        "csrc/cpu/softmax_losses.h",
        "sum == USED ? (is_unused(c) ? Vec{} : weight)",
        "sum == USED ? weight",
        SOFTMAX,
    ),
    Mutant(
        "a class that is ignored, in C++",
        "csrc/cpu/softmax_rows.h",
        "classes[i] = in_range & !ignored ?",
        "classes[i] = in_range ?",
        SOFTMAX,
    ),
    Mutant(
        "weight 0 of a logit that is not finite, in C++",
        "csrc/cpu/upsampling.h",
        "return weight == 0 ? low : (1 - weight) * low + weight * high;",
        "return (1 - weight) * low + weight * high;",
        SOFTMAX,
    ),
    Mutant(
        "gradients of each image in C++",
        "csrc/cpu/softmax_moments.cpp",
        "table->dim() == 2 ? table->size(1) : 0",
        "0",
        SOFTMAX,
    ),
    Mutant(
        "label smoothing of each image in C++",
        "csrc/cpu/softmax_moments.cpp",
        "smoothing->dim() == 3 ? smoothing->stride(0) : 0",
        "0",
        SOFTMAX,
    ),
    Mutant(
        "align_corners in C++",
        "csrc/cpu/bilinear.h",
        "double(source - 1) / double(std::max<int64_t>(size - 1, 1))",
        "double(source) / double(std::max<int64_t>(size, 1))",
        SOFTMAX,
    ),
    Mutant(
        "gradient of pixel weights",
        "anchorops/_ops/softmax_moments.py",
        "torch.where(losses.isfinite(), losses, 0)",
        "torch.ones_like(losses)",
        LOSSES,
    ),
    Mutant(
        "slope of squared probabilities",
        "kernels/softmax_moments_backward.py",
        "dsquare = 2 * _class_value(gradients.dsquares, image, k)\n            p = [",
        "dsquare = _class_value(gradients.dsquares, image, k)\n            p = [",
        T_SOME,
    ),
    Mutant(
        "gradients of each image",
        "kernels/softmax_moments_backward.py",
        "ptr = gradient.ptr + image * gradient.stride_b\n        return",
        "ptr = gradient.ptr\n        return",
        T_SOFTMAX,
    ),
    Mutant(
        "gradient of the losses of pixels",
        "kernels/softmax_moments_backward.py",
        "label_term = -alphas[i] if BY_PIXEL else -alpha",
        "label_term = -alpha",
        T_SOFTMAX,
    ),
    Mutant(
        "smallest loss dropped in the backward pass",
        "kernels/softmax_moments_backward.py",
        "loss_options = loss_options_of(options)",
        "loss_options = loss_options_of(options)._replace(min_loss=None)",
        T_SHAPED,
    ),
    Mutant(
        "slope of the focal factor",
        "kernels/loss_options.py",
        "by_c = tl.where((e == 0) | (x == _SMALLEST), 0.0, growth) + by_u * a",
        "by_c = by_u * a",
        T_SHAPED,
    ),
    Mutant(
        "label smoothing of each image",
        "kernels/loss_options.py",
        "strides = (smoothing.stride(0), 1) if by_image else (0, 0)",
        "strides = (smoothing.stride(0), 0) if by_image else (0, 0)",
        T_SHAPED,
    ),
    Mutant(
        "number of hard examples in Triton",
        "kernels/softmax_moments.py",
        "kept = [mine[i] & used[i] for i in () + CELLS.columns]",
        "kept = mine",
        T_SHAPED,
    ),
    Mutant(
        "gradients before the first logit",
        "kernels/upsampling_transposed.py",
        "tl.where(first, lower + upper, upper)",
        "upper",
        T_SOME,
    ),
    Mutant(
        "blocks of parts of a cell",
        "kernels/upsampling_transposed.py",
        "gradients.sum(0) if len(gradients) > 1 else gradients[0]",
        "gradients[0]",
        T_SOFTMAX,
    ),
    Mutant(
        "rows of a lane's pixels",
        "kernels/upsampling_transposed.py",
        "tl.sum(upper, ROW_AXIS, keep_dims=True)",
        "tl.max(upper, ROW_AXIS, keep_dims=True)",
        T_SOME,
    ),
    Mutant(
        "first pixel of a cell, where coordinates are rounded",
        "kernels/upsampling.py",
        "    i += (coordinate(i, axis, CELLS.align_corners) < cell).to(tl.int32)\n    return i",
        "    return i",
        Tests("softmax_not_finite", "just_above", True),
    ),
    Mutant(
        "sums that underflow",
        "kernels/softmax.py",
        "_SMALLEST_SUM = tl.constexpr(2.0**-100)",
        "_SMALLEST_SUM = tl.constexpr(0.0)",
        T_SOFTMAX,
    ),
    Mutant(
        "a class that is ignored",
        "kernels/lanes.py",
        "(label[i] >= 0) & (label[i] < num_classes) & (label[i] != ignore_index)",
        "(label[i] >= 0) & (label[i] < num_classes)",
        T_SOME,
    ),
)

DIVERGENCES = (
    Mutant(
        "temperature of the divergence in C++",
        "csrc/cpu/pixel_kl_divergence_kernel.h",
        "is_valid ? divergence.temperature * dpixels : Vec{}",
        "is_valid ? dpixels : Vec{}",
        DIVERGENCE,
    ),
    Mutant(
        "strides of valid",
        "csrc/cpu/pixel_kl_divergence_kernel.h",
        "is_valid[t] = line[t * valid.stride_w];",
        "is_valid[t] = line[t];",
        DIVERGENCE,
    ),
    Mutant(
        "a row of weight 0",
        "csrc/cpu/pixel_kl_divergence_kernel.h",
        "return last.weight != 0 && last.lower == row_of(next);",
        "return last.lower == row_of(next);",
        DIVERGENCE,
    ),
    Mutant(
        "mean over the valid pixels",
        "anchorops/_ops/pixel_kl_divergence.py",
        "total / valid.sum().clamp(min=1)",
        "total / valid.numel()",
        DIVERGENCE,
    ),
    Mutant(
        "temperature of the divergence",
        "kernels/pixel_kl_divergence_backward.py",
        "factors = [x * temperature for x in factors]",
        "factors = [x for x in factors]",
        T_DIVERGENCE,
    ),
    Mutant(
        "gradient of pixels that are not valid",
        "kernels/pixel_kl_divergence_backward.py",
        "tl.where(valid[i] >= 0, (q[i] - p[i]) * factors[i], 0.0)",
        "(q[i] - p[i]) * factors[i]",
        T_DIVERGENCE,
    ),
    Mutant(
        "classes of probability 0",
        "kernels/pixel_kl_divergence.py",
        "tl.where(e[i] == 0, 0.0, e[i] * (t[i] - s[i]))",
        "e[i] * (t[i] - s[i])",
        T_DIVERGENCE,
    ),
    Mutant(
        "square of the temperature",
        "kernels/pixel_kl_divergence.py",
        "temperature * (temperature * values[i])",
        "temperature * values[i]",
        T_DIVERGENCE,
    ),
    Mutant(
        "temperature of the exponentials",
        "kernels/pixel_kl_divergence.py",
        "slope = LOG2_E / temperature",
        "slope = LOG2_E",
        T_DIVERGENCE,
    ),
    Mutant(
        "shift of the teacher's lse",
        "kernels/pixel_kl_divergence.py",
        "teacher_shift[i] / temperature +",
        "shift[i] / temperature +",
        T_DIVERGENCE,
    ),
    Mutant(
        "a teacher of the same height alone",
        "kernels/pixel_kl_divergence.py",
        "if logits.shape == teacher.shape:",
        "if logits.shape[2] == teacher.shape[2]:",
        T_DIVERGENCE,
    ),
    Mutant(
        "teacher's logits at the pixels of a lane",
        "kernels/pixel_kl_divergence.py",
        "lanes.x.start + i, teacher_axes.x",
        "lanes.x.start, teacher_axes.x",
        T_DIVERGENCE,
    ),
)

UPSAMPLED_SUMS = (
    Mutant(
        "slope of the variance",
        "kernels/upsampled_sums_backward.py",
        "2 * dvariance[:, None] * (x - mean[:, None])",
        "2 * dvariance[:, None] * x",
        T_SUMS,
    ),
    Mutant(
        "gradients of several keys",
        "kernels/upsampled_sums_backward.py",
        "gradient += dsums[:, None] * weight[None, :]",
        "gradient = dsums[:, None] * weight[None, :]",
        T_SUMS,
    ),
    Mutant(
        "gradients of the sums of all images",
        "kernels/upsampled_sums_backward.py",
        "image_keys = num_classes if len(dsums) > num_classes else 0",
        "image_keys = num_classes",
        T_SUMS,
    ),
    Mutant(
        "features that no label uses",
        "kernels/upsampled_sums.py",
        "used = tl.where(weight[None, :] != 0, x, 0.0)",
        "used = x",
        T_SUMS,
    ),
    Mutant(
        "variance between tiles",
        "kernels/upsampled_sums.py",
        "squares + shift * shift * (moments.count * count / total)",
        "squares",
        T_SUMS,
    ),
    Mutant(
        "variance between chunks",
        "kernels/upsampled_sums.py",
        "squares += tl.sum(part_squares + here * shift * shift, 0)",
        "squares += tl.sum(part_squares, 0)",
        T_SUMS,
    ),
    Mutant(
        "sums of each image",
        "kernels/upsampled_sums.py",
        "tables = images if num_keys > num_classes else 1",
        "tables = 1",
        T_SUMS,
    ),
    Mutant(
        "labels around a feature",
        "kernels/splat.py",
        "min(axis.pixels, math.ceil(2 / axis.ratio) + 5)",
        "min(axis.pixels, math.ceil(1 / axis.ratio))",
        T_SUMS,
    ),
    Mutant(
        "labels at the left of a feature",
        "kernels/splat.py",
        "first = tl.maximum(((tile.x - 1) * axis.inverse).to(tl.int32) - 1, 0)",
        "first = (tile.x * axis.inverse).to(tl.int32)",
        T_SUMS,
    ),
    Mutant(
        "sums of each image at the features' size on the CPU",
        "anchorops/_ops/upsampled_sums.py",
        "image_keys = num_classes if num_keys > num_classes else 0",
        "image_keys = 0",
        SUMS,
    ),
    Mutant(
        "slope of the variance on the CPU",
        "anchorops/_ops/upsampled_sums.py",
        "slope = 2 / pixels * dvariance",
        "slope = dvariance / pixels",
        SUMS,
    ),
    Mutant(
        "rows that two parts share",
        "anchorops/_ops/upsampled_sums.py",
        "if num_keys > num_classes:\n            sums[part.images] += image_sums",
        "if num_keys > num_classes:\n            sums[part.images] = image_sums",
        SUMS,
    ),
)

INFO_NCE = (
    Mutant(
        "absent keys",
        "kernels/centroid_info_nce_backward.py",
        "used = present & are_present(problem.keys, k) & (r // problem.sizes.groups != k)",
        "used = present & (r // problem.sizes.groups != k)",
        T_INFO_NCE,
    ),
    Mutant(
        "gradient of the positive",
        "kernels/centroid_info_nce_backward.py",
        "(tl.exp(-loss) - 1)",
        "tl.exp(-loss)",
        T_INFO_NCE,
    ),
    Mutant(
        "gradient of the own key",
        "kernels/centroid_info_nce_backward.py",
        "if OWN_KEY_IS_POSITIVE and not OF_QUERIES:",
        "if OWN_KEY_IS_POSITIVE and OF_QUERIES:",
        T_INFO_NCE,
    ),
    Mutant(
        "gradient of given positives",
        "kernels/centroid_info_nce_backward.py",
        "dpositives = weight * load_rows(queries, i, d, present, sizes.dim)",
        "dpositives = weight * p",
        T_INFO_NCE,
    ),
    Mutant(
        "channels of the second block",
        "kernels/centroid_info_nce_backward.py",
        "d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)",
        "d = tl.arange(0, CHANNELS)",
        T_INFO_NCE,
    ),
    Mutant(
        "own key in the denominator",
        "kernels/centroid_info_nce.py",
        "used = are_present(keys, k)[None, :] & (k[None, :] != own_key[:, None])",
        "used = are_present(keys, k)[None, :]",
        T_INFO_NCE,
    ),
    Mutant(
        "given positives",
        "kernels/centroid_info_nce.py",
        "own_key if OWN_KEY_IS_POSITIVE else r, d, present",
        "own_key, d, present",
        T_INFO_NCE,
    ),
    Mutant(
        "classes of groups",
        "kernels/centroid_info_nce.py",
        "are_present(queries, r), r // sizes.groups",
        "are_present(queries, r), r",
        T_INFO_NCE,
    ),
    Mutant(
        "sums of earlier tiles of keys",
        "kernels/centroid_info_nce.py",
        "total = total * tl.exp(maximum - shift) +",
        "total = total +",
        T_INFO_NCE,
    ),
    Mutant(
        "mask of the keys",
        "kernels/centroid_info_nce.py",
        "_rows_of(keys, present_keys)",
        "_rows_of(keys, None)",
        T_INFO_NCE,
    ),
    Mutant(
        "keys of classes with one present query",
        "anchorops/_ops/centroid_info_nce.py",
        "present.any(1)",
        "present.all(1)",
        T_INFO_NCE,
    ),
    Mutant(
        "mean over the present queries",
        "anchorops/_ops/centroid_info_nce.py",
        "(max(losses.numel(), 1) if rows is None else rows.sum().clamp(min=1))",
        "max(losses.numel(), 1)",
        T_INFO_NCE,
    ),
)

KEYS_AND_RANKS = (
    Mutant(
        "nearest label in double precision",
        "csrc/cpu/class_keys.cpp",
        "std::floor(static_cast<float>(i) * scale_)",
        "std::floor(static_cast<double>(i) * scale_)",
        KEYS,
    ),
    Mutant(
        "number of pixels of a group",
        "csrc/cpu/split_groups.cpp",
        "*out++ = (key_counts[k] - g + groups - 1) / groups;",
        "*out++ = key_counts[k] / groups;",
        KEYS,
    ),
    Mutant(
        "rank of the k-th largest",
        "csrc/cpu/kth_largest.cpp",
        "counts[digit] < k",
        "counts[digit] <= k",
        RANK,
    ),
    Mutant(
        "fewer numbers than the rank",
        "anchorops/_ops/kth_largest.py",
        ".clamp(min=0)",
        "",
        RANK,
    ),
    Mutant(
        "sign of −0",
        "anchorops/_ops/kth_largest.py",
        "values.view(torch.int32) & 0x7FFFFFFF",
        "values.view(torch.int32)",
        RANK,
    ),
    Mutant(
        "last key of a tile",
        "kernels/class_keys.py",
        "ends = (i == key.shape[0] - 1) | (run",
        "ends = (run",
        T_KEYS,
    ),
    Mutant(
        "classes alone, of several images",
        "kernels/class_keys.py",
        "IMAGE_IN_KEY=per_image and class_dtype is None",
        "IMAGE_IN_KEY=per_image",
        T_KEYS,
    ),
    Mutant(
        "rows of labels that do not follow each other",
        "kernels/class_keys.py",
        "resize or not (height == 1 or stride_y == width * stride_x)",
        "resize",
        T_KEYS,
    ),
    Mutant(
        "ignored class keys",
        "kernels/class_keys.py",
        "(label < num_classes) & (label != ignore_index)",
        "(label < num_classes)",
        T_KEYS,
    ),
    Mutant(
        "high half of the seed",
        "kernels/split_groups.py",
        "_mix32((seed >> 32).to(tl.uint32))",
        "_mix32((seed >> 31).to(tl.uint32))",
        T_KEYS,
    ),
    Mutant(
        "rank of a pixel among the hashes",
        "kernels/split_groups.py",
        "hash_of(seed, b - 1) < pixel_hash",
        "hash_of(seed, b - 1) <= pixel_hash",
        T_KEYS,
    ),
)

PREDICTIONS = (
    Mutant(
        "matrix of many classes",
        "csrc/cpu/confusion.cpp",
        "std::atomic_ref(matrix[i * num_classes + j])",
        "std::atomic_ref(matrix[j * num_classes + i])",
        CONFUSION,
    ),
    Mutant(
        "true negatives of a sigmoid",
        "anchorops/_ops/confusion.py",
        "negative = torch.stack([hits[:, 0], misses[:, 0]], -1)",
        "negative = torch.stack([hits[:, 0], misses[:, 1]], -1)",
        SIGMOIDS,
    ),
    Mutant(
        "align_corners of the confusion matrix",
        "anchorops/_ops/confusion.py",
        "pixel_argmax(logits, shape_of(labels)[1:], align_corners=align_corners)",
        "pixel_argmax(logits, shape_of(labels)[1:])",
        CONFUSION,
    ),
    Mutant(
        "align_corners of the confidence",
        "anchorops/_ops/pixel_argmax.py",
        "Options(ignore_index=-1, align_corners=align_corners, pixel_losses=True)",
        "Options(ignore_index=-1, pixel_losses=True)",
        CONFUSION,
    ),
    Mutant(
        "transposed confusion matrix",
        "kernels/confusion.py",
        "label * num_classes + prediction",
        "prediction * num_classes + label",
        T_CONFUSION,
    ),
    Mutant(
        "strides of the labels",
        "kernels/confusion.py",
        "b * stride_labels_b + y * stride_labels_h",
        "b * stride_labels_b + y * stride_predictions_h",
        T_CONFUSION,
    ),
    Mutant(
        "negative predictions",
        "kernels/confusion.py",
        "valid &= (prediction >= 0) & (prediction < num_classes)",
        "valid &= prediction < num_classes",
        T_CONFUSION,
    ),
    Mutant(
        "NaN is the largest logit",
        "kernels/pixel_argmax.py",
        "larger = [(z[i] > largest[i]) | for_nan[i] for i in () + CELLS.columns]",
        "larger = [z[i] > largest[i] for i in () + CELLS.columns]",
        T_CONFUSION,
    ),
    Mutant(
        "first of equal logits",
        "kernels/pixel_argmax.py",
        "(z[i] > largest[i]) | for_nan[i]",
        "(z[i] >= largest[i]) | for_nan[i]",
        T_CONFUSION,
    ),
)

VOLUMES_AND_SIGMOIDS = (
    Mutant(
        "slices that are not mixed",
        "anchorops/_ops/volumes.py",
        ".add_(around[upper], alpha=weight)",
        ".add_(around[lower], alpha=weight)",
        VOLUMES,
    ),
    Mutant(
        "numbers of the volumes of a slab",
        "anchorops/_ops/volumes.py",
        "values[self.volumes].repeat_interleave(self.slices.stop - self.slices.start, 0)",
        "torch.cat([values[self.volumes]] * (self.slices.stop - self.slices.start))",
        VOLUMES,
    ),
    Mutant(
        "maps of the second slab",
        "anchorops/_ops/volumes.py",
        'if axis == "pixels" and part.numel() > 0:',
        'if axis == "pixels" and part.numel() > 0 and slab.slices.start == 0:',
        VOLUMES,
    ),
    Mutant(
        "gradient of a slice between two slabs",
        "anchorops/_ops/volumes.py",
        "if slab.slices.stop == depth:",
        "if dx:",
        VOLUMES,
    ),
    Mutant(
        "a slice of weight 0",
        "anchorops/_ops/volumes.py",
        "    upper = torch.where(weight == 0, lower, upper)\n",
        "",
        VOLUMES,
    ),
    Mutant(
        "align_corners of the depth of predictions",
        "anchorops/_ops/volumes.py",
        "sources = _sources(depth, logits, align_corners)\n    for slab",
        "sources = _sources(depth, logits, False)\n    for slab",
        Tests("volumes confusion"),
    ),
    Mutant(
        "pixel weights of volumes dropped in the backward pass",
        "anchorops/_ops/volumes.py",
        "            *pack(_slab_options(slab, options)),",
        "            *pack(_slab_options(slab, options._replace(pixel_weights=None))),",
        VOLUMES,
    ),
    Mutant(
        "depth of the teacher",
        "anchorops/_ops/volumes.py",
        "sources = _sources(depth, teacher_logits, align_corners)",
        "sources = _sources(depth, logits, align_corners)",
        DIVERGENCE_OF_VOLUMES,
    ),
    Mutant(
        "valid voxels dropped in the backward pass",
        "anchorops/_ops/volumes.py",
        "None if valid is None else slab.select_pixels(valid),",
        "None,",
        DIVERGENCE_OF_VOLUMES,
    ),
    Mutant(
        "layout of the gradient of sigmoids",
        "anchorops/_ops/sigmoid.py",
        "grad.movedim(1, -1).contiguous().movedim(-1, 1) if ctx.channels_last else grad",
        "grad",
        SIGMOIDS,
    ),
    Mutant(
        "statistics of each image of sigmoids",
        "anchorops/_ops/sigmoid.py",
        "statistic if options.per_image else statistic.sum(0)",
        "statistic.sum(0)",
        Tests("sigmoid_losses volumes pixel_losses"),
    ),
    Mutant(
        "label that sigmoids ignore",
        "anchorops/_ops/sigmoid.py",
        "options.map(by_image)._replace(per_image=True)",
        "options.map(by_image)._replace(per_image=True, ignore_index=255)",
        SIGMOIDS,
    ),
    Mutant(
        "channels of label smoothing",
        "anchorops/_ops/pixel_binary_cross_entropy.py",
        "smoothing.repeat(1 if logits.dim() == 2 else logits.shape[0], 1, 1)",
        "smoothing.repeat_interleave(1 if logits.dim() == 2 else logits.shape[0], 0)",
        SIGMOIDS,
    ),
    Mutant(
        "weight of the positive class",
        "anchorops/_ops/pixel_binary_cross_entropy.py",
        "torch.stack([torch.ones_like(pos_weight), pos_weight], -1)",
        "torch.stack([pos_weight, torch.ones_like(pos_weight)], -1)",
        SIGMOIDS,
    ),
)

PLUMBING = (
    Mutant(
        "two options swapped",
        "anchorops/_moments.py",
        "    masses: bool = False\n    squares: bool = False\n",
        "    squares: bool = False\n    masses: bool = False\n",
        LOSSES,
    ),
    Mutant(
        "two results swapped",
        "anchorops/_moments.py",
        '"overlaps": Result(',
        '"masses": Result("classes", float, lambda o: o.masses, differentiable=True),\n    '
        '"overlaps": Result(',
        LOSSES,
    ),
    Mutant(
        "align_corners dropped in the backward pass",
        "anchorops/_ops/softmax_moments.py",
        "operator(logits, labels, lse, *statistic_grads, *pack(options))",
        "operator(logits, labels, lse, *statistic_grads, *pack(options._replace("
        "align_corners=False)))",
        Tests("softmax_moments", "cpu and through_some"),
    ),
    Mutant(
        "align_corners of an lse that is computed later",
        "anchorops/_moments.py",
        "Options(ignore_index=self.ignore_index, align_corners=self.align_corners)",
        "Options(ignore_index=self.ignore_index)",
        Tests("func_transforms guarantees_of_torch pixel_losses softmax_moments_torch"),
    ),
    Mutant(
        "gradient of an absent map",
        "anchorops/_ops/softmax_moments.py",
        "gradients[x] if RESULTS[x].requested(options) else None",
        "gradients[x]",
        Tests("guarantees_of_torch softmax_moments_torch compile"),
    ),
    Mutant(
        "smallest loss of weighted pixels on a GPU",
        "kernels/loss_options.py",
        "return tl.where(used, w, 0.0)",
        "return w",
        T_WEIGHTS,
    ),
    Mutant(
        "weights of pixels in the gradient on a GPU",
        "kernels/softmax_moments_backward.py",
        "added = [weights[i] * added[i] for i in () + CELLS.columns]",
        "pass",
        T_WEIGHTS,
    ),
    Mutant(
        "labels that are wrong, on a GPU",
        "kernels/lanes.py",
        "((label[i] < 0) | (label[i] >= num_classes)) & (label[i] != ignore_index)",
        "((label[i] < 0) | (label[i] >= num_classes))",
        T_WRONG_LABELS,
    ),
    Mutant(
        "labels that are wrong, of Lovasz",
        "anchorops/_ops/probability_histograms.py",
        "labels.numel() - counts.sum() - _number_of(ignore_index, labels)",
        "labels.numel() - counts.sum()",
        Tests("wrong_labels lovasz"),
    ),
    Mutant(
        "dtype of a result without values",
        "anchorops/_ops/softmax_moments.py",
        "weighted or RESULTS[name].dtype is float",
        "RESULTS[name].dtype is float",
        OPERATORS,
    ),
    Mutant(
        "layouts copied by torch.compile",
        "anchorops/_ops/softmax_moments.py",
        'define_moments("softmax_moments", any_strides=True)',
        'define_moments("softmax_moments")',
        Tests("compile", "convolutions", slow=True),
    ),
    Mutant(
        "gradient of absent sums",
        "anchorops/_ops/class_moments.py",
        "dsums = dsums if ctx.with_sums else None",
        "pass",
        Tests("guarantees_of_torch class_moments_torch compile"),
    ),
    Mutant(
        "overload of another backend",
        "anchorops/_ops/class_moments.py",
        "operator = getattr(torch.ops.anchorops.class_moments, backend)",
        "operator = torch.ops.anchorops.class_moments.cpu",
        T_LAUNCHED,
    ),
    Mutant(
        "overload of another backend for the gradient of volumes",
        "anchorops/_ops/volumes.py",
        "operator = getattr(torch.ops.anchorops.softmax_moments_backward, backend)",
        "operator = torch.ops.anchorops.softmax_moments_backward.cpu",
        Tests("volumes every_kernel", "", True),
    ),
    Mutant(
        "lse of the divergence that the forward pass left out",
        "anchorops/_ops/pixel_kl_divergence.py",
        "if not ctx.with_lse:",
        "if False:",
        Tests("guarantees_of_torch", "call_does_not_see"),
    ),
    Mutant(
        "weights in the mean",
        "anchorops/_ops/pixel_cross_entropy.py",
        "counts if weight is None else weight * counts",
        "counts",
        LOSSES,
    ),
    Mutant(
        "second derivatives",
        "anchorops/_ops/registration.py",
        '    _differentiate(f"{name}_backward", backend, second_derivative, function=function)\n',
        "",
        SECOND,
    ),
    Mutant(
        "float64 on Triton",
        "anchorops/_backend.py",
        'name in ("cuda", "triton") and tensor.dtype == torch.float64',
        'name == "cuda" and tensor.dtype == torch.float64',
        T_REFUSED,
    ),
    Mutant(
        "most keys of cuda",
        "anchorops/_ops/class_moments.py",
        "num_keys > CUDA_MAX_KEYS",
        "num_keys >= CUDA_MAX_KEYS",
        BACKENDS,
    ),
    Mutant(
        "default of ignore_index",
        "anchorops/losses/pixel.py",
        "ignore_index=self.ignored(logits), align_corners",
        "ignore_index=255, align_corners",
        LOSSES,
    ),
    Mutant(
        "per_image dropped",
        "anchorops/losses/dice.py",
        "squares=dice.squared, per_image=dice.per_image",
        "squares=dice.squared",
        LOSSES,
    ),
    Mutant(
        "smallest loss with a least number of pixels",
        "anchorops/losses/cross_entropy.py",
        "min_loss = -math.inf  # pixels of smaller losses may be used",
        "pass",
        LOSSES,
    ),
    Mutant(
        "groups of a shared pass",
        "anchorops/losses/statistics.py",
        "made.groups // request.groups, request.groups)",
        "request.groups, made.groups // request.groups)",
        METHODS,
    ),
    Mutant(
        "state that a recomputation updates",
        "anchorops/losses/recomputation.py",
        "if not self.training or recomputing():\n            return False",
        "if not self.training:\n            return False",
        METHODS,
    ),
)

MUTANTS = (
    *CLASS_MOMENTS,
    *SOFTMAX_MOMENTS,
    *DIVERGENCES,
    *UPSAMPLED_SUMS,
    *INFO_NCE,
    *KEYS_AND_RANKS,
    *PREDICTIONS,
    *VOLUMES_AND_SIGMOIDS,
    *PLUMBING,
)
VERIFIED = {
    "triton": (
        "slope of squared probabilities",
        "slope of the focal factor",
        "gradients before the first logit",
        "squared distances in tiles of several keys",
        "temperature of the divergence",
        "slope of the variance",
        "absent keys",
        "sums that underflow",
        "float32 rounded to bfloat16",
        "transposed confusion matrix",
    ),
    "cpu": (
        "slope of squared probabilities in C++",
        "last column of a tile",
        "both gradients of a tile of one key",
        "temperature of the divergence in C++",
        "slope of the focal factor in C++",
        "number of hard examples",
        "rank of the k-th largest",
        "slices that are not mixed",
        "gradient of pixel weights",
        "gradient of anchors",
    ),
}


def _environment(interpreted: bool) -> dict[str, str]:
    environment = {"PYTHONPATH": str(COPY), "OMP_NUM_THREADS": "1"}
    return os.environ | environment | ({"TRITON_INTERPRET": "1"} if interpreted else {})


def _output(command: list[str], **environment: str) -> str:
    run = subprocess.run(
        command, cwd=COPY, env=os.environ | environment, capture_output=True, text=True
    )
    if run.returncode != 0:
        sys.exit(f"{shlex.join(command)}\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    return run.stdout


def _copy() -> None:
    """The repository as it is now. Objects that were compiled for an earlier copy are kept."""
    for name in ("anchorops", "kernels", "csrc", "tests", "bench", "docs"):
        shutil.rmtree(COPY / name, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, COPY / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, COPY)


class Library:
    """The C++ library of the copy."""

    def __init__(self) -> None:
        _output([sys.executable, "setup.py", "build_ext", "--inplace"], ANCHOROPS_CUDA="0")
        self.path = COPY / "anchorops/_cpu.so"
        self.right = self.path.read_bytes()
        self.ninja = ["ninja", "-C", str(next((COPY / "build").glob("temp.*")))]
        best = torch.backends.cpu.get_cpu_capability().lower().replace("default", "baseline")
        self.not_compiled = tuple(f"_{x}.o" for x in {"baseline", "avx2", "avx512"} - {best})

    def compile(self, file: Path) -> None:
        """Compiles what depends on this file, and links it with the right objects of the rest."""
        objects = []
        for block in _output([*self.ninja, "-t", "deps"]).strip().split("\n\n"):
            path, *sources = (line.split(":")[0].strip() for line in block.splitlines())
            if str(file) not in sources or path.endswith(self.not_compiled):
                objects.append(path)
                continue
            objects.append(str(COPY / Path(path).name))
            command = _output([*self.ninja, "-t", "commands", path]).splitlines()[-1]
            _output([objects[-1] if word == path else word for word in shlex.split(command)])
        self.path.unlink()  # a process may have loaded it
        folder = Path(torch.__file__).parent / "lib"
        link = [os.environ.get("CXX", "c++"), "-shared", *objects, f"-L{folder}", "-ltorch_cpu"]
        _output([*link, "-o", str(self.path)])

    def restore(self) -> None:
        self.path.unlink()
        self.path.write_bytes(self.right)


@contextlib.contextmanager
def planted(mutant: Mutant, library: Library) -> Iterator[None]:
    path, compiled = COPY / mutant.file, mutant.file.startswith("csrc")
    source, times = path.read_text(), path.stat()
    path.write_text(source.replace(mutant.right, mutant.wrong))
    try:
        if compiled:
            library.compile(path)
        yield
    finally:
        path.write_text(source)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # objects remain up to date
        if compiled:
            library.restore()


def first_failure(arguments: list[str], interpreted: bool, slow: bool) -> str | None:
    """The first test that fails."""
    failures = COPY / ".pytest_cache/v/cache/lastfailed"
    failures.unlink(missing_ok=True)
    marked = "not stress" if slow else "not slow and not stress"
    command = [sys.executable, "-m", "pytest", "-xq", "-m", marked, *arguments]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=COPY,
            env=_environment(interpreted),
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            status = process.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
            return "no end"
        if status < 0:
            return signal.Signals(-status).name
        if status in (1, 2):  # 2: not even imported
            return next(iter(json.loads(failures.read_text())))
        if status > 2:
            output.seek(0)
            sys.exit(f"{shlex.join(command)}\n{output.read()[-4000:]}")
    return None


def caught_by(mutant: Mutant, library: Library, passing: set[str]) -> str | None:
    """The test that fails with the mutant. passing: the tests that are known to pass without."""
    names, chosen, interpreted, slow = mutant.tests
    files = [Path("tests", name) for name in names.split()]
    arguments = [str(file.with_name(f"test_{file.name}.py")) for file in files]
    if chosen:
        arguments += ["-k", chosen]
    with planted(mutant, library):
        test = first_failure(arguments, interpreted, slow)
    if test and test.startswith("tests/") and test not in passing:
        if first_failure([test], interpreted, slow):
            return f"NOTHING: {test} fails without it too"
        passing.add(test)
    return test


def run_tests(mutants: list[Mutant], library: Library, file: Path | None) -> int:
    rows, passing, most = [], set(), max(len(mutant.name) for mutant in mutants)
    for mutant in mutants:
        start = time.monotonic()
        test = caught_by(mutant, library, passing)
        seconds = time.monotonic() - start
        caught = test is not None and not test.startswith("NOTHING")
        print(f"{mutant.name:<{most}} {seconds:5.0f} s  {test or 'SURVIVED'}", flush=True)
        row = {"name": mutant.name, "file": mutant.file, "caught": caught, "by": test}
        rows.append(row | {"seconds": round(seconds)})
        if file is not None:
            file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    survivors = sum(not row["caught"] for row in rows)
    print(f"{len(rows) - survivors} of {len(rows)} mutants caught")
    return int(survivors > 0)


def first_wrong(backend: str) -> str | None:
    """The first line of `--verify` that says WRONG."""
    command = [sys.executable, "-m", "anchorops.doctor", "--verify", "--backend", backend]
    environment = _environment(interpreted=backend == "triton")
    with subprocess.Popen(
        command, cwd=COPY, env=environment, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("WRONG\n"):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                return " ".join(line.split())
    if process.returncode != 0:
        sys.exit(f"--verify ends with {process.returncode}, and nothing is wrong")
    return None


def run_verify(mutants: list[Mutant], library: Library) -> int:
    unnoticed = 0
    for backend, names in VERIFIED.items():
        chosen = [mutant for mutant in mutants if mutant.name in names]
        if chosen and (wrong := first_wrong(backend)):
            sys.exit(f"without a fault: {wrong}")
        for mutant in chosen:
            start = time.monotonic()
            with planted(mutant, library):
                wrong = first_wrong(backend)
            unnoticed += wrong is None
            seconds = time.monotonic() - start
            found = "NOT NOTICED" if wrong is None else "noticed"
            print(f"{found:<12}{seconds:5.0f} s  {backend:<8}{mutant.name}: {wrong}", flush=True)
    print(f"{unnoticed} are not noticed")
    return int(unnoticed > MOST_UNNOTICED)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    names = {mutant.name for mutant in MUTANTS}
    assert len(names) == len(MUTANTS) and all(names.issuperset(some) for some in VERIFIED.values())
    if unknown := {*arguments.names} - names:
        parser.error(f"no mutants: {', '.join(sorted(unknown))}")
    for mutant in MUTANTS:
        number = (ROOT / mutant.file).read_text().count(mutant.right)
        assert number == 1, f"{mutant.name}: {mutant.right!r} occurs {number} times"
    _copy()
    library = Library()
    mutants = [x for x in MUTANTS if not arguments.names or x.name in arguments.names]
    if arguments.verify:
        return run_verify(mutants, library)
    return run_tests(mutants, library, arguments.json and arguments.json.resolve())


if __name__ == "__main__":
    sys.exit(main())
