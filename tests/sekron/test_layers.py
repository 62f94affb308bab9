"""The layers against the dense layers of their kernels, which are formed by the tests' own oracle.

A case supplies a factorised layer, the dense layer that it stands for, and an input; the checks are inherited.
"""

import copy
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import permutations, product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

from kronsearch.errors import SpecError
from kronsearch.sekron import Geometry, SeKronConv2d, SeKronLinear, SeKronSpec, decompose, planning, reconstruct
from kronsearch.sekron.convolution import SeKronConv, conv_geometry, conv_like, kernels_formed
from kronsearch.sekron.planning import StepPrices, plan_training

EXACT = 1e-10  # float64: sums of some hundred products of order one
# Each stage rounds its result to the dtype; of the largest output, over at most four stages.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.06}


@dataclass(frozen=True)
class Case:
    spec: SeKronSpec
    input_shape: tuple[int, ...]
    bias: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.spec} {options}{'' if self.bias else ' no bias'}".replace(" ", "")


def quiet_forward(module: nn.Module, data: Tensor) -> Tensor:
    """Run a dense layer; torch warns that its own 'same' copies the input for an even kernel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
        return module(data)


def randomise(layer: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)


def draw(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare to a tolerance of the largest expected entry."""
    scale = max(1.0, float(expected.detach().abs().max()) if expected.numel() else 1.0)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


class LayerConformance:
    """Checks that hold for every factorised layer. Subclasses give CASES, `create` and `dense`."""

    CASES: tuple[Case, ...] = ()

    def create(self, case: Case) -> nn.Module:
        """Return the factorised layer, float64, its factors drawn at random."""
        raise NotImplementedError

    def dense(self, case: Case) -> nn.Module:
        """Return a dense layer with the same settings; its weights don't matter."""
        raise NotImplementedError

    def run(self, layer: nn.Module, data: Tensor) -> Tensor:
        return layer(data)

    def dense_forward(self, case, layer, factors, bias, data, indexed_kernel) -> Tensor:
        """Run the dense layer with the kernel of these factors."""
        kernel = indexed_kernel(factors, case.spec.factor_shapes, case.spec.ranks, case.spec.coupling)
        state = {"weight": kernel} if bias is None else {"weight": kernel, "bias": bias}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
            return functional_call(self.dense(case), state, (data,))

    def test_values_and_gradients(self, case, indexed_kernel):
        layer = self.create(case)
        data = draw(case.input_shape).requires_grad_()
        factors = list(layer.factors)
        found = self.run(layer, data)
        expected = self.dense_forward(case, layer, factors, layer.bias, data, indexed_kernel)
        close(found, expected, EXACT)
        towards = draw(tuple(found.shape), seed=2)
        wanted = [data, *factors, *([layer.bias] if case.bias else [])]
        found_gradients = torch.autograd.grad((found * towards).sum(), wanted)
        expected_gradients = torch.autograd.grad((expected * towards).sum(), wanted)
        for found_gradient, expected_gradient in zip(found_gradients, expected_gradients, strict=True):
            close(found_gradient, expected_gradient, EXACT)

    def test_inference(self, case):
        """In eval mode without gradients a layer runs otherwise, in each memory layout: the outputs are the same."""
        layer, data = self.create(case), draw(case.input_shape)
        expected = self.run(layer, data).detach()
        layer.eval()
        inputs = [data]
        if data.ndim == 4:
            inputs += [data.to(memory_format=torch.channels_last)]
            inputs += [data.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), data[:1], data[:0]]
        for images in inputs:
            for without in (torch.no_grad, torch.inference_mode):
                with without():
                    for _ in range(2):
                        close(self.run(layer, images), expected[: len(images)], EXACT)


