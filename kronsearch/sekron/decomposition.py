"""Kernel to factors: recursive SVD, and for three factors and more a joint fit."""

from collections.abc import Sequence

from torch import Tensor

from kronsearch.sekron.chain import fit_chain
from kronsearch.sekron.fit import fit, working_dtype
from kronsearch.sekron.kernels import in_units
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.refit import refit
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.sekron.svd import recursive_svd
from kronsearch.sekron.tensors import as_matrices, balanced_factors, reconstruct, unfold_kernel

__all__ = ["decompose", "relative_error"]


def decompose(
    kernel: Tensor, spec: SeKronSpec, *, metric: Metric | None = None, refine: bool | None = None
) -> tuple[Tensor, ...]:
    """Return the factors of a kernel.

    Args:
        kernel: (out channels, in channels, *extent), any floating dtype and device.
        spec: sequence and ranks; its shapes multiply to the kernel's.
        metric: of the layer; with it the error is small where it matters to the network.
        refine: fit all factors together: three factors and more by alternating least squares, and with a metric in
            its whole moments at last; None does where the truncated SVDs are not optimal already, False nowhere.

    Returns:
        S tensors of `spec.tensor_shapes`, in the kernel's dtype and on its device, their norms balanced.

    Raises:
        SpecError: the spec is not one of this kernel's shape, or the kernel is not of real and finite numbers.
    """
    spec.check_kernel(kernel.shape)
    shapes, length = spec.factor_shapes, spec.sequence_length
    whole, (kernel, unit) = kernel, in_units(kernel)
    if length == 1:
        return (whole.detach().clone(),)
    tensor = unfold_kernel(kernel.double(), shapes)
    if metric is not None:
        tensor = metric.weight(tensor, shapes)
    joint = length > 2 and refine is not False
    tensor = tensor.to(working_dtype(kernel)) if joint else tensor
    if spec.coupling == "chain":
        matrices = fit_chain(tensor, spec.ranks, refine=joint)[0]
    else:
        matrices = fit(tensor, spec.ranks)[0] if joint else recursive_svd(tensor, spec.ranks)
    if metric is not None:
        matrices = metric.unweight(matrices, shapes)
    factors = balanced_factors(matrices, spec)
    if metric is not None and refine is not False:
        factors = balanced_factors(refit(kernel, as_matrices(factors, spec), spec, metric), spec)
    return tuple((factor * unit ** (1 / length)).to(kernel.dtype) for factor in factors)


def relative_error(kernel: Tensor, factors: Sequence[Tensor], spec: SeKronSpec) -> float:
    """Return `‖W - Ŵ‖_F / ‖W‖_F`; for a kernel of zeros the numerator alone."""
    kernel = kernel.detach().double()
    error = float((kernel - reconstruct([factor.detach().double() for factor in factors], spec)).norm())
    return error / (float(kernel.norm()) or 1.0)
