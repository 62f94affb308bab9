import numpy as np
import pytest
import torch

import kronsearch as ks
from kronsearch.models.shelf import Shelf
from kronsearch.plan import Decomposition
from kronsearch.search import prepare as module
from kronsearch.search.prepare import Prepared, measure, tabulate
from kronsearch.search.reach import replaceable
from kronsearch.search.space import SearchSpace

SPACE = SearchSpace(deep_fits=2)
SETTINGS = Decomposition(calibration_images=64, batchnorm_images=0, seed=0)


@pytest.fixture(scope="module")
def names(digits_cost):
    return replaceable(digits_cost, SPACE)[:3]


def measured(model, data, names, folder, **settings):
    settings = SETTINGS.model_copy(update=settings)
    return measure(model, data, names, settings, shelf=Shelf(folder), device="cpu")


def tabulated(model, cost, names, prepared, folder, space=SPACE):
    told = []
    found = tabulate(model, cost, names, space, prepared, shelf=Shelf(folder), tell=lambda *step: told.append(step))
    assert told == [*enumerate(names), (len(names), "")]
    return found


def same(ours, theirs):
    return all(
        a.name == b.name
        and a.kernel_shape == b.kernel_shape
        and a.sequences == b.sequences
        and all(np.array_equal(getattr(a, c), getattr(b, c)) for c in ("sequence", "rank", "macs", "params", "error"))
        for a, b in zip(ours, theirs, strict=True)
    )


def never(*args, **kwargs):
    raise AssertionError("computed anew")


def test_a_second_search_takes_everything_from_the_shelf(
    digits_model, digits_data, digits_cost, names, tmp_path, monkeypatch
):
    first = measured(digits_model, digits_data, names, tmp_path)
    tables = tabulated(digits_model, digits_cost, names, first, tmp_path)
    monkeypatch.setattr(module, "calibrate", never)
    monkeypatch.setattr(module, "layer_candidates", never)
    again = measured(digits_model, digits_data, names, tmp_path)
    assert again.metrics.keys() == first.metrics.keys() == set(names)
    for name in names:
        ours, theirs = first.metrics[name].moments, again.metrics[name].moments
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.outputs, theirs.outputs)
        assert (ours.mean is None) == (theirs.mean is None)
    assert same(tabulated(digits_model, digits_cost, names, again, tmp_path), tables)


def test_other_weights_settings_or_spaces_are_computed_anew(
    digits_model, digits_data, digits_cost, names, tmp_path, monkeypatch
):
    first = measured(digits_model, digits_data, names, tmp_path)
    tabulated(digits_model, digits_cost, names, first, tmp_path)
    plain = tabulated(digits_model, digits_cost, names, Prepared({}, None), tmp_path)
    monkeypatch.setattr(module, "layer_candidates", never)
    monkeypatch.setattr(module, "calibrate", never)
    other = ks.load_model("zoo:digits")
    with torch.no_grad():
        other.get_parameter(f"{names[0]}.weight").mul_(2)
    for model, settings in ((other, {}), (digits_model, {"seed": 1}), (digits_model, {"calibration_images": 128})):
        with pytest.raises(AssertionError, match="anew"):
            measured(model, digits_data, names, tmp_path, **settings)
    with pytest.raises(AssertionError, match="anew"):
        tabulated(other, digits_cost, names, Prepared({}, None), tmp_path)
    with pytest.raises(AssertionError, match="anew"):
        tabulated(digits_model, digits_cost, names, Prepared({}, None), tmp_path, SearchSpace(deep_fits=3))
    same_but_for_the_kept = SearchSpace(deep_fits=2, keep_dense=("conv9",))
    found = tabulated(digits_model, digits_cost, names, Prepared({}, None), tmp_path, same_but_for_the_kept)
    assert same(found, plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("error"),
        lambda t: t.update(error=t["error"][:-1]),
        lambda t: t.update(sequence=t["sequence"] + 10_000),
        lambda t: t.update(shapes=t["shapes"] * 2),
        lambda t: t.update(lengths=t["lengths"][:-1]),
        lambda t: t.update(lengths=torch.cat([t["lengths"], torch.tensor([0])])),
        lambda t: t.pop("stages"),
        lambda t: t.update(stages=t["stages"][:-1]),
    ],
)
def test_tables_that_do_not_hold_together_are_not_taken(digits_model, digits_cost, names, tmp_path, change):
    nothing = Prepared({}, None)
    tables = tabulated(digits_model, digits_cost, names[:1], nothing, tmp_path)
    tensors = module._to_tensors(tables[0])
    assert same([module._from_tensors(tensors, digits_cost.layer(names[0]))], tables)
    change(tensors)
    assert module._from_tensors(tensors, digits_cost.layer(names[0])) is None


def test_moments_of_other_shapes_are_not_taken(digits_model, names):
    kept = {f"{names[0]}/inputs": torch.zeros(2, 2), f"{names[0]}/outputs": torch.zeros(2, 2)}
    assert module._metrics(kept, digits_model, names[:1], "cpu") is None
    assert module._metrics({}, digits_model, names[:1], "cpu") == {}
