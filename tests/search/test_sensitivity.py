import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import kronsearch as ks
from kronsearch.models.factorised import factorise
from kronsearch.models.shelf import Shelf
from kronsearch.plan import Decomposition
from kronsearch.search import sensitivity as module
from kronsearch.search.candidates import layer_candidates
from kronsearch.search.prepare import Prepared, measure
from kronsearch.search.sensitivity import Damage, estimated
from kronsearch.search.space import SearchSpace
from kronsearch.sekron.metrics import Metric, Moments

SETTINGS = Decomposition(calibration_images=64, batchnorm_images=0, seed=0)
NONE = Shelf(None)


@pytest.fixture(scope="module")
def prepared(digits_model, digits_data, digits_tables):
    names = [layer.name for layer in digits_tables]
    return measure(digits_model, digits_data, names, SETTINGS, shelf=NONE, device="cpu")


def damage(model, data, macs, prepared, shelf=NONE, seed=0):
    return Damage(model, data, macs, prepared, seed=seed, shelf=shelf, device="cpu")


def no_word(done, name):
    del done, name


def test_estimates_are_the_energies_by_their_formulas():
    weight = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    for layer in net.values():
        layer.weight.data.copy_(weight)
    inputs, outputs = torch.diag(torch.tensor([2.0, 5.0])), torch.diag(torch.tensor([7.0, 11.0]))
    metrics = {"a": Metric(Moments(inputs, outputs))}
    rows = [2 * 1 + 5 * 4, 5 * 9]  # w Ω wᵀ of each row
    assert estimated("fisher", net, ["a", "b"], metrics) == pytest.approx(
        dict.fromkeys("ab", 7 * rows[0] + 11 * rows[1])  # b has no metric: the median of those that have
    )
    underived = {**metrics, "b": Metric(Moments(inputs))}  # b has no gradients, without which its unit is another
    assert estimated("fisher", net, ["a", "b"], underived) == estimated("fisher", net, ["a", "b"], metrics)
    assert estimated("inputs", net, ["a"], metrics) == pytest.approx({"a": sum(rows)})
    assert estimated("absolute", net, ["a", "b"], metrics) == pytest.approx(dict.fromkeys("ab", 1 + 4 + 9))
    assert estimated("plain", net, ["a", "b"], metrics) == dict.fromkeys("ab", 1.0)
    for name in ("fisher", "inputs", "measured"):
        assert estimated(name, net, ["a", "b"], {}) == dict.fromkeys("ab", 1.0)


class Scaled(nn.Module):
    """Two linear layers side by side, of which one is heard ten times as loud."""

    def __init__(self):
        super().__init__()
        self.quiet, self.loud = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)
        self.quiet.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        self.loud.weight.data.copy_(self.quiet.weight.data)

    def forward(self, images):
        flat = images.flatten(1)
        return self.quiet(flat) + 10 * self.loud(flat)


def test_a_layer_that_is_heard_ten_times_as_loud_matters_a_hundred_times_as_much(digits_data):
    net = Scaled()
    cost = ks.profile_model(net, input_shape=(1, 8, 8))
    tables = [
        layer_candidates(layer.weight.detach(), cost.layer(name), SearchSpace()).without_pointless()
        for name, layer in (("quiet", net.quiet), ("loud", net.loud))
    ]
    found = damage(net, digits_data, cost.macs, Prepared({}, None)).sensitivity(tables, no_word)
    assert found["loud"] / found["quiet"] == pytest.approx(100, rel=0.02)  # it runs in bfloat16 where that is fast


def test_it_is_the_change_of_the_outputs_by_the_error_with_batch_norms_of_the_batch(
    digits_model, digits_data, digits_cost, digits_tables, prepared
):
    layer = digits_tables[2]
    index = module._nearest(layer)
    found = damage(digits_model, digits_data, digits_cost.macs, prepared).sensitivity([layer], no_word)[layer.name]
    nets = [copy.deepcopy(digits_model) for _ in range(2)]
    small = factorise(nets[1].get_submodule(layer.name), layer.spec(index), prepared.metrics[layer.name])
    nets[1].set_submodule(layer.name, small.to_conv())
    inputs = damage(digits_model, digits_data, digits_cost.macs, prepared)._images(256)
    squares = []
    for batch in inputs:
        with torch.no_grad():
            ours, theirs = (net.train()(batch) for net in nets)  # it has no dropout: train() is of its batch norms
        squares += (ours - theirs).square().sum(1).tolist()
    assert found == pytest.approx(np.mean(squares) / layer.error[index], rel=0.1)  # bfloat16 against float32


def test_the_network_is_left_as_it_was(digits_model, digits_data, digits_cost, digits_tables, prepared):
    before = copy.deepcopy(digits_model.state_dict())
    damage(digits_model, digits_data, digits_cost.macs, prepared).sensitivity(digits_tables[:2], no_word)
    assert all(torch.equal(value, before[name]) for name, value in digits_model.state_dict().items())
    assert len({part.training for part in digits_model.modules()}) == 1


