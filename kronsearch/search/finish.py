"""From the winning trial to the network that is handed over."""

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from optuna.trial import FrozenTrial
from torch import nn

from kronsearch.errors import CheckpointError, KronsearchError, ModelError, PlanError, StudyError, TrainingError
from kronsearch.finetuning.course import Course, Start, long_settings
from kronsearch.finetuning.loop import Tell
from kronsearch.finetuning.validation import Validation
from kronsearch.models.apply import load_compressed, stored_plan
from kronsearch.models.checkpoint import read_metadata
from kronsearch.models.profile import profile_model
from kronsearch.plan import Plan, Score
from kronsearch.search.study import plan_of

__all__ = ["check_cost", "final_plan", "kept_network", "tuned"]


def final_plan(trial: FrozenTrial, study: str, score: Score | None) -> Plan:
    """Return the stored plan of a trial, with its score and where it comes from.

    Args:
        trial: of the search.
        study: its name.
        score: what the plan was measured to be worth.
    """
    plan = plan_of(trial)
    provenance = plan.provenance.model_copy(update={"study": study, "trial": trial.number})
    return plan.model_copy(update={"score": score, "provenance": provenance})


def kept_network(dense: nn.Module, path: Path, plan: Plan, epochs: float) -> nn.Module | None:
    """Return the network that a file holds if it is of this plan and was fine-tuned for so many epochs, else None.

    A damaged file is as good as none.
    """
    try:
        kept = stored_plan(path).model_copy(update={"latency": plan.latency})  # timed anew it is the same network
        if kept != plan or read_metadata(path).get("epochs") != str(epochs):
            return None
        return load_compressed(dense, path, plan)
    except (CheckpointError, PlanError):
        return None


def check_cost(small: nn.Module, plan: Plan) -> None:
    """Raise ModelError unless the network of a plan costs what was counted."""
    measured = profile_model(small, input_shape=plan.input_shape)
    if (measured.macs, measured.params) != (plan.compressed.macs, plan.compressed.params):
        raise ModelError(
            f"the applied plan has {measured.macs} MACs and {measured.params} params by fvcore, but was counted as "
            f"{plan.compressed.macs} and {plan.compressed.params}: this is a bug, please report the model"
        )


def tuned(
    dense: nn.Module,
    start: Start,
    validation: Validation,
    *,
    epochs: float,
    seed: int,
    out: Path | None,
    device: torch.device | str,
    tell: Tell,
) -> tuple[nn.Module, float]:
    """Fine-tune the winner as `finetune` does, and go on where that was cut off.

    Args:
        dense: the teacher, on `device`.
        start: the winner.
        validation: of the data.
        epochs: how long.
        seed: of everything random.
        out: folder for the state of the fine-tune, of which nobody else makes use meanwhile; what is there of another
            winner or of other settings is written over. None takes a temporary one.
        device: to run on.
        tell: see `Loop`.

    Returns:
        The network that was kept, and the seconds that this call trained for, evaluations included.

    Raises:
        StudyError: the loss is no longer finite.
        CheckpointError: the state is of another network, though it says otherwise.
    """
    data = validation.data
    with TemporaryDirectory() if out is None else nullcontext(out) as folder:
        settings = long_settings(data, epochs=epochs)
        course = Course(dense, start, data, settings, out=Path(folder), device=device, seed=seed)
        try:
            found = course.found()
        except KronsearchError:
            found = None
        try:
            ended = course.run(found, validation, tell)
        except TrainingError as error:
            raise StudyError(
                f"the final fine-tune of {epochs:g} epochs diverged: run the same line again with other --final-epochs"
            ) from error
    return ended.network, ended.seconds
