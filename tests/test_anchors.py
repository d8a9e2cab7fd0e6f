"""Fixed anchors: their geometry and their errors."""

import pytest
import torch

import anchorops as ao


def test_random_anchors_are_standard_normal() -> None:
    anchors = ao.anchors.random_anchors(200, 100, generator=torch.Generator().manual_seed(0))
    assert anchors.dtype == torch.float32
    assert abs(anchors.mean()) < 0.02 and abs(anchors.std() - 1) < 0.02


@pytest.mark.parametrize(("num_classes", "dim"), [(1, 1), (4, 4), (5, 9)])
def test_orthogonal_anchors(num_classes: int, dim: int) -> None:
    anchors = ao.anchors.orthogonal_anchors(num_classes, dim)
    torch.testing.assert_close(anchors @ anchors.T, torch.eye(num_classes))


@pytest.mark.parametrize(
    ("num_classes", "dim"), [(2, 1), (2, 2), (7, 6), (7, 7), (7, 20), (150, 512)]
)
def test_simplex(num_classes: int, dim: int) -> None:
    frame = ao.anchors.simplex_etf(num_classes, dim).double()
    expected = torch.full((num_classes, num_classes), -1 / (num_classes - 1), dtype=torch.float64)
    torch.testing.assert_close(frame @ frame.T, expected.fill_diagonal_(1), rtol=0, atol=1e-6)


def test_category_basis_is_gram_schmidt() -> None:
    """Algorithm 1, row by row, from given vectors, without the last equalisation."""
    vectors = torch.randn(4, 7, dtype=torch.float64)
    rows: list[torch.Tensor] = []
    for vector in vectors:
        rows.append(vector - sum((vector @ b) / (b @ b) * b for b in rows))
    basis = ao.anchors.category_basis(4, 7, length=None, init=vectors)
    torch.testing.assert_close(basis, torch.stack(rows).float())
    equal = ao.anchors.category_basis(4, 7, length=2.0, init=vectors)
    torch.testing.assert_close(equal, torch.stack([2 * r / r.norm() for r in rows]).float())


def test_category_basis_of_rows_of_very_different_lengths() -> None:
    lengths = torch.tensor([1.0, 2e6, 1e-20])
    basis = ao.anchors.category_basis(3, 3, 1.0, init=torch.diag(lengths))
    torch.testing.assert_close(basis.abs(), torch.eye(3))


def test_category_basis_equalised_only() -> None:
    vectors = torch.randn(9, 7)
    basis = ao.anchors.category_basis(9, 7, length=2.0, init=vectors, orthogonalize=False)
    torch.testing.assert_close(basis, 2 * vectors / vectors.norm(dim=1, keepdim=True))


def test_generators_repeat() -> None:
    for make in (
        ao.anchors.random_anchors,
        ao.anchors.orthogonal_anchors,
        ao.anchors.simplex_etf,
        ao.anchors.category_basis,
    ):
        first, second = (make(4, 6, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, make(4, 6, generator=torch.Generator().manual_seed(2)))