class LayerLife(LayerConformance):
    """Further checks, for fewer cases: a layer is saved, copied, cast and shown as any module is."""

    def test_state_dict_round_trip(self, case):
        layer, other = self.create(case), self.create(case)
        randomise(other, seed=5)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        expected = {f"factors.{k}": shape for k, shape in enumerate(case.spec.tensor_shapes)}
        if case.bias:
            expected["bias"] = (case.spec.kernel_shape[0],)
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
        assert sum(math.prod(shape) for name, shape in expected.items() if name != "bias") == case.spec.params
        assert other.load_state_dict(state).missing_keys == []
        data = draw(case.input_shape)
        assert torch.equal(layer(data), other(data))

    def test_deepcopy(self, case):
        layer = self.create(case)
        data = draw(case.input_shape)
        before = layer(data)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(data), before)
        randomise(twin, seed=5)
        assert torch.equal(layer(data), before)

    def test_repr(self, case):
        text = repr(self.create(case))
        assert text.startswith((f"SeKronConv{len(case.spec.kernel_shape) - 2}d(", "SeKronLinear("))
        assert str(case.spec) in text
        assert f"bias={case.bias}" in text

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dtypes(self, case, dtype):
        layer = self.create(case)
        with torch.no_grad():  # to the scale of trained factors, where bfloat16 is of use
            for factor in layer.factors:
                factor.mul_(case.spec.params**-0.5)
        small = copy.deepcopy(layer).to(dtype)
        close(small(draw(case.input_shape, dtype=dtype)).double(), layer(draw(case.input_shape)), ROUNDING[dtype])

    def test_autocast_gives_the_dtype_that_a_dense_layer_gives(self, case):
        layer, dense = self.create(case).float(), self.dense(case).float()
        data = draw(case.input_shape, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(data).dtype == quiet_forward(dense, data).dtype == torch.bfloat16

    def test_modes_and_an_input_of_no_examples(self, case):
        layer = self.create(case)
        data = draw(case.input_shape)
        assert torch.equal(layer.train()(data), layer.eval()(data))
        nobody = layer(data[:0])
        assert nobody.shape == (0, *layer(data).shape[1:])

    def test_the_dense_layer_and_back(self, case):
        """to_conv / to_linear give the dense layer; factorised again, at full accuracy, it is the same layer."""
        layer = self.create(case)
        data = draw(case.input_shape)
        dense = layer.to_conv() if isinstance(layer, SeKronConv) else layer.to_linear()
        close(dense.weight, layer.kernel, EXACT)
        close(quiet_forward(dense, data), layer(data), EXACT)
        whole = SeKronSpec((case.spec.kernel_shape,))
        again = type(layer)
        make = again.from_conv if isinstance(layer, SeKronConv) else again.from_linear
        close(make(dense, whole)(data), layer(data), EXACT)

    def test_what_networks_ask_their_layers_for(self, case):
        layer = self.create(case)
        dense = layer.to_conv() if isinstance(layer, SeKronConv) else layer.to_linear()
        names = ["in_features", "out_features"]
        if isinstance(layer, SeKronConv):
            names = ["in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding"]
        assert {name: getattr(layer, name) for name in names} == {name: getattr(dense, name) for name in names}

    def test_the_global_generator_is_left_alone(self, case):
        state = torch.get_rng_state()
        layer = self.create(case)
        dense = layer.to_conv() if isinstance(layer, SeKronConv) else layer.to_linear()
        _ = type(layer).from_conv(dense, case.spec) if isinstance(layer, SeKronConv) else None
        assert torch.equal(torch.get_rng_state(), state)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.cls.CASES, ids=str)


CONV_SPECS = (
    SeKronSpec(((4, 6, 3, 3),)),
    SeKronSpec(((4, 1, 3, 1), (1, 6, 1, 2)), (3,)),
    SeKronSpec(((1, 6, 1, 3), (4, 1, 2, 1)), (2,)),
    SeKronSpec(((4, 1, 1, 1), (1, 6, 3, 2)), (4,)),
    SeKronSpec(((1, 6, 3, 2), (4, 1, 1, 1)), (3,)),
    SeKronSpec(((2, 2, 1, 1), (2, 3, 3, 3)), (3,)),
    SeKronSpec(((2, 3, 3, 1), (2, 2, 1, 5)), (2,)),
    SeKronSpec(((2, 3, 2, 1), (3, 1, 2, 3)), (2,)),
    SeKronSpec(((4, 1, 1, 1), (1, 1, 3, 3), (1, 6, 1, 1)), (5, 1)),
    SeKronSpec(((4, 1, 1, 1), (1, 1, 3, 2), (1, 6, 1, 1)), (2, 3)),
    SeKronSpec(((2, 3, 1, 2), (1, 2, 2, 1), (3, 1, 1, 2)), (2, 2)),
    SeKronSpec(((1, 6, 1, 1), (1, 1, 2, 3), (4, 1, 1, 1)), (3, 2)),
    SeKronSpec(((2, 1, 2, 1), (1, 3, 1, 2), (2, 1, 1, 1), (1, 2, 1, 2)), (2, 1, 2)),
    SeKronSpec(((2, 2, 1, 3), (1, 1, 2, 1), (2, 1, 2, 1), (1, 2, 1, 1)), (2, 2, 2)),
    SeKronSpec(((4, 1, 1, 1), (1, 1, 3, 2), (1, 6, 1, 1)), (3, 4), "chain"),
    SeKronSpec(((2, 3, 1, 2), (1, 2, 2, 1), (3, 1, 1, 2)), (3, 2), "chain"),
    SeKronSpec(((1, 6, 1, 1), (3, 1, 2, 3), (2, 1, 1, 1)), (2, 2), "chain"),
    SeKronSpec(((2, 2, 1, 3), (1, 1, 2, 1), (2, 1, 2, 1), (1, 2, 1, 1)), (2, 3, 2), "chain"),
)
CONV_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"stride": (1, 3), "padding": (2, 1)},
    {"stride": (2, 1), "dilation": 2, "padding": (1, 3)},
    {"dilation": (1, 2), "padding": "valid"},
    {"padding": "same"},
    {"dilation": (2, 1), "padding": "same", "padding_mode": "zeros"},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "reflect", "stride": 2},
    {"padding": (2, 1), "padding_mode": "replicate", "dilation": (1, 2)},
    {"dilation": 2, "padding": "same", "padding_mode": "replicate"},
    {"padding": 2, "padding_mode": "circular", "stride": (1, 2)},
    {"padding": "same", "padding_mode": "circular"},
)


