from types import SimpleNamespace

import pytest

from kronsearch.finetuning import loop as loop_module
from kronsearch.finetuning.loop import Loop, supersedes
from kronsearch.finetuning.record import Record
from kronsearch.training.evaluate import Evaluation
from kronsearch.training.finetune import StepReport
from kronsearch.training.task import Classification


def scored(metric, divergence=None, error=0.0):
    return Evaluation(metric, 0.0, divergence, 100, error)


@pytest.mark.parametrize(
    ("new", "kept", "wanted"),
    [
        (scored(0.9), None, True),
        (scored(0.91), scored(0.90), True),
        (scored(0.89), scored(0.90), False),
        (scored(0.90), scored(0.90), True),  # of equals the later one
        (scored(0.89, 0.2, 0.01), scored(0.90, 0.1, 0.01), True),  # alike, whatever the divergence
        (scored(0.87, 0.1, 0.03), scored(0.90, 0.1, 0.02), True),  # 0.03 < √(0.03² + 0.02²)
        (scored(0.88, 0.1, 0.012), scored(0.90, 0.1, 0.012), False),  # 0.02 > √2 · 0.012
        (scored(0.92, 0.2, 0.012), scored(0.90, 0.1, 0.012), True),
    ],
)
def test_the_later_one_is_kept_unless_it_is_worse(new, kept, wanted):
    assert supersedes(new, kept, higher_is_better=True) is wanted


def test_an_error_that_shall_be_low_is_better_when_it_is_lower():
    assert supersedes(scored(0.1), scored(0.2), higher_is_better=False)
    assert not supersedes(scored(0.3), scored(0.2), higher_is_better=False)


class Epochs:
    """A trainer of epochs of one step, whose network is the number of the step."""

    def __init__(self, count, refusals=(None,)):
        self.step, self.total_steps, self.settings = 0, count, SimpleNamespace(batch_size=10)
        self._refusals = refusals

    @property
    def refusal(self):
        return self._refusals[min(self.step, len(self._refusals) - 1)]

    @property
    def result(self):
        return self.step

    def advance(self, steps):
        self.step += steps
        return StepReport(self.step, self.total_steps, 1.0, 0.1, 10.0)

    def state(self):
        return {}


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ((0.9, 0.5, 0.4, 0.6, 0.5, 0.3), (1, 2, 3, 4)),
        ((0.9, 0.5, 0.4, 0.3, 0.2, 0.1), (1, 2, 3)),
        ((0.9, 0.8, 0.85), (1, 2, 3)),
        ((0.9, 0.8), (1,)),
        ((0.9,), (1,)),
    ],
)
def test_of_the_first_half_the_latest_is_kept_and_then_the_best(monkeypatch, tmp_path, scores, kept):
    saved = []
    monkeypatch.setattr(loop_module, "save_compressed", lambda small, *told, epochs: saved.append(small))
    monkeypatch.setattr(loop_module, "save_record", lambda *told: None)
    data = SimpleNamespace(size=lambda split: 10, task=Classification())

    def validate(small):
        return scored(scores[small - 1])

    validate.data = data
    trainer = Epochs(len(scores))
    record = Record(identity={})
    record = Loop(trainer, record, validation=validate, plan=None, out=tmp_path, tell=lambda *told: None).run()
    assert tuple(saved) == kept == tuple(row.step for row in record.log if row.kept)


def test_that_a_step_is_not_recorded_is_told_once():
    told = []
    trainer = Epochs(4, (None, None, "it waits"))
    validation = SimpleNamespace(data=SimpleNamespace(size=lambda split: 10))
    Loop(
        trainer,
        Record(identity={}),
        validation=validation,
        plan=None,
        out=None,
        tell=lambda *news: told.append(news[2]),
    ).run()
    slow = "loss 1.0000; no CUDA graph, so a small network trains slowly: it waits"
    assert told == ["", "loss 1.0000", slow, "loss 1.0000", "loss 1.0000"]
