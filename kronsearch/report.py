"""What the command line prints at the end: tables of profiles, plans and comparisons, made to be read by people."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kronsearch.budget import format_count
from kronsearch.plan import Plan, PlanBudget
from kronsearch.tables import FLOPS, add_costs, duration, new_table, one_line, sizes

if TYPE_CHECKING:
    from kronsearch.models.bench import Timing
    from kronsearch.models.profile import ModelCost
    from kronsearch.progress import Phase
    from kronsearch.search.frontier import ScoredFront
    from kronsearch.search.summary import Summary
    from kronsearch.search.sweep import Front
    from kronsearch.training.evaluate import Evaluation

__all__ = [
    "budget_used",
    "comparison",
    "evaluation",
    "front",
    "gain",
    "latency",
    "not_begun",
    "plan_report",
    "profile_report",
    "scored_front",
    "times",
]

_NAMES = {
    "predicted_error": "predicted error",
    "divergence": "divergence before the fine-tune",
    "tuned_divergence": "divergence after it",
}
_PARTS: "dict[Phase, str]" = {  # others prepare
    "trials": "trials",
    "finalists": "finalists",
    "apply": "decomposition",
    "final": "final fine-tune",
    "test": "test",
}


def comparison(
    plan: Plan,
    *,
    dense: "Evaluation | None" = None,
    compressed: "Evaluation | None" = None,
    metric: str | None = None,
) -> RenderableType:
    """Return the table dense / compressed, with the metric on the test split where there are data, and the budget."""
    table = _costs(plan, "compressed")
    if dense is not None and compressed is not None:
        change = compressed.metric - dense.metric
        table.add_row(f"test {metric}", f"{dense.metric:.4f}", f"{compressed.metric:.4f}", f"{change:+.4f}")
    else:
        table.add_row("predicted error", "0", f"{plan.predicted_error:.4g}", "")
    return Group(table, *map(Text, (*budget_used(plan), *_measured(plan), *_gap(plan))))


def gain(summary: "Summary", metric: str) -> RenderableType:
    """Return what the trials gained over the plain allocation, and how well cheap measures order plans."""
    table = new_table("on the validation split", numbers=("plain allocation", "winner", "change"))
    for name, plain, best, digits in (
        (metric, summary.plain, summary.best, ".4f"),
        ("divergence", summary.plain_divergence, summary.best_divergence, ".4g"),
    ):
        if best is not None:
            known = ("no score", "") if plain is None else (f"{plain:{digits}}", f"{best - plain:+{digits}}")
            table.add_row(one_line(name), known[0], f"{best:{digits}}", known[1])
    failed = f" ({summary.failed} missed a budget or diverged)" if summary.failed else ""
    lines = [f"best: trial {summary.winner}; {summary.trials} trials{failed}, {summary.finalists} of them fine-tuned"]
    lines += [
        f"rank correlation of {_NAMES[found.cheap]} and {_NAMES[found.dear]}: {found.correlation:.2f}, n {found.n}"
        for found in summary.agreements
    ]
    return Group(table, *map(Text, lines))


def not_begun(left: int, trials: int) -> list[str]:
    """Return a line if trials are left of so many that a search was asked for."""
    if not left:
        return []
    return [f"{left} of {trials} trials were not begun: the time was over; the same line with more of it goes on"]


def times(seconds: "Mapping[Phase, float]", tuning: float) -> str:
    """Return one line: how long each part of a search took, and how much of all was fine-tuning."""
    preparation = sum(took for phase, took in seconds.items() if phase not in _PARTS)
    parts = {"preparation": preparation} | {name: seconds.get(phase, 0.0) for phase, name in _PARTS.items()}
    told = ", ".join(f"{name} {duration(took)}" for name, took in parts.items() if round(took))
    return (
        f"time: {told or duration(sum(parts.values()))}; {tuning / (sum(parts.values()) or 1.0):.0%} of it fine-tuning"
    )


def budget_used(plan: Plan) -> list[str]:
    """Return one line for each bound of the plan's budget: how much of it the compressed network uses."""
    budget, used = plan.budget, plan.compressed
    bounds = (
        (FLOPS, budget.flops, used.macs, budget.max_macs),
        ("params", budget.params, used.params, budget.max_params),
    )
    return [
        f"budget of {name}: {one_line(written or bound)} ({format_count(bound)}), {used / max(1, bound):.2%} used"
        for name, written, used, bound in bounds
        if bound is not None
    ]


