"""What is measured for one trial of a search, before any fine-tune, and for one finalist, after a short one."""

import math
from collections.abc import Mapping

from optuna.trial import FrozenTrial, Trial

from kronsearch.plan import Plan
from kronsearch.search.score import Scorer
from kronsearch.search.study import OVER, SCORE, objective_of
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.evaluate import Evaluation

__all__ = ["outcome", "overstepped", "score", "tune"]

_MEASURED = (SCORE, "error", "divergence", "examples")


def score(trial: Trial, plan: Plan, scorer: Scorer | None, twin: FrozenTrial | None) -> float | None:
    """Return the objective of a plan, None if it is not finite, and write what was measured to its trial.

    Nothing is fine-tuned: what batch norms re-estimated leave of a network orders plans as well as a short fine-tune
    does, which costs several times as much.

    Args:
        trial: that the plan is of.
        plan: what is measured.
        scorer: None without data; the objective is the predicted error then.
        twin: an earlier trial with the same plan, whose outcome is this one's as well.
    """
    if scorer is None:
        trial.set_user_attr(SCORE, plan.predicted_error)
        return plan.predicted_error
    if twin is not None:
        for key in _MEASURED:
            if key in twin.user_attrs:
                trial.set_user_attr(key, twin.user_attrs[key])
        return objective_of(twin)
    return _written(trial, scorer.settled(scorer.build(plan.replaced)))


def overstepped(trial: Trial, specs: Mapping[str, SeKronSpec], scorer: Scorer | None) -> float | None:
    """Return the objective of layers that don't keep the budgets together, which the sampler learns from.

    It is written to the trial that they can't win. Without data nothing is measured.
    """
    trial.set_user_attr(OVER, max(trial.constraints.values()))
    return 0.0 if scorer is None else _written(trial, scorer.settled(scorer.build(specs)))


def tune(trial: Trial, plan: Plan, scorer: Scorer, *, seed: int) -> float | None:
    """Return the objective of a finalist's plan after its fine-tune, and write what was measured to its trial.

    None if it diverges.

    Args:
        trial: of the finals.
        plan: what is measured.
        scorer: of the search.
        seed: of the fine-tune.
    """
    return _written(trial, scorer.proxy(scorer.build(plan.replaced), seed))


def outcome(trial: Trial, value: float | None) -> str:
    """Return what came of a trial, in a few words; `value` is its objective."""
    if OVER in trial.user_attrs:
        return f"is {trial.user_attrs[OVER]:.1%} over a budget"
    if value is None:
        return "diverged"
    divergence = trial.user_attrs.get("divergence")
    return f"scored {trial.user_attrs[SCORE]:.4f}" + ("" if divergence is None else f", divergence {divergence:.3g}")


def _written(trial: Trial, measured: Evaluation) -> float | None:
    """Write to a trial what its network came to, and return that as an objective; None, unwritten, if not finite.

    A study minimises the divergence, or the loss where the dense network's outputs fill the memory.
    """
    objective = measured.loss if measured.divergence is None else measured.divergence
    if not (math.isfinite(objective) and math.isfinite(measured.metric)):
        return None
    values = (measured.metric, measured.error, measured.divergence, measured.n)
    for key, value in zip(_MEASURED, values, strict=True):
        trial.set_user_attr(key, value)
    return objective
