"""What the tests of the engine share: oracles of the SeKron model that use none of its code, and random specs."""

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kronsearch.sekron.spec import SeKronSpec

Shapes = Sequence[Sequence[int]]


def _digits(index: int, bases: Sequence[int]) -> list[int]:
    """Return the digits of a number, most significant first."""
    digits = []
    for base in reversed(bases):
        index, digit = divmod(index, base)
        digits.append(digit)
    return digits[::-1]


def _own(term: Sequence[int], k: int, coupling: str) -> tuple[int, ...]:
    """Return those of the indices r_1, …, r_{S-1} that factor k (from 0) has: all so far, or its two neighbours'."""
    return tuple(term[: k + 1]) if coupling == "tree" else tuple(term[max(k - 1, 0) : k + 1])


def _naive_kernel(
    factors: Sequence[Tensor], shapes: Shapes, ranks: Sequence[int], coupling: str = "tree"
) -> NDArray[np.float64]:
    """Sum, for every entry of the kernel and every tuple of rank indices, the product of one entry of each factor."""
    arrays = [factor.detach().double().numpy() for factor in factors]
    modes = range(len(shapes[0]))
    kernel = np.zeros([prod(shape[mode] for shape in shapes) for mode in modes])
    for index in np.ndindex(kernel.shape):
        digits = [_digits(index[mode], [shape[mode] for shape in shapes]) for mode in modes]
        for term in product(*map(range, ranks)):
            value = 1.0
            for k, array in enumerate(arrays):
                value *= array[(*_own(term, k, coupling), *(digits[mode][k] for mode in modes))]
            kernel[index] += value
    return kernel


def _indexed_kernel(factors: Sequence[Tensor], shapes: Shapes, ranks: Sequence[int], coupling: str = "tree") -> Tensor:
    """Do the same for all entries at once, by index arrays: differentiable, still the definition."""
    modes = range(len(shapes[0]))
    size = [prod(shape[mode] for shape in shapes) for mode in modes]
    total = factors[0].new_zeros(size)
    places = [
        [
            torch.tensor([_digits(i, [shape[mode] for shape in shapes])[k] for i in range(size[mode])]).reshape(
                [-1 if mode == other else 1 for other in modes]
            )
            for mode in modes
        ]
        for k in range(len(shapes))
    ]
    for term in product(*map(range, ranks)):
        value = torch.ones_like(total)
        for k, factor in enumerate(factors):
            value = value * factor[_own(term, k, coupling)][tuple(places[k])]
        total = total + value
    return total


def _naive_outer(matrices: Sequence[Tensor], ranks: Sequence[int], coupling: str = "tree") -> NDArray[np.float64]:
    """Sum the outer products of all terms of factor matrices (ranks of its own, n_k)."""
    arrays = [m.numpy().reshape(*_own(ranks, k, coupling), m.shape[1]) for k, m in enumerate(matrices)]
    total = np.zeros([m.shape[1] for m in matrices])
    for term in product(*map(range, ranks)):
        value = np.ones(())
        for k, array in enumerate(arrays):
            value = np.multiply.outer(value, array[_own(term, k, coupling)])
        total += value
    return total


def _draw_spec(
    draw: Callable[..., Any],
    *,
    modes: int = 4,
    length: int | None = None,
    largest: int = 3,
    entries: int = 400,
    couplings: Sequence[str] = ("tree",),
) -> SeKronSpec:
    """Draw a spec of a kernel with few entries, its ranks at most those that a recursive SVD can have."""
    length = draw(st.integers(1, 4)) if length is None else length
    left = entries
    shapes = [[1] * modes for _ in range(length)]
    for k in draw(st.permutations(range(length))):
        for mode in draw(st.permutations(range(modes))):
            shapes[k][mode] = draw(st.integers(1, max(1, min(largest, left))))
            left //= shapes[k][mode]
    sizes = [prod(shape) for shape in shapes]
    ranks = [draw(st.integers(1, max(1, min(3, n, prod(sizes[k + 1 :]))))) for k, n in enumerate(sizes[:-1])]
    return SeKronSpec(tuple(map(tuple, shapes)), tuple(ranks), draw(st.sampled_from(couplings)))


@pytest.fixture(scope="session")
def naive_kernel() -> Callable[..., NDArray[np.float64]]:
    return _naive_kernel


@pytest.fixture(scope="session")
def indexed_kernel() -> Callable[..., Tensor]:
    return _indexed_kernel


@pytest.fixture(scope="session")
def naive_outer() -> Callable[..., NDArray[np.float64]]:
    return _naive_outer


@pytest.fixture(scope="session")
def draw_spec() -> Callable[..., SeKronSpec]:
    return _draw_spec


@pytest.fixture(scope="session")
def random_factors() -> Callable[..., list[Tensor]]:
    """Return a function that draws the factors of a spec, float64, from a seed."""

    def draw(spec: SeKronSpec, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in spec.tensor_shapes]

    return draw


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
