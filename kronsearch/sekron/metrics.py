"""The norm in which errors are measured: plain, or weighted by what enters the layer and what its outputs matter.

With the second moments `Ω` of the input patches and `G` of the output gradients, the loss grows like
`‖G^½ (W - Ŵ) Ω^½‖²` (K-FAC: Martens and Grosse, 2015). For a sequence of factors both are replaced by their nearest
Kronecker products along the same digits (Van Loan and Pitsianis, 1993), so that the weighted kernel has the structure
of the plain one: it is decomposed as it stands, and each factor is un-weighted by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kronsearch.sekron.kernels import power_of_two
from kronsearch.sekron.shapes import FactorShapes

__all__ = ["Metric", "Moments", "Root", "nearest_kronecker"]

_SWEEPS = 2  # of the alternation for the nearest Kronecker product; it starts near, at the partial traces
_RIDGE = 1e-3  # of the mean eigenvalue, added to each: directions that calibration never saw keep a small weight

_Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer, gathered on calibration data.

    Args:
        inputs: (C·prod(extent), C·prod(extent)), of the input patches, in channels slowest; centred where the layer's
            mean output can be corrected behind it, by a bias or by a batch norm.
        outputs: (F, F), of the gradient of the loss, or of the network's outputs, by the layer's outputs; None where
            there were no gradients.
        mean: (groups, C·prod(extent)), or flat, each group's mean input patch, where the layer's own bias takes up the
            change of its mean.
    """

    inputs: Tensor
    outputs: Tensor | None = None
    mean: Tensor | None = None


def nearest_kronecker(moment: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return positive semidefinite matrices, one for each factor, whose Kronecker product is near to a moment.

    Args:
        moment: square, over the modes that the shapes divide, positive semidefinite.
        shapes: for every factor its part of each of those modes.

    Returns:
        For each factor a symmetric matrix of extent `prod(shape)`.
    """
    sizes = [prod(shape) for shape in shapes]
    length, modes = len(shapes), len(shapes[0])
    digits = moment.reshape([shape[mode] for mode in range(modes) for shape in shapes] * 2)
    order = [
        half * length * modes + mode * length + k for k in range(length) for half in (0, 1) for mode in range(modes)
    ]
    tensor = digits.permute(order).reshape([n * n for n in sizes])
    parts = [torch.eye(n, dtype=moment.dtype, device=moment.device).flatten() for n in sizes]
    wide = [k for k, n in enumerate(sizes) if n > 1] or [0]
    for _ in range(_SWEEPS if len(wide) > 1 else 1):
        for k in wide:
            part, norm = tensor, 1.0
            for j in range(length - 1, -1, -1):
                if j != k:
                    part = torch.tensordot(part, parts[j], dims=([j if j < k else part.ndim - 1], [0]))
                    norm *= float(parts[j].square().sum()) or 1.0
            parts[k] = part / norm
    matrices = [part.reshape(n, n) for part, n in zip(parts, sizes, strict=True)]
    return [(matrix + matrix.T) / 2 for matrix in matrices]


def _roots(matrix: Tensor) -> _Pair:
    """Return the symmetric square root of a positive semidefinite matrix, regularised, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0)
    mean = float(values.mean())
    values = values + _RIDGE * mean if mean > 0 else torch.ones_like(values)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _ridged(matrix: Tensor) -> Tensor:
    """Return a moment with the ridge of its roots, or the first power of ten of that with which it is definite.

    Where a few directions have nearly all of it, the others can be below zero by rounding; a descent would follow them.
    """
    mean = float(matrix.diagonal().mean())
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    if mean <= 0:
        return eye
    for ridge in (_RIDGE, 10 * _RIDGE, 100 * _RIDGE):
        ridged = matrix + ridge * mean * eye
        if int(torch.linalg.cholesky_ex(ridged).info) == 0:
            return ridged
    return mean * eye


