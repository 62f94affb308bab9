"""One trial: its plan is built, fine-tuned briefly, and measured on the validation split."""

import math
import statistics
from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial, Trial
from torch import nn

from kronsearch.plan import Plan
from kronsearch.search.score import Scorer
from kronsearch.search.study import SCORE, STOPPED, objective_of, was_stopped
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.evaluate import Evaluation

__all__ = ["foretold", "outcome", "overstepped", "score", "score_longer"]

OVER = "over"
_MEASURED = ("settled", "settled_divergence", SCORE, "error", "divergence", "examples", STOPPED)


def score(
    trial: Trial,
    plan: Plan,
    scorer: Scorer | None,
    twin: FrozenTrial | None,
    ended: Sequence[FrozenTrial] = (),
    *,
    seed: int,
) -> float | None:
    """Return the objective of a plan, None if it diverges, and write what was measured to its trial.

    A trial may be stopped before its fine-tune, by what batch norms re-estimated leave of the network, which costs a
    fraction and orders plans as well as a short one does. Its objective is what it can be expected to have come to,
    see `foretold`; what was measured by then is written to it, and that it was stopped.

    Args:
        trial: which is told of the evaluation before the fine-tune, and may be stopped there.
        plan: what is measured.
        scorer: None without data; the objective is the predicted error then.
        twin: an earlier trial with the same plan, whose outcome is this one's as well.
        ended: earlier trials that came to their end.
        seed: of the proxy fine-tune.
    """
    if scorer is None:
        trial.set_user_attr(SCORE, plan.predicted_error)
        return plan.predicted_error
    if twin is not None:
        for key in _MEASURED:
            if key in twin.user_attrs:
                trial.set_user_attr(key, twin.user_attrs[key])
        return objective_of(twin)
    small = scorer.build(plan.replaced)
    settled = _settled(trial, scorer, small)
    value = _objective(settled)
    if not math.isfinite(value):
        return None
    if not _is_stopped(trial, value):
        return _written(trial, scorer.proxy(small, seed))
    trial.set_user_attr(STOPPED, True)
    _written(trial, settled)
    return foretold(value, ended)


def score_longer(trial: Trial, plan: Plan, scorer: Scorer, *, seed: int) -> float | None:
    """Return the objective of a finalist's plan after a longer fine-tune, and write what was measured to its trial.

    None if it diverges.

    Args:
        trial: of the finals.
        plan: what is measured.
        scorer: of the search.
        seed: of the fine-tune.
    """
    return _written(trial, scorer.longer(scorer.build(plan.replaced), seed))


def foretold(value: float, ended: Sequence[FrozenTrial]) -> float:
    """Return what an objective can be expected to be after the fine-tune: as in trials that had it, in the median.

    Without that a trial that is stopped before its fine-tune, which takes a good part off the divergence, would stand
    above others that are worse, and what learns from both would be misled next to the best ones.

    Args:
        value: what it is before the fine-tune.
        ended: trials that came to their end.
    """
    parts = [
        final / before
        for trial in ended
        if (final := objective_of(trial)) is not None and (before := trial.intermediate_values.get(0, 0.0)) > 0
    ]
    return value * statistics.median(parts) if parts else value


def overstepped(
    trial: Trial, specs: Mapping[str, SeKronSpec], scorer: Scorer | None, ended: Sequence[FrozenTrial] = ()
) -> float | None:
    """Return the objective of layers that don't keep the budgets together, which can't win and isn't fine-tuned.

    It is told from the divergence before a fine-tune, see `foretold`; without data nothing is measured. None if it is
    not finite.
    """
    trial.set_user_attr(STOPPED, True)
    trial.set_user_attr(OVER, max(trial.constraints.values()))
    if scorer is None:
        return 0.0
    value = _objective(_settled(trial, scorer, scorer.build(specs)))
    return foretold(value, ended) if math.isfinite(value) else None


def outcome(trial: Trial, value: float | None) -> str:
    """Return what came of a trial, in a few words; `value` is what `score` returned."""
    if OVER in trial.user_attrs:
        return f"is {trial.user_attrs[OVER]:.1%} over a budget"
    if value is None or was_stopped(trial):
        return "pruned"
    divergence = trial.user_attrs.get("divergence")
    return f"scored {trial.user_attrs[SCORE]:.4f}" + ("" if divergence is None else f", divergence {divergence:.3g}")


def _is_stopped(trial: Trial, value: float) -> bool:
    """Tell whether an objective before the fine-tune ends a trial; in studies of several Optuna stops none."""
    if len(trial.study.directions) > 1:
        return False
    trial.report(value, 0)
    return trial.should_prune()


def _settled(trial: Trial, scorer: Scorer, small: nn.Module) -> Evaluation:
    """Evaluate a network before its fine-tune, and write that to its trial."""
    settled = scorer.settled(small)
    trial.set_user_attr("settled", settled.metric)
    trial.set_user_attr("settled_divergence", settled.divergence)
    return settled


def _written(trial: Trial, measured: Evaluation) -> float | None:
    """Write to a trial what its network came to, and return that as an objective; None, unwritten, if not finite."""
    objective = _objective(measured)
    if not math.isfinite(objective):
        return None
    values = (measured.metric, measured.error, measured.divergence, measured.n)
    for key, value in zip(_MEASURED[2:6], values, strict=True):
        trial.set_user_attr(key, value)
    return objective


def _objective(evaluation: Evaluation) -> float:
    """Return what a study minimises: the divergence, or the loss where the dense network's outputs fill the memory."""
    return evaluation.loss if evaluation.divergence is None else evaluation.divergence
