import numpy as np
import pytest
from scipy.optimize import linprog

from kronsearch.search.knapsack import _Program


@pytest.mark.parametrize("tightness", [0.02, 0.2, 0.6])
def test_the_floor_is_the_error_of_the_whole_relaxation(tightness):
    generator = np.random.default_rng(1)
    count, layers = 400, 10
    owner = np.repeat(np.arange(layers), count // layers)
    costs, errors = generator.integers(1, 10**6, (2, count)), generator.uniform(0, 1, count)
    limits = (costs.reshape(2, layers, -1).max(2).sum(1) * tightness).astype(int)
    one_each = (owner == np.arange(layers)[:, None]).astype(float)
    oracle = linprog(errors, A_ub=costs / limits[:, None], b_ub=[1, 1], A_eq=one_each, b_eq=np.ones(layers))
    excess, floor = _Program(errors, owner, costs, limits)._excesses()
    assert (excess >= 0).all()
    assert (excess.reshape(layers, -1).min(1) == 0).all()
    if oracle.success:
        assert floor == pytest.approx(oracle.fun, rel=1e-9)
    else:
        assert floor > layers  # above any error there is