def conv_case(spec: SeKronSpec, options: dict[str, Any], *, bias: bool, size: tuple[int, ...] = (9, 11)) -> Case:
    return Case(spec, (2, spec.kernel_shape[1] * options.get("groups", 1), *size), bias, options)


class ConvCases:
    def dense(self, case: Case) -> nn.Module:
        out_channels, in_channels, *extent = case.spec.kernel_shape
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(extent)]
        channels = in_channels * case.options.get("groups", 1), out_channels
        return nn.utils.skip_init(kind, *channels, tuple(extent), bias=case.bias, dtype=torch.float64, **case.options)

    def create(self, case: Case) -> SeKronConv:
        dense = self.dense(case)
        make = conv_like(dense)
        layer = make(
            case.spec, conv_geometry(dense), bias=case.bias, padding_mode=dense.padding_mode, dtype=torch.float64
        )
        randomise(layer)
        return layer


class TestConvGrid(ConvCases, LayerConformance):
    CASES = tuple(
        conv_case(spec, options, bias=(i + j) % 2 == 0)
        for (i, spec), (j, options) in product(enumerate(CONV_SPECS), enumerate(CONV_OPTIONS))
    )


def every_run(spec: SeKronSpec) -> Iterator[SeKronSpec]:
    """Yield the spec with each division of its factors into neighbours, in each order."""
    for divided in product((False, True), repeat=spec.sequence_length - 1):
        groups = [[0]]
        for k, new in enumerate(divided, start=1):
            groups.append([k]) if new else groups[-1].append(k)
        for run in permutations(map(tuple, groups)):
            yield replace(spec, run=run)


def test_every_run_is_one():
    counts = [len({spec.run for spec in every_run(SeKronSpec(((1, 1),) * n, (1,) * (n - 1)))}) for n in range(1, 5)]
    assert counts == [1, 3, 11, 49]


class TestConvRuns(ConvCases, LayerConformance):
    CASES = tuple(
        conv_case(spec, CONV_OPTIONS[(5 * i + j) % len(CONV_OPTIONS)], bias=j % 2 == 0)
        for i, spec in enumerate(CONV_SPECS)
        for j, spec in enumerate(every_run(spec))
    )


GROUPED_SPECS = (
    SeKronSpec(((12, 2, 3, 3),)),
    SeKronSpec(((12, 1, 3, 1), (1, 2, 1, 3)), (2,)),
    SeKronSpec(((6, 2, 1, 1), (2, 1, 3, 3)), (3,)),
    SeKronSpec(((6, 1, 1, 2), (2, 2, 3, 1)), (4,)),
    SeKronSpec(((12, 1, 1, 1), (1, 1, 3, 3), (1, 2, 1, 1)), (5, 1)),
    SeKronSpec(((6, 1, 1, 1), (2, 1, 3, 1), (1, 2, 1, 3)), (2, 2)),
    SeKronSpec(((6, 1, 1, 1), (2, 1, 3, 1), (1, 2, 1, 3)), (3, 2), "chain"),
)
GROUPED_OPTIONS: tuple[dict[str, Any], ...] = (
    {"groups": 2},
    {"groups": 3, "padding": 1, "stride": 2},
    {"groups": 6, "padding": "same", "dilation": (2, 1)},
    {"groups": 2, "padding": (1, 2), "padding_mode": "circular"},
)


class TestGroupedConvGrid(ConvCases, LayerConformance):
    CASES = (
        *(
            conv_case(spec, options, bias=(i + j) % 2 == 0)
            for (i, spec), (j, options) in product(enumerate(GROUPED_SPECS), enumerate(GROUPED_OPTIONS))
        ),
        conv_case(SeKronSpec(((6, 1, 3, 1), (1, 1, 1, 3)), (2,)), {"groups": 6, "padding": 1}, bias=True),
        conv_case(SeKronSpec(((12, 1, 1, 3), (1, 1, 3, 1)), (3,)), {"groups": 6, "stride": 2}, bias=False),
    )


class TestGroupedConvRuns(ConvCases, LayerConformance):
    CASES = tuple(
        conv_case(spec, GROUPED_OPTIONS[(i + j) % len(GROUPED_OPTIONS)], bias=j % 2 == 0)
        for i, spec in enumerate(GROUPED_SPECS)
        for j, spec in enumerate(every_run(spec))
    )


