"""Coordinates of factors in which what is minimised is about as steep in all directions, and a descent is short.

The squared error has the curvature `(A ⊗ M²)` in a factor (rows, n_k), where `M` is the root of the metric's part of
it and `A` the Gram matrix of what the other factors' products come to for each of its rows. Both are near enough to
constant when factors begin near an optimum. With their roots taken into the coordinates, L-BFGS has the error after 100
steps that it has after 200 to 300 without (layers of ResNet-20 at half its MACs).

In a training, where the curvature is the loss's, the root of `A` alone makes a step of a factor's coordinates one of
the kernel that is as long: preconditioned gradients of low-rank matrices (Tong, Ma and Chi, 2021) for sums of Kronecker
products.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kronsearch.sekron.chain import as_cores
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.sekron.tensors import all_but, leaves

__all__ = ["THIN", "Coordinates", "Rows", "block_shape", "row_coordinates"]

# Columns: by a symmetric matrix one of fewer is multiplied from the right, transposed. Products with matrices of few
# columns take several times as long (MKL, AVX2: 9 columns, 206 rows, 1 ms there, 0.3 ms here).
THIN = 16

_BLOCK = 256  # rows of a factor that are mapped together in training
_RIDGE = 1e-2  # of A's largest eigenvalue; from 1e-8 to 1e-3 the error falls more slowly, with 0.1 about as fast


class Coordinates:
    """The linear map between factor matrices and their coordinates, which is its own transpose.

    Args:
        matrices: factor matrices (rows, n_k) that a descent begins with.
        spec: of the factors.
        metric: of the layer.
        energy: what squared errors in the metric are divided by.
        restraint: what the sum of the terms' squared norms is multiplied by.
    """

    def __init__(
        self, matrices: Sequence[Tensor], spec: SeKronSpec, metric: Metric, *, energy: float, restraint: float
    ) -> None:
        shapes = spec.factor_shapes
        weighed = [metric.root(shapes, k, matrix).on(matrix) for k, matrix in enumerate(matrices)]
        self._columns = [metric.root(shapes, k, matrix, inverse=True) for k, matrix in enumerate(matrices)]
        self._rows: list[Tensor] | None = None
        self.start = weighed  # the coordinates of the matrices
        if spec.coupling == "tree":
            curvatures = _curvatures(weighed, matrices, spec, energy, restraint)
            halves = [_halves(curvature) for curvature in curvatures]
            self._rows = [inverse for _, inverse in halves]
            self.start = [half @ matrix for (half, _), matrix in zip(halves, weighed, strict=True)]

    def matrices(self, coordinates: Sequence[Tensor]) -> list[Tensor]:
        """Return the factor matrices at some coordinates; of a gradient by the matrices, that by the coordinates."""
        mixed = coordinates if self._rows is None else [a @ b for a, b in zip(self._rows, coordinates, strict=True)]
        return [inverse.on(matrix) for inverse, matrix in zip(self._columns, mixed, strict=True)]


class Rows(NamedTuple):
    """A symmetric matrix, of equal blocks on its diagonal, that a factor matrix (rows, n_k) is multiplied by.

    Args:
        left: (blocks, b, b), of which what goes beyond the rows is zero; of a chain's core what belongs to its first
            rank R_{k-1}.
        right: None, or of a chain's core what belongs to its second rank R_k.
    """

    left: Tensor
    right: Tensor | None = None

    def on(self, matrix: Tensor, extents: Sequence[int]) -> Tensor:
        """Return the product; the extents are the number of rows, or of a chain's core its two ranks."""
        if self.right is None:
            return _product(self.left, matrix)
        core = _product(self.left, matrix.reshape(extents[0], -1)).reshape(*extents, -1)
        turned = _product(self.right, core.transpose(0, 1).flatten(1))
        return turned.reshape(extents[1], extents[0], -1).transpose(0, 1).reshape(matrix.shape)

    @property
    def size(self) -> float:
        """The root of the sum of its squared entries."""
        right = 1.0 if self.right is None else float(torch.linalg.vector_norm(self.right))
        return float(torch.linalg.vector_norm(self.left)) * right

    def to(self, dtype: torch.dtype) -> "Rows":
        """Return it in a dtype."""
        return Rows(self.left.to(dtype), None if self.right is None else self.right.to(dtype))