class Root:
    """A symmetric matrix `G ⊗ Ω` that the columns of factor matrices (rows, n_k) are multiplied by.

    Args:
        inputs: `Ω`.
        outputs: `G`; None for the identity.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor | None = None) -> None:
        if outputs is not None and min(len(inputs), len(outputs)) == 1:  # one of the two is a number
            inputs, outputs = outputs * inputs, None
        self._inputs, self._outputs = inputs, outputs

    def on(self, matrix: Tensor) -> Tensor:
        """Multiply the columns of a matrix (rows, n_k)."""
        block = matrix.reshape(len(matrix), -1, len(self._inputs)) @ self._inputs
        if self._outputs is not None:
            block = self._outputs @ block
        return block.reshape(matrix.shape)


class Metric:
    """The weighting of a layer's kernel by its moments, for any sequence of factors.

    For a sequence it is `T ×_k M_k` on the unfolded kernel, with `M_k = G_k^½ ⊗ Ω_k^½`. Sequences that divide the in
    channels and the extent alike share their `Ω_k`, and are met often: the roots are kept. Both moments are taken in
    units of about the mean of their diagonals: how large a network's outputs are changes no decomposition.

    Args:
        moments: of the layer.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self._units = tuple(
            1.0 if moment is None else power_of_two(float(moment.diagonal().double().mean()))
            for moment in (moments.inputs, moments.outputs)
        )
        self._kept: dict[tuple[bool, tuple[tuple[int, ...], ...]], list[_Pair]] = {}

    def forget(self) -> None:
        """Drop the kept roots, hundreds of megabytes for a wide layer; they are formed again where they are needed."""
        self._kept.clear()

    def regularised(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return the moments of inputs and outputs, in their units, with the ridge that the roots have as well."""
        outputs = self.moments.outputs
        return (
            _ridged((self.moments.inputs / self._units[0]).to(device, dtype)),
            None if outputs is None else _ridged((outputs / self._units[1]).to(device, dtype)),
        )

    def _parts(self, moment: Tensor, outputs: bool, shapes: tuple[tuple[int, ...], ...]) -> list[_Pair]:
        key = (outputs, shapes)
        if key not in self._kept:
            self._kept[key] = [
                _roots(part) for part in nearest_kronecker(moment.double() / self._units[outputs], shapes)
            ]
        return self._kept[key]

    def root(self, factor_shapes: FactorShapes, k: int, like: Tensor, *, inverse: bool = False) -> Root:
        """Return the root M_k of a factor, or its inverse, in the dtype and on the device of a tensor."""
        inputs = self._parts(self.moments.inputs, False, tuple(shape[1:] for shape in factor_shapes))[k][inverse]
        if self.moments.outputs is None:
            return Root(inputs.to(like))
        outputs = self._parts(self.moments.outputs, True, tuple(shape[:1] for shape in factor_shapes))[k][inverse]
        return Root(inputs.to(like), outputs.to(like))

    def weight(self, tensor: Tensor, factor_shapes: FactorShapes) -> Tensor:
        """Weight every mode of an unfolded kernel (n_1, …, n_S)."""
        for k in range(tensor.ndim):
            moved = tensor.movedim(k, -1)
            rows = self.root(factor_shapes, k, tensor).on(moved.reshape(-1, moved.shape[-1]))
            tensor = rows.reshape(moved.shape).movedim(-1, k)
        return tensor

    def unweight(self, matrices: Sequence[Tensor], factor_shapes: FactorShapes) -> list[Tensor]:
        """Take the weight off factor matrices (terms, n_k)."""
        return [self.root(factor_shapes, k, matrix, inverse=True).on(matrix) for k, matrix in enumerate(matrices)]

    def energy(self, kernel: Tensor) -> float:
        """Return `tr(G W Ω Wᵀ)` of a kernel or of a difference of kernels, with the moments as they are."""
        rows = kernel.double().flatten(1)
        weighted = rows @ self.moments.inputs.to(rows)
        if self.moments.outputs is not None:
            weighted = self.moments.outputs.to(rows) @ weighted
        return float((weighted * rows).sum())