OTHER_AXES = tuple(
    conv_case(spec, options, bias=(i + j) % 2 == 0, size=size)
    for specs, size in (
        (
            (
                SeKronSpec(((8, 3, 4),)),
                SeKronSpec(((8, 1, 2), (1, 3, 2)), (4,)),
                SeKronSpec(((2, 3, 2), (4, 1, 2)), (3,)),
                SeKronSpec(((8, 1, 1), (1, 1, 4), (1, 3, 1)), (4, 1)),
                SeKronSpec(((4, 1, 2), (1, 3, 1), (2, 1, 2)), (3, 2), "chain"),
            ),
            (13,),
        ),
        (
            (
                SeKronSpec(((4, 2, 3, 2, 2),)),
                SeKronSpec(((4, 1, 3, 1, 1), (1, 2, 1, 2, 2)), (3,)),
                SeKronSpec(((2, 2, 1, 2, 1), (2, 1, 3, 1, 2)), (3,)),
                SeKronSpec(((4, 1, 1, 1, 1), (1, 1, 3, 2, 2), (1, 2, 1, 1, 1)), (3, 2)),
                SeKronSpec(((4, 1, 1, 1, 1), (1, 1, 3, 2, 2), (1, 2, 1, 1, 1)), (2, 2), "chain"),
            ),
            (6, 5, 7),
        ),
    )
    for i, spec in enumerate(specs)
    for j, options in enumerate(
        (
            {},
            {"padding": 1, "stride": 2},
            {"padding": "same"},
            {"padding": 1, "padding_mode": "replicate", "dilation": 2},
            {"groups": 2, "padding": 1},
        )
    )
)


@contextmanager
def in_stages(layer: SeKronConv) -> Iterator[None]:
    """Run a layer as it is trained in stages of plain convolutions, if there are any, however slow they are."""
    with patch.object(planning, "_WORTH", math.inf):
        run = plan_training(layer.spec, layer.geometry, 1, StepPrices(1, 0, 1, 1, 0)).order
    with kernels_formed(nn.Sequential(layer), runs={"0": run}):
        yield


class TestConvOfOtherAxes(ConvCases, LayerConformance):
    CASES = OTHER_AXES


class TestRunsOfOtherAxes(ConvCases, LayerConformance):
    CASES = tuple(replace(case, spec=spec) for case in OTHER_AXES[1::2] for spec in list(every_run(case.spec))[::2])


class TestLifeOfOtherConvs(ConvCases, LayerLife):
    CASES = (
        *OTHER_AXES[4::7],
        *TestGroupedConvGrid.CASES[2::7],
        *TestConvRuns.CASES[3::29],
        *TestGroupedConvRuns.CASES[5::17],
    )


class TestConvWithItsKernelFormed(ConvCases, LayerConformance):
    CASES = (*TestConvGrid.CASES[::3], *TestGroupedConvGrid.CASES[::3], *OTHER_AXES[::3], *TestConvRuns.CASES[::19])

    def run(self, layer: nn.Module, data: Tensor) -> Tensor:
        with kernels_formed(nn.Sequential(layer)):
            return layer(data)


class TestConvTrainedInStages(ConvCases, LayerConformance):
    CASES = (
        *TestConvGrid.CASES[1::3],
        *TestGroupedConvGrid.CASES[1::3],
        *OTHER_AXES[1::3],
        *(conv_case(spec, options, bias=True) for spec in CONV_SPECS for options in CONV_OPTIONS[1::4]),
    )

    def run(self, layer: nn.Module, data: Tensor) -> Tensor:
        with in_stages(layer):
            return layer(data)

    def test_most_have_stages(self):
        """Or the others would show nothing."""
        stages = []
        for case in self.CASES:
            with in_stages(layer := self.create(case)):
                stages.append(len(layer._formed))
        assert {1, 2, 3} <= set(stages)
        assert sum(n > 1 for n in stages) > len(stages) / 3


class TestConvLife(ConvCases, LayerLife):
    CASES = tuple(
        conv_case(spec, CONV_OPTIONS[options], bias=options % 2 == 0)
        for spec, options in zip(CONV_SPECS, (0, 2, 3, 6, 9, 2, 4, 7, 2, 1, 12, 8, 5, 10, 3, 9, 2, 13), strict=True)
    )

    def test_unbatched_inputs(self, case):
        layer = self.create(case)
        data = draw(case.input_shape)
        close(layer(data[0]), layer(data)[0], EXACT)

    def test_channels_last(self, case):
        layer, data = self.create(case), draw(case.input_shape)
        expected = layer(data)
        layer = layer.to(memory_format=torch.channels_last)
        close(layer(data.to(memory_format=torch.channels_last)), expected, EXACT)

    def test_inputs_that_are_views(self, case):
        layer, data = self.create(case), draw(case.input_shape)
        expected = layer(data)
        close(layer(data.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)), expected, EXACT)
        close(layer(torch.stack([data, data], 0)[1]), expected, EXACT)

    def test_wrong_channels_are_refused(self, case):
        with pytest.raises(RuntimeError, match=r"shape|size|channels"):
            self.create(case)(draw((2, case.spec.kernel_shape[1] + 1, 9, 11)))


