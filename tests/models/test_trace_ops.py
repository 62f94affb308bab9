"""The cost of single operators, against counting loops written another way and against torch's own counter."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kronsearch.errors import ModelError
from kronsearch.models.profile import profile_model
from kronsearch.models.trace_ops import FREE_OPS, HANDLERS, attention_macs, einsum_macs, product_macs


def torch_macs(function, *args):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*args)
    return counter.get_total_flops() // 2


def naive_einsum_macs(equation, shapes):
    """Visit every index tuple of the product, after summing what only one operand has."""
    inputs, _, output = equation.partition("->")
    left, right = inputs.split(",")
    sizes = {}
    for term, shape in zip((left, right), shapes, strict=True):
        sizes |= dict(zip(term, shape, strict=True))
    multiplied = [c for c in sizes if (c in left and c in right) or c in output]
    return sum(1 for _ in product(*(range(sizes[c]) for c in multiplied)))


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 1, 3, 4), (6, 4, 5)), ((3, 4), (7, 4, 2)), ((2, 3, 4), (2, 4, 1))],
)
def test_matrix_product_with_broadcast_batch_agrees_with_torch(left, right):
    a, b = torch.zeros(left), torch.zeros(right)
    assert product_macs(left, (a @ b).shape) == torch_macs(torch.matmul, a, b)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_attention_is_its_two_products(n, h, q, k, e, v):
    expected = n * h * q * k * e + n * h * q * k * v
    assert attention_macs((n, h, q, e), (n, h, k, e), (n, h, q, v)) == expected


def test_attention_agrees_with_torch():
    query, key, value = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 8)
    assert attention_macs(query.shape, key.shape, query.shape) == torch_macs(
        F.scaled_dot_product_attention, query, key, value
    )


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [(3, 4), (4, 5)]),
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("bhd,bhid->bhi", [(2, 3, 4), (2, 3, 5, 4)]),
        ("i,j->ij", [(3,), (4,)]),
        ("ija,jk->ik", [(3, 4, 6), (4, 5)]),
    ],
)
def test_einsum_of_two_operands(equation, shapes):
    assert einsum_macs(equation, shapes) == naive_einsum_macs(equation, shapes)


def test_einsum_without_output_with_ellipsis_and_of_one_operand():
    assert einsum_macs("ij, jk", [(3, 4), (4, 5)]) == 3 * 4 * 5
    assert einsum_macs("...ij,...jk->...ik", [(7, 1, 3, 4), (2, 4, 5)]) == 7 * 2 * 3 * 4 * 5
    assert einsum_macs("ijk->kj", [(3, 4, 5)]) == 0


def test_einsum_of_three_operands_is_refused():
    with pytest.raises(ModelError, match=r"einsum of 3 operands \(ab,bc,cd->ad\)"):
        einsum_macs("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)])


def test_nothing_is_both_free_and_counted():
    assert not FREE_OPS & set(HANDLERS)
    assert all(name.startswith("aten::") and " " not in name for name in FREE_OPS)


class Op(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


A = torch.zeros(6, 4, 5)


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda x: x.unsqueeze(2) @ A, 2 * 6 * 3 * 4 * 5),  # fvcore by itself: 2 · 3 · 4 · 5
        (lambda x: torch.bmm(x[0], A[:2]), 2 * 3 * 4 * 5),
        (lambda x: torch.baddbmm(torch.zeros(1), x[0], A[:2]), 2 * 3 * 4 * 5),
        (lambda x: torch.mv(x[0, 0], torch.zeros(4)), 3 * 4),
        (lambda x: torch.vdot(x[0, 0, 0], torch.zeros(4)), 4),
        (lambda x: torch.einsum("nbij,bjk->nbik", x, A[:2]), 2 * 3 * 4 * 5),
        (lambda x: torch.cdist(x[0], x[0, :, :1]), 2 * 3 * 1 * 4),
        (lambda x: F.scaled_dot_product_attention(x, x, x), 2 * 3 * 3 * (4 + 4)),
        (lambda x: F.interpolate(x[0], scale_factor=2, mode="linear"), 2 * prod((2, 3, 8))),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 4 * prod((2, 6, 8))),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), 16 * prod((2, 6, 8))),
        (lambda x: F.interpolate(x[None], scale_factor=2, mode="trilinear"), 8 * prod((4, 6, 8))),
        (lambda x: F.conv2d(x, torch.zeros(5, 2, 3, 3), padding="same"), 5 * 2 * 9 * 3 * 4),
        (lambda x: F.conv2d(x[0], torch.zeros(5, 2, 3, 3), padding=1), 5 * 2 * 9 * 3 * 4),
        (lambda x: torch.softmax(F.gelu(x), -1).mean(), 0),
    ],
)
def test_operators_are_counted_in_a_network(function, macs):
    assert profile_model(Op(function), input_shape=(2, 3, 4)).macs == macs


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.atan2(x.sinh().acos(), x.cosh()) + torch.sinc(x.asin().atan().erfinv().erfc()),
        lambda x: torch.logaddexp(x.cumprod(1), x.logcumsumexp(1)).nan_to_num().sgn(),
        lambda x: (
            F.cosine_similarity(x, x).sum()
            + F.pairwise_distance(x, x).sum()
            + torch.outer(x[0, 0, 0], x[0, 0, 1]).sum()
        ),
        lambda x: F.fractional_max_pool2d(x, 2, (1, 2)).rot90(1, (1, 2)),
        lambda x: torch.bucketize(x, torch.arange(3.0)) + torch.searchsorted(torch.arange(3.0), x).median(),
        lambda x: x.cummax(1)[0].count_nonzero() + x.kthvalue(1)[0].sum() + torch.isclose(x, x).sum(),
        lambda x: x[0, torch.tril_indices(2, 2)[0]] + x[0, torch.triu_indices(2, 2)[0]],
        lambda x: (
            torch.view_as_real(torch.view_as_complex(x.reshape(-1, 2)).conj().resolve_conj()).sum()
            + torch.polar(x, x).imag
        ),
        lambda x: torch.complex(x, x).real.flatten(1).T,
        lambda x: x.mH.diff().hypot(x.mT.diff()).mT.asinh().acosh().atanh().frac().exp2().log10().logit().nanmean(),
        lambda x: x[0, 0].H.nansum() + torch.block_diag(x[0, 0], x[0, 1]).sum() + x.aminmax()[0],
        lambda x: (x > 0).bitwise_and(x < 1).bitwise_or(x < 2).bitwise_xor(x < 3).logical_xor(x > 4).bitwise_not(),
        lambda x: torch.dstack([x, x]).sum() + torch.column_stack([x, x]).sum() + (x[0, 0] + 1).multinomial(1),
        lambda x: x.index_copy(1, torch.tensor([0]), x[:, :1]).put(torch.tensor([0]), torch.zeros(1)),
        lambda x: x.select_scatter(x[:, 0], 1, 0).slice_scatter(x[:, :1], 1, 0, 1),
        lambda x: x.scatter_reduce(1, torch.zeros_like(x, dtype=torch.int64), x, "sum"),
    ],
)
def test_operators_that_take_a_constant_number_of_operations_an_element_are_free(function):
    assert profile_model(Op(function), input_shape=(2, 3, 4)).macs == 0


class First(nn.Module):
    """A recurrent layer on sequences, of which the first `packed` steps may be all there are, or one of its cells."""

    def __init__(self, recurrent, packed=None):
        super().__init__()
        self.recurrent, self.packed = recurrent, packed

    def forward(self, x):
        if self.packed is not None:
            x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([self.packed]), batch_first=True)
        outputs = self.recurrent(x)
        outputs = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        return outputs if self.packed is None else nn.utils.rnn.pad_packed_sequence(outputs)[0]


def weights_of(model):
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "weight" in name)


@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_take_all_their_matrices_in_each_step(kind, options):
    model = First(kind(6, 5, batch_first=True, **options))
    cost = profile_model(model, input_shape=(7, 6))
    assert cost.macs == cost.layer("recurrent").macs == 7 * weights_of(model)
    model.packed = 4
    assert profile_model(model, input_shape=(7, 6)).macs == 4 * weights_of(model)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_the_projections_of_lstm_are_matrices_too():
    model = First(nn.LSTM(6, 5, proj_size=2, batch_first=True))
    assert profile_model(model, input_shape=(7, 6)).macs == 7 * weights_of(model)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(kind):
    model = First(kind(6, 5))
    assert profile_model(model, input_shape=(6,)).macs == weights_of(model)


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: torch.kron(x, torch.zeros(2, 2)), "kron"),
        (lambda x: torch.tensordot(x, x, 4), "tensordot"),
        (lambda x: torch.fft.fft(x).real, "fft_fft"),
        (lambda x: torch.linalg.svdvals(x), "linalg_svdvals"),
    ],
)
def test_an_operator_of_unknown_cost_is_refused_by_name_and_place(function, operator):
    model = nn.Sequential(nn.Identity(), Op(function))
    with pytest.raises(ModelError, match=rf"^the MACs of Sequential can't be counted.* it runs .*{operator} in 1"):
        profile_model(model, input_shape=(2, 3, 4))
