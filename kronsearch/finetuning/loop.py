"""From the first step to the last: evaluations, the network that is kept, the log, and checkpoints."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from kronsearch.errors import TrainingError
from kronsearch.finetuning.record import Record, Row, save_log, save_record
from kronsearch.finetuning.validation import Validation
from kronsearch.models.apply import save_compressed
from kronsearch.plan import Plan
from kronsearch.training.data import train_batch_count
from kronsearch.training.evaluate import Evaluation, within_error
from kronsearch.training.finetune import StepReport, Trainer

__all__ = ["CHECKPOINT", "COMPRESSED", "LOG", "Loop", "Tell", "supersedes"]

COMPRESSED, CHECKPOINT, LOG = "compressed.safetensors", "checkpoint.safetensors", "log.csv"
Tell = Callable[[int, int, str, float | None], None]

_TELL = 10  # steps between two reports of progress
_SAVE_SECONDS = 120.0  # at the most between two checkpoints, and a step


def supersedes(new: Evaluation, kept: Evaluation | None, *, higher_is_better: bool) -> bool:
    """Tell whether a network is kept in the place of an earlier one.

    It is, unless its score is worse by more than the standard error of the difference: while the rate falls the later
    network is the better one, as a rule, and scores alone don't tell. To take of alike ones the one that diverges least
    from the dense network made no difference after two long fine-tunes (on the test split 0.14 points for it and 0.01
    against, of 0.27 standard error), and where labels are learnt and few images are scored it takes one from long
    before the end.
    """
    if kept is None:
        return True
    gain = (new.metric - kept.metric) * (1 if higher_is_better else -1)
    return gain > 0 or within_error(gain, new.error, kept.error)


class Loop:
    """Takes a trainer to its last step, and leaves on disk what that takes and what came of it.

    Args:
        trainer: which may have begun already.
        record: what is known of that.
        validation: of the data, beside the dense network.
        plan: of the network.
        out: where files are written to; None in all processes but the first.
        tell: is called with the number of steps done and that of all, a few words, and the score of the network that is
            kept where it is news.
    """

    def __init__(
        self,
        trainer: Trainer,
        record: Record,
        *,
        validation: Validation,
        plan: Plan,
        out: Path | None,
        tell: Tell,
    ) -> None:
        self.trainer, self.record, self.plan, self.out, self.tell = trainer, record, plan, out, tell
        self.validation, self.data = validation, validation.data
        self._began, self._saved = time.monotonic() - record.seconds, time.monotonic()

    def run(self) -> Record:
        """Train to the last step and return the record then.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        trainer = self.trainer
        per_epoch = train_batch_count(self.data.size("train"), trainer.settings.batch_size)
        kept, refusal = self.record.kept, None
        if trainer.step == 0:  # before any other file, which without it would not be known as this fine-tune's
            self._save()
        self.tell(trainer.step, trainer.total_steps, "", None if kept is None else kept.metric)
        while trainer.step < trainer.total_steps:
            epoch_ends = min((trainer.step // per_epoch + 1) * per_epoch, trainer.total_steps)
            # in the same portions however often it is resumed
            portion = min(_TELL - trainer.step % _TELL, epoch_ends - trainer.step)
            report = trainer.advance(portion)
            self._check(report, report.loss)
            self._add(losses=_sum(self.record.losses, report.loss, portion))
            words = f"loss {report.loss:.4f}"
            if trainer.refusal != refusal:
                refusal = trainer.refusal
                words += f"; no CUDA graph, so a small network trains slowly: {refusal}"
            self.tell(report.step, report.total_steps, words, None)
            if trainer.step == epoch_ends and self.out is not None:
                self._evaluate(report, trainer.step / per_epoch, self.out)
            if trainer.step == epoch_ends or time.monotonic() - self._saved > _SAVE_SECONDS:
                self._save()
        return self.record

    def _save(self) -> None:
        """Leave what the fine-tune is resumed from."""
        if self.out is not None:
            self._add(seconds=time.monotonic() - self._began)
            save_record(self.record, self.trainer.state(), self.out / CHECKPOINT)
        self._saved = time.monotonic()

    def _check(self, report: StepReport, *figures: float) -> None:
        if not all(map(math.isfinite, figures)):
            raise TrainingError(
                f"the fine-tune diverged at step {report.step} of {report.total_steps}, with a highest learning rate "
                f"of {self.trainer.settings.lr:g}: pass a lower --lr, and another --out"
            )

    def _add(self, **news: object) -> None:
        self.record = self.record.model_copy(update=news)

    def _evaluate(self, report: StepReport, epoch: float, out: Path) -> None:
        """Score the network as it stands, keep it unless one of the second half is better, and log that.

        The dense network was trained on the validation split, as a rule, and knows it by heart. What a student has of
        that is lost at first, and its score with it, while it learns: of the first half it is the latest that is kept.
        """
        # with the running statistics of batch norms: re-estimated ones were no better (0.0546 against 0.0544 of
        # divergence for ResNet-20 at a third of the MACs after one epoch)
        small = self.trainer.result
        found, kept = self.validation(small), self.record.kept
        self._check(report, found.metric, found.loss, found.divergence or 0.0)
        rival = None if kept is None or 2 * kept.step < report.total_steps else kept.evaluation
        better = supersedes(found, rival, higher_is_better=self.data.task.higher_is_better)
        total, steps = self.record.losses
        row = Row(
            step=report.step,
            epoch=epoch,
            loss=total / steps,
            lr=report.learning_rate,
            metric=found.metric,
            error=found.error,
            divergence=found.divergence,
            images_per_second=report.images_per_second,
            seconds=time.monotonic() - self._began,
            kept=better,
        )
        if better:
            save_compressed(small, self.plan, out / COMPRESSED, epochs=epoch)
        self._add(log=(*self.record.log, row), losses=(0.0, 0))
        save_log(self.record, self.data.task.metric_name, out / LOG)
        best = row if better or kept is None else kept
        words = f"epoch {epoch:g} scored {row.metric:.4f}, loss {row.loss:.4f}"
        self.tell(report.step, report.total_steps, words, best.metric)


def _sum(losses: tuple[float, int], mean: float, steps: int) -> tuple[float, int]:
    total, count = losses
    return total + mean * steps, count + steps
