"""The definition of every operator, in plain PyTorch for any device.

The functions here have the signatures of the public functions. Their arguments are already checked,
and ignore_index is always given. They are also the `reference` backend; as they are plain PyTorch,
higher-order derivatives work.

Shapes: features (B, D, H, W), (B, D, N) or (N, D); labels (B, H', W'), (B, N) or (N,); K classes;
P = H·W pixels of an image; logits (B, K, h, w). Accumulation is in float64, so the order of a sum
does not affect the float32 result.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SPLAT_UNITS = 2**30  # of a weight of one pixel


class ClassMoments(NamedTuple):
    """Count, sum and squared distance to an anchor, over the features of each class.

    Shapes are [K], [K, D], [K]; with groups [K, G, …]; with per_image [B, K, …]; with both
    [B, K, G, …]. `sqdists` is None if no anchors were given.
    """

    counts: Tensor
    sums: Tensor
    sqdists: Tensor | None


class SoftmaxMoments(NamedTuple):
    """Statistics of each class, from p = the softmax of the logits upsampled to the labels' size.

    `counts`, `hits`, `losses`, `overlaps`, `masses` and `squares` are [K], with per_image [B, K].
    `pixel_losses` and `lse` (log-sum-exp) have the labels' shape. What was not requested is None.
    """

    counts: Tensor
    hits: Tensor | None
    losses: Tensor
    overlaps: Tensor | None
    masses: Tensor | None
    squares: Tensor | None
    pixel_losses: Tensor | None
    lse: Tensor | None


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def nearest_index(size: int, source: int, device: torch.device) -> Tensor:
    """Row (or column) of the labels for each row of the features, as F.interpolate's "nearest":
    floor(i · source/size), with the scale and the product in float32."""
    # filled on the device, because copying a number to it would synchronise
    scale = torch.full((), source / max(size, 1), dtype=torch.float32, device=device)
    index = (torch.arange(size, device=device, dtype=torch.float32) * scale).floor().long()
    return index.clamp(max=source - 1)


def resize_labels(labels: Tensor, features: Tensor) -> Tensor:
    """Labels on the features' grid: int64 [B, P], with B = 1 for points (N,)."""
    if features.dim() == 2:
        return labels.long()[None]
    if features.dim() == 4:
        rows, columns = (
            nearest_index(features.shape[i], labels.shape[i - 1], labels.device) for i in (2, 3)
        )
        labels = labels[:, rows[:, None], columns]
    return labels.long().flatten(1)


def _mix32(x: Tensor) -> Tensor:
    """A bijective 32-bit hash on int64 tensors (from Wellons' "hash prospector"). Both multipliers
    are below 2^31, so no product overflows int64."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def split_groups(keys: Tensor, counts: Tensor, groups: int, seed: int | Tensor) -> Tensor:
    """Split each key's pixels at random into `groups` keys of equal size (±1).

    keys: [B, P] int, −1 where ignored; counts: int64, flattened [num_keys]. The pixels of a key are
    ranked by the 32-bit hash of (seed, pixel index), ties by index. The group of a pixel is
    rank mod groups; its new key is key·groups + group.
    """
    flat = keys.flatten().long()
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=keys.device)
    seed = seed.reshape(())
    low, high = _mix32(seed & 0xFFFFFFFF), _mix32((seed >> 32) & 0xFFFFFFFF)
    pixel = torch.arange(flat.numel(), device=keys.device) & 0xFFFFFFFF
    hashes = _mix32(_mix32(pixel ^ low) ^ high)
    valid = flat >= 0
    segment = torch.where(valid, flat, counts.numel())
    packed, order = torch.sort((segment << 32) | hashes, stable=True)
    segment = packed >> 32
    start = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])[segment]
    rank = torch.arange(flat.numel(), device=keys.device) - start
    group = torch.empty_like(flat).scatter(0, order, rank % groups)
    return torch.where(valid, flat * groups + group, -1).to(keys.dtype).view_as(keys)


def group_counts(counts: Tensor, groups: int) -> Tensor:
    """Sizes of the groups of `split_groups`: [...] -> [..., groups]."""
    offset = torch.arange(groups, device=counts.device)
    return (counts[..., None] - offset + groups - 1) // groups


def class_keys(
    features: Tensor, labels: Tensor, num_classes: int, per_image: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The key of each pixel, int64 [B, P]: its class, or image·K + class, or −1 if ignored. And the
    number of pixels with each key: int64 [K] or [B, K]."""
    labels = resize_labels(labels, features)
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    images, keys = (labels.shape[0] if per_image else 1), labels
    if per_image:
        keys = labels + num_classes * torch.arange(images, device=labels.device)[:, None]
    keys = torch.where(valid, keys, -1)
    counts = sum_by_key(keys.flatten(), valid.flatten().long(), images * num_classes)
    return keys, counts.view(images, num_classes) if per_image else counts