def _measured(plan: Plan) -> list[str]:
    """Return what the plan was measured to take, and against which budget; that it is no faster, if it isn't."""
    taken = plan.latency
    asked = [] if plan.budget.latency is None else [f"budget of latency: {one_line(plan.budget.latency)}"]
    if taken is None:
        return asked
    where = f"batch {taken.batch}, {taken.threads} thread{'s' * (taken.threads > 1)}, {one_line(taken.device)}"
    told = (
        f"latency: dense {taken.dense_ms:.4g} ms, compressed {taken.compressed_ms:.4g} ms; within pairs of runs "
        f"{taken.ratio:.1%} of dense (quartiles {taken.ratio_low:.1%}–{taken.ratio_high:.1%}; {where})"
    )
    slower = "no faster than the dense network on this machine: see --budget-latency, or a larger --latency-batch"
    return [*asked, told, *([slower] if taken.ratio >= 1 and not asked else [])]


def plan_report(plan: Plan) -> RenderableType:
    """Return a plan's layers, costs, budget, score and provenance."""
    layers = new_table("layer", "kernel", "becomes", numbers=("squared error",))
    for name, layer in plan.layers.items():
        becomes, error = f"dense: {layer.dense}", ""
        if layer.spec is not None:
            becomes, error = str(layer.spec), f"{layer.error:.4g}"
        layers.add_row(one_line(name), sizes(layer.kernel_shape), one_line(becomes), error)
    lines = [
        *budget_used(plan),
        *_measured(plan),
        *_gap(plan),
        f"predicted error: {plan.predicted_error:.4g}",
        *_score(plan),
        _model(plan),
        _decomposition(plan),
        _provenance(plan),
    ]
    return Group(layers, _costs(plan, "compressed"), *map(Text, lines))


def front(found: "Front") -> RenderableType:
    """Return the points of a sweep."""
    points, dense = found.points, found.points[0].plan.dense
    timed = any(point.plan.latency is not None for point in points)
    numbers = ("MACs", "params", *(("latency",) if timed else ()), "predicted error", "weighed error", "proven gap")
    table = new_table("budget", numbers=numbers, last="plan")
    for point in points:
        plan, gap = point.plan, point.plan.provenance.gap or 0.0
        table.add_row(
            _bounds(plan.budget),
            format_count(plan.compressed.macs),
            format_count(plan.compressed.params),
            *([_took(plan)] if timed else []),
            f"{plan.predicted_error:.4g}",
            f"{point.weighed_error:.4g}",
            f"{gap:.2%}",
            one_line(point.name),
        )
    told = f"The dense network has {format_count(dense.macs)} MACs and {format_count(dense.params)} params."
    return Group(table, Text(f"{told} The weighed error is what was made smallest, to the proven gap."))


def scored_front(found: "ScoredFront", span: str, metric: str) -> RenderableType:
    """Return the points of a search for a front."""
    dense = found.points[0].plan.dense
    table = new_table("budget", numbers=("MACs", "params", metric, "divergence", "trial"), last="plan")
    for point in found.points:
        cost, budget, measured = point.plan.compressed, point.plan.budget, point.measured
        divergence = measured.get("divergence")
        table.add_row(
            _bounds(budget),
            f"{format_count(cost.macs)}, {cost.macs / dense.macs:.1%}",
            f"{format_count(cost.params)}, {cost.params / dense.params:.1%}",
            f"{measured['score']:.4f} ± {measured['error']:.4f}",
            "" if divergence is None else f"{divergence:.4g}",
            str(point.plan.provenance.trial),
            one_line(point.name),
        )
    told = (
        f"{len(found.points)} of {len(found.trials)} trials between {span} are on the front. Scores are of the "
        "validation split after a proxy fine-tune: pass a plan to `kronsearch finetune`."
    )
    return Group(table, Text(told))


def _bounds(budget: PlanBudget) -> str:
    bounds = (("flops", budget.flops), ("params", budget.params), ("latency", budget.latency))
    return one_line(", ".join(f"{name} {written}" for name, written in bounds if written is not None))


def _took(plan: Plan) -> str:
    return "" if plan.latency is None else f"{plan.latency.compressed_ms:.4g} ms, {plan.latency.ratio:.1%}"


