import numpy as np
import pytest
from torch import nn

import kronsearch as ks
from kronsearch.models.bench import Timing
from kronsearch.models.shelf import Shelf
from kronsearch.search.candidates import layer_candidates
from kronsearch.search.reach import replaceable
from kronsearch.search.space import SearchSpace
from kronsearch.search.stopwatch import Setting, Stopwatch
from kronsearch.sekron.layers import SeKronLayer


@pytest.fixture(scope="module", autouse=True)
def _short(short_proxies):
    """Spare every search here the time of finalists."""


@pytest.fixture(scope="session")
def digits_cost(digits_model):
    return ks.profile_model(digits_model, input_shape=(1, 8, 8))


class HandTimer:
    """Stands in for a machine: a dense layer takes a millisecond, a factorised one as long as `parts` says.

    Args:
        parts: of a dense layer's time, by spec.
        noise: what whole networks take, as a multiple of the sum of their parts.
    """

    def __init__(self, parts, noise=1.0):
        self.parts, self.noise, self.lineups, self.compared = parts, noise, [], []

    def __call__(self, network, lineups, inputs, *, names, rounds, clock):
        self.lineups += lineups
        found = []
        for lineup in lineups:
            own = {name: self.parts(lineup[name]) if name in lineup else 1.0 for name in names}
            times = {name: np.array([[1e-3, 1e-3 * part]] * rounds) for name, part in own.items()}
            found.append({"": np.array([[1e-3 * len(names), 1e-3 * sum(own.values())]] * rounds), **times})
        return found

    def compare(self, dense, small, *, input_shape, batches, threads, seconds, layers, device, clock):
        specs = {name: module.spec for name, module in small.named_modules() if isinstance(module, SeKronLayer)}
        self.compared.append(specs)
        names = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        took = self.noise * sum(self.parts(specs[name]) if name in specs else 1.0 for name in names)
        speedup = len(names) / took
        times = (float(len(names)), took, speedup, speedup / 1.25, speedup * 1.25)
        return [Timing("", *batches, *threads, *times, 5, "contiguous", "channels_last")]


@pytest.fixture
def stopwatch(digits_model, digits_cost, tmp_path):
    """Return what makes a stopwatch of a timer, whose shelf is the same each time."""

    def make(timer, setting=None, model=digits_model):
        return Stopwatch(
            model,
            digits_cost,
            replaceable(digits_cost, SearchSpace()),
            setting or Setting(),
            shelf=Shelf(tmp_path / "shelf"),
            device="cpu",
            tell=lambda done, total: None,
            timer=timer,
            comparer=timer.compare,
        )

    return make


@pytest.fixture(scope="session")
def digits_tables(digits_model, digits_cost):
    """Return half of the candidates of each layer, the dense one among them."""
    space, kernels = SearchSpace(deep_fits=2), dict(digits_model.named_parameters())
    tables = [
        layer_candidates(kernels[f"{name}.weight"], digits_cost.layer(name), space).without_pointless()
        for name in replaceable(digits_cost, space)
    ]
    return [table.take(np.arange(0, len(table), 2)) for table in tables]


@pytest.fixture
def hand_timer():
    return HandTimer
