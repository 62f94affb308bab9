"""The state of one search: what its trials are about, how they are scored, and what is made of the winner."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.trial import Trial
from torch import nn

from kronsearch.budget import Limits
from kronsearch.choices import SamplerName
from kronsearch.files import alone, make_folder
from kronsearch.finetuning.course import APPLIED, Start
from kronsearch.finetuning.loop import COMPRESSED
from kronsearch.finetuning.validation import tested
from kronsearch.models.apply import decomposed, save_compressed
from kronsearch.models.checkpoint import fingerprint_weights
from kronsearch.plan import Latency, Plan
from kronsearch.progress import Phase
from kronsearch.search.allocate import Allocation
from kronsearch.search.decode import Problem
from kronsearch.search.decoders import Decoder
from kronsearch.search.draft import Draft
from kronsearch.search.finals import Finals
from kronsearch.search.finish import check_cost, kept_network, tuned
from kronsearch.search.pace import Pace, specs_of
from kronsearch.search.prepare import Prepared
from kronsearch.search.score import Scorer
from kronsearch.search.sharing import share
from kronsearch.search.study import DIGEST, OBJECTIVE, PLAN, Given, Study, objective_of, save_table
from kronsearch.search.subject import Subject
from kronsearch.search.trial import outcome, overstepped, score
from kronsearch.training.evaluate import Evaluation

__all__ = ["Aim", "Work"]

_REVISION = 12  # of how trials are proposed, and these and finalists measured: those of another can't be compared
_FINAL, _LOCK = "final", ".final.lock"  # folder for the state of the final fine-tune, and who is at it


@dataclass(frozen=True)
class Aim:
    """What a trial is about.

    Args:
        problem: what it chooses from, and within which limits.
        draft: what its plan says besides its choice.
        pace: what is asked of latency.
    """

    problem: Problem
    draft: Draft
    pace: Pace


class Work:
    """The state of one search.

    Args:
        subject: the network, its data and the search space.
        limits: the budget in plain numbers.
        draft: what all plans have in common.
        pace: what is asked of latency.
        decoder: what makes an allocation of a trial.
    """

    def __init__(self, subject: Subject, limits: Limits, draft: Draft, pace: Pace, decoder: Decoder) -> None:
        self.subject, self.limits, self.draft, self.pace, self.decoder = subject, limits, draft, pace, decoder
        self.data, self.dense, self.device = subject.data, subject.dense, subject.device
        self._scorer: Scorer | None = None
        self._final_seconds = 0.0

    @property
    def higher_is_better(self) -> bool:
        """The direction of the score."""
        return self.data is not None and self.data.task.higher_is_better

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a study is resumed."""
        return {
            "model": self.draft.model_spec or type(self.dense).__name__,
            "model args": self.draft.model_args,
            "structure": self.subject.structure,
            "weights": fingerprint_weights(self.dense)[:16],
            "data": None if self.data is None else self.data.fingerprint[:16],
            "task": None if self.data is None else self.data.task.identity,
            "input shape": list(self.subject.cost.input_shape),
            "budget": str(self.draft.budget),
            "space": self.draft.space.model_dump_json(),
            "seed": self.draft.seed,
            "objective": OBJECTIVE if self.data is not None else "predicted error",
            "revision": _REVISION,
            **self.pace.identity,
        }

    def wanted(self, trials: int) -> int:
        """Return how many trials there are to do: one without data, whose plan is proven to be the best."""
        return trials if self.data is not None else 1

    def open(
        self,
        storage: str | None,
        study: str | None,
        folder: Path | None,
        *,
        sampler: SamplerName,
        objectives: int = 1,
        **choices: str,
    ) -> Study:
        """Open the study of this work; the folder is made once that is not refused.

        Args:
            storage: its URL; None is memory.
            study: its name in there, None for the usual one.
            folder: of the results, None where there is none.
            sampler: what proposes parameters.
            objectives: how many numbers are minimised.
            choices: what else must be the same when the study is resumed.
        """
        ledger = Study(
            storage,
            study or "kronsearch",
            {**self.identity, "sampler": sampler, **choices},
            seed=self.draft.seed,
            sampler=sampler,
            objectives=objectives,
            told=(PLAN, DIGEST),
        )
        if folder is not None:
            make_folder(folder)
        return ledger

    def set_problem(self, trials: int) -> None:
        """Measure, decompose, and set what so many trials are about.

        A single one is plain: context is not measured for it, but its parameter is there, for more trials to come.
        """
        prepared = self.set_tables()
        self.problem = self.pace.problem(self.plain)
        context = None if self._scorer is None else self.subject.context(prepared, self._scorer)
        if context is not None and trials > 1:
            self.problem = context.known(self.problem)
        elif context is not None:
            self.problem = replace(self.problem, context={layer.name: 0.0 for layer in self.problem.candidates})

    def set_tables(self) -> Prepared:
        """Measure, decompose, and set what the trials would be about if latency and context were of no account."""
        prepared = self.subject.prepared()
        candidates, sensitivity = self.subject.tables(prepared)
        self.plain = Problem(self.subject.cost, self.limits, candidates, sensitivity)
        self._scorer = self._scorer_with(prepared)
        return prepared

    def scorer(self) -> Scorer | None:
        """Return the one scorer, None without data."""
        if self._scorer is None and self.data is not None:
            self._scorer = self._scorer_with(self.subject.prepared())
        return self._scorer

    @property
    def tuning(self) -> float:
        """Seconds that fine-tunes took, their evaluations included."""
        return self._final_seconds + (0.0 if self._scorer is None else self._scorer.tuning)

    def _scorer_with(self, prepared: Prepared) -> Scorer | None:
        if self.data is None:
            return None
        return Scorer(
            self.dense,
            self.data,
            prepared.metrics,
            self.subject.settings,
            self.device,
            macs=self.subject.cost.macs,
        )

    def all_trials(self, ledger: Study, trials: int, *, ends: float | None, folder: Path | None) -> None:
        """Run, or wait for others to run, what is left of a study's trials.

        Args:
            ledger: their study.
            trials: how many finished ones there shall be in the end.
            ends: the moment after which none is begun, by the monotonic clock.
            folder: for the table of trials, written after each.
        """
        wanted = self.wanted(trials)
        if not ledger.left(range(wanted)):
            self.begin(ledger, wanted)
            return
        self.set_problem(wanted)
        self.begin(ledger, wanted)

        def run(trial: Trial) -> None:
            self.trial(ledger, trial, wanted)
            if folder is not None:
                save_table(ledger.table(), folder)

        share(ledger, range(wanted), run, self._waits("trials", wanted), given=self.given(), ends=ends)

    def left(self, ledger: Study, trials: int) -> int:
        """Return how many of so many trials are not finished."""
        return len(ledger.left(range(self.wanted(trials))))

    def play(self, finals: Finals) -> None:
        """Fine-tune the finalists, or wait for others to do it; without data there is nothing to do."""
        while self.data is not None and finals.ledger.left(slots := finals.slots):  # other workers' new ones, too
            scorer = self.scorer()
            assert scorer is not None
            self._tell_finals(finals, slots)

            def run(trial: Trial, slots: Sequence[str] = slots, scorer: Scorer = scorer) -> None:
                self._tell_finals(finals, slots, finals.score(trial, scorer, self.draft.seed))

            share(finals.ledger, slots, run, self._waits("finalists", len(slots)))

    def _tell_finals(self, finals: Finals, slots: Sequence[str], words: str = "") -> None:
        self.subject.tell("finalists", len(slots) - len(finals.ledger.left(slots)), len(slots), words)

    def begin(self, ledger: Study, wanted: int) -> None:
        """Tell that trials are next."""
        self.subject.tell("trials", len(ledger.finished()), wanted, best=_best(ledger))

    def _waits(self, phase: Phase, wanted: int) -> Callable[[int, int], None]:
        """Return what tells that other workers' trials are waited for."""
        return lambda others, done: self.subject.tell(
            phase, done, wanted, f"waiting for other workers, which run {others}"
        )

    def trial(self, ledger: Study, trial: Trial, wanted: int) -> None:
        """Run one trial to its end."""
        aim = self.aim(trial)
        found = self.decoder.decide(trial, aim.problem, aim.pace)
        if found is None:
            ledger.tell(trial)
            done = len(ledger.finished())
            self.subject.tell("trials", done, wanted, f"trial {trial.number} missed the budget of latency")
            return
        allocation, latency = found
        if aim.problem.bounds.hold(**allocation.costs):
            value = self._scored(ledger, trial, aim, allocation, latency)
        else:
            value = overstepped(trial, specs_of(aim.problem.candidates, allocation), self.scorer())
        if not ledger.tell(trial, *(() if value is None else self.objectives(value, allocation))):
            return
        self.subject.tell(
            "trials",
            len(ledger.finished()),
            wanted,
            f"trial {trial.number} {outcome(trial, value)}",
            best=_best(ledger),
            macs=allocation.costs["macs"],
            params=allocation.costs["params"],
        )

    def aim(self, trial: Trial) -> Aim:
        """Return what a trial is about; the sampler may be asked for it."""
        del trial
        return Aim(self.problem, self.draft, self.pace)

    def objectives(self, value: float, allocation: Allocation) -> tuple[float, ...]:
        """Return what is minimised, given what a plan scored."""
        del allocation
        return (value,)

    def given(self) -> Given:
        """Return what maps a slot to the parameters of a trial that every study begins with, or to None."""
        return self.decoder.given(self.problem)

    def _scored(
        self, ledger: Study, trial: Trial, aim: Aim, allocation: Allocation, latency: Latency | None
    ) -> float | None:
        """Return the objective of an allocation's plan, and write both to its trial."""
        plan = aim.draft.plan(aim.problem, allocation, latency)
        digest = hashlib.sha256(repr(sorted(plan.replaced.items())).encode()).hexdigest()[:16]
        twin = next((t for t in ledger.finished() if t.user_attrs.get(DIGEST) == digest), None)
        for key, attribute in (
            (PLAN, plan.model_dump_json()),
            (DIGEST, digest),
            ("macs", plan.compressed.macs),
            ("params", plan.compressed.params),
            ("predicted_error", plan.predicted_error),
            ("gap", allocation.gap),
            *(() if latency is None else (("latency_ms", latency.compressed_ms), ("latency_ratio", latency.ratio))),
        ):
            trial.set_user_attr(key, attribute)
        return score(trial, plan, self.scorer(), twin)

    def finish(self, plan: Plan, epochs: float, folder: Path | None) -> nn.Module:
        """Return the winner, fine-tuned and measured; written to a folder, or read from there if it was done before.

        Of workers that share the folder one does it, and the others wait for it.
        """
        epochs = epochs if self.data is not None else 0.0
        if folder is None:
            return self._finished(plan, epochs, None)
        path = folder / COMPRESSED
        with alone(folder / _LOCK, lambda: self.subject.tell("final", 0, 1, "another worker is at it")):
            if (kept := kept_network(self.dense, path, plan, epochs)) is not None:
                return kept.to(self.device)
            small = self._finished(plan, epochs, folder / _FINAL)
            save_compressed(small, plan, path, epochs=epochs)
            return small

    def _finished(self, plan: Plan, epochs: float, out: Path | None) -> nn.Module:
        """Return the winner, fine-tuned if it shall be, with a folder for the state of that."""
        scorer = self.scorer()

        def build() -> nn.Module:
            count = len(plan.replaced)
            small = decomposed(
                self.dense,
                plan.replaced,
                self.subject.cost,
                {} if scorer is None else scorer.metrics,
                self.data,
                plan.decomposition,
                device=self.device,
                tell=lambda done, words: self.subject.tell("apply", done, count, words),
            )
            check_cost(small, plan)
            return small

        if scorer is None or epochs == 0:
            return build()
        small, self._final_seconds = tuned(
            self.dense,
            Start(plan, APPLIED, build),
            scorer.validate,
            epochs=epochs,
            seed=self.draft.seed,
            out=out,
            device=self.device,
            tell=lambda done, total, words, best: self.subject.tell("final", done, total, words, best=best),
        )
        return small

    def test(self, small: nn.Module) -> tuple[Evaluation | None, Evaluation | None]:
        """Evaluate the dense and the compressed network on the test split."""
        if self.data is None:
            return None, None
        return tested(self.dense, small, self.data, self.device, lambda done: self.subject.tell("test", done, 2))


def _best(ledger: Study) -> float | None:
    """Return the least objective so far, None where nothing has one, or more than one."""
    best = ledger.ranked()
    return objective_of(best[0]) if best and ledger.objectives == 1 else None
