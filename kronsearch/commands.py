"""The commands: each takes its settings, makes one call of the library, and prints what came of it.

What is slow to import is imported by the command that needs it, after what can be refused without it.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kronsearch.budget import Budget, budgets, read_span
from kronsearch.config import OptionError, Settings
from kronsearch.given import check_data, data_of, device_of, input_shape_of, model_of, spec_of
from kronsearch.plan import holds_weights, load_plan
from kronsearch.report import (
    comparison,
    evaluation,
    front,
    gain,
    latency,
    not_begun,
    plan_report,
    profile_report,
    scored_front,
    times,
)
from kronsearch.tables import console_for
from kronsearch.watching import SearchView

if TYPE_CHECKING:
    from kronsearch.progress import Watcher

__all__ = ["apply", "bench", "evaluate", "finetune", "profile", "run", "show", "sweep"]


def run(settings: Settings) -> None:
    """Search for the best plan under a budget, and compare dense and compressed network."""
    if settings.objective == "pareto":
        _run_front(settings)
        return
    spec = spec_of(settings)
    budget = Budget(flops=settings.budget_flops, params=settings.budget_params, latency=settings.budget_latency)

    from kronsearch.search.run import search

    if not settings.debug:
        logging.getLogger("optuna").setLevel(logging.ERROR)  # its log tells what the progress tells
    device = device_of(settings)
    model = model_of(settings, spec)
    data = data_of(settings, None)
    with _watching(settings.quiet, budget, timeout=settings.timeout) as watch:
        result = search(
            model,
            data,
            budget=budget,
            decoder=settings.decoder,
            input_shape=input_shape_of(settings, spec, model, data),
            final_epochs=settings.final_epochs,
            **_of_study(settings),
            **_of_subject(settings, spec, device),
            watch=watch,
        )
    metric = None if data is None else data.task.metric_name
    console = console_for()
    console.print(comparison(result.plan, dense=result.dense, compressed=result.compressed, metric=metric))
    summary = result.summary
    if metric is not None and summary is not None and summary.trials > 1:
        console.print(gain(summary, metric))
    for line in (*not_begun(result.left, settings.trials), times(result.seconds, result.tuning)):
        console.print(line, soft_wrap=True)
    console.print(f"written to {result.out}: plan.json, compressed.safetensors, trials.csv", soft_wrap=True)


def _run_front(settings: Settings) -> None:
    """Search for the front of score and cost between two budgets, and show it."""
    spec = spec_of(settings)
    span = read_span(flops=settings.budget_flops, params=settings.budget_params)
    final = "final_epochs" in settings.model_fields_set and settings.final_epochs > 0
    for name, given, instead in (
        ("--budget-latency", settings.budget_latency is not None, ""),
        ("--decoder direct", settings.decoder == "direct", " or pass --decoder allocate"),
        ("--input-shape", settings.input_shape is not None, ""),
        ("--final-epochs", final, " or pass --final-epochs 0"),
    ):
        if given:
            raise OptionError(f"{name} does not go with --objective pareto: leave it out{instead}")

    from kronsearch.search.frontier import search_front

    if not settings.debug:
        logging.getLogger("optuna").setLevel(logging.ERROR)
    device = device_of(settings)
    model = model_of(settings, spec)
    data = data_of(settings, None)
    if data is None:
        raise OptionError("no --data given to score plans on: pass it, or take `kronsearch sweep`, which needs none")
    with _watching(settings.quiet, timeout=settings.timeout) as watch:
        found = search_front(
            model,
            data,
            flops=settings.budget_flops,
            params=settings.budget_params,
            **_of_study(settings),
            **_of_subject(settings, spec, device),
            watch=watch,
        )
    console = console_for()
    console.print(scored_front(found, str(span), data.task.metric_name))
    for line in (*not_begun(found.left, settings.trials), times(found.seconds, found.tuning)):
        console.print(line, soft_wrap=True)
    console.print(f"written to {found.out}: front.csv, plans/, trials.csv", soft_wrap=True)


def sweep(settings: Settings) -> None:
    """Allocate many budgets from one set of error tables, and show the front."""
    spec = spec_of(settings)
    asked: dict[str, Any] = {
        "flops": settings.budget_flops,
        "params": settings.budget_params,
        "latency": settings.budget_latency,
    }
    budgets(**asked)  # what can't be read needs no torch to be told

    from kronsearch.search.sweep import sweep

    device = device_of(settings)
    model = model_of(settings, spec)
    data = data_of(settings, None)
    with _watching(settings.quiet) as watch:
        found = sweep(
            model,
            data,
            **asked,
            input_shape=input_shape_of(settings, spec, model, data),
            **_of_subject(settings, spec, device),
            watch=watch,
        )
    console = console_for()
    console.print(front(found))
    console.print(f"written to {found.out}: front.csv, plans/", soft_wrap=True)


@contextmanager
def _watching(quiet: bool, budget: Budget | None = None, *, timeout: float | None = None) -> Iterator["Watcher"]:
    """Yield what shows each step on stderr, or nothing."""
    from kronsearch.progress import ignore

    view = SearchView(console_for(sys.stderr), budget, timeout=timeout)
    with nullcontext(ignore) if quiet else view as watch:
        yield watch


def _of_study(settings: Settings) -> dict[str, Any]:
    """Return what every search for trials is given."""
    return {name: getattr(settings, name) for name in ("sampler", "trials", "timeout", "storage", "study")}


def _of_subject(settings: Settings, spec: str, device: str) -> dict[str, Any]:
    """Return what every search is given."""
    names = ("sensitivity", "space", "out", "cache", "seed", "latency_batch", "latency_threads", "allow_slower")
    given = {name: getattr(settings, name) for name in (*names, "model_args")}
    return {**given, "model_spec": spec, "device": device}


def profile(settings: Settings) -> None:
    """Show what each layer costs, and the smallest reachable cost."""
    spec = spec_of(settings)

    from kronsearch.models.profile import profile_model
    from kronsearch.search.reach import smallest_cost
    from kronsearch.search.space import load_space

    space = load_space(settings.space)
    model = model_of(settings, spec, warn=False)
    cost = profile_model(model, input_shape=input_shape_of(settings, spec, model, data_of(settings, None)))
    console_for().print(profile_report(cost, smallest=smallest_cost(cost, space), kept=space.reason_to_keep))


def show(path: Path) -> None:
    """Show a plan."""
    console_for().print(plan_report(load_plan(path)))


def apply(path: Path, out: Path, settings: Settings) -> None:
    """Apply a plan to a checkpoint, and write the compressed network."""
    spec = spec_of(settings)
    plan = load_plan(path)

    if out.suffix != ".safetensors":
        raise OptionError(f"--out {out}: the network is written as safetensors; pass a name such as small.safetensors")

    from kronsearch.models.apply import apply_plan, measured, save_compressed

    device = device_of(settings)
    model = model_of(settings, spec)
    data = data_of(settings, plan)
    with _watching(settings.quiet) as watch:
        small = apply_plan(model, plan, data, device=device, watch=watch)
    plan = measured(plan, model.to(device), small)
    budget = plan.budget
    for cost, most, name in (
        (plan.compressed.macs, budget.max_macs, "MACs"),
        (plan.compressed.params, budget.max_params, "params"),
    ):
        if most is not None and cost > most:
            typer.echo(f"warning: {cost} {name} are above the plan's budget of {most}", err=True)
    save_compressed(small, plan, out)
    console = console_for()
    console.print(comparison(plan))
    console.print(f"written to {out}", soft_wrap=True)


def finetune(path: Path, settings: Settings) -> None:
    """Fine-tune a compressed network, and compare it with the dense one, its teacher."""
    spec = spec_of(settings)
    plan = None if holds_weights(path) else load_plan(path)
    check_data(settings)

    from kronsearch.finetuning.run import finetune
    from kronsearch.models.apply import stored_plan
    from kronsearch.training.team import joined

    leads = joined().leads
    device = device_of(settings)
    model = model_of(settings, spec, warn=leads)
    data = data_of(settings, stored_plan(path) if plan is None else plan, val_fraction=settings.val_fraction)
    assert data is not None
    with _watching(settings.quiet or not leads) as watch:
        result = finetune(
            model,
            path,
            data,
            epochs=settings.epochs,
            lr=settings.lr,
            batch_size=settings.batch_size,
            label_weight=settings.label_weight,
            compiled=settings.compile,
            out=settings.out if "out" in settings.model_fields_set else "kronsearch-finetuned",
            device=device,
            seed=settings.seed,
            watch=watch,
        )
    if leads:
        console = console_for()
        console.print(
            comparison(result.plan, dense=result.dense, compressed=result.compressed, metric=data.task.metric_name)
        )
        done = "had been fine-tuned before, see" if result.was_done else "written to"
        console.print(f"{done} {result.out}: compressed.safetensors, log.csv", soft_wrap=True)


def evaluate(path: Path | None, settings: Settings) -> None:
    """Evaluate a dense checkpoint, a plan applied to one, or a compressed checkpoint, on a split of the data."""
    spec = spec_of(settings)
    plan = None if path is None or holds_weights(path) else load_plan(path)
    check_data(settings)

    from kronsearch.models.apply import apply_plan, is_compressed, load_compressed, stored_plan
    from kronsearch.models.loading import load_model
    from kronsearch.training.evaluate import evaluate

    device, compressed = device_of(settings), None
    if path is not None and plan is None:
        compressed = path
    elif settings.weights is not None and is_compressed(settings.weights):
        compressed = Path(settings.weights)
    if compressed is not None and plan is None:
        plan = stored_plan(compressed)
    data = data_of(settings, plan, reseeded=False, val_fraction=settings.val_fraction)
    assert data is not None
    if compressed is not None:
        model = load_compressed(load_model(spec, args=settings.model_args), compressed, plan)
    else:
        model = model_of(settings, spec)
        if plan is not None:
            with _watching(settings.quiet) as watch:
                model = apply_plan(model, plan, data, device=device, watch=watch)
    result = evaluate(model.to(device), data, settings.split, device=device)
    console_for().print(evaluation(result, metric=data.task.metric_name, split=settings.split))


def bench(path: Path | None, csv: Path | None, settings: Settings) -> None:
    """Time the dense network and a compressed one on this machine."""
    spec = spec_of(settings)
    file = path if path is not None or settings.weights is None else Path(settings.weights)
    if file is None or (path is None and not holds_weights(file)):
        raise OptionError("nothing to compare with: pass a plan.json, or the compressed.safetensors of a run")
    plan = None if holds_weights(file) else load_plan(file)

    from kronsearch.models.apply import apply_plan, load_compressed, stored_plan
    from kronsearch.models.bench import bench, save_timings
    from kronsearch.models.loading import load_model

    device = device_of(settings)
    model = load_model(spec, weights=None if path is None else settings.weights, args=settings.model_args)
    if plan is None:
        plan = stored_plan(file)
        small = load_compressed(model, file, plan)
    else:
        with _watching(settings.quiet) as watch:
            small = apply_plan(model, plan, device=device, watch=watch)
    timings = bench(
        model,
        small,
        input_shape=plan.input_shape,
        batches=settings.batch,
        threads=settings.threads,
        seconds=settings.seconds,
        device=device,
    )
    console = console_for()
    console.print(latency(timings))
    if csv is not None:
        save_timings(timings, csv)
        console.print(f"written to {csv}", soft_wrap=True)
