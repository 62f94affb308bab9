"""Plans: saved and loaded byte by byte, and read with suspicion."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kronsearch.errors import PlanError
from kronsearch.plan import SCHEMA_VERSION, Latency, LayerPlan, Plan, fingerprint, load_plan, parse_plan, save_plan
from kronsearch.sekron.spec import SeKronSpec

GOLDEN = Path(__file__).parent / "data" / "plan_v1.json"


def without_newlines(caught):
    """Check that an error is one line."""
    assert "\n" not in str(caught.value)


def test_the_golden_file_is_read(plan):
    """A plan of version 1 as it was written once. Never change the file: raise the version, and add another one."""
    golden = load_plan(GOLDEN)
    assert golden == plan
    assert golden.schema_version == 1
    assert golden.replaced == {"conv": SeKronSpec(((8, 1, 3, 1), (1, 4, 1, 3)), (2,))}


def test_the_golden_file_is_written_again_to_the_byte(plan, tmp_path):
    save_plan(plan, tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == GOLDEN.read_bytes()


def test_a_chain_is_told_and_a_tree_goes_without_saying(plan):
    shapes = ((8, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1))
    for coupling in ("tree", "chain"):
        layer = LayerPlan(kernel_shape=(8, 4, 3, 3), spec=SeKronSpec(shapes, (2, 2), coupling))
        layers = {"conv": layer}
        identity = plan.model.model_copy(update={"fingerprint": fingerprint(layers)})
        text = plan.model_copy(update={"layers": layers, "model": identity}).model_dump_json()
        assert ("chain" in text) == ("coupling" in text) == (coupling == "chain")
        assert parse_plan(text, origin="X").replaced == {"conv": layer.spec}
    with pytest.raises(PlanError, match="X"):
        parse_plan(text.replace('"chain"', '"ring"'), origin="X")


def test_what_was_measured_survives_and_what_was_not_is_not_told(plan, tmp_path):
    taken = Latency(
        dense_ms=8.25,
        compressed_ms=4.125,
        ratio=0.5,
        ratio_low=0.4375,
        ratio_high=0.625,
        batch=1,
        threads=2,
        device="cpu X",
        dense_layout="contiguous",
        compressed_layout="contiguous",
    )
    budget = plan.budget.model_copy(update={"latency": "60%"})
    timed = plan.model_copy(update={"latency": taken, "budget": budget})
    save_plan(timed, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == timed
    assert "latency" not in plan.model_dump_json()
    text = timed.model_dump_json()
    for said, instead in (('"ratio":0.5', '"ratio":0'), ('"threads":2', '"threads":0'), ("8.25", '"8.25"')):
        with pytest.raises(PlanError, match=r"X is not a valid plan: latency\."):
            parse_plan(text.replace(said, instead), origin="X")


def with_conv(plan, spec):
    """Return the JSON text of a plan of one layer with this spec."""
    layers = {"conv": LayerPlan(kernel_shape=spec.kernel_shape, spec=spec)}
    identity = plan.model.model_copy(update={"fingerprint": fingerprint(layers)})
    return plan.model_copy(update={"layers": layers, "model": identity}).model_dump_json()


def test_images_that_layers_are_fitted_on_one_after_the_other_are_told_if_there_are_any(plan, tmp_path):
    fitted = plan.model_copy(update={"decomposition": plan.decomposition.model_copy(update={"sequential_images": 64})})
    save_plan(fitted, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == fitted
    assert '"sequential_images":64' in fitted.model_dump_json()
    assert "sequential" not in plan.model_dump_json()


def test_a_run_is_told_unless_it_is_the_default(plan):
    shapes = ((8, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1))
    for run in ((), ((2,), (1,), (0,)), ((0,), (1, 2)), ((0, 1, 2),)):
        spec = SeKronSpec(shapes, (2, 2), run=run)
        text = with_conv(plan, spec)
        assert ('"run"' in text) == bool(spec.run)
        assert parse_plan(text, origin="X").replaced == {"conv": spec}
    assert '"run":[[0,1,2]]' in text
    for hostile in ("[[0,1]]", "[[0,2],[1]]", "[[0,1,2],[]]", '[["0",1,2]]', "[[0.0,1,2]]", "[0,1]", "[[true]]", "3"):
        with pytest.raises(PlanError, match=r"X is not a valid plan: layers\.conv\.spec") as caught:
            parse_plan(text.replace("[[0,1,2]]", hostile), origin="X")
        without_newlines(caught)


def test_a_run_that_merges_factors_into_a_huge_one_is_refused(plan):
    spec = SeKronSpec(((64, 1), (1, 64), (4, 1), (1, 4)), (64, 64, 1))
    text = with_conv(plan, spec)
    assert parse_plan(text, origin="X").replaced == {"conv": spec}
    with pytest.raises(PlanError, match=r"have more than .* entries, 64 times the kernel's"):
        parse_plan(text.replace("[64,64,1]", '[64,64,1],"run":[[0,1],[3],[2]]'), origin="X")


def test_save_load_save_gives_the_same_bytes(plan, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    save_plan(plan, first)
    loaded = load_plan(first)
    save_plan(loaded, str(second))
    assert loaded == plan
    assert list(loaded.layers) == list(plan.layers)
    assert second.read_bytes() == first.read_bytes()
    assert first.read_text(encoding="utf-8").endswith("}\n")


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(
    layers=st.dictionaries(
        NAMES,
        st.one_of(
            st.builds(
                lambda a, b, rank, error: LayerPlan(
                    kernel_shape=(a[0] * b[0], a[1] * b[1]),
                    spec=SeKronSpec((a, b), (min(rank, a[0] * a[1], b[0] * b[1]),)),
                    error=error,
                ),
                st.tuples(st.integers(1, 9), st.integers(1, 9)),
                st.tuples(st.integers(1, 9), st.integers(1, 9)),
                st.integers(1, 9),
                st.floats(0, 1),
            ),
            st.builds(lambda n, why: LayerPlan(kernel_shape=(n, n), dense=why), st.integers(1, 9), NAMES),
        ),
        max_size=4,
    ),
    error=st.floats(allow_nan=False, allow_infinity=False),
    seed=st.integers(-(2**63), 2**64),
)
@settings(deadline=None, max_examples=60)
def test_random_plans_survive(layers, error, seed):
    content = json.loads(GOLDEN.read_text(encoding="utf-8"))
    content |= {"layers": {}, "predicted_error": error}
    content["model"]["fingerprint"] = fingerprint({})
    plan = parse_plan(json.dumps(content), origin="golden").model_copy(update={"layers": layers})
    plan = plan.model_copy(
        update={
            "model": plan.model.model_copy(update={"fingerprint": fingerprint(layers)}),
            "provenance": plan.provenance.model_copy(update={"seed": seed}),
        }
    )
    text = plan.model_dump_json(indent=2)
    again = parse_plan(text, origin="X")
    assert again == plan
    assert again.model_dump_json(indent=2) == text


def changed(plan, place, value):
    """Return the plan's JSON text with one value changed; a place that isn't there is added."""
    content = json.loads(plan.model_dump_json())
    *way, last = place
    inner = content
    for key in way:
        inner = inner[key]
    inner[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["schema_version"], 2, r"X has schema_version 2, this version of kronsearch reads 1: use the version"),
        (["schema_version"], 0, r"X has schema_version 0, this version of kronsearch reads 1"),
        (["schema_version"], None, "X is not a plan: it has no schema_version"),
        (["schema_version"], "1", "X is not a plan: it has no schema_version"),
        (["schema_version"], True, "X is not a plan: it has no schema_version"),
        (["schema_version"], 1.0, "X is not a plan: it has no schema_version"),
        (["extra"], 1, r"X is not a valid plan: extra: Extra inputs are not permitted"),
        (["model", "extra"], 1, r"model\.extra: Extra inputs"),
        (["layers", "conv", "extra"], 1, r"layers\.conv\.extra: Extra inputs"),
        (["layers", "conv", "spec", "extra"], 1, r"layers\.conv\.spec\.extra: Unexpected"),
        (["layers", "conv", "spec", "ranks"], ["2"], r"ranks\.0: Input should be a valid integer"),
        (["layers", "conv", "spec", "ranks"], [2.0], r"ranks\.0: Input should be a valid integer"),
        (["layers", "conv", "spec", "ranks"], [True], r"ranks\.0: Input should be a valid integer"),
        (["layers", "conv", "spec", "ranks"], [13], r"rank 13 of .* is above 12"),
        (["layers", "conv", "spec", "ranks"], [0], r"must be positive whole numbers"),
        (["layers", "conv", "spec", "factor_shapes"], [[8, 4, 3, 3]], "1 factors take 0 ranks"),
        (["layers", "conv", "kernel_shape"], [8, 8, 3, 3], r"not to the kernel's shape \(8, 8, 3, 3\)"),
        (["layers", "conv", "dense"], "both", "either a spec or the reason why it stays dense"),
        (["layers", "head", "dense"], None, "either a spec or the reason why it stays dense"),
        (["layers", "conv", "error"], -0.1, r"layers\.conv\.error: Input should be greater than or equal to 0"),
        (["layers", "conv", "error"], float("inf"), r"layers\.conv\.error: Input should be a finite number"),
        (["predicted_error"], float("nan"), r"predicted_error: Input should be a finite number"),
        (["predicted_error"], "0.1", r"predicted_error: Input should be a valid number"),
        (["layers", "conv", "kernel_shape"], [1] * 17, r"conv\.kernel_shape: Tuple should have at most 16 items"),
        (["input_shape"], [1] * 17, r"input_shape: Tuple should have at most 16 items"),
        (["input_shape"], [0, 8, 8], r"input_shape\.0: Input should be greater than or equal to 1"),
        (["dense", "macs"], "5", r"dense\.macs: Input should be a valid integer"),
        (["dense", "macs"], -5, r"dense\.macs: Input should be greater than or equal to 0"),
        (["layers"], [], r"layers: Input should be an object"),
        (["model", "spec"], 5, r"model\.spec: Input should be a valid string"),
        (["model", "fingerprint"], "0" * 64, "the fingerprint is not the one of the layers"),
        (["score", "value"], None, r"score\.value: Input should be a valid number"),
    ],
)
def test_a_plan_that_was_tampered_with_is_refused(plan, place, value, message):
    with pytest.raises(PlanError, match=message) as caught:
        parse_plan(changed(plan, place, value), origin="X")
    without_newlines(caught)


def test_a_layer_that_was_renamed_or_added_does_not_fit_the_fingerprint(plan):
    content = json.loads(plan.model_dump_json())
    renamed = copy.deepcopy(content)
    renamed["layers"]["other"] = renamed["layers"].pop("conv")
    added = copy.deepcopy(content)
    added["layers"]["conv2"] = added["layers"]["conv"]
    for tampered in (renamed, added):
        with pytest.raises(PlanError, match="the fingerprint is not the one of the layers"):
            parse_plan(json.dumps(tampered), origin="X")


@pytest.mark.parametrize(
    "field", ["model", "input_shape", "budget", "dense", "layers", "provenance", "predicted_error"]
)
def test_a_missing_field_is_named(plan, field):
    content = json.loads(plan.model_dump_json())
    del content[field]
    with pytest.raises(PlanError, match=f"{field}: Field required"):
        parse_plan(json.dumps(content), origin="X")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "X is not JSON"),
        ("{", "X is not JSON"),
        ('{"schema_version": 1, "model": {"spec": "a", "spec": "b"}}', r"X is not JSON \('spec' stands there twice\)"),
        ("[" * 100_000, "X is not JSON"),
        ('{"schema_version": ' + "9" * 5000 + "}", "X is not JSON"),
        ('{"schema_version": ' + "[" * 300 + "]" * 300 + "}", "X is not a plan"),
        ('{"schema_version": 1, "a": ' + "[" * 300 + "]" * 300 + "}", "X is not a valid plan: .*recursion limit"),
        ("[]", "X is not a plan"),
        ("null", "X is not a plan"),
        ("5", "X is not a plan"),
        ("{}", "X is not a plan: it has no schema_version"),
    ],
    ids=lambda text: text[:24],
)
def test_what_is_no_plan_is_refused_in_one_short_line(text, message):
    with pytest.raises(PlanError, match=message) as caught:
        parse_plan(text, origin="X")
    without_newlines(caught)
    assert len(str(caught.value)) < 300


@given(st.text(max_size=40))
@settings(deadline=None)
def test_any_text_is_refused(text):
    with pytest.raises(PlanError, match="X is not"):
        parse_plan(text, origin="X")


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(PlanError, match=r"can't read the plan .*none\.json \(No such file or directory\)"):
        load_plan(tmp_path / "none.json")
    with pytest.raises(PlanError, match=r"can't read the plan .* \(Is a directory\)"):
        load_plan(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(PlanError, match=r"can't read the plan .*weights\.pt \(not text\): pass the plan\.json"):
        load_plan(tmp_path / "weights.pt")


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)  # sparse
    with pytest.raises(PlanError, match=r"is larger than any plan \(64 MiB\)"):
        load_plan(path)


def test_dense_layers_are_no_part_of_the_fingerprint(plan):
    other_head = plan.layers | {"head": LayerPlan(kernel_shape=(100, 8), dense="other")}
    assert fingerprint(other_head) == fingerprint(plan.layers) == plan.model.fingerprint
    two = dict.fromkeys(("b", "a"), plan.layers["conv"])
    assert fingerprint(two) == fingerprint(dict(reversed(two.items())))
    wider = LayerPlan(kernel_shape=(16, 4, 3, 3), spec=SeKronSpec(((16, 4, 3, 3),)))
    assert fingerprint(plan.layers | {"conv": wider}) != plan.model.fingerprint


def test_another_spec_of_the_same_kernel_keeps_the_fingerprint(plan):
    spec = SeKronSpec(((8, 4, 1, 1), (1, 1, 3, 3)), (5,))
    other = {**plan.layers, "conv": LayerPlan(kernel_shape=(8, 4, 3, 3), spec=spec)}
    assert fingerprint(other) == plan.model.fingerprint


def test_plans_are_frozen(plan):
    with pytest.raises(ValidationError, match="frozen"):
        plan.predicted_error = 0.0
    assert Plan.model_fields["schema_version"].default == SCHEMA_VERSION == 1