def profile_report(
    cost: "ModelCost", *, smallest: tuple[int, int], kept: Callable[[str], str | None]
) -> RenderableType:
    """Return what a network costs by layer, which layers can be replaced, and the smallest reachable cost.

    Args:
        cost: of the network.
        smallest: reachable MACs and parameters.
        kept: tells why the search space keeps a layer of this name dense.
    """
    layers = new_table("layer", "kind", "kernel", numbers=("MACs", "params"), last="can be replaced")
    for layer in cost.layers:
        layers.add_row(
            one_line(layer.name or "(the model itself)"),
            one_line(layer.kind),
            sizes(layer.kernel_shape or ()),
            format_count(layer.macs),
            format_count(layer.params),
            "yes" if (reason := layer.keeps_dense or kept(layer.name)) is None else one_line(f"no: {reason}"),
        )
    totals = new_table("", numbers=("dense", "smallest reachable", "change"))
    add_costs(totals, (cost.macs, cost.params), smallest)
    note = "Each of the smallest is reached by itself, not both at once."
    return Group(layers, totals, Text(f"input {sizes(cost.input_shape)}. {note}"))


def evaluation(result: "Evaluation", *, metric: str, split: str) -> RenderableType:
    """Return a network's metric and loss on a split."""
    table = new_table("", numbers=(split,))
    table.add_row(one_line(metric), f"{result.metric:.4f}")
    table.add_row("loss", f"{result.loss:.4f}")
    table.add_row("examples", str(result.n))
    return table


def latency(timings: "list[Timing]") -> RenderableType:
    """Return how long dense and compressed network take, whole and by layer, for each batch and number of threads."""
    tables: dict[str, Table] = {}
    memory: dict[str, str] = {}
    for timing in timings:
        setting = f"batch {timing.batch}, threads {timing.threads}"
        layouts = f"dense {timing.dense_layout}, compressed {timing.compressed_layout}"
        columns = ("dense ms", "compressed ms", "speed-up", "quartiles", "pairs")
        heading = f"{setting}; {layouts}"
        table = tables.setdefault(heading, new_table("layer", numbers=columns))
        if timing.dense_bytes is not None and timing.compressed_bytes is not None:
            before, after = (size / 2**20 for size in (timing.dense_bytes, timing.compressed_bytes))
            memory[heading] = f"peak memory: dense {before:.2f} MiB, compressed {after:.2f} MiB"
        table.add_row(
            one_line(timing.layer or "(the whole network)"),
            f"{timing.dense_ms:.4g}",
            f"{timing.compressed_ms:.4g}",
            f"{timing.speedup:.2f}×",
            f"{timing.speedup_low:.2f}–{timing.speedup_high:.2f}",
            str(timing.pairs),
        )
    parts: list[RenderableType] = []
    for heading, table in tables.items():
        parts += [Text(heading), table]
        if heading in memory:
            parts.append(Text(memory[heading]))
    note = "Medians of runs that took turns, each network in the layout it is faster in. Below 1× it got slower."
    return Group(*parts, Text(note))


def _costs(plan: Plan, name: str) -> Table:
    table = new_table("", numbers=("dense", name, "change"))
    add_costs(table, (plan.dense.macs, plan.dense.params), (plan.compressed.macs, plan.compressed.params))
    return table


def _gap(plan: Plan) -> list[str]:
    gap = plan.provenance.gap
    return [] if gap is None else [f"proven gap: at most {gap:.2%} above the least that the allocation could reach"]


def _score(plan: Plan) -> list[str]:
    score = plan.score
    return [] if score is None else [f"score: {one_line(score.metric)} {score.value:.4f}, n {score.examples}"]


def _model(plan: Plan) -> str:
    arguments = f" with --model-args '{one_line(json.dumps(plan.model.args))}'" if plan.model.args else ""
    replaced = f"{len(plan.replaced)} of {len(plan.layers)} layers replaced"
    return f"model: {one_line(plan.model.spec or 'not named')}{arguments}, input {sizes(plan.input_shape)}, {replaced}"


def _decomposition(plan: Plan) -> str:
    how = plan.decomposition
    calibration = f"data-aware, {how.calibration_images} images" if how.calibration_images else "of the weights alone"
    statistics = f"batch norms re-estimated on {how.batchnorm_images} images" if how.batchnorm_images else ""
    return f"decomposition: {', '.join(filter(None, (calibration, statistics, f'seed {how.seed}')))}"


def _provenance(plan: Plan) -> str:
    origin = plan.provenance
    trial = f"trial {origin.trial} of study {one_line(origin.study)}" if origin.study is not None else "no study"
    versions = [f"{one_line(name)} {one_line(version)}" for name, version in origin.versions.items()]
    return f"provenance: {', '.join((trial, f'seed {origin.seed}', *versions))}"
