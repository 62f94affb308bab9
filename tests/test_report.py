import io
from dataclasses import replace

from kronsearch.models.bench import Timing
from kronsearch.models.profile import LayerCost, ModelCost
from kronsearch.plan import Latency, LayerPlan, PlanBudget, Provenance, fingerprint
from kronsearch.report import (
    comparison,
    evaluation,
    front,
    gain,
    latency,
    plan_report,
    profile_report,
    times,
)
from kronsearch.search.summary import Agreement, Summary
from kronsearch.search.sweep import Front, Point
from kronsearch.tables import FLOPS, console_for
from kronsearch.training.evaluate import Evaluation


def printed(renderable) -> str:
    stream = io.StringIO()
    console_for(stream).print(renderable)
    return stream.getvalue()


def row(text: str, first: str) -> list[str]:
    """Return the cells of the table row that begins with a cell."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return next(cells for cells in rows if cells and cells[0] == first)


def test_the_comparison_holds_cost_metric_budget_and_gap(plan):
    dense, compressed = Evaluation(0.99, 0.1, None, 360), Evaluation(0.9775, 0.2, None, 360)
    text = printed(comparison(plan, dense=dense, compressed=compressed, metric="accuracy"))
    assert row(text, FLOPS) == [FLOPS, "20 k", "9 k", f"{20 / 9:.2f}× fewer"]
    assert row(text, "params")[1:3] == [str(8 * 4 * 3 * 3 + 10 * 8), str(2 * (8 * 3 + 4 * 3) + 10 * 8)]
    assert row(text, "test accuracy") == ["test accuracy", "0.9900", "0.9775", "-0.0125"]
    assert "predicted error" not in text
    assert f"budget of {FLOPS}: 50% (10 k), 90.00% used" in text
    assert "proven gap: at most 0.01% above" in text


def test_without_data_the_comparison_tells_the_predicted_error(plan):
    text = printed(comparison(plan))
    assert row(text, "predicted error") == ["predicted error", "0", "0.125", ""]


def test_more_is_called_more(plan):
    text = printed(comparison(plan.model_copy(update={"dense": plan.compressed, "compressed": plan.dense})))
    assert row(text, FLOPS)[3] == f"{20 / 9:.2f}× more"


def test_both_budgets_are_told(plan):
    budget = PlanBudget(flops="50%", params="200", max_macs=10_000, max_params=200)
    used = plan.compressed.params / 200
    assert f"budget of params: 200 (200), {used:.2%} used" in printed(
        comparison(plan.model_copy(update={"budget": budget}))
    )


def test_a_plan_is_shown_whole(plan):
    text = printed(plan_report(plan))
    assert row(text, "conv") == ["conv", "8×4×3×3", "8·1·3·1 ⊗ 1·4·1·3, R 2", "0.0625"]
    assert row(text, "head") == ["head", "10×8", "dense: no candidate costs less", ""]
    for fact in (
        "predicted error: 0.125",
        "score: accuracy 0.9765, n 144",
        """model: zoo:digits with --model-args '{"width": 8}', input 4×8×8, 1 of 2 layers replaced""",
        "decomposition: data-aware, 256 images, batch norms re-estimated on 512 images, seed 3",
        "provenance: trial 7 of study digits, seed 3, kronsearch 0.1.0",
    ):
        assert fact in text


def test_what_a_plan_was_measured_to_take_is_told(plan):
    taken = Latency(
        dense_ms=8.25,
        compressed_ms=10.0,
        ratio=1.25,
        ratio_low=1.125,
        ratio_high=1.5,
        batch=1,
        threads=2,
        device="cpu X",
        dense_layout="contiguous",
        compressed_layout="contiguous",
    )
    slower = printed(comparison(plan.model_copy(update={"latency": taken})))
    told = (
        "latency: dense 8.25 ms, compressed 10 ms; within pairs of runs 125.0% of dense (quartiles 112.5%–150.0%; "
        "batch 1, 2 threads, cpu X)"
    )
    assert told in slower
    assert "no faster than the dense network on this machine: see --budget-latency" in slower
    faster = plan.model_copy(update={"latency": taken.model_copy(update={"ratio": 0.75, "threads": 1})})
    assert "75.0% of dense" in printed(plan_report(faster))
    assert "1 thread," in printed(plan_report(faster))
    assert "no faster" not in printed(plan_report(faster))
    bounded = faster.model_copy(update={"budget": PlanBudget(latency="80%")})
    assert "budget of latency: 80%\n" in printed(plan_report(bounded))
    text = printed(front(Front((Point(bounded, 0.25, "plans/a.json"), Point(plan, 0.25, "plans/b.json")), None)))
    assert row(text, "latency 80%")[3] == "10 ms, 75.0%"
    assert row(text, "flops 50%")[3] == ""


def test_what_a_plan_may_lack_is_not_told(plan):
    bare = plan.model_copy(
        update={
            "model": plan.model.model_copy(update={"spec": None, "args": {}}),
            "score": None,
            "provenance": Provenance(versions={}, seed=0),
        }
    )
    text = printed(plan_report(bare))
    assert "score" not in text
    assert "gap" not in text
    assert "model: not named, input" in text
    assert "provenance: no study, seed 0\n" in text


def test_a_hostile_plan_writes_no_escape_codes_and_no_markup(plan):
    layers = {"[red]\x1b[31mconv\n": plan.layers["conv"], "head": LayerPlan(kernel_shape=(8, 8), dense="\x1b]0;x\x07")}
    hostile = plan.model_copy(
        update={
            "layers": layers,
            "model": plan.model.model_copy(
                update={"spec": "\x1b[2J", "args": {"\u202e": "\x1b"}, "fingerprint": fingerprint(layers)}
            ),
            "budget": PlanBudget(flops="\x1b[2J", max_macs=10_000),
        }
    )
    text = printed(plan_report(hostile))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[red]?[31mconv" in text


def test_a_profile_tells_what_can_be_replaced_and_what_can_be_reached():
    layers = (
        LayerCost("", "Net", None, 0, 1, (), "not a convolution or linear layer"),
        LayerCost("conv", "Conv2d", (8, 4, 3, 3), 8 * 4 * 3 * 3 * 64, 8 * 4 * 3 * 3, ((8, 8),), None),
    )
    cost = ModelCost(sum(layer.macs for layer in layers), sum(layer.params for layer in layers), layers, (4, 8, 8))
    text = printed(profile_report(cost, smallest=(1_152, 100), kept=lambda name: None))
    assert row(text, "conv") == ["conv", "Conv2d", "8×4×3×3", "18.43 k", str(8 * 4 * 3 * 3), "yes"]
    assert row(text, "(the model itself)")[-1] == "no: not a convolution or linear layer"
    assert row(text, FLOPS) == [FLOPS, "18.43 k", "1.152 k", f"{8 * 4 * 9 * 64 / 1152:.2f}× fewer"]
    assert "input 4×8×8." in text
    text = printed(profile_report(cost, smallest=(1_152, 100), kept=lambda name: f"the space keeps {name}"))
    assert row(text, "conv")[-1] == "no: the space keeps conv"


def test_a_front_is_told(plan):
    other = plan.model_copy(update={"budget": PlanBudget(flops="1k", params="9%")})
    points = (Point(plan, 0.25, "plans/flops-50pct.json"), Point(other, 0.125, "plans/b.json"))
    text = printed(front(Front(points, None)))
    assert row(text, "flops 50%") == [
        *("flops 50%", "9 k", str(plan.compressed.params), "0.125", "0.25", "0.01%", "plans/flops-50pct.json"),
    ]
    assert row(text, "flops 1k, params 9%")[-1] == "plans/b.json"
    assert "The dense network has 20 k MACs and 368 params." in text


def test_timings_are_told_by_setting():
    whole = Timing("", 8, 2, 3.0, 2.0, 1.5, 1.25, 1.75, 9, "contiguous", "channels_last")
    text = printed(latency([whole, replace(whole, layer="a.b"), replace(whole, layer="c", batch=1)]))
    assert text.count("batch 8, threads 2; dense contiguous, compressed channels_last\n") == 1
    assert text.count("batch 1, threads 2; ") == 1
    assert row(text, "(the whole network)") == ["(the whole network)", "3", "2", "1.50×", "1.25–1.75", "9"]
    assert row(text, "a.b")[1:] == row(text, "c")[1:]
    assert "memory" not in text
    text = printed(
        latency([replace(whole, dense_bytes=3 * 2**20, compressed_bytes=2**19), replace(whole, layer="a.b")])
    )
    assert text.count("peak memory: dense 3.00 MiB, compressed 0.50 MiB\n") == 1


def test_the_gain_of_a_search_is_told():
    summary = Summary(
        20, 9, 3, 7, 0.9972, 0.9984, 0.0125, 0.01, (Agreement("predicted_error", "tuned_divergence", 0.614, 11),)
    )
    text = printed(gain(summary, "accuracy"))
    assert row(text, "accuracy")[1:] == ["0.9972", "0.9984", "+0.0012"]
    assert row(text, "divergence")[1:] == ["0.0125", "0.01", "-0.0025"]
    assert "best: trial 7; 20 trials (9 missed a budget or diverged), 3 of them fine-tuned\n" in text
    assert "rank correlation of predicted error and divergence after it: 0.61, n 11" in text


def test_a_gain_over_a_plan_without_a_score_is_not_told():
    text = printed(gain(Summary(2, 0, 1, 1, None, 0.5, None, None, ()), "accuracy"))
    assert row(text, "accuracy")[1:] == ["no score", "0.5000", ""]
    assert "best: trial 1; 2 trials, 1 of them fine-tuned\n" in text
    assert "divergence" not in text


def test_times_are_told_by_part():
    seconds = {"profile": 1.0, "calibrate": 2.0, "tables": 3.0, "trials": 3540.0, "finalists": 60.0, "final": 93.0}
    assert times(seconds | {"test": 1.0}, 3330.0) == (
        "time: preparation 6s, trials 59m00s, finalists 1m00s, final fine-tune 1m33s, test 1s; 90% of it fine-tuning"
    )
    assert times({"profile": 1.0, "trials": 0.4}, 0.0) == "time: preparation 1s; 0% of it fine-tuning"
    assert times({"profile": 0.5, "trials": 0.5}, 0.25) == "time: 1s; 25% of it fine-tuning"
    assert times({"trials": 2.0, "apply": 70.0}, 0.0) == "time: trials 2s, decomposition 1m10s; 0% of it fine-tuning"
    assert times({"latency": 8.0, "tables": 1.0, "trials": 1.0}, 0.0).startswith("time: preparation 9s, trials 1s;")


def test_an_evaluation_is_told():
    text = printed(evaluation(Evaluation(0.5, 0.25, None, 12), metric="accuracy", split="val"))
    assert row(text, "accuracy") == ["accuracy", "0.5000"]
    assert row(text, "loss") == ["loss", "0.2500"]
    assert row(text, "examples") == ["examples", "12"]
