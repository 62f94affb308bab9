"""The last step of a data-aware decomposition: the factors in the norm of the moments themselves.

A metric weighs each factor by itself, and for that takes the moments' nearest Kronecker products. The factors that are
best in that norm are a good start, no more: on a ResNet-32 the error in the whole moments falls by another 15 to 60 %,
and with it much of what the network loses. No factor has a closed form there, so all are moved together by a
quasi-Newton method (L-BFGS: Liu and Nocedal, 1989), with the restraint on the terms' norms that joint fits have.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from kronsearch.sekron.fit import RESTRAINT
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.sekron.tensors import as_factors, leaves, reconstruct

__all__ = ["refit"]

_MOST_STEPS, _FEWEST_STEPS = 100, 20
_WORK = 300_000_000_000  # multiply-accumulates for all steps, between those two
_HISTORY = 20  # steps that the curvature is told from


def refit(kernel: Tensor, matrices: Sequence[Tensor], spec: SeKronSpec, metric: Metric) -> list[Tensor]:
    """Lower the error of factors in the norm of a metric's whole moments, `tr(G ΔW Ω ΔWᵀ)`.

    Args:
        kernel: (out channels, in channels, *extent).
        matrices: factor matrices (terms of its own, n_k) to begin with, their norms balanced.
        spec: of the factors.
        metric: of the layer.

    Returns:
        Factor matrices, in the dtype of those they began as: of those seen the ones of the least error, the terms'
        squared norms counted in for trees of three factors and more, which could cancel otherwise.
    """
    dtype = matrices[0].dtype
    inputs, outputs = metric.regularised(kernel.device, dtype)
    target = kernel.detach().to(dtype).flatten(1)
    energy = float(((target if outputs is None else outputs @ target) @ inputs).mul_(target).sum())
    if energy <= 0:
        return list(matrices)
    size = float(target.square().sum())
    restrained = spec.coupling == "tree" and spec.sequence_length > 2
    parameters = [matrix.detach().clone().requires_grad_() for matrix in matrices]
    weight: float | None = None
    best, found = float("inf"), list(matrices)

    def objective() -> float:
        nonlocal weight, best, found
        with torch.enable_grad():
            formed = reconstruct(as_factors(parameters, spec), spec).flatten(1)
        lost = target - formed.detach()
        weighted = (lost if outputs is None else outputs @ lost) @ inputs
        value = float((weighted * lost).sum()) / energy
        gradients = torch.autograd.grad(formed, parameters, weighted * (-2 / energy))
        if weight is None:
            weight = RESTRAINT * value if restrained else 0.0
        if weight > 0:
            with torch.enable_grad():
                squares = [column.square().sum(1) for column in leaves(parameters, spec.ranks)]
                terms = torch.stack(squares).prod(0).sum() * (weight / size)
            others = torch.autograd.grad(terms, parameters)
            gradients = tuple(own + other for own, other in zip(gradients, others, strict=True))
            value += float(terms.detach())
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if value < best:
            best, found = value, [parameter.detach().clone() for parameter in parameters]
        return value

    work = target.numel() * (sum(target.shape) + prod(spec.ranks))
    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, _WORK // work))
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=steps, history_size=_HISTORY, line_search_fn="strong_wolfe", tolerance_grad=0
    )
    optimiser.step(objective)  # type: ignore[no-untyped-call]
    return found
