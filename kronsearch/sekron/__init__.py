"""The decomposition engine: sequences of Kronecker factors (SeKron) in place of kernels.

Usable by itself: it knows no plan, no search and no particular model. Shapes, specs and costs need no torch, which is
imported when the first name that does need it is used.
"""

from typing import TYPE_CHECKING

from kronsearch.sekron.execution import Geometry, count_macs, dense_macs
from kronsearch.sekron.shapes import Structure, cp_sequence, factor_pairs
from kronsearch.sekron.spec import SeKronSpec

if TYPE_CHECKING:
    from kronsearch.sekron.decomposition import decompose, relative_error
    from kronsearch.sekron.layers import SeKronConv2d, SeKronLinear
    from kronsearch.sekron.metrics import Metric, Moments
    from kronsearch.sekron.tables import ErrorTable, cp_table, pair_table
    from kronsearch.sekron.tensors import reconstruct

__all__ = [
    "ErrorTable",
    "Geometry",
    "Metric",
    "Moments",
    "SeKronConv2d",
    "SeKronLinear",
    "SeKronSpec",
    "Structure",
    "count_macs",
    "cp_sequence",
    "cp_table",
    "decompose",
    "dense_macs",
    "factor_pairs",
    "pair_table",
    "reconstruct",
    "relative_error",
]

_HOMES = {
    "ErrorTable": "tables",
    "Metric": "metrics",
    "Moments": "metrics",
    "SeKronConv2d": "layers",
    "SeKronLinear": "layers",
    "cp_table": "tables",
    "decompose": "decomposition",
    "pair_table": "tables",
    "reconstruct": "tensors",
    "relative_error": "decomposition",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
