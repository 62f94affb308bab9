"""What single operators of a traced network cost: handlers for fvcore, and the operators that cost nothing.

fvcore lets an operator it doesn't know pass as free. Here an operator is counted by fvcore, counted by a handler below,
listed as free below, or an error of the profiler. One MAC is one multiply-accumulate.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from kronsearch.errors import ModelError

__all__ = ["FREE_OPS", "HANDLERS", "attention_macs", "einsum_macs", "product_macs"]

# Free is what takes a constant number of operations an element, as fvcore sees activations and pooling: its own list of
# ignored operators comes on top, and what fvcore counts (batch_norm, layer_norm, adaptive_avg_pool2d, …) stays counted.
_ARITHMETIC = """abs acos acosh add add_ addcdiv addcmul addcmul_ asin asinh atan atan2 atanh ceil clamp_max
clamp_max_ clamp_min clamp_min_ cos cosh cosine_similarity cross cumprod cumsum diff div div_ erfc erfinv exp exp2
exp_ expm1 floor_ fmod frac hypot lerp log log10 log1p log2 logaddexp logcumsumexp maximum mean minimum mul mul_
nan_to_num nanmean nansum neg neg_ outer pairwise_distance pow pow_ prod reciprocal round rsqrt rsub sgn sign sin
sinc sinh sqrt sqrt_ square std std_mean sub sub_ sum tan true_divide trunc var var_mean where"""
_ACTIVATIONS = """alpha_dropout celu celu_ dropout_ elu elu_ erf feature_alpha_dropout feature_dropout
feature_dropout_ gelu gelu_ glu hardshrink hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_
leaky_relu leaky_relu_ log_sigmoid log_softmax logit logsumexp mish mish_ prelu relu6 relu6_ rrelu selu selu_ sigmoid
sigmoid_ silu silu_ softmax softplus softshrink tanh tanh_ threshold threshold_"""
_NORMALISATION = "_weight_norm linalg_vector_norm norm rms_norm"
_POOLING = """adaptive_avg_pool1d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
avg_pool1d avg_pool2d avg_pool3d fractional_max_pool2d max_pool1d max_pool1d_with_indices max_pool2d
max_pool2d_with_indices max_pool3d"""
_COMPARISON = """all amax amin aminmax any argmax argmin argsort bitwise_and bitwise_not bitwise_or bitwise_xor
bucketize count_nonzero cummax isclose isfinite isinf isnan kthvalue le logical_and logical_not logical_or
logical_xor lt median min ne searchsorted sort topk tril tril_ triu triu_"""
_CREATION = """bernoulli bernoulli_ empty_like eye fill_ linspace meshgrid multinomial new_ones normal_ ones_like
rand rand_like randn randn_like scalar_tensor tensor tril_indices triu_indices uniform_ zero_"""
_SHAPE = """_conj _pack_padded_sequence _pad_packed_sequence affine_grid_generator alias as_strided block_diag
broadcast_tensors broadcast_to channel_shuffle clone col2im column_stack complex concat diagonal dstack embedding
expand_as fill flip hstack im2col imag index_add index_copy index_fill index_reduce index_select item lift_fresh mH
mT masked_fill_ masked_scatter masked_select matrix_H moveaxis movedim native_channel_shuffle numel numpy_T one_hot
pad pixel_shuffle pixel_unshuffle polar put real reflection_pad1d reflection_pad2d reflection_pad3d repeat
repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape_as resolve_conj rot90 scatter
scatter_ scatter_add scatter_reduce select_scatter slice_scatter squeeze_ swapaxes swapdims take_along_dim
tensor_split tile transpose_ unflatten unfold unsafe_chunk unsafe_split upsample_nearest1d upsample_nearest3d view_as
view_as_complex view_as_real vstack"""

FREE_OPS: frozenset[str] = frozenset(
    f"aten::{name}"
    for group in (_ARITHMETIC, _ACTIVATIONS, _NORMALISATION, _POOLING, _COMPARISON, _CREATION, _SHAPE)
    for name in group.split()
)


def product_macs(left: Sequence[int], out: Sequence[int]) -> int:
    """MACs of a (batched, broadcast) matrix product: its `out` shape times the summed last mode of the `left` shape."""
    return prod(out) * left[-1]


def attention_macs(query: Sequence[int], key: Sequence[int], out: Sequence[int]) -> int:
    """MACs of softmax(QKᵀ)V for `query` (…, L, E), `key` (…, S, E) and `out` (…, L, V): both of its products."""
    return prod(out[:-1]) * key[-2] * (query[-1] + out[-1])


def einsum_macs(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """MACs of an einsum of one operand (0) or two, whose `shapes` may broadcast in their ellipses.

    An index that is summed and stands in one operand only is summed before the product, as torch does. Three operands
    and more raise ModelError: their cost depends on the order of the products, which the equation does not tell.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) > 2:
        raise ModelError(
            f"an einsum of {len(terms)} operands ({equation}) can't be counted: the order of its products is open; "
            "write it as products of two"
        )
    if len(terms) == 1:
        return 0
    sizes: dict[str, int] = {}
    seen: list[set[str]] = []
    for term, shape in zip(terms, shapes, strict=True):
        broadcast = len(shape) - len(term.replace("...", ""))
        # the modes of an ellipsis, aligned at their last, are named by digits
        letters = term.replace("...", "".join(str(i) for i in reversed(range(broadcast))))
        seen.append(set(letters))
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    kept = set(output) if arrow else set(sizes)
    summed_alone = {letter for letter in (seen[0] ^ seen[1]) if letter.isalpha()} - kept
    return prod(size for letter, size in sizes.items() if letter not in summed_alone)


