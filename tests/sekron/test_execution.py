"""Stages and their costs, against exact formulas, torch's counter and fvcore's."""

import math
import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kronsearch.sekron import Geometry, SeKronConv2d, SeKronLinear, SeKronSpec, count_macs, dense_macs, plan_run
from kronsearch.sekron.convolution import conv_geometry
from kronsearch.sekron.execution import plan_stages


def geometry_of(*, stride=(1, 1), dilation=(1, 1), padding=(0, 0), padded_first=False):
    return Geometry(stride, dilation, tuple((p, p) for p in padding), padded_first)


def torch_macs(layer, data):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(data)
    return counter.get_total_flops() // 2  # it counts a multiply-accumulate as two


def fvcore_macs(layer, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports, and of the jit tracer about sizes that become constants
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(layer, data).unsupported_ops_warnings(False)
        macs = analysis.total()
    # of sizes, the bias, and merged factors
    assert set(analysis.unsupported_ops()) <= {"aten::pad", "aten::add", "aten::mul", "aten::addcmul"}
    return macs


# F, C, height and width of the kernel, ranks, height and width of input and output
F, C, KH, KW, H, W = 16, 12, 3, 5, 10, 14
SAME = geometry_of(padding=(KH // 2, KW // 2))


def test_a_dense_convolution():
    assert dense_macs((F, C, KH, KW), SAME, (H, W)) == F * C * KH * KW * H * W
    assert dense_macs((F, C, KH, KW), geometry_of(), (H, W)) == F * C * KH * KW * (H - KH + 1) * (W - KW + 1)
    strided = geometry_of(stride=(2, 2), padding=(KH // 2, KW // 2))
    assert dense_macs((F, C, KH, KW), strided, (H, W)) == F * C * KH * KW * (H // 2) * (W // 2)


def test_a_dense_linear_layer():
    assert dense_macs((F, C), Geometry(), (1,)) == F * C
    assert dense_macs((F, C), Geometry(), (7,)) == 7 * F * C


def test_the_spatial_split():
    """(F,1,KH,1)(1,C,1,KW): first 1×KW from C to R, then KH×1 from R to F."""
    R = 7
    spec = SeKronSpec(((F, 1, KH, 1), (1, C, 1, KW)), (R,))
    assert count_macs(spec, SAME, (H, W)) == H * W * (R * C * KW + F * R * KH)
    strided = geometry_of(stride=(2, 2), padding=(KH // 2, KW // 2))
    # the stride along the width belongs to the first stage, that along the height to the second
    expected = H * (W // 2) * R * C * KW + (H // 2) * (W // 2) * F * R * KH
    assert count_macs(spec, strided, (H, W)) == expected


def test_cp_is_pointwise_depthwise_pointwise():
    R = 9
    spec = SeKronSpec(((F, 1, 1, 1), (1, 1, KH, KW), (1, C, 1, 1)), (R, 1))
    assert count_macs(spec, SAME, (H, W)) == H * W * (C * R + R * KH * KW + R * F)
    strided = geometry_of(stride=(2, 2), padding=(KH // 2, KW // 2))
    assert count_macs(spec, strided, (H, W)) == H * W * C * R + (H // 2) * (W // 2) * (R * KH * KW + R * F)


def test_tucker_like():
    """(F,1,1,1)(1,1,KH,KW)(1,C,1,1) with ranks (T1, T2): C to T1·T2, a grouped convolution to T1, then to F."""
    T1, T2 = 5, 4
    spec = SeKronSpec(((F, 1, 1, 1), (1, 1, KH, KW), (1, C, 1, 1)), (T1, T2))
    assert count_macs(spec, SAME, (H, W)) == H * W * (C * T1 * T2 + T1 * T2 * KH * KW + T1 * F)


def test_a_bottleneck_with_the_kernel_behind():
    R = 6
    spec = SeKronSpec(((F, 1, KH, KW), (1, C, 1, 1)), (R,))
    assert count_macs(spec, SAME, (H, W)) == H * W * (C * R + R * F * KH * KW)


def test_a_mixing_pair():
    """(4,3,1,1)(4,4,KH,KW): the second factor on each of the 3 digits of the inputs, then the first on 4 outputs."""
    R = 5
    spec = SeKronSpec(((4, 3, 1, 1), (4, 4, KH, KW)), (R,))
    assert count_macs(spec, SAME, (H, W)) == H * W * (3 * (4 * R) * 4 * KH * KW + 4 * (4 * R * 3))


def test_a_linear_pair():
    R, tokens = 5, 11
    spec = SeKronSpec(((4, 3), (4, 4)), (R,))
    assert count_macs(spec, Geometry(), (tokens,)) == tokens * (3 * (4 * R) * 4 + 4 * (4 * R * 3))


def test_a_single_tap_is_not_dilated():
    """Torch runs a dilated convolution of one tap many times slower than one that is not."""
    spec = SeKronSpec(((F, 1, 1, 1), (1, 1, KH, 1), (1, C, 1, KW)), (4, 2))
    stages = plan_stages(spec, geometry_of(dilation=(2, 3), padding=(2, 2)))
    assert [stage.geometry.dilation for stage in stages] == [(1, 3), (2, 1), (1, 1)]


def test_padding_beforehand_is_seen_by_every_stage():
    R = 7
    spec = SeKronSpec(((F, 1, KH, 1), (1, C, 1, KW)), (R,))
    beforehand = geometry_of(padding=(KH // 2, KW // 2), padded_first=True)
    expected = (H + 2 * (KH // 2)) * W * R * C * KW + H * W * F * R * KH
    assert count_macs(spec, beforehand, (H, W)) == expected


def test_a_stage_by_stage_plan():
    spec = SeKronSpec(((F, 1, KH, 1), (1, C, 1, KW)), (7,))
    first, second = plan_stages(spec, geometry_of(stride=(2, 3), dilation=(1, 2), padding=(1, 4)))
    assert (first.factors, first.batch, first.groups, first.group_in, first.group_out) == ((1,), 1, 1, C, 7)
    assert (first.extent, first.geometry) == ((1, KW), Geometry((1, 3), (1, 2), ((0, 0), (4, 4))))
    assert (second.factors, second.batch, second.groups, second.group_in, second.group_out) == ((0,), 1, 1, 7, F)
    assert (second.extent, second.geometry) == ((KH, 1), Geometry((2, 1), (1, 1), ((1, 1), (0, 0))))


def test_taps_of_an_earlier_factor_lie_as_far_apart_as_the_later_ones_are_wide():
    spec = SeKronSpec(((2, 1, 2, 3), (1, 2, 3, 1), (2, 2, 2, 2)), (2, 1))
    dilations = [stage.geometry.dilation for stage in plan_stages(spec, geometry_of(dilation=(1, 2)))]
    assert dilations == [(1, 2), (2, 1), (2 * 3, 2 * 2 * 1)]  # the second factor has one tap along the width


def test_a_pointwise_layer_is_strided_and_padded_at_once():
    spec = SeKronSpec(((4, 3, 1, 1), (4, 4, 1, 1)), (2,))
    first, second = plan_stages(spec, geometry_of(stride=(2, 2), padding=(1, 1)))
    assert first.geometry == geometry_of(stride=(2, 2), padding=(1, 1))
    assert second.geometry == geometry_of()


SPECS = (
    SeKronSpec(((6, 4, 3, 2),)),
    SeKronSpec(((6, 1, 3, 1), (1, 4, 1, 2)), (3,)),
    SeKronSpec(((1, 4, 3, 2), (6, 1, 1, 1)), (3,)),
    SeKronSpec(((2, 2, 1, 1), (3, 2, 3, 3)), (3,)),
    SeKronSpec(((3, 2, 2, 3), (2, 2, 1, 1)), (2,)),
    SeKronSpec(((6, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1)), (5, 2)),
    SeKronSpec(((3, 2, 1, 2), (1, 2, 2, 1), (2, 1, 1, 2)), (2, 2)),
    SeKronSpec(((2, 1, 2, 1), (1, 2, 1, 2), (3, 1, 1, 1), (1, 2, 1, 2)), (2, 1, 2)),
)
OPTIONS = (
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 3), "dilation": (2, 1), "padding": (2, 1)},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": 2, "stride": (2, 1), "padding_mode": "circular"},
)


@pytest.mark.parametrize(("spec", "options"), list(product(SPECS, OPTIONS)), ids=str)
def test_three_counts_of_a_convolution_agree(spec, options):
    out_channels, in_channels, *extent = spec.kernel_shape
    dense = nn.utils.skip_init(nn.Conv2d, in_channels, out_channels, tuple(extent), **options)
    geometry = conv_geometry(dense)
    layer = SeKronConv2d(spec, geometry, padding_mode=dense.padding_mode)
    data = torch.zeros(1, in_channels, 9, 12)
    macs = count_macs(spec, geometry, (9, 12))
    assert macs == torch_macs(layer, data) == fvcore_macs(layer, data)
    assert 3 * macs == torch_macs(layer, torch.zeros(3, in_channels, 9, 12))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
        assert dense_macs(spec.kernel_shape, geometry, (9, 12)) == torch_macs(dense, data)


@pytest.mark.parametrize("coupling", ["tree", "chain"])
@pytest.mark.parametrize(("spec", "options"), [(spec, OPTIONS[i % 5]) for i, spec in enumerate(SPECS[1:])], ids=str)
def test_three_counts_of_other_orders_and_of_mergers_agree(spec, options, coupling):
    out_channels, in_channels, *extent = spec.kernel_shape
    dense = nn.utils.skip_init(nn.Conv2d, in_channels, out_channels, tuple(extent), **options)
    geometry = conv_geometry(dense)
    data, last = torch.zeros(1, in_channels, 9, 12), spec.sequence_length - 1
    ascending = tuple((k,) for k in range(last + 1))
    front, back, whole = tuple(range(last)), tuple(range(1, last + 1)), tuple(range(last + 1))
    for run in (ascending, (whole,), (back, (0,)), ((last,), front)):
        other = replace(spec, coupling=coupling, run=run)
        layer = SeKronConv2d(other, geometry, padding_mode=dense.padding_mode)
        assert count_macs(other, geometry, (9, 12)) == torch_macs(layer, data) == fvcore_macs(layer, data)


@pytest.mark.parametrize(
    ("spec", "options"), list(product((*SPECS, *(replace(s, coupling="chain") for s in SPECS[5:])), OPTIONS)), ids=str
)
def test_three_counts_of_planned_layers_agree(spec, options):
    out_channels, in_channels, *extent = spec.kernel_shape
    dense = nn.utils.skip_init(nn.Conv2d, in_channels, out_channels, tuple(extent), **options)
    geometry = conv_geometry(dense)
    planned = plan_run(spec, geometry, [(9, 12)])
    layer = SeKronConv2d(planned, geometry, padding_mode=dense.padding_mode)
    data = torch.zeros(1, in_channels, 9, 12)
    macs = count_macs(planned, geometry, (9, 12))
    assert macs == torch_macs(layer, data) == fvcore_macs(layer, data)
    assert 3 * macs == torch_macs(layer, torch.zeros(3, in_channels, 9, 12))
    assert macs <= count_macs(spec, geometry, (9, 12))


@pytest.mark.parametrize(
    "spec",
    [
        SeKronSpec(((6, 8),)),
        SeKronSpec(((6, 1), (1, 8)), (3,)),
        SeKronSpec(((2, 4), (3, 2)), (4,)),
        SeKronSpec(((2, 2), (3, 2), (1, 2)), (2, 3)),
        SeKronSpec(((2, 2), (1, 2), (3, 1), (1, 2)), (2, 2, 2)),
        SeKronSpec(((2, 4), (3, 2)), (4,), run=((0,), (1,))),
        SeKronSpec(((2, 4), (3, 2)), (4,), run=((0, 1),)),
        SeKronSpec(((2, 2), (1, 2), (3, 1), (1, 2)), (2, 2, 2), run=((1, 2), (3,), (0,))),
        SeKronSpec(((2, 2), (1, 2), (3, 1), (1, 2)), (2, 2, 2), "chain", ((1,), (2, 3), (0,))),
    ],
    ids=str,
)
def test_three_counts_of_a_linear_layer_agree(spec):
    layer, data = SeKronLinear(spec), torch.zeros(1, 5, 8)
    assert count_macs(spec, Geometry(), (5,)) == torch_macs(layer, data) == fvcore_macs(layer, data)


def naive_positions(size, padding, dilation, extent, stride):
    """Count the places at which a kernel lies inside of the padded input."""
    first = range(-padding[0], size + padding[1], stride)
    return sum(1 for start in first if start + dilation * (extent - 1) < size + padding[1])


@given(
    size=st.integers(1, 30),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.integers(1, 3),
    extent=st.integers(1, 5),
    stride=st.integers(1, 4),
)
@settings(deadline=None)
def test_output_sizes_are_the_places_of_the_kernel(size, padding, dilation, extent, stride):
    if size + sum(padding) > dilation * (extent - 1):
        found = Geometry((stride,), (dilation,), (padding,)).output_size((size,), (extent,))
        assert found == (naive_positions(size, padding, dilation, extent, stride),)


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_random_specs_keep_the_output_size_and_the_params(data, draw_spec):
    spec = draw_spec(data.draw)
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation = data.draw(pairs), data.draw(pairs)
    padding = tuple(data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3))) for _ in range(2))
    geometry = Geometry(stride, dilation, padding, data.draw(st.booleans()))
    extent = spec.kernel_shape[2:]
    size = tuple(d * (k - 1) + data.draw(st.integers(1, 9)) for d, k in zip(dilation, extent, strict=True))
    positions = tuple(
        naive_positions(n, p, d, k, s) for n, p, d, k, s in zip(size, padding, dilation, extent, stride, strict=True)
    )
    assert geometry.output_size(size, extent) == positions
    stages = plan_stages(spec, geometry)
    assert [stage.factors for stage in stages] == [(k,) for k in reversed(range(spec.sequence_length))]
    here = size
    if geometry.padded_first:
        here = tuple(n + sum(p) for n, p in zip(size, padding, strict=True))
    for stage in stages:
        here = stage.geometry.output_size(here, stage.extent)
        assert min(here) >= 1
    assert here == positions
    weights = [stage.groups * stage.group_out * stage.group_in * math.prod(stage.extent) for stage in stages]
    assert sum(weights) == spec.params
    # every weight is used at each output position; a stage before the padding has as many as the input at most
    fewest = math.prod(map(min, size, positions))
    assert count_macs(spec, geometry, size) >= spec.params * fewest
    if spec.sequence_length == 1:
        assert count_macs(spec, geometry, size) == math.prod(spec.kernel_shape) * math.prod(positions)
