"""One trial: its plan is built, fine-tuned briefly, and measured on the validation split."""

import math
from collections.abc import Mapping

from optuna.trial import FrozenTrial, Trial
from torch import nn

from kronsearch.plan import Plan
from kronsearch.search.score import Scorer
from kronsearch.search.study import SCORE, STOPPED, was_stopped
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.evaluate import Evaluation

__all__ = ["outcome", "overstepped", "score"]

OVER = "over"
_MEASURED = ("settled", "settled_divergence", SCORE, "error", "divergence", "examples", STOPPED)


def score(trial: Trial, plan: Plan, scorer: Scorer | None, twin: FrozenTrial | None, *, seed: int) -> float | None:
    """Return the objective of a plan, None if it diverges, and write what was measured to its trial.

    Of a trial that is stopped early it is what it was by then, and the trial says so.

    Args:
        trial: which is told of every evaluation, and may be pruned at each.
        plan: what is measured.
        scorer: None without data; the objective is the predicted error then.
        twin: an earlier trial with the same plan, whose outcome is this one's as well.
        seed: of the proxy fine-tune.
    """
    if scorer is None:
        trial.set_user_attr(SCORE, plan.predicted_error)
        return plan.predicted_error
    if twin is not None:
        for key in _MEASURED:
            if key in twin.user_attrs:
                trial.set_user_attr(key, twin.user_attrs[key])
        return twin.value
    small = scorer.build(plan.replaced)
    _settled(trial, scorer, small)
    last = None
    for step, last in enumerate(scorer.proxy(small, seed)):
        if not math.isfinite(_objective(last)):
            return None
        trial.report(_objective(last), step)
        if trial.should_prune():
            trial.set_user_attr(STOPPED, True)
            break
    if last is None:
        return None
    for key, value in zip(_MEASURED[2:6], (last.metric, last.error, last.divergence, last.n), strict=True):
        trial.set_user_attr(key, value)
    return _objective(last)


def overstepped(trial: Trial, specs: Mapping[str, SeKronSpec], scorer: Scorer | None) -> float | None:
    """Return the objective of layers that don't keep the budgets together, which can't win and isn't fine-tuned.

    It is the divergence before a fine-tune, which orders plans like that after it; without data nothing is measured.
    None if it is not finite.
    """
    trial.set_user_attr(STOPPED, True)
    trial.set_user_attr(OVER, max(trial.constraints.values()))
    if scorer is None:
        return 0.0
    value = _objective(_settled(trial, scorer, scorer.build(specs)))
    return value if math.isfinite(value) else None


def outcome(trial: Trial, value: float | None) -> str:
    """Return what came of a trial, in a few words; `value` is what `score` returned."""
    if OVER in trial.user_attrs:
        return f"is {trial.user_attrs[OVER]:.1%} over a budget"
    if value is None or was_stopped(trial):
        return "pruned"
    divergence = trial.user_attrs.get("divergence")
    return f"scored {trial.user_attrs[SCORE]:.4f}" + ("" if divergence is None else f", divergence {divergence:.3g}")


def _settled(trial: Trial, scorer: Scorer, small: nn.Module) -> Evaluation:
    """Evaluate a network before its fine-tune, and write that to its trial."""
    settled = scorer.validate(small)
    trial.set_user_attr("settled", settled.metric)
    trial.set_user_attr("settled_divergence", settled.divergence)
    return settled


def _objective(evaluation: Evaluation) -> float:
    """Return what a study minimises: the divergence, or the loss where the dense network's outputs fill the memory."""
    return evaluation.loss if evaluation.divergence is None else evaluation.divergence