def _product(blocks: Tensor, matrix: Tensor) -> Tensor:
    """Multiply a matrix by one with these symmetric blocks on its diagonal."""
    count, extent, _ = blocks.shape
    padded = pad(matrix, (0, 0, 0, count * extent - len(matrix))).reshape(count, extent, -1)
    if padded.shape[2] < THIN:
        product = torch.bmm(padded.transpose(1, 2), blocks).transpose(1, 2)
    else:
        product = torch.bmm(blocks, padded)
    return product.reshape(count * extent, -1)[: len(matrix)]


def row_coordinates(matrices: Sequence[Tensor], spec: SeKronSpec) -> list[Rows]:
    """Return the maps from coordinates to factor matrices in which a kernel moves as far as each factor's coordinates.

    They are the inverse roots of the Gram matrices of what each factor's rows are multiplied with, and symmetric, so
    that they take gradients by the matrices to those by the coordinates, too. Directions in which terms cancel each
    other are held back by the ridge. Of more than 256 rows blocks have maps of their own, so that to map a factor takes
    no more multiplications an entry.

    Args:
        matrices: factor matrices (rows, n_k).
        spec: of the factors.
    """
    if spec.coupling == "chain":
        cores = as_cores(matrices, spec.ranks)
        lefts, rights = [cores[0].new_ones(1, 1)], [cores[0].new_ones(1, 1)]
        for core in cores[:-1]:
            lefts.append(torch.einsum("ab,axn,byn->xy", lefts[-1], core, core))
        for core in cores[:0:-1]:
            rights.insert(0, torch.einsum("xy,axn,byn->ab", rights[0], core, core))
        return [
            Rows(*(_inverse_roots([gram[own, own] for own in _blocks(len(gram))]) for gram in pair))
            for pair in zip(lefts, rights, strict=True)
        ]
    columns, found = leaves(matrices, spec.ranks), []
    for k, matrix in enumerate(matrices):
        terms = len(columns[k]) // len(matrix)
        grams = []
        for own in _blocks(len(matrix)):
            of_terms = slice(own.start * terms, own.stop * terms)
            others = [column[of_terms] for j, column in enumerate(columns) if j != k]
            gram = reduce(torch.mul, (column @ column.T for column in others), matrix.new_ones(1, 1))
            grams.append(_by_rows(gram, own.stop - own.start))
        found.append(Rows(_inverse_roots(grams)))
    return found


def block_shape(rows: int) -> tuple[int, int, int]:
    """Return the shape of the blocks of so many rows."""
    blocks = _blocks(rows)
    return len(blocks), blocks[0].stop, blocks[0].stop


def _blocks(rows: int) -> list[slice]:
    """Cut rows in equal blocks of at most `_BLOCK`, the last one as short as it is."""
    extent = -(-rows // -(-rows // _BLOCK))
    return [slice(start, min(start + extent, rows)) for start in range(0, rows, extent)]


def _inverse_roots(grams: Sequence[Tensor]) -> Tensor:
    """Return the inverse roots (blocks, b, b) of Gram matrices, raised by a ridge; the last one may be smaller.

    Of what is not finite, as in a training that has diverged, it is the identity.
    """
    extent = len(grams[0])
    roots = [_halves(gram)[1] if bool(gram.isfinite().all()) else torch.eye(len(gram)).to(gram) for gram in grams]
    return torch.stack([pad(root, (0, extent - len(root)) * 2) for root in roots])


def _curvatures(
    weighed: Sequence[Tensor], plain: Sequence[Tensor], spec: SeKronSpec, energy: float, restraint: float
) -> list[Tensor]:
    """Return the curvature (rows, rows) of error and restraint by each factor of a tree, but for the columns' part."""
    grams = [column @ column.T for column in leaves(weighed, spec.ranks)]
    squares = [column.square().sum(1) for column in leaves(plain, spec.ranks)]
    found = []
    for k, matrix in enumerate(weighed):
        others = all_but(grams, k) / energy
        others.diagonal().add_(all_but(squares, k), alpha=restraint)
        found.append(_by_rows(others, len(matrix)))
    return found


def _by_rows(gram: Tensor, rows: int) -> Tensor:
    """Add the entries of a Gram matrix of terms that belong to the same two rows."""
    return gram.reshape(rows, len(gram) // rows, rows, -1).sum((1, 3))


def _halves(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric root of a positive semidefinite matrix, raised by a ridge, and its inverse."""
    values, vectors = torch.linalg.eigh(curvature)
    most = float(values[-1])
    values = values.clamp_min(0) + _RIDGE * most if most > 0 else torch.ones_like(values)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