def _shape(value: Any) -> list[int]:
    """Return the shape of a tensor value in a jit graph."""
    sizes: list[int] = value.type().sizes()
    return sizes


def _product(left: int) -> Callable[[Any, Any], int]:
    return lambda inputs, outputs: product_macs(_shape(inputs[left]), _shape(outputs[0]))


def _convolution_by_mode(inputs: Any, outputs: Any) -> int:
    return prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:])


def _attention(inputs: Any, outputs: Any) -> int:
    return attention_macs(_shape(inputs[0]), _shape(inputs[1]), _shape(outputs[0]))


def _einsum(inputs: Any, _outputs: Any) -> int:
    return einsum_macs(inputs[0].toIValue(), [_shape(value) for value in inputs[1].node().inputs()])


def _recurrent(inputs: Any, outputs: Any) -> int:
    """Count recurrent layers, any number of them, in both directions: each step takes all matrices once."""
    *_, weights = (value for value in inputs if value.node().kind() == "prim::ListConstruct")
    shapes = [_shape(weight) for weight in weights.node().inputs()]
    steps = prod(_shape(outputs[0])[:-1])  # of a padded batch, or of a packed one
    return steps * sum(prod(shape) for shape in shapes if len(shape) == 2)


def _resample(reads: int) -> Callable[[Any, Any], int]:
    return lambda _inputs, outputs: reads * prod(_shape(outputs[0]))


# Operators that fvcore lacks, or miscounts: its matmul where batch modes broadcast, its einsum by an assumed path.
HANDLERS: Mapping[str, Callable[[Any, Any], int]] = {
    "aten::matmul": _product(0),
    "aten::mm": _product(0),
    "aten::bmm": _product(0),
    "aten::mv": _product(0),
    "aten::dot": _product(0),
    "aten::vdot": _product(0),
    "aten::cdist": _product(0),
    "aten::addmv": _product(1),
    "aten::baddbmm": _product(1),
    "aten::einsum": _einsum,
    "aten::_convolution_mode": _convolution_by_mode,  # padding="same" or "valid"; never transposed
    "aten::scaled_dot_product_attention": _attention,
    **dict.fromkeys(("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"), _recurrent),
    "aten::upsample_linear1d": _resample(2),
    "aten::upsample_bicubic2d": _resample(16),
    "aten::upsample_trilinear3d": _resample(8),
}
