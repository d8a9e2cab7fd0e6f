"""Fixed class anchors and classifiers: random, orthogonal, simplex, category basis.

All are computed in float64 and returned in torch's default dtype, shape [K, D].
"""

import torch
from torch import Tensor

from ._checks import (
    check_count,
    check_flags,
    check_num_classes,
    check_number,
    check_strided,
    describe,
    fail,
)
from ._torch_state import has_values

__all__ = ["category_basis", "orthogonal_anchors", "random_anchors", "simplex_etf"]


def _normal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def _orthonormal_columns(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """[rows, columns], uniformly distributed (q is corrected by the signs of R's diagonal)."""
    q, r = torch.linalg.qr(_normal(rows, columns, generator))
    return q * r.diagonal().sign()


def _check(
    function: str, num_classes: object, dim: object, *, orthogonal: bool = False
) -> tuple[int, int]:
    classes = check_num_classes(function, num_classes)
    channels = check_count(function, "dim", dim)
    if orthogonal and channels < classes:
        expected = f"at least num_classes = {classes}, the number of orthogonal rows"
        fail(function, "dim", expected, channels)
    return classes, channels


def random_anchors(
    num_classes: int, dim: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Rows drawn from N(0, I) (SAR, arXiv 2312.11872, "ND"): [K, D]."""
    num_classes, dim = _check("random_anchors", num_classes, dim)
    return _normal(num_classes, dim, generator).to(torch.get_default_dtype())


def orthogonal_anchors(
    num_classes: int, dim: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Orthonormal rows of a random rotation (SAR, "OM"): [K, D].

    Raises ValueError if dim < num_classes, because K orthogonal directions need D ≥ K.
    """
    num_classes, dim = _check("orthogonal_anchors", num_classes, dim, orthogonal=True)
    return _orthonormal_columns(dim, num_classes, generator).T.to(torch.get_default_dtype())


def simplex_etf(num_classes: int, dim: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Simplex equiangular tight frame, randomly rotated: [K, D], unit rows, cosines −1/(K−1).

    W = sqrt(K/(K−1)) · U (I − 11ᵀ/K) (CeCo, CVPR 2023, supplement Eq. 11; SAR, "MES"), here as
    sqrt(K/(K−1)) · B Qᵀ with B Bᵀ = I − 11ᵀ/K and Q orthonormal, which only needs D ≥ K−1.

    Raises ValueError if dim < num_classes − 1 (no such frame exists) or num_classes < 2.
    """
    num_classes, dim = _check("simplex_etf", num_classes, dim)
    if num_classes < 2:
        fail("simplex_etf", "num_classes", "at least 2", num_classes)
    if dim < num_classes - 1:
        expected = f"at least num_classes - 1 = {num_classes - 1}, the rank of a simplex"
        fail("simplex_etf", "dim", expected, dim)
    centering = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    basis = torch.linalg.eigh(centering).eigenvectors[:, 1:]  # the eigenvalue 0 comes first
    rotation = _orthonormal_columns(dim, num_classes - 1, generator)
    frame = (num_classes / (num_classes - 1)) ** 0.5 * basis @ rotation.T
    return frame.to(torch.get_default_dtype())


def category_basis(
    num_classes: int,
    dim: int,
    length: float | None = 2.0,
    *,
    init: Tensor | None = None,
    orthogonalize: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Category-basis prototypes: orthogonal rows of equal length, for a frozen classifier.

    CBP, Algorithm 1 (doi 10.1016/j.patcog.2024.110431): Kaiming initialisation (here normal,
    fan_in, because the paper does not state the variant), then Gram-Schmidt on the rows (lines 3 to
    11), then every row is scaled to `length`. That is line 12, β·T/√(βᵀβ), applied to one row β at
    a time. As a product of matrices it would mix the rows; its comment says "equalize the ℓ2 norm".

    Args:
        num_classes, dim: K and D, with D ≥ K if orthogonalised.
        length: T, the rows' length; None keeps the lengths as they are ("orthogonalised only").
        init: initial matrix [K, D] instead of a random one (text embeddings, backbone features).
        orthogonalize: False for "equalised only".

    Returns:
        [K, D].

    Raises:
        ValueError: D < K, a wrong length or init, or rows of init that are linearly dependent.
    """
    function = "category_basis"
    check_flags(function, orthogonalize=orthogonalize)
    num_classes, dim = _check(function, num_classes, dim, orthogonal=orthogonalize)
    if length is not None:
        length = check_number(function, "length", length, above=True)
    check_strided(function, "init", init)
    if init is None:
        weight = _normal(num_classes, dim, generator) * (2 / dim) ** 0.5
    elif not isinstance(init, Tensor) or init.shape != (num_classes, dim):
        fail(function, "init", f"a tensor [{num_classes}, {dim}]", describe(init))
    else:
        weight = init.detach().to("cpu", torch.float64)
    if orthogonalize:
        q, r = torch.linalg.qr(weight.T)
        weight = (q * r.diagonal()).T  # Gram-Schmidt: residuals of the rows, not yet normalised
        independent = r.diagonal().abs() > 1e-6 * r.norm(dim=0)  # of the rows' own lengths
        if has_values(independent) and not independent.all():
            fail(function, "init", "linearly independent rows", "dependent ones")
    if length is not None:
        weight = length * torch.nn.functional.normalize(weight, dim=1, eps=1e-300)
    return weight.to(torch.get_default_dtype())