class LinearCases:
    def dense(self, case: Case) -> nn.Linear:
        out_features, in_features = case.spec.kernel_shape
        return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=case.bias, dtype=torch.float64)

    def create(self, case: Case) -> SeKronLinear:
        layer = SeKronLinear(case.spec, bias=case.bias, dtype=torch.float64)
        randomise(layer)
        return layer


class TestLinear(LinearCases, LayerLife):
    CASES = tuple(
        Case(spec, shape, bias)
        for spec, shape, bias in (
            (SeKronSpec(((6, 8),)), (3, 8), True),
            (SeKronSpec(((6, 1), (1, 8)), (3,)), (3, 8), True),
            (SeKronSpec(((1, 8), (6, 1)), (1,)), (3, 8), False),
            (SeKronSpec(((2, 4), (3, 2)), (4,)), (3, 5, 8), True),
            (SeKronSpec(((3, 2), (2, 4)), (4,)), (2, 3, 2, 8), False),
            (SeKronSpec(((2, 2), (3, 2), (1, 2)), (2, 3)), (3, 8), True),
            (SeKronSpec(((1, 2), (3, 2), (2, 2)), (2, 2)), (2, 3, 8), True),
            (SeKronSpec(((3, 1), (2, 2), (1, 4)), (3, 2)), (3, 8), False),
            (SeKronSpec(((2, 2), (1, 2), (3, 1), (1, 2)), (2, 2, 2)), (3, 2, 8), True),
            (SeKronSpec(((2, 2), (3, 2), (1, 2)), (2, 3), run=((1,), (2,), (0,))), (3, 8), True),
            (SeKronSpec(((3, 2), (2, 4)), (4,), run=((0, 1),)), (3, 5, 8), True),
        )
    )

    def test_leading_dimensions(self, case):
        layer = self.create(case)
        rows = draw((12, 8))
        expected = layer(rows)
        for shape in ((3, 4), (2, 3, 2), (1, 12, 1), (12, 1)):
            close(layer(rows.reshape(*shape, 8)), expected.reshape(*shape, 6), EXACT)
        close(layer(rows[0]), expected[0], EXACT)
        close(layer(rows.reshape(3, 4, 8).transpose(0, 1)), expected.reshape(3, 4, 6).transpose(0, 1), EXACT)


class TestLinearRuns(LinearCases, LayerConformance):
    CASES = tuple(
        Case(spec, (2, 3, 8), j % 2 == 0)
        for spec in (
            SeKronSpec(((2, 4), (3, 2)), (4,)),
            SeKronSpec(((2, 2), (3, 2), (1, 2)), (2, 3)),
            SeKronSpec(((3, 1), (2, 2), (1, 4)), (3, 2)),
            SeKronSpec(((3, 1), (2, 2), (1, 4)), (3, 2), "chain"),
            SeKronSpec(((2, 2), (1, 2), (3, 1), (1, 2)), (2, 2, 2)),
            SeKronSpec(((2, 2), (1, 2), (3, 1), (1, 2)), (3, 3, 2), "chain"),
        )
        for j, spec in enumerate(every_run(spec))
    )


@given(data=st.data(), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=60)
def test_random_convolutions(data, seed, draw_spec, indexed_kernel):
    spec = draw_spec(data.draw, entries=150, couplings=("tree", "chain"))
    spec = data.draw(st.sampled_from(list(every_run(spec))))
    extent = spec.kernel_shape[2:]
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    spans = [d * (k - 1) for d, k in zip(dilation, extent, strict=True)]
    size = tuple(span + 2 + data.draw(st.integers(0, 4)) for span in spans)  # enough for every padding mode
    padding = tuple(data.draw(st.integers(0, n - 1)) for n in size)
    if stride == (1, 1) and data.draw(st.booleans()):
        padding = data.draw(st.sampled_from(["same", "valid"]))
    options = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode}
    cases = TestConvGrid()
    case = conv_case(spec, options, bias=data.draw(st.booleans()), size=size)
    layer = cases.create(case)
    randomise(layer, seed)
    inputs = draw(case.input_shape, seed)
    expected = cases.dense_forward(case, layer, list(layer.factors), layer.bias, inputs, indexed_kernel)
    close(layer(inputs), expected, EXACT)


