"""CP, Tucker, tensor train and ring as factors, against sums written out by the formats' own definitions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from kronsearch.errors import SpecError
from kronsearch.sekron import Geometry, SeKronSpec, reconstruct
from kronsearch.sekron.convolution import SeKronConv2d
from kronsearch.sekron.formats import FamilyMember, from_cp, from_tr, from_tt, from_tucker
from kronsearch.sekron.layers import SeKronLinear

EXACT = 1e-12  # float64, of the tensor's norm
MODES, SUMS = "abcde", "uvwxy"


@dataclass(frozen=True)
class Case:
    """A format at the kernel's extents and its own ranks: R for CP, ρ_0 … ρ_{N-1} for a ring, else one of each sum."""

    format: str
    extents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.format} {'·'.join(map(str, self.extents))} R {','.join(map(str, self.ranks))}"

    @property
    def own_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of what the format stores."""
        n, r = self.extents, self.ranks
        if self.format in ("cp", "cp weighted"):
            return [*((extent, r[0]) for extent in n), *([(r[0],)] if self.format == "cp weighted" else [])]
        if self.format == "tucker":
            return [r, *zip(n, r, strict=True)]
        edges = (*r, r[0]) if self.format == "tr" else (1, *r, 1)
        return [(edges[k], extent, edges[k + 1]) for k, extent in enumerate(n)]

    def draw(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.own_shapes]

    def member(self, own: Sequence[Tensor]) -> FamilyMember:
        if self.format == "cp":
            return from_cp(own)
        if self.format == "cp weighted":
            return from_cp(own[:-1], own[-1])
        if self.format == "tucker":
            return from_tucker(own[0], own[1:])
        return {"tt": from_tt, "tr": from_tr}[self.format](own)

    def dense(self, own: Sequence[Tensor]) -> Tensor:
        """Sum by one einsum over the definition."""
        modes = MODES[: len(self.extents)]
        if self.format in ("cp", "cp weighted"):
            terms = [*(f"{mode}u" for mode in modes), "u"][: len(own)]
        elif self.format == "tucker":
            terms = [SUMS[: len(modes)], *(mode + own_sum for mode, own_sum in zip(modes, SUMS, strict=False))]
        else:
            edges = SUMS[: len(modes)] + SUMS[0]
            terms = [edges[k] + mode + edges[k + 1] for k, mode in enumerate(modes)]
        return torch.einsum(f"{','.join(terms)}->{modes}", *own)


GRID = [
    *(Case("cp", (5, 4), (rank,)) for rank in (1, 2, 4)),
    *(Case("cp weighted", (5, 4), (rank,)) for rank in (1, 3)),
    *(Case("cp", (5, 4, 3, 2, 3)[:n], (rank,)) for n in (3, 4, 5) for rank in (1, 3, 7)),
    *(Case("cp weighted", (5, 4, 3, 2, 3)[:n], (rank,)) for n in (3, 4, 5) for rank in (1, 3)),
    *(Case("tucker", (5, 4, 3, 2, 3)[:n], (1,) * n) for n in (2, 3, 4, 5)),
    *(Case("tucker", (5, 4, 3, 2, 3)[:n], (3, 2, 1, 2, 2)[:n]) for n in (2, 3, 4, 5)),
    *(Case("tucker", (5, 4, 3, 2, 3)[:n], (5, 4, 3, 2)[:n]) for n in (2, 3, 4)),
    Case("tucker", (2, 6, 5), (4, 3, 2)),  # R_1 above its mode's extent is Tucker all the same
    *(Case("tt", (5, 4, 3, 2, 3)[:n], (1,) * (n - 1)) for n in (2, 3, 4, 5)),
    *(Case("tt", (5, 4, 3, 2, 3)[:n], (3, 2, 2, 2)[: n - 1]) for n in (2, 3, 4, 5)),
    Case("tt", (5, 4), (4,)),
    Case("tt", (5, 4, 3, 2, 3), (5, 18, 6, 3)),  # what every kernel of that shape can be written with
    *(Case("tr", (5, 4, 3, 2, 3)[:n], (1,) * n) for n in (2, 3, 4, 5)),
    *(Case("tr", (5, 4, 3, 2, 3)[:n], (2, 2, 3, 2, 2)[:n]) for n in (2, 3, 4, 5)),
    *(Case("tr", (5, 4, 3, 2, 3)[:n], (3, 1, 2, 1, 3)[:n]) for n in (2, 3, 4, 5)),
    *(Case("tr", (5, 4, 3, 2, 3)[:n], (1, 3, 2, 2, 3)[:n]) for n in (2, 3, 4, 5)),
]
ONE_EACH = [
    Case("cp", (3, 4, 2), (3,)),
    Case("cp weighted", (3, 4, 2), (2,)),
    Case("tucker", (3, 4, 2), (2, 3, 2)),
    Case("tt", (3, 4, 2), (3, 2)),
    Case("tr", (3, 4, 2), (2, 3, 2)),
]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).norm()) <= EXACT * float(expected.norm())


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_the_oracle_is_the_definition(case):
    own = case.draw()
    arrays = [tensor.numpy() for tensor in own]
    expected = np.zeros(case.extents)
    for i in np.ndindex(case.extents):
        for r in product(*map(range, case.ranks)):
            if case.format in ("cp", "cp weighted"):
                value = prod(arrays[k][i[k], r[0]] for k in range(3)) * (arrays[3][r[0]] if len(arrays) > 3 else 1)
            elif case.format == "tucker":
                value = arrays[0][r] * prod(arrays[k + 1][i[k], r[k]] for k in range(3))
            else:
                edges = (*r, r[0]) if case.format == "tr" else (0, *r, 0)
                value = prod(arrays[k][edges[k], i[k], edges[k + 1]] for k in range(3))
            expected[i] += value
    assert_same(case.dense(own), torch.from_numpy(expected))


@pytest.mark.parametrize("case", GRID, ids=str)
def test_factors_make_the_same_kernel(case):
    own = case.draw()
    member = case.member(own)
    assert member.spec.kernel_shape == case.extents
    assert tuple(tuple(factor.shape) for factor in member.factors) == member.spec.tensor_shapes
    assert_same(reconstruct(member.factors, member.spec), case.dense(own))


@given(data=st.data(), kind=st.sampled_from(["cp", "cp weighted", "tucker", "tt", "tr"]), seed=st.integers(0, 2**16))
def test_factors_of_random_shapes_make_the_same_kernel(data, kind, seed):
    extents = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    left = prod(extents) if len(extents) > 2 or kind == "tucker" else min(extents)
    ranks = []
    for k in range({"cp": 1, "cp weighted": 1, "tt": len(extents) - 1}.get(kind, len(extents))):
        limit = min(prod(extents[: k + 1]), prod(extents[k + 1 :])) if kind == "tt" else left
        ranks.append(data.draw(st.integers(1, min(4, limit))))
        left //= ranks[-1]
    case = Case(kind, extents, tuple(ranks))
    own = case.draw(seed)
    member = case.member(own)
    assert member.params == sum(map(prod, case.own_shapes))
    assert_same(reconstruct(member.factors, member.spec), case.dense(own))


@pytest.mark.parametrize("case", GRID, ids=str)
def test_params_are_those_that_the_format_counts(case):
    n, r, modes = case.extents, case.ranks, range(len(case.extents))
    spread = [prod(r[: k + 1]) for k in modes]  # of the sums up to the k-th, from 0
    if case.format == "cp":
        expected = untied = r[0] * sum(n)
    elif case.format == "cp weighted":
        expected, untied = r[0] * (1 + sum(n)), r[0] * sum(n)
    elif case.format == "tucker":
        expected = prod(r) + sum(n[k] * r[k] for k in modes)
        untied = prod(r) + sum(n[k] * spread[k] for k in modes)
    elif case.format == "tt":
        edges = (1, *r, 1)
        expected = untied = sum(edges[k] * n[k] * edges[k + 1] for k in modes)
    else:
        edges = (*r, r[0])
        expected = sum(edges[k] * n[k] * edges[k + 1] for k in modes)
        untied = sum(n[k] * spread[min(k + 1, len(n) - 1)] for k in modes)
    member = case.member(case.draw())
    assert (member.params, member.untied_params) == (expected, untied)
    assert member.untied_params == sum(factor.numel() for factor in member.factors)


def test_specs_are_those_of_the_family():
    def spec(kind: str, ranks: tuple[int, ...], extents: tuple[int, ...] = (5, 4, 3, 2)) -> SeKronSpec:
        case = Case(kind, extents, ranks)
        return case.member(case.draw()).spec

    shapes = ((5, 1, 1, 1), (1, 4, 1, 1), (1, 1, 3, 1), (1, 1, 1, 2))
    assert spec("cp", (6,)) == SeKronSpec(shapes, (6, 1, 1))
    assert spec("tucker", (3, 2, 1, 2)) == SeKronSpec((*shapes, (1, 1, 1, 1)), (3, 2, 1, 2))
    assert spec("tt", (3, 4, 2)) == SeKronSpec(shapes, (3, 4, 2), "chain")
    assert spec("tr", (2, 3, 4, 2)) == SeKronSpec(shapes, (6, 4, 2))
    assert spec("tt", (3,), (5, 4)) == SeKronSpec(((5, 1), (1, 4)), (3,), "tree")
    assert spec("tr", (2, 2), (5, 4)) == SeKronSpec(((5, 1), (1, 4)), (4,))


@pytest.mark.parametrize("case", ONE_EACH + [replace(c, extents=(5, 4, 3, 2, 3)) for c in ONE_EACH[:2]], ids=str)
def test_gradients_reach_what_the_format_stores(case):
    own = [tensor.requires_grad_() for tensor in case.draw()]
    member = case.member(own)
    towards = torch.randn(case.extents, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):
        found = torch.autograd.grad((reconstruct(member.factors, member.spec) * towards).sum(), own)
        expected = torch.autograd.grad((case.dense(own) * towards).sum(), own)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
        with torch.no_grad():  # a step of training, which the member must see
            for tensor, gradient in zip(own, found, strict=True):
                tensor -= 0.1 * gradient


def test_factors_of_cp_and_train_are_views():
    for case in (Case("cp", (5, 4, 3), (3,)), Case("tt", (5, 4, 3, 2), (3, 4, 2))):
        member = case.member(case.draw())
        for factor, tensor in zip(member.factors, member.own, strict=True):
            assert factor.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_ties_of_tucker_are_views():
    case = Case("tucker", (5, 4, 3), (2, 3, 2))
    member = case.member(case.draw())
    core, *matrices = member.own
    *factors, last = member.factors
    assert torch.equal(last.squeeze(), core)
    for k, (factor, matrix) in enumerate(zip(factors, matrices, strict=True)):
        assert factor.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
        assert factor.stride()[:k] == (0,) * k
        for r in np.ndindex(*case.ranks[:k]):
            assert torch.equal(factor[r].squeeze(), matrix.T)


def test_ties_of_a_ring_repeat_its_cores():
    case = Case("tr", (5, 4, 3, 2, 3), (2, 3, 2, 3, 2))
    member = case.member(case.draw())
    cores, factors = member.own, [factor.squeeze() for factor in member.factors]
    for r0, r1 in np.ndindex(2, 3):
        pair = 3 * r0 + r1
        assert torch.equal(factors[0][pair], cores[0][r0, :, r1])
        for r2 in range(2):
            assert torch.equal(factors[1][pair, r2], cores[1][r1, :, r2])
            for r3 in range(3):
                assert torch.equal(factors[2][pair, r2, r3], cores[2][r2, :, r3])
                for r4 in range(2):
                    assert torch.equal(factors[3][pair, r2, r3, r4], cores[3][r3, :, r4])
                    assert torch.equal(factors[4][pair, r2, r3, r4], cores[4][r4, :, r0])
    assert [member.factors[k].stride()[:4].count(0) for k in (2, 3, 4)] == [1, 2, 2]
    assert member.factors[3].untyped_storage().data_ptr() == cores[3].untyped_storage().data_ptr()
    assert member.factors[4].untyped_storage().nbytes() == 8 * 6 * 2 * 3  # copied over the pair index alone


KERNELS = [
    Case("cp weighted", (6, 4, 3, 3), (5,)),
    Case("tucker", (6, 4, 3, 3), (3, 2, 2, 2)),
    Case("tt", (6, 4, 3, 3), (4, 5, 2)),
    Case("tr", (6, 4, 3, 3), (2, 3, 2, 2)),
]


@pytest.mark.parametrize("case", KERNELS, ids=str)
@pytest.mark.parametrize(("stride", "padding", "dilation"), [((1, 1), (1, 1), (1, 1)), ((2, 1), (2, 0), (1, 2))])
def test_a_convolution_runs_with_the_factors(case, stride, padding, dilation):
    own = [tensor.requires_grad_() for tensor in case.draw()]
    member = case.member(own)
    geometry = Geometry(stride, dilation, tuple((p, p) for p in padding))
    layer = SeKronConv2d(member.spec, geometry, bias=False, dtype=torch.float64)
    with torch.no_grad():
        for parameter, factor in zip(layer.factors, member.factors, strict=True):
            parameter.copy_(factor)
    data = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = F.conv2d(data, case.dense(own), None, stride, padding, dilation)
    assert_same(layer(data), expected)

    # the same with the ties kept, so that the layer can train what the format stores
    tied = functional_call(layer, {f"factors.{k}": factor for k, factor in enumerate(member.factors)}, (data,))
    assert_same(tied, expected)
    found = torch.autograd.grad(tied.square().sum(), own)
    for one, other in zip(found, torch.autograd.grad(expected.square().sum(), own), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("case", [Case("tucker", (6, 5), (3, 2)), Case("tr", (6, 5), (2, 2))], ids=str)
def test_a_linear_layer_runs_with_the_factors(case):
    own = case.draw()
    member = case.member(own)
    layer = SeKronLinear(member.spec, bias=False, dtype=torch.float64)
    with torch.no_grad():
        for parameter, factor in zip(layer.factors, member.factors, strict=True):
            parameter.copy_(factor)
    data = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_same(layer(data), data @ case.dense(own).T)


def zeros(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape) for shape in shapes]


REFUSED: dict[str, tuple[Callable[[], FamilyMember], str]] = {
    "cp of none": (lambda: from_cp([]), r"for each of two modes or more.*got shapes \(\)"),
    "cp of one mode": (lambda: from_cp(zeros((4, 2))), r"two modes or more.*\(\(4, 2\),\)"),
    "cp of two ranks": (lambda: from_cp(zeros((4, 2), (3, 2), (5, 3))), r"R the same, got shapes .*\(5, 3\)"),
    "cp of vectors": (lambda: from_cp(zeros((4,), (3,))), r"takes a matrix \(n_k, R\)"),
    "cp weights": (lambda: from_cp(zeros((4, 2), (3, 2)), torch.ones(3)), r"rank 2 takes weights of shape \(2,\).*\(3"),
    "cp weights' axes": (lambda: from_cp(zeros((4, 2), (3, 2)), torch.ones(2, 1)), r"weights .* got \(2, 1\)"),
    "cp of rank 0": (lambda: from_cp(zeros((4, 0), (3, 0))), "positive whole numbers"),
    "cp beyond a matrix's rank": (lambda: from_cp(zeros((4, 5), (6, 5))), "rank 5 .* is above 4, where the sum is exa"),
    "cp of too many terms": (lambda: from_cp(zeros((2, 9), (2, 9), (2, 9))), r"has entries \(8\)"),
    "tucker of one mode": (lambda: from_tucker(torch.ones(2), zeros((4, 2))), "two modes or more"),
    "tucker core": (lambda: from_tucker(torch.ones(2, 4), zeros((4, 2), (5, 3))), r"got matrices .* shape \(2, 4\)"),
    "tucker core's axes": (lambda: from_tucker(torch.ones(2, 3, 1), zeros((4, 2), (5, 3))), r"a core of shape \(2, 3"),
    "tucker of a core": (lambda: from_tucker(torch.ones(2, 3), zeros((4, 2), (5, 3, 1))), r"a matrix \(n_k, R_k\)"),
    "tucker of too many terms": (lambda: from_tucker(torch.ones(3, 3), zeros((2, 3), (4, 3))), r"has entries \(8\)"),
    "train of one mode": (lambda: from_tt(zeros((1, 4, 1))), "two modes or more"),
    "train that breaks": (lambda: from_tt(zeros((1, 4, 2), (3, 5, 1))), r"R_0 = R_N = 1 .*got shapes .*\(3, 5, 1\)"),
    "train that is a ring": (lambda: from_tt(zeros((2, 4, 3), (3, 5, 2))), "a tensor ring has others"),
    "train that ends open": (lambda: from_tt(zeros((1, 4, 3), (3, 5, 2))), "R_0 = R_N = 1"),
    "train of matrices": (lambda: from_tt(zeros((4, 3), (3, 5))), r"takes a core \(R_{k-1}, n_k, R_k\)"),
    "train beyond exact": (lambda: from_tt(zeros((1, 4, 5), (5, 3, 2), (2, 3, 1))), "rank 5 .* above 4, where the sum"),
    "ring of one mode": (lambda: from_tr(zeros((2, 4, 2))), "two modes or more"),
    "ring that breaks": (lambda: from_tr(zeros((2, 4, 3), (2, 5, 2))), r"ρ_N = ρ_0, got shapes .*\(2, 5, 2\)"),
    "ring that doesn't close": (lambda: from_tr(zeros((2, 4, 3), (3, 5, 1))), "ρ_N = ρ_0"),
    "ring of matrices": (lambda: from_tr(zeros((2, 2), (2, 2))), r"takes a core \(ρ_{k-1}, n_k, ρ_k\)"),
    "ring of rank 0": (lambda: from_tr(zeros((0, 4, 2), (2, 5, 0))), "positive whole numbers"),
    "ring of too many terms": (lambda: from_tr(zeros(*[(3, 2, 3)] * 3)), r"ranks \(9, 3\) .* has entries \(8\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_member_is_refused_in_one_line(case):
    make, message = REFUSED[case]
    with pytest.raises(SpecError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)
