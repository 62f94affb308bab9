"""From the winning trial to the network that is handed over."""

from collections.abc import Callable
from pathlib import Path

import torch
from optuna.trial import FrozenTrial
from torch import nn

from kronsearch.errors import ModelError, StudyError
from kronsearch.models.apply import is_compressed, save_compressed, stored_plan
from kronsearch.models.checkpoint import read_metadata
from kronsearch.models.profile import profile_model
from kronsearch.plan import Plan, Score, parse_plan
from kronsearch.search.score import Scorer
from kronsearch.search.study import PLAN, SCORE
from kronsearch.training.data import Data
from kronsearch.training.evaluate import Evaluation, evaluate
from kronsearch.training.finetune import StepReport

__all__ = ["final_plan", "finish", "is_done", "tested"]


def final_plan(best: FrozenTrial, study: str, data: Data | None) -> Plan:
    """Return the stored plan of a trial with its score and where it comes from."""
    plan = parse_plan(str(best.user_attrs[PLAN]), origin=f"the plan of trial {best.number}")
    score = None
    if data is not None:
        examples = int(best.user_attrs.get("examples") or 0)
        score = Score(metric=data.task.metric_name, value=float(best.user_attrs[SCORE]), examples=examples)
    provenance = plan.provenance.model_copy(update={"study": study, "trial": best.number})
    return plan.model_copy(update={"score": score, "provenance": provenance})


def is_done(path: Path, plan: Plan, epochs: float) -> bool:
    """Tell whether a file holds the network of this plan, fine-tuned for so many epochs."""
    if not (path.is_file() and is_compressed(path)):
        return False
    kept = stored_plan(path).model_copy(update={"latency": plan.latency})  # timed anew it is the same network
    return kept == plan and read_metadata(path).get("epochs") == str(epochs)


def finish(
    small: nn.Module,
    plan: Plan,
    scorer: Scorer | None,
    *,
    epochs: float,
    seed: int,
    path: Path | None,
    tell: Callable[[StepReport], None],
) -> None:
    """Fine-tune the network of a plan in place, once its cost is what was counted, and write it.

    Raises:
        ModelError: it is not.
        StudyError: the fine-tune diverged.
    """
    measured = profile_model(small, input_shape=plan.input_shape)
    if (measured.macs, measured.params) != (plan.compressed.macs, plan.compressed.params):
        raise ModelError(
            f"the applied plan has {measured.macs} MACs and {measured.params} params by fvcore, but was counted as "
            f"{plan.compressed.macs} and {plan.compressed.params}: this is a bug, please report the model"
        )
    if scorer is not None and epochs > 0 and not scorer.final(small, epochs, seed, tell):
        raise StudyError(
            f"the final fine-tune of {epochs} epochs diverged: run the same line again with other --final-epochs"
        )
    if path is not None:
        save_compressed(small, plan, path, epochs=epochs)


def tested(
    dense: nn.Module, small: nn.Module, data: Data, device: torch.device | str, tell: Callable[[int], None]
) -> tuple[Evaluation, Evaluation]:
    """Evaluate the dense and the compressed network on the test split; `tell` is called with how many are done."""
    tell(0)
    first = evaluate(dense, data, "test", device=device)
    tell(1)
    second = evaluate(small, data, "test", device=device)
    tell(2)
    return first, second