@given(data=st.data(), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_random_linear_layers(data, seed, draw_spec, indexed_kernel):
    spec = draw_spec(data.draw, modes=2, couplings=("tree", "chain"))
    spec = data.draw(st.sampled_from(list(every_run(spec))))
    cases = TestLinear()
    leading = data.draw(st.lists(st.integers(1, 3), max_size=3))
    case = Case(spec, (*leading, spec.kernel_shape[1]), data.draw(st.booleans()))
    layer = cases.create(case)
    randomise(layer, seed)
    inputs = draw(case.input_shape, seed)
    expected = cases.dense_forward(case, layer, list(layer.factors), layer.bias, inputs, indexed_kernel)
    close(layer(inputs), expected, EXACT)


def small_conv(**options: Any) -> nn.Conv2d:
    conv = nn.utils.skip_init(nn.Conv2d, 4, 8, 3, **options)
    randomise(conv)
    return conv


def test_the_call_of_the_readme():
    conv = nn.utils.skip_init(nn.Conv2d, 64, 64, 3, padding=1, stride=2, dtype=torch.float64)
    randomise(conv)
    spec = SeKronSpec(factor_shapes=((32, 32, 1, 1), (2, 2, 3, 3)), ranks=(4,))
    factors = decompose(conv.weight, spec)
    kernel = reconstruct(factors, spec)
    layer = SeKronConv2d.from_conv(conv, spec)
    assert [tuple(factor.shape) for factor in factors] == [(4, 32, 32, 1, 1), (4, 2, 2, 3, 3)]
    close(layer.kernel, kernel, EXACT)
    data = draw((2, 64, 5, 6))
    dense = layer.to_conv()
    assert type(dense) is nn.Conv2d
    close(dense.weight, kernel, EXACT)
    close(dense(data), layer(data), EXACT)


def test_one_factor_is_the_same_layer_to_the_bit():
    conv = small_conv(padding=1)
    layer = SeKronConv2d.from_conv(conv, SeKronSpec(((8, 4, 3, 3),)))
    data = draw((2, 4, 6, 7), dtype=torch.float32)
    assert torch.equal(layer(data), conv(data))
    linear = nn.utils.skip_init(nn.Linear, 4, 8)
    randomise(linear)
    data = draw((2, 3, 4), dtype=torch.float32)
    assert torch.equal(SeKronLinear.from_linear(linear, SeKronSpec(((8, 4),)))(data), linear(data))


@pytest.mark.parametrize(
    ("shapes", "ranks"),
    [
        (((8, 1, 3, 1), (1, 4, 1, 3)), (4 * 3,)),
        (((2, 2, 1, 1), (4, 2, 3, 3)), (2 * 2,)),
        (((8, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1)), (8, 4)),
    ],
)
def test_full_ranks_are_the_same_layer(shapes, ranks):
    conv = small_conv(padding=1, dtype=torch.float64)
    layer = SeKronConv2d.from_conv(conv, SeKronSpec(shapes, ranks))
    data = draw((2, 4, 6, 7))
    close(layer(data), conv(data), EXACT if len(ranks) == 1 else 1e-6)  # a joint fit stops near rounding


def test_kernels_are_formed_in_the_factors_precision_and_only_inside(monkeypatch):
    layer = SeKronConv2d.from_conv(nn.Conv2d(4, 6, 3), SeKronSpec(((6, 1, 1, 1), (1, 4, 3, 3)), (3,)))
    data = draw((1, 4, 5, 5), dtype=torch.float32)
    weights: list[Tensor] = []
    conv2d = SeKronConv2d.convolve

    def spy(data: Tensor, weight: Tensor, *others: Any) -> Tensor:
        weights.append(weight)
        return conv2d(data, weight, *others)

    monkeypatch.setattr(SeKronConv2d, "convolve", staticmethod(spy))
    with torch.autocast("cpu", dtype=torch.bfloat16), kernels_formed(layer):
        layer(data)
    assert [tuple(weight.shape) for weight in weights] == [(6, 4, 3, 3)]
    assert weights[0].dtype == torch.float32
    with pytest.raises(RuntimeError, match="channels"), kernels_formed(layer):
        layer(data[:, :3])
    weights.clear()
    layer(data)
    assert len(weights) == 2


def test_weights_of_stages_are_formed_in_the_factors_precision_too():
    spec = SeKronSpec(((64, 1, 1, 1), (1, 1, 3, 3), (1, 64, 1, 1)), (16, 1))
    layer = SeKronConv2d.empty(nn.Conv2d(64, 64, 3), spec)
    for factor in layer.factors:
        nn.init.normal_(factor)
    merged = torch.einsum("rhw,rc->rchw", layer.factors[1].reshape(16, 3, 3), layer.factors[2].reshape(16, 64))
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16), kernels_formed(layer, dtype, {"": ((1, 2), (0,))}):
            (first, inner), (last, outer) = layer._formed
            assert layer(draw((1, 64, 5, 5), dtype=torch.float32)).dtype == torch.bfloat16
        assert (first.factors, last.factors) == ((1, 2), (0,))
        assert inner.dtype == outer.dtype == (dtype or torch.float32)
        assert torch.equal(inner, merged.to(inner.dtype))
    assert layer._formed is None


