"""The decomposition engine: sequences of Kronecker factors (SeKron) in place of kernels.

Usable by itself: it knows no plan, no search and no particular model. Shapes, specs and costs need no torch, which is
imported when the first name that does need it is used.
"""

from typing import TYPE_CHECKING

from kronsearch.sekron.execution import Geometry, count_macs, dense_macs
from kronsearch.sekron.planning import plan_run
from kronsearch.sekron.shapes import Structure, cp_sequence, factor_pairs
from kronsearch.sekron.spec import SeKronSpec

if TYPE_CHECKING:
    from kronsearch.sekron.convolution import SeKronConv1d, SeKronConv2d, SeKronConv3d
    from kronsearch.sekron.decomposition import decompose, relative_error
    from kronsearch.sekron.formats import FamilyMember, from_cp, from_tr, from_tt, from_tucker
    from kronsearch.sekron.layers import SeKronLinear
    from kronsearch.sekron.metrics import Metric, Moments
    from kronsearch.sekron.tables import ErrorTable, chain_table, cp_table, pair_table, pair_tables
    from kronsearch.sekron.tensors import reconstruct

__all__ = [
    "ErrorTable",
    "FamilyMember",
    "Geometry",
    "Metric",
    "Moments",
    "SeKronConv1d",
    "SeKronConv2d",
    "SeKronConv3d",
    "SeKronLinear",
    "SeKronSpec",
    "Structure",
    "chain_table",
    "count_macs",
    "cp_sequence",
    "cp_table",
    "decompose",
    "dense_macs",
    "factor_pairs",
    "from_cp",
    "from_tr",
    "from_tt",
    "from_tucker",
    "pair_table",
    "pair_tables",
    "plan_run",
    "reconstruct",
    "relative_error",
]

_HOMES = {
    "ErrorTable": "tables",
    "FamilyMember": "formats",
    "Metric": "metrics",
    "Moments": "metrics",
    "SeKronConv1d": "convolution",
    "SeKronConv2d": "convolution",
    "SeKronConv3d": "convolution",
    "SeKronLinear": "layers",
    "chain_table": "tables",
    "cp_table": "tables",
    "decompose": "decomposition",
    "from_cp": "formats",
    "from_tr": "formats",
    "from_tt": "formats",
    "from_tucker": "formats",
    "pair_table": "tables",
    "pair_tables": "tables",
    "reconstruct": "tensors",
    "relative_error": "decomposition",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