def test_what_was_measured_is_kept_layer_by_layer_and_by_the_seed(
    digits_model, digits_data, digits_cost, digits_tables, prepared, tmp_path, monkeypatch
):
    shelf, told = Shelf(tmp_path), []
    first = damage(digits_model, digits_data, digits_cost.macs, prepared, shelf).sensitivity(
        digits_tables[:2], lambda *step: told.append(step)
    )
    names = [layer.name for layer in digits_tables]
    assert told == [(0, names[0]), (1, names[1]), (2, "")]
    again = damage(digits_model, digits_data, digits_cost.macs, prepared, shelf).sensitivity(digits_tables[:3], no_word)
    whole = damage(digits_model, digits_data, digits_cost.macs, prepared).sensitivity(digits_tables[:3], no_word)
    assert {name: again[name] for name in first} == first
    assert again == whole  # cut off after two layers, or not

    def never(*_):
        raise AssertionError("measured anew")

    monkeypatch.setattr(Damage, "_outputs", never)
    kept = damage(digits_model, digits_data, digits_cost.macs, prepared, shelf).sensitivity(digits_tables[:3], no_word)
    assert kept == whole
    other = Prepared(prepared.metrics, {**prepared.origin, "seed": 1})
    with pytest.raises(AssertionError, match="anew"):
        damage(digits_model, digits_data, digits_cost.macs, other, shelf, seed=1).sensitivity(
            digits_tables[:3], no_word
        )


def test_it_is_measured_at_the_cheapest_candidate_of_the_error_level(digits_tables):
    for layer in digits_tables:
        index = module._nearest(layer)
        if index is None:
            continue
        assert layer.rank[index] > 0
        fitting = (layer.rank > 0) & (layer.error > 0) & (layer.error <= module._LEVEL)
        if fitting.any():
            product = (layer.macs.astype(float) * layer.params)[fitting]
            assert layer.error[index] <= module._LEVEL
            assert float(layer.macs[index]) * layer.params[index] == product.min()
        else:
            assert layer.error[index] == layer.error[(layer.rank > 0) & (layer.error > 0)].min()


def test_a_layer_that_can_only_stay_dense_has_the_median(
    digits_model, digits_data, digits_cost, digits_tables, prepared
):
    only_dense = digits_tables[3].take(np.array([0]))
    tables = [*digits_tables[:3], only_dense]
    found = damage(digits_model, digits_data, digits_cost.macs, prepared).sensitivity(tables, no_word)
    assert found[only_dense.name] == sorted(found[layer.name] for layer in digits_tables[:3])[1]


def test_a_large_network_is_run_on_fewer_images(
    digits_model, digits_data, digits_cost, digits_tables, prepared, monkeypatch
):
    asked = []

    def change(_, layer, index, images):
        asked.append(images)
        return 1.0 if layer.name != digits_tables[0].name else math.inf

    monkeypatch.setattr(Damage, "_change", change)
    found = damage(digits_model, digits_data, digits_cost.macs, prepared).sensitivity(digits_tables, no_word)
    assert set(asked) == {256}
    assert math.isfinite(found[digits_tables[0].name])  # the median, where it came to nothing finite
    for macs, images in ((10**11, 32), (module._WORK // (100 * len(digits_tables)), 100)):
        asked.clear()
        damage(digits_model, digits_data, macs, prepared).sensitivity(digits_tables, no_word)
        assert set(asked) == {images}


def test_of_large_outputs_fewer_are_kept(digits_model, digits_data, digits_cost, prepared, monkeypatch):
    measuring = damage(digits_model, digits_data, digits_cost.macs, prepared)
    inputs = measuring._images(256)
    assert [len(batch) for batch in measuring._fitting(inputs)] == [128, 128]
    for kept, lengths in ((10 * 200, [128, 72]), (10 * 128, [128]), (10 * 7 + 3, [7]), (3, [1])):  # of ten classes
        monkeypatch.setattr(module, "_ENTRIES", kept)
        assert [len(batch) for batch in measuring._fitting(inputs)] == lengths


@pytest.mark.parametrize(
    "kept", [{"change": torch.tensor(-1.0)}, {"change": torch.zeros(2)}, {"other": torch.ones(())}]
)
def test_what_can_not_be_a_change_is_not_taken(
    digits_model, digits_data, digits_cost, digits_tables, prepared, tmp_path, kept
):
    shelf, [layer] = Shelf(tmp_path), digits_tables[:1]
    found = damage(digits_model, digits_data, digits_cost.macs, prepared, shelf).sensitivity([layer], no_word)
    spec = repr(layer.spec(module._nearest(layer)))
    key = {**prepared.origin, "layer": layer.name, "spec": spec, "runs on": 256}
    assert shelf.get("damage", key)["change"] / layer.error[module._nearest(layer)] == found[layer.name]
    shelf.put("damage", key, kept)
    assert damage(digits_model, digits_data, digits_cost.macs, prepared, shelf).sensitivity([layer], no_word) == found