def test_formed_kernels_are_there_only_inside_and_not_in_copies():
    layer = SeKronConv2d.from_conv(nn.Conv2d(4, 6, 3), SeKronSpec(((6, 1, 1, 1), (1, 4, 3, 3)), (3,)))
    with kernels_formed(layer):
        formed = layer._formed
        with kernels_formed(nn.Sequential(layer)):
            assert layer._formed is formed
        assert layer._formed is formed
        assert copy.deepcopy(layer)._formed is None
    assert layer._formed is None


@pytest.mark.parametrize("coupling", ["tree", "chain"])
@pytest.mark.parametrize("extent", [(3, 1), (1, 3), (3, 3)])
def test_formed_kernels_of_groups_are_right_on_images_with_their_channels_last(coupling, extent):
    """Torch's grouped convolution misreads a weight of which an axis of one entry has the stride 1."""
    conv = nn.utils.skip_init(nn.Conv2d, 12, 12, extent, groups=3, padding=(extent[0] // 2, extent[1] // 2))
    spec = SeKronSpec(((12, 1, 1, 1), (1, 1, *extent), (1, 4, 1, 1)), (2, 2), coupling)
    layer = SeKronConv2d.empty(conv, spec)
    randomise(layer)
    data = draw((2, 12, 6, 7), dtype=torch.float32)
    found = []
    for images in (data, data.to(memory_format=torch.channels_last)):
        with kernels_formed(layer):
            outputs = layer(images)
            gradients = torch.autograd.grad(outputs.square().mean(), list(layer.factors))
        found.append([outputs, *gradients])
    for plain, last in zip(*found, strict=True):
        close(last, plain, 1e-4 * float(plain.detach().abs().max()))


def test_where_forming_fails_no_kernel_stays():
    spec = SeKronSpec(((4, 1, 1, 1), (1, 4, 3, 3)), (2,))
    layers = nn.Sequential(*(SeKronConv2d.empty(nn.utils.skip_init(nn.Conv2d, 4, 4, 3), spec) for _ in range(2)))
    with pytest.raises(SpecError, match="a run of 2 factors"), kernels_formed(layers, runs={"1": ((0,), (2,))}):
        raise AssertionError
    assert [layer._formed for layer in layers] == [None, None]


def test_pruned_factors_and_those_of_replicas_are_used():
    layer = SeKronLinear(SeKronSpec(((4, 4), (4, 4)), (3,)))
    randomise(layer)
    data = draw((5, 16), dtype=torch.float32)
    replica, factors = layer._replicate_for_data_parallel(), layer.factors._replicate_for_data_parallel()
    for name, factor in layer.factors._parameters.items():  # as torch.nn.parallel.replicate does
        setattr(factors, name, factor * 1)
    replica.factors, replica.bias = factors, layer.bias * 1
    for training in (True, False):
        close(replica.train(training)(data), layer.to_linear()(data), 1e-5)
    prune.l1_unstructured(layer.factors, "0", 0.9)
    for training in (True, False):
        close(layer.train(training)(data), data @ layer.kernel.T + layer.bias, 1e-5)


@pytest.mark.parametrize("geometry", [Geometry(), Geometry((1,), (1,), ((0, 0),)), Geometry((1, 1), (1, 1), ((0, 0),))])
def test_geometries_of_other_axes_are_refused(geometry):
    with pytest.raises(SpecError, match="a 2-d convolution takes a geometry of 2 axes"):
        SeKronConv2d(SeKronSpec(((8, 4, 3, 3),)), geometry)


def test_groups_that_the_first_factor_does_not_hold_are_refused():
    spec = SeKronSpec(((4, 1, 1, 1), (2, 2, 3, 3)), (1,))
    SeKronConv2d.from_conv(small_conv(groups=2), spec)
    with pytest.raises(SpecError, match="has 2 out channels, which a layer of 4 groups can't divide"):
        SeKronConv2d.from_conv(small_conv(groups=4), SeKronSpec(((2, 1, 1, 1), (4, 1, 3, 3)), (1,)))


def test_transposed_convolutions_and_those_of_other_axes_are_refused():
    spec = SeKronSpec(((4, 8, 3, 3),))
    for conv in (nn.utils.skip_init(nn.ConvTranspose2d, 4, 8, 3), nn.utils.skip_init(nn.Conv1d, 8, 4, 9)):
        with pytest.raises(SpecError, match=f"made from a Conv2d, not from {type(conv).__name__}"):
            SeKronConv2d.from_conv(conv, spec)


def test_specs_of_other_kernels_are_refused():
    with pytest.raises(SpecError, match="not to the kernel's shape"):
        SeKronConv2d.from_conv(small_conv(), SeKronSpec(((4, 8, 3, 3),)))
    with pytest.raises(SpecError, match="not to the kernel's shape"):
        SeKronLinear.from_linear(nn.utils.skip_init(nn.Linear, 4, 8), SeKronSpec(((4, 8),)))
    with pytest.raises(SpecError, match=r"a kernel of 4 modes, .* has 2"):
        SeKronConv2d(SeKronSpec(((4, 8),)), Geometry((1, 1), (1, 1), ((0, 0), (0, 0))))
    with pytest.raises(SpecError, match=r"a kernel of 2 modes, .* has 4"):
        SeKronLinear(SeKronSpec(((4, 8, 3, 3),)))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_padding_mode_is_kept_whatever_the_geometry_says(mode):
    geometry = Geometry((1, 1), (1, 1), ((1, 1), (1, 1)))
    layer = SeKronConv2d(SeKronSpec(((8, 4, 3, 3),)), geometry, padding_mode=mode)
    randomise(layer)
    conv = small_conv(padding=1, padding_mode=mode)
    conv.load_state_dict({"weight": layer.kernel, "bias": layer.bias})
    data = draw((1, 4, 6, 7), dtype=torch.float32)
    close(layer(data), conv(data), ROUNDING[torch.float32])


def test_uneven_padding_is_kept_whatever_the_geometry_says():
    geometry = Geometry((2, 1), (1, 1), ((2, 0), (0, 1)))
    layer = SeKronConv2d(SeKronSpec(((8, 4, 3, 3),)), geometry, dtype=torch.float64)
    randomise(layer)
    data = draw((1, 4, 6, 7))
    padded = torch.zeros(1, 4, 2 + 6, 7 + 1, dtype=torch.float64)
    padded[:, :, 2:, :7] = data
    expected = nn.functional.conv2d(padded, layer.kernel, layer.bias, stride=(2, 1))
    close(layer(data), expected, EXACT)
    for ask in (layer.to_conv, lambda: layer.padding):
        with pytest.raises(SpecError, match=r"padding \(\(2, 0\), \(0, 1\)\)"):
            ask()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("formed", [False, True])
def test_gradients_of_a_pixel_of_few_channels_under_a_stride(last, formed):
    """Without care for it torch crashes here, or gives any gradient: 112 x 112 are enough for oneDNN's issue 6035."""
    spec = SeKronSpec(((32, 1, 1, 1), (1, 13, 1, 1)), (5,))
    layer = SeKronConv2d(spec, Geometry((2, 1), (1, 1), ((0, 0), (0, 0))))
    randomise(layer)
    reference = copy.deepcopy(layer).double()
    data = draw((2, 13, 112, 112), dtype=torch.float32)
    reference(data.double()).square().mean().backward()
    if last:
        data = data.contiguous(memory_format=torch.channels_last)
    with kernels_formed(layer) if formed else nullcontext():
        layer(data).square().mean().backward()
    for found, expected in zip(layer.parameters(), reference.parameters(), strict=True):
        close(found.grad, expected.grad.float(), ROUNDING[torch.float32])


def test_training_mode_and_frozen_weights_are_taken_over():
    spec = SeKronSpec(((8, 1, 1, 1), (1, 4, 3, 3)), (2,))
    conv = small_conv().eval()
    conv.weight.requires_grad_(False)
    layer = SeKronConv2d.from_conv(conv, spec)
    assert not layer.training
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
        "bias": True,
        "factors.0": False,
        "factors.1": False,
    }
    assert torch.equal(layer.bias, conv.bias)
    assert layer.bias.data_ptr() != conv.bias.data_ptr()
    back = layer.to_conv()
    assert not back.training
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {"weight": False, "bias": True}
    layer.bias.requires_grad_(False)
    layer.factors[1].requires_grad_(True)
    back = layer.to_conv()
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {"weight": True, "bias": False}
    conv.weight.requires_grad_(True)
    assert all(p.requires_grad for p in SeKronConv2d.from_conv(conv, spec).parameters())


def test_one_factor_does_not_share_memory_with_the_dense_layer():
    conv = small_conv()
    layer = SeKronConv2d.from_conv(conv, SeKronSpec(((8, 4, 3, 3),)))
    with torch.no_grad():
        layer.factors[0].zero_()
    assert bool(conv.weight.all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_dtype_of_the_dense_layer_is_kept(dtype):
    spec = SeKronSpec(((8, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1)), (2, 1))
    layer = SeKronConv2d.from_conv(small_conv().to(dtype), spec)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.to_conv().weight.dtype == dtype


def test_no_stage_forms_the_kernel_of_a_linear_layer():
    """Rank-one factors of a layer whose dense weight would take 32 GiB."""
    n = 2**8
    spec = SeKronSpec(((n, n), (n, n)), (1,))
    layer = SeKronLinear(spec, bias=False)
    with torch.no_grad():
        for factor in layer.factors:
            factor.copy_(torch.eye(n))
    data = draw((1, n * n), dtype=torch.float32)
    assert torch.equal(layer(data), data)
    assert np.prod(spec.kernel_shape) == 2**32