def sum_by_key(keys: Tensor, values: Tensor, num_keys: int) -> Tensor:
    """Σ of values [N, …] for each key [N]; values with key −1 are ignored."""
    keys = torch.where(keys >= 0, keys, num_keys)
    out = values.new_zeros(num_keys + 1, *values.shape[1:])
    if values.is_cuda:  # index_put sorts, and so sums in a fixed order; index_add uses atomics
        out = out.index_put((keys,), values, accumulate=True)
    else:
        out = out.index_add(0, keys, values)
    return out[:-1]


def feature_rows(features: Tensor) -> Tensor:
    """One row per pixel: [N, D] or [B·P, D], in the order of the labels."""
    return features if features.dim() == 2 else features.flatten(2).transpose(1, 2).flatten(0, 1)


def class_moments(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    anchors: Tensor | None = None,
    groups: int = 1,
    per_image: bool = False,
    seed: int | Tensor | None = None,
    ignore_index: int,
) -> ClassMoments:
    """n_k = #{p : key_p = k},  s_k = Σ f_p,  q_k = Σ ‖f_p − a_k‖²."""
    dtype = statistics_dtype(features.dtype)
    wide = torch.float32 if features.device.type == "mps" else torch.float64  # MPS has no float64
    keys, counts = class_keys(features, labels, num_classes, per_image, ignore_index)
    if groups > 1:
        assert seed is not None
        keys = split_groups(keys, counts, groups, seed)
        counts = group_counts(counts, groups)
    keys, num_keys = keys.flatten(), counts.numel()
    # Ignored pixels are removed by selection, because NaN · 0 would be NaN.
    rows = torch.where(keys[:, None] >= 0, feature_rows(features), 0).to(wide)
    sums = sum_by_key(keys, rows, num_keys).to(dtype).view(*counts.shape, features.shape[1])
    if anchors is None:
        return ClassMoments(counts, sums, None)
    nearest = anchors.to(dtype).to(wide)[keys.clamp(min=0) // groups % num_classes]
    residuals = torch.where(keys[:, None] >= 0, rows - nearest, 0)
    sqdists = sum_by_key(keys, residuals.square().sum(1), num_keys).to(dtype)
    return ClassMoments(counts, sums, sqdists.view(counts.shape))


def bilinear_sources(
    size: int, source: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row (or column) of the upsampled logits: the two rows of the logits around it, and
    the weight of the second, as in F.interpolate's "bilinear". int64, int64 and `dtype`, [size]."""
    if size == source:  # float32 coordinates would be rounded beyond 2^23
        same = torch.arange(size, device=device)
        return same, same, torch.zeros(size, device=device, dtype=dtype)
    at = torch.arange(size, device=device, dtype=dtype)
    # filled on the device, because copying a number to it would synchronise
    ratio = (source - 1) / max(size - 1, 1) if align_corners else source / max(size, 1)
    ratio = torch.full((), ratio, dtype=dtype, device=device)
    at = at * ratio if align_corners else ((at + 0.5) * ratio - 0.5).clamp(min=0)
    lower = at.floor().clamp(max=source - 1)
    weight = (at - lower).clamp(max=1)
    lower = lower.long()
    return lower, (lower + 1).clamp(max=source - 1), weight


def upsample(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """F.interpolate(logits, size, mode="bilinear"), but terms of weight 0 are removed by selection,
    because 0 · NaN and 0 · ∞ would be NaN. logits: (B, K, h, w); returns (B, K, *size)."""
    # as F.interpolate: coordinates are float32, for float64 logits float64
    dtype = statistics_dtype(logits.dtype)
    x = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    for axis, length in zip((2, 3), size, strict=True):
        lower, upper, weight = bilinear_sources(
            length, logits.shape[axis], align_corners, dtype, logits.device
        )
        index = (slice(None),) * axis  # the gradient of indexing sums in a fixed order
        low, high, weight = x[(*index, lower)], x[(*index, upper)], weight.to(x.dtype)
        weight = weight[:, None] if axis == 2 else weight
        x = torch.where(weight == 0, low, (1 - weight) * low + weight * high)
    return x


class Splat(NamedTuple):
    """The four features around each of N labels, for upsampling with align_corners=True.

    first: [N], the index of the upper left feature of each label in the row of key 0 of a flat
        table [1 + num_keys, H·W], whose first row is that of key −1.
    corners: for each of the four features the offset from the upper left one, and the weights [N]
        in units of 1/SPLAT_UNITS.
    size: (H, W) of the features.
    """

    first: Tensor
    corners: list[tuple[int, Tensor]]
    size: tuple[int, int]


def splat_axis(size: int, source: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of `size` label rows (or columns): the upper one of the two feature rows around it,
    int64, and the weight of the lower one, float32. If there is no lower row, the weight is 0."""
    step = (source - 1) / (size - 1) if size > 1 else 0.0
    scale = torch.full((), step, dtype=torch.float32, device=device)  # a copy would synchronise
    position = torch.arange(size, device=device, dtype=torch.float32) * scale
    upper = position.long().clamp(max=source - 1)
    return upper, torch.where(upper < source - 1, position - upper, 0)


def splat_of(
    rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], size: tuple[int, int]
) -> Splat:
    (row, below), (column, right) = rows, columns
    corners = []
    for down, row_weight in enumerate((1 - below, below)):
        for across, column_weight in enumerate((1 - right, right)):
            weight = (row_weight[:, None] * column_weight * SPLAT_UNITS).round().long()
            corners.append((down * size[1] + across, weight.flatten()))
    first = (row[:, None] + size[0]) * size[1] + column
    return Splat(first.flatten(), corners, size)


def splat_keys(keys: Tensor, num_keys: int, splat: Splat) -> Tensor:
    """W = upᵀ onehot(keys), int64 [num_keys, H·W] in units of 1/SPLAT_UNITS. W has integers, so
    that the order of its sums does not matter. keys: [B, N]; −1 is ignored."""
    cells, width = splat.size[0] * splat.size[1], splat.size[1]
    first = torch.add(splat.first, keys, alpha=cells).flatten()
    # for weights of 0 the index may be beyond the last feature
    table = keys.new_zeros((num_keys + 1) * cells + width + 1, dtype=torch.int64)
    for offset, weight in splat.corners:
        table[offset:].index_add_(0, first, weight.expand_as(keys).flatten())
    return table[cells : (num_keys + 1) * cells].view(num_keys, cells)


def upsampled_sums(
    features: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int
) -> ClassMoments:
    """For each image: n_k and s_k = Σ_{p∈k} up(f)(p) = Σ_q W[k, q]·f_q, where `up` upsamples to the
    labels' size."""
    size = (features.shape[2], features.shape[3])
    rows, columns = (splat_axis(labels.shape[i + 1], size[i], labels.device) for i in (0, 1))
    keys, counts = class_keys(labels[:, None], labels, num_classes, True, ignore_index)
    table = splat_keys(keys, counts.numel(), splat_of(rows, columns, size))
    weights = (table.float() / SPLAT_UNITS).to(features.dtype).view(*counts.shape, -1)
    sums = (features.flatten(2) @ weights.transpose(1, 2)).transpose(1, 2)
    return ClassMoments(counts, sums, None)


def softmax_moments(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    align_corners: bool = False,
    per_image: bool = False,
    hits: bool = True,
    masses: bool = True,
    squares: bool = False,
    pixel_losses: bool = False,
    lse: bool = False,
) -> SoftmaxMoments:
    """Let z be the upsampled logits, p = softmax z, V the valid pixels q:

    counts[k] = #{q ∈ V : y = k}                 hits[k] = #{q ∈ V : y = k = argmax z}
    losses[k] = Σ_{q ∈ V, y = k} −log p_k(q)     overlaps[k] = Σ_{q ∈ V, y = k} p_k(q)
    masses[k] = Σ_{q ∈ V} p_k(q)                 squares[k] = Σ_{q ∈ V} p_k(q)²
    pixel_losses[q] = −log p_y(q)                lse[q] = log Σ_k e^{z_k(q)};  0 where ignored

    logits: (B, K, h, w); labels: (B, H, W).
    """
    dtype = statistics_dtype(logits.dtype)
    (batch, num_classes), size = logits.shape[:2], (labels.shape[1], labels.shape[2])
    labels = labels.long()
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    own = torch.where(valid, labels, 0)
    # Ignored pixels are removed by selection, because NaN · 0 would be NaN.
    z = torch.where(valid[:, None], upsample(logits, size, align_corners), 0)
    all_lse = z.logsumexp(1)
    losses = torch.where(valid, all_lse - z.gather(1, own[:, None])[:, 0], 0)
    image = torch.arange(batch, device=labels.device)[:, None, None]
    keys = torch.where(valid, image * num_classes + own, -1).flatten()

    def by_class(values: Tensor) -> Tensor:
        sums = sum_by_key(keys, values.flatten(), batch * num_classes).view(batch, num_classes)
        return over_images(sums)

    def over_images(sums: Tensor) -> Tensor:
        sums = sums if per_image else sums.sum(0)
        return sums.to(dtype) if sums.is_floating_point() else sums

    p = torch.where(valid[:, None], (z - all_lse[:, None]).exp(), 0) if masses or squares else None
    return SoftmaxMoments(
        counts=by_class(valid.long()),
        hits=by_class((valid & (z.argmax(1) == own)).long()) if hits else None,
        losses=by_class(losses),
        overlaps=by_class(p.gather(1, own[:, None])) if masses and p is not None else None,
        masses=over_images(p.sum((2, 3))) if masses and p is not None else None,
        squares=over_images(p.square().sum((2, 3))) if squares and p is not None else None,
        pixel_losses=losses.to(dtype) if pixel_losses else None,
        lse=torch.where(valid, all_lse, 0).to(dtype) if lse else None,
    )


def pixel_argmax(logits: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """argmax of the upsampled logits, int64 (B, *size). It is the first of equal logits; NaN is
    larger than all numbers."""
    return upsample(logits, size, align_corners).argmax(1)


def confusion(
    predictions: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = 255
) -> Tensor:
    """int64 [K, K]: the number of pixels of true class i predicted as class j. Pixels are ignored
    if their label is ignored, or if their prediction is not a class."""
    truth, predictions = labels.flatten().long(), predictions.flatten().long()
    valid = (truth >= 0) & (truth < num_classes) & (truth != ignore_index)
    valid &= (predictions >= 0) & (predictions < num_classes)
    keys = torch.where(valid, truth * num_classes + predictions, -1)
    return sum_by_key(keys, valid.long(), num_classes**2).view(num_classes, num_classes)


def class_centroids(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    per_image: bool = False,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """c_k = s_k / n_k (zero for an absent class), and n_k."""
    counts, sums, _ = class_moments(
        features, labels, num_classes, per_image=per_image, ignore_index=ignore_index
    )
    return sums / counts.clamp(min=1)[..., None], counts


def pixel_to_anchor_mse(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    ignore_index: int,
    reduction: str = "mean",
) -> Tensor:
    """Σ_valid ‖f_p − a_{y_p}‖², divided by D·N_valid for "mean"; 0 if no pixel is valid."""
    counts, _, sqdists = class_moments(
        features, labels, anchors.shape[0], anchors=anchors, ignore_index=ignore_index
    )
    assert sqdists is not None
    if reduction == "sum":
        return sqdists.sum()
    return sqdists.sum() / (features.shape[1] * counts.sum()).clamp(min=1)


def centroid_info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    positives: Tensor | None = None,
    present: Tensor | None = None,
    present_keys: Tensor | None = None,
    temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """−log [ e^{q_i·p_i/τ} / ( e^{q_i·p_i/τ} + Σ_{j≠i} e^{q_i·k_j/τ} ) ] for each present query i,
    with p_i = k_i unless positives are given.

    queries, positives: [K, D] or [K, G, D]; keys: [K, D]; present: bool [K] or [K, G];
    present_keys: bool [K], by default the classes with a present query.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    if present is None:
        present = torch.ones(queries.shape[:-1], dtype=torch.bool, device=queries.device)
    if present_keys is None:
        present_keys = present if present.dim() == 1 else present.any(1)
    own = torch.eye(keys.shape[0], dtype=torch.bool, device=keys.device)
    if queries.dim() == 3:
        own = own[:, None]
    with torch.autocast(queries.device.type, enabled=False):
        # Absent classes are removed by selection, because their centroids may be NaN.
        queries = torch.where(present[..., None], queries.to(dtype), 0)
        used = present_keys
        if positives is None:
            used = used | (present if present.dim() == 1 else present.any(1))
        keys = torch.where(used[:, None], keys.to(dtype), 0)
        logits = queries @ keys.T / temperature
        if positives is not None:
            positives = torch.where(present[..., None], positives.to(dtype), 0)
            logits = torch.where(
                own, ((queries * positives).sum(-1) / temperature)[..., None], logits
            )
        positive = torch.where(own, logits, 0).sum(-1)
        lse = torch.where(present_keys | own, logits, -torch.inf).logsumexp(-1)
        losses = torch.where(present, lse - positive, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / present.sum().clamp(min=1)
