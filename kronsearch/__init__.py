"""kronsearch: smaller networks by a search over Kronecker factorizations (SeKron) within FLOPs, params or latency.

    import kronsearch as ks

    model = ks.load_model("zoo:digits")
    data = ks.load_data("digits", seed=0)
    result = ks.search(model, data, budget=ks.Budget(flops="50%"), trials=20, out="DIR")
    small = ks.apply_plan(model, ks.load_plan("DIR/plan.json"))

Names are imported when they are first used, so that what needs no torch doesn't wait for it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kronsearch.budget import Budget
    from kronsearch.errors import KronsearchError
    from kronsearch.finetuning.run import FinetuneResult, finetune
    from kronsearch.models.apply import apply_plan, load_compressed
    from kronsearch.models.bench import Timing, bench
    from kronsearch.models.loading import load_model
    from kronsearch.models.profile import ModelCost, profile_model
    from kronsearch.plan import Plan, load_plan, save_plan
    from kronsearch.search.frontier import ScoredFront, search_front
    from kronsearch.search.run import SearchResult, search
    from kronsearch.search.space import SearchSpace, load_space
    from kronsearch.search.sweep import Front, sweep
    from kronsearch.sekron.spec import SeKronSpec
    from kronsearch.training.data import Data
    from kronsearch.training.sources import load_data

__all__ = [
    "Budget",
    "Data",
    "FinetuneResult",
    "Front",
    "KronsearchError",
    "ModelCost",
    "Plan",
    "ScoredFront",
    "SeKronSpec",
    "SearchResult",
    "SearchSpace",
    "Timing",
    "apply_plan",
    "bench",
    "finetune",
    "load_compressed",
    "load_data",
    "load_model",
    "load_plan",
    "load_space",
    "profile_model",
    "save_plan",
    "search",
    "search_front",
    "sweep",
]

__version__ = "0.1.0"

_HOMES = {
    "Budget": "budget",
    "Data": "training.data",
    "FinetuneResult": "finetuning.run",
    "Front": "search.sweep",
    "KronsearchError": "errors",
    "ModelCost": "models.profile",
    "Plan": "plan",
    "ScoredFront": "search.frontier",
    "SeKronSpec": "sekron.spec",
    "SearchResult": "search.run",
    "SearchSpace": "search.space",
    "Timing": "models.bench",
    "apply_plan": "models.apply",
    "bench": "models.bench",
    "finetune": "finetuning.run",
    "load_compressed": "models.apply",
    "load_data": "training.sources",
    "load_model": "models.loading",
    "load_plan": "plan",
    "load_space": "search.space",
    "profile_model": "models.profile",
    "save_plan": "plan",
    "search": "search.run",
    "search_front": "search.frontier",
    "sweep": "search.sweep",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
