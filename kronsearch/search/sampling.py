"""The samplers that a study may have: what proposes a trial's parameters, given the trials that are finished."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from kronsearch.choices import SamplerName
from kronsearch.errors import StudyError

__all__ = ["GIVEN", "PLAIN", "SLOT", "new_sampler"]

SLOT = "slot"  # in the user attributes of trials: its number among those that are wanted
PLAIN = 0  # the slot of the plain allocation, with which every study begins
GIVEN = "fixed_params"  # in the system attributes of trials whose parameters were set beforehand, as Optuna has it
_STARTUP = 6  # trials before a sampler models anything; the first ones are given
_SIGMA = 1 / 6  # of each parameter's range: what CMA-ES begins with


def new_sampler(name: SamplerName, seed: int) -> optuna.samplers.BaseSampler:
    """Return a sampler for one trial.

    Args:
        name: `gp`, a Gaussian process; `tpe`, a tree-structured Parzen estimator; `cmaes`, an evolution strategy that
            adapts its covariance; `random`.
        seed: of what it draws for this trial.

    Raises:
        StudyError: its package isn't installed.
    """
    if name == "gp":
        return optuna.samplers.GPSampler(n_startup_trials=_STARTUP, seed=seed, deterministic_objective=False)
    if name == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=_STARTUP, seed=seed)
    if name == "cmaes":
        return _Evolution(seed)
    return optuna.samplers.RandomSampler(seed=seed)


class _Evolution(optuna.samplers.BaseSampler):
    """CMA-ES (Hansen and Ostermeier, 2001) by the package `cmaes`, begun anew and told all generations for each trial.

    Optuna's own keeps the state of the strategy in the storage, as a pickle, which a storage that others can write to
    must not be trusted with, and draws by the numbers of trials, which aren't the same after a trial was cut off.

    A generation are so many finished trials in the order of their slots, given ones left out; within it those that keep
    the constraints come first, and of those that don't the ones that break them least (Deb, 2000).
    """

    def __init__(self, seed: int) -> None:
        try:
            import cmaes
        except ImportError as error:
            raise StudyError(
                "the sampler cmaes needs a package: pip install 'kronsearch[cmaes]', or choose gp, tpe or random"
            ) from error
        self._strategy, self._seed = cmaes.CMA, seed
        self._others = optuna.samplers.RandomSampler(seed=seed)
        self._space = IntersectionSearchSpace()

    def infer_relative_search_space(
        self,
        study: optuna.Study,
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        return {
            name: distribution
            for name, distribution in self._space.calculate(study).items()
            if isinstance(distribution, FloatDistribution) and not distribution.single()
        }

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,  # noqa: ARG002
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        ranges = _Ranges({name: each for name, each in search_space.items() if isinstance(each, FloatDistribution)})
        bounds = np.tile([0.0, 1.0], (len(search_space), 1))
        strategy = self._strategy(np.full(len(search_space), 0.5), _SIGMA, bounds=bounds, seed=self._seed)
        told = [each for each in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if _is_drawn(each)]
        told.sort(key=lambda each: int(each.user_attrs[SLOT]))
        size = strategy.population_size
        for first in range(0, len(told) - size + 1, size):
            ranked = sorted(told[first : first + size], key=_merit)
            strategy.tell([(ranges.place(each.params), float(rank)) for rank, each in enumerate(ranked)])
        return ranges.values(strategy.ask())

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._others.sample_independent(study, trial, param_name, param_distribution)


class _Ranges:
    """The ranges of parameters, by name, as places from 0 to 1, (count,)."""

    def __init__(self, ranges: Mapping[str, FloatDistribution]) -> None:
        self._names = list(ranges)
        self._low = np.array([each.low for each in ranges.values()])
        self._span = np.array([each.high - each.low for each in ranges.values()])

    def place(self, params: Mapping[str, float]) -> NDArray[np.float64]:
        """Return where parameters lie."""
        values = np.array([params[name] for name in self._names])
        return np.asarray((values - self._low) / self._span)

    def values(self, place: NDArray[np.float64]) -> dict[str, float]:
        """Return the parameters that lie there."""
        return dict(zip(self._names, (self._low + place * self._span).tolist(), strict=True))


def _is_drawn(trial: FrozenTrial) -> bool:
    return SLOT in trial.user_attrs and GIVEN not in trial.system_attrs


def _merit(trial: FrozenTrial) -> tuple[float, float, int]:
    over = sum(max(0.0, value) for value in trial.constraints.values())
    return over, trial.value or 0.0, int(trial.user_attrs[SLOT])
