"""The planner against all orders and mergers, costed by the labels of sums of products instead of by stages."""

from dataclasses import replace
from itertools import product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsearch.errors import SpecError
from kronsearch.sekron import Geometry, SeKronSpec, count_macs, dense_macs, plan_run
from kronsearch.sekron.planning import StepPrices, merging_macs, plan_training
from kronsearch.training.stages import AVX2, PRICES

F, C, H, W = 16, 12, 8, 10


def geometry_of(*, stride=(1, 1), dilation=(1, 1), padding=(0, 0), padded_first=False, groups=1):
    return Geometry(stride, dilation, tuple((p, p) for p in padding), padded_first, groups)


SAME = geometry_of(padding=(1, 1))


def ranks_of(spec, k):
    """Return the names and extents of the indices of a factor."""
    first = 0 if spec.coupling == "tree" else max(k - 1, 0)
    return {f"r{i}": spec.ranks[i] for i in range(first, min(k + 1, spec.sequence_length - 1))}


class Walk:
    """All ways to multiply an input by the factors one after the other, or by merged ones.

    Every dimension has a label. A product has all labels of both operands, and takes as many multiplications at each
    position; then those that no factor to come has, nor the output, are summed.
    """

    def __init__(self, spec, geometry, size):
        self.spec, self.geometry = spec, geometry
        self.extents = {"g": geometry.groups}
        self.labels = []
        for k, (out_channels, in_channels, *_) in enumerate(spec.factor_shapes):
            own = {f"c{k}": in_channels, f"f{k}": out_channels // (geometry.groups if k == 0 else 1)}
            own |= ranks_of(spec, k)
            self.extents |= own
            self.labels.append({*own, *(["g"] if k == 0 else [])})
        padded = [n + sum(p) for n, p in zip(size, geometry.padding, strict=True)]
        self.start = tuple(padded if geometry.padded_first else size)
        self.ways = list(self._ways(frozenset(), {"g", *(f"c{k}" for k in range(len(self.labels)))}, self.start))

    def entries(self, labels):
        return prod(self.extents[label] for label in labels)

    def taps(self, factors, axis):
        return prod(self.spec.factor_shapes[k][2 + axis] for k in factors)

    def _ways(self, done, data, size):
        """Yield (MACs, those of merging, the largest result in between, run) of all ways to go on."""
        length = len(self.labels)
        for first, last in product(range(length), repeat=2):
            group = set(range(first, last + 1))
            if not group or group & done:
                continue
            others = [k for k in range(length) if k not in done and k not in group]
            needed = {label for k in others for label in self.labels[k]}
            outside = set().union(needed, *(self.labels[k] for k in done))
            own = set().union(*(self.labels[k] for k in group))
            own = {label for label in own if label[0] in "cfg" or label in outside}  # the other sums are merged
            positions = self.positions(size, done, group, others)
            together = data | own
            macs = self.entries(together) * prod(positions) * prod(self.taps(group, a) for a in range(len(size)))
            left = {label for label in together if label[0] in "fg" or label in needed}
            merging = self.merging(group, outside)
            if not others:
                yield macs, merging, 0, (tuple(group),)
            for more, more_merging, largest, run in self._ways(done | group, left, positions):
                largest = max(largest, self.entries(left) * prod(positions))
                yield macs + more, merging + more_merging, largest, (tuple(sorted(group)), *run)

    def merging(self, group, outside):
        """Count the multiplications of merging a group, its last factor first."""
        total, merged, entries = 0, set(), 1
        for k in sorted(group, reverse=True):
            ranks = {label for label in self.labels[k] if label[0] == "r"}
            entries *= prod(self.spec.factor_shapes[k])
            if k != max(group):
                total += self.entries(merged | ranks) * entries
            before = {label for j in group if j < k for label in self.labels[j]}
            merged = {label for label in merged | ranks if label in outside | before}
        return total

    def positions(self, size, done, group, others):
        """Count the positions of a stage, by axis."""
        counts = []
        for axis, n in enumerate(size):
            before, taps, after = (self.taps(those, axis) for those in (done, group, others))
            everywhere_one = before == taps == after == 1
            pad = step = 0
            if (taps > 1 and before == 1) or (everywhere_one and not done):
                pad = 0 if self.geometry.padded_first else sum(self.geometry.padding[axis])
            if (taps > 1 and after == 1) or (everywhere_one and not done):
                step = self.geometry.stride[axis]
            spread = self.geometry.dilation[axis] * self.taps(range(max(group) + 1, len(self.labels)), axis)
            counts.append(len(range(0, n + pad - spread * (taps - 1), step or 1)))
        return tuple(counts)

    def fewest(self, most):
        """Return the fewest MACs, those of merging included, where no result is larger."""
        return min(macs + merging for macs, merging, largest, _ in self.ways if largest <= most)


SPECS = (
    SeKronSpec(((F, C, 3, 3),)),
    SeKronSpec(((F, 1, 3, 1), (1, C, 1, 3)), (5,)),
    SeKronSpec(((1, C, 3, 3), (F, 1, 1, 1)), (3,)),
    SeKronSpec(((2, 6, 1, 1), (8, 2, 3, 3)), (3,)),
    SeKronSpec(((8, 2, 3, 3), (2, 6, 1, 1)), (9,)),
    SeKronSpec(((F, 1, 1, 1), (1, 1, 3, 3), (1, C, 1, 1)), (5, 1)),
    SeKronSpec(((F, 1, 1, 1), (1, 1, 3, 3), (1, C, 1, 1)), (4, 9)),
    SeKronSpec(((F, 1, 1, 1), (1, 1, 3, 3), (1, C, 1, 1)), (4, 9), "chain"),
    SeKronSpec(((1, C, 1, 1), (4, 1, 3, 1), (4, 1, 1, 3)), (3, 2)),
    SeKronSpec(((1, C, 1, 1), (4, 1, 3, 1), (4, 1, 1, 3)), (3, 2), "chain"),
    SeKronSpec(((4, 3, 1, 1), (2, 2, 3, 1), (2, 2, 1, 3)), (6, 4)),
    SeKronSpec(((2, 1, 3, 1), (2, 3, 1, 1), (4, 2, 1, 3), (1, 2, 1, 1)), (2, 3, 2)),
    SeKronSpec(((2, 3, 3, 1), (2, 1, 1, 1), (1, 2, 1, 3), (4, 2, 1, 1)), (2, 4, 3), "chain"),
)
GEOMETRIES = (
    SAME,
    geometry_of(stride=(2, 2), padding=(1, 1)),
    geometry_of(stride=(1, 3), dilation=(2, 1), padding=(0, 2)),
    geometry_of(stride=(2, 1), padding=(2, 1), padded_first=True),
    geometry_of(padding=(1, 1), groups=2),
)


@pytest.mark.parametrize(("spec", "geometry"), list(product(SPECS, GEOMETRIES)), ids=str)
def test_no_run_that_fits_costs_less(spec, geometry):
    if spec.factor_shapes[0][0] % geometry.groups:
        with pytest.raises(SpecError, match="groups"):
            plan_run(spec, geometry, [(H, W)])
        return
    walk = Walk(spec, geometry, (H, W))
    outputs = geometry.output_size((H, W), spec.kernel_shape[2:])
    larger = max(geometry.groups * spec.kernel_shape[1] * H * W, spec.kernel_shape[0] * prod(outputs))
    for largest in (1, 2, 16, 10**6):
        planned = plan_run(spec, geometry, [(H, W)], largest=largest)
        macs = count_macs(planned, geometry, (H, W))
        [(merging, most)] = [way[1:3] for way in walk.ways if way[3] == planned.order]
        assert macs + merging == walk.fewest(largest * larger)
        assert most <= largest * larger
        assert replace(planned, run=()) == spec
    assert macs <= count_macs(spec, geometry, (H, W))
    counted = {run: macs for macs, _, _, run in walk.ways}
    assert len(counted) == len(walk.ways) == {1: 1, 2: 3, 3: 11, 4: 49}[spec.sequence_length]
    assert counted == {run: count_macs(replace(spec, run=run), geometry, (H, W)) for run in counted}


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_random_specs(data, draw_spec):
    spec = draw_spec(data.draw, couplings=("tree", "chain"))
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    geometry = geometry_of(stride=data.draw(pairs), dilation=data.draw(pairs), padding=data.draw(pairs))
    size = tuple(d * k + 4 for d, k in zip(geometry.dilation, spec.kernel_shape[2:], strict=True))
    planned = plan_run(spec, geometry, [size], largest=10**6)
    walk = Walk(spec, geometry, size)
    [merging] = [merging for _, merging, _, run in walk.ways if run == planned.order]
    assert count_macs(planned, geometry, size) + merging == walk.fewest(10**9)


@pytest.mark.parametrize("coupling", ["tree", "chain"])
def test_a_linear_layer(coupling):
    spec = SeKronSpec(((2, 6), (8, 1), (2, 3)), (4, 6), coupling)
    tokens = 7
    planned = plan_run(spec, Geometry(), [(tokens,)], largest=10**6)
    ways = Walk(spec, Geometry(), ()).ways
    fewest, merging = min((tokens * macs + merging, merging) for macs, merging, _, _ in ways)
    assert count_macs(planned, Geometry(), (tokens,)) == fewest - merging


def test_a_mixing_pair_runs_the_factor_of_more_in_than_out_channels_first():
    R = 2
    spec = SeKronSpec(((2, 8, 1, 1), (8, 2, 3, 3)), (R,))
    planned = plan_run(spec, SAME, [(H, W)])
    assert planned.run == ((0,), (1,))
    assert count_macs(planned, SAME, (H, W)) == H * W * (2 * R * 2 * 8 + 2 * 8 * 2 * R * 9)
    assert count_macs(spec, SAME, (H, W)) == H * W * (8 * R * 8 * 2 * 9 + 8 * 2 * 8 * R)


def test_block_terms_between_cp_and_the_spatial_split():
    spec = SeKronSpec(((16, 1, 1, 1), (16, 4, 3, 3), (1, 64, 1, 1)), (4, 4))
    assert count_macs(plan_run(spec, SAME, [(H, W)]), SAME, (H, W)) <= 14_336 * H * W


def test_wide_inner_ranks_are_merged_away():
    """(F)(3×3)(C) with R_2 = 9: the two last factors are any 3×3×C block, and cost less as one."""
    R = 2
    spec = SeKronSpec(((F, 1, 1, 1), (1, 1, 3, 3), (1, C, 1, 1)), (R, 9))
    planned = plan_run(spec, SAME, [(H, W)])
    assert count_macs(spec, SAME, (H, W)) == H * W * (C * R * 9 + R * 9 * 9 + F * R)
    assert planned.run == ((1, 2), (0,))
    assert count_macs(planned, SAME, (H, W)) == H * W * (C * R * 9 + F * R)


def test_ranks_that_cost_more_than_the_kernel_form_it():
    spec = SeKronSpec(((4, 3, 1, 1), (4, 4, 3, 3)), (12,))
    planned = plan_run(spec, SAME, [(H, W)])
    assert planned.run == ((0, 1),)
    assert count_macs(planned, SAME, (H, W)) == dense_macs((16, 12, 3, 3), SAME, (H, W))


def test_a_merger_that_takes_more_than_it_saves_is_none():
    """At few positions forming a kernel is what costs most."""
    spec = SeKronSpec(((4, 3, 1, 1), (4, 4, 3, 3)), (12,))
    for size in ((1, 1), (2, 2), (H, W)):
        forming = 12 * (16 * 12 * 3 * 3)
        saved = count_macs(spec, SAME, size) - dense_macs((16, 12, 3, 3), SAME, size)
        assert (plan_run(spec, SAME, [size]).run == ((0, 1),)) == (saved > forming)
        assert saved > 0


def test_of_equal_runs_the_default_is_taken_then_one_of_fewer_stages():
    cp = SeKronSpec(((F, 1, 1, 1), (1, 1, 3, 3), (1, C, 1, 1)), (5, 1))
    assert plan_run(replace(cp, run=((0, 1, 2),)), SAME, [(H, W)]) == cp
    square = SeKronSpec(((4, 4), (4, 4)), (2,))
    assert plan_run(square, Geometry(), [(1,)]) == square
    ones = SeKronSpec(((1, 1), (8, 8)), (1,))
    assert plan_run(ones, Geometry(), [(8,)]) == ones  # 8 more multiplications a token, or 8·8 to merge
    assert plan_run(ones, Geometry(), [(9,)]).run == ((0, 1),)


def test_all_calls_decide_together():
    """The 1×1 factor of more in than out channels had better go first, unless the other one takes the stride early."""
    spec = SeKronSpec(((4, 6, 1, 1), (4, 2, 3, 3)), (1,))
    geometry = geometry_of(stride=(4, 4), padding=(1, 1))
    calls = [(H, W), (1, 1)]
    for chosen in (calls, calls[:1], calls[1:], [calls[1]] * 1000 + calls[:1]):
        macs = {
            run: sum(count_macs(replace(spec, run=run), geometry, call) for call in chosen)
            for run in ((), ((0,), (1,)), ((0, 1),))
        }
        assert macs[plan_run(spec, geometry, chosen).run] == min(macs.values())
    assert len({plan_run(spec, geometry, chosen).run for chosen in (calls[:1], calls[1:])}) == 2


BF16, FLOAT32 = PRICES["bf16"], PRICES["float32"]
MANY = 10**9  # positions: forming kernels is of no account


def three_by_three(kind, channels, rank):
    """Return the spec of a 3×3 convolution of so many channels in and out."""
    pointwise, depthwise, entering = (channels, 1, 1, 1), (1, 1, 3, 3), (1, channels, 1, 1)
    if kind == "cp":
        return SeKronSpec((pointwise, depthwise, entering), (rank, 1))
    if kind == "tucker":
        return SeKronSpec((pointwise, depthwise, entering), (rank, rank), coupling="chain")
    if kind == "bottleneck":
        return SeKronSpec(((channels, 1, 3, 3), entering), (rank,))
    return SeKronSpec(((channels, 1, 3, 1), (1, channels, 1, 3)), (rank,))


@pytest.mark.parametrize(
    ("prices", "kind", "channels", "rank", "stages"),
    [  # behind each what a step was measured to take of the dense one's time, forming left out
        (BF16, "bottleneck", 256, 64, 2),  # 0.41
        (BF16, "separable", 256, 64, 2),  # 0.30
        (BF16, "tucker", 256, 64, 3),  # 0.29
        (BF16, "cp", 256, 256, 3),  # 0.60
        (BF16, "bottleneck", 128, 64, 2),  # 0.76
        (BF16, "separable", 64, 32, 2),  # 0.67
        (BF16, "tucker", 64, 48, 1),  # 1.34
        (BF16, "cp", 64, 64, 1),  # 1.48
        (BF16, "cp", 64, 128, 1),  # 3.15
        (BF16, "separable", 32, 24, 1),  # 1.22
        (BF16, "bottleneck", 16, 4, 1),  # 1.22
        (FLOAT32, "cp", 64, 64, 3),  # 0.66
        (FLOAT32, "cp", 64, 128, 1),  # 1.13
        (FLOAT32, "cp", 256, 512, 3),  # 0.64
        (FLOAT32, "tucker", 32, 8, 3),  # 0.69
        (FLOAT32, "bottleneck", 32, 24, 1),  # 1.28
        (FLOAT32, "bottleneck", 16, 8, 1),  # 1.21
        (AVX2, "cp", 64, 94, 3),  # 0.62
        (AVX2, "cp", 64, 188, 1),  # 1.26
        (AVX2, "cp", 256, 566, 3),  # 0.54
        (AVX2, "bottleneck", 32, 10, 2),  # 0.55
        (AVX2, "bottleneck", 16, 2, 2),  # 0.52
        (AVX2, "bottleneck", 16, 10, 1),  # 0.99
        (AVX2, "separable", 32, 16, 2),  # 0.45
    ],
)
def test_a_layer_is_trained_in_stages_where_that_is_faster(prices, kind, channels, rank, stages):
    planned = plan_training(three_by_three(kind, channels, rank), SAME, MANY, prices)
    assert len(planned.order) == stages


def test_dilated_depthwise_convolutions_and_those_of_three_axes_are_slower():
    """In bf16 a step in stages was measured to take 1.7 to 1.9 and 1.7 to 2.2 of one with the kernel formed.

    On a processor with AVX2 such convolutions take 15 and 50 times as long as others by themselves.
    """
    spec, dilated = three_by_three("cp", 128, 64), replace(SAME, dilation=(2, 2), padding=((2, 2), (2, 2)))
    solid = SeKronSpec(((64, 1, 1, 1, 1), (1, 1, 3, 3, 3), (1, 64, 1, 1, 1)), (32, 1))
    voxels = Geometry((1, 1, 1), (1, 1, 1), ((1, 1),) * 3)
    for prices, layers in ((BF16, [3, 2, 2]), (FLOAT32, [3, 3, 3]), (AVX2, [3, 2, 3])):
        cases = ((spec, SAME), (spec, dilated), (solid, voxels))
        assert [len(plan_training(*case, MANY, prices).order) for case in cases] == layers


def test_where_few_ranks_are_left_the_factors_within_are_merged():
    """A depthwise convolution of all channels moves more than a dense one to few of them takes."""
    spec = three_by_three("cp", 64, 16)
    assert plan_training(spec, SAME, MANY, BF16).order == ((1, 2), (0,))
    assert plan_training(spec, SAME, MANY, FLOAT32).order == ((2,), (1,), (0,))


@pytest.mark.parametrize("prices", [BF16, FLOAT32, AVX2, StepPrices(1, 0, 1, 1, 0)])
def test_stages_over_other_digits_than_plain_channels_are_not_trained_in(prices):
    """Their data would have to be moved there and back."""
    kronecker = SeKronSpec(((16, 16, 1, 1), (16, 16, 3, 3)), (2,))
    grouped = SeKronSpec(((256, 1, 3, 1), (1, 64, 1, 3)), (8,))
    for spec, geometry in ((kronecker, SAME), (grouped, replace(SAME, groups=4))):
        assert len(plan_training(spec, geometry, MANY, prices).order) == 1
    dense = SeKronSpec(((256, 256, 3, 3),))
    assert plan_training(dense, SAME, MANY, prices) == dense


@pytest.mark.parametrize(("prices", "fewest"), [(BF16, 16), (FLOAT32, 16), (AVX2, 8)])
def test_kernels_for_images_are_formed(prices, fewest):
    """With three channels a step in stages takes twice as long (32 x 32, CP of rank 7 for 16 channels, AVX2)."""
    for channels in (1, 3, fewest - 1, fewest):
        spec = SeKronSpec(((512, 1, 1, 1), (1, channels, 9, 9)), (1,))
        assert len(plan_training(spec, SAME, MANY, prices).order) == (1 if channels < fewest else 2)


@pytest.mark.parametrize(("prices", "lanes"), [(BF16, 16), (FLOAT32, 16), (AVX2, 8)])
def test_channels_take_as_long_as_the_lanes_that_they_begin(prices, lanes):
    found = [
        len(plan_training(three_by_three("bottleneck", 128, rank), SAME, MANY, prices).order) for rank in range(1, 129)
    ]
    assert all(len({*found[start : start + lanes]}) == 1 for start in range(0, 128, lanes))
    assert {*found} == {1, 2}


def test_a_stride_counts_for_the_stages_that_see_every_position():
    """Of a bottleneck behind a stride of 2 the product in front runs on four times as many positions."""
    spec = three_by_three("bottleneck", 128, 64)
    assert len(plan_training(spec, SAME, MANY, BF16).order) == 2
    assert len(plan_training(spec, replace(SAME, stride=(2, 2)), MANY, BF16).order) == 1


def test_of_few_positions_stages_are_trained_in_to_save_forming_the_kernel():
    """At many ranks that takes more than a convolution of a few examples."""
    spec = three_by_three("cp", 512, 1000)
    forming = merging_macs(spec, (0, 1, 2))
    assert forming > 1000 * 512 * 512 * 9
    found = [len(plan_training(spec, SAME, 49 * examples, BF16).order) for examples in (1, 16, 128, 10_000)]
    assert found == [3, 3, 3, 1]
    assert len(plan_training(spec, SAME, 49, BF16._replace(forming=0)).order) == 1
