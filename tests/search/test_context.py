import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from kronsearch.budget import Limits
from kronsearch.models.factorised import replace_layers
from kronsearch.models.shelf import Shelf
from kronsearch.plan import Decomposition
from kronsearch.search import context as module
from kronsearch.search.context import Context, contributions
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.pace import specs_of
from kronsearch.search.score import Scorer
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.batchnorm import batch_statistics
from kronsearch.training.data import train_inputs
from kronsearch.training.distillation import softened_divergence

IMAGES = 128


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(module, "precision_for", lambda device: "float32")


@pytest.fixture(scope="module")
def problem(digits_tables, digits_cost):
    sensitivity = {layer.name: 1.0 + number for number, layer in enumerate(digits_tables)}
    return Problem(digits_cost, Limits(digits_cost.macs // 2, None), digits_tables, sensitivity)


@pytest.fixture
def scorer(digits_model, digits_data):
    return Scorer(digits_model, digits_data, {}, Decomposition(batchnorm_images=256), "cpu")


def divergence(scorer, network):
    """Return the divergence on the images that contributions are measured on."""
    dense, total, seen = copy.deepcopy(scorer.dense), 0.0, 0
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad(), batch_statistics(network), batch_statistics(dense):
        for batch in train_inputs(scorer.data, 64, IMAGES, generator=generator):
            total += len(batch) * float(softened_divergence(network(batch), dense(batch), scorer.data.task, 4.0))
            seen += len(batch)
    return total / seen


def scaled(scorer, small, scales):
    """Return the dense network with a multiple of the error of each of these layers."""
    layers = {}
    for name, scale in scales.items():
        layers[name] = copy.deepcopy(scorer.dense.get_submodule(name))
        kernel = layers[name].weight.detach()
        layers[name].weight.data = torch.lerp(kernel, small.get_submodule(name).kernel.detach(), scale)
    return replace_layers(small, layers)


def test_a_layers_contribution_is_half_the_slope_along_its_error_and_all_add_up_to_the_divergence(problem, scorer):
    looser = replace(problem, limits=Limits(problem.cost.macs * 7 // 10, None))
    specs = specs_of(looser.candidates, looser.allocate(Weighing()))
    small = scorer.build(specs)
    found = contributions(scorer, specs, IMAGES, torch.Generator().manual_seed(3))
    assert list(found) == list(specs)
    assert len(specs) > 1
    step = 0.05
    for name in specs:
        above, below = (
            divergence(scorer, scaled(scorer, small, dict.fromkeys(specs, 1.0) | {name: 1 + change}))
            for change in (step, -step)
        )
        assert found[name] == pytest.approx((above - below) / (4 * step), rel=0.05, abs=1e-3)
    whole = divergence(scorer, scaled(scorer, small, dict.fromkeys(specs, 1.0)))
    assert sum(found.values()) == pytest.approx(whole, rel=0.2)  # it is nearly a quadratic form


def test_the_error_of_a_bias_is_its_layers(digits_data):
    """Two linear layers side by side: the divergence is of the sum of their outputs, which a bias shifts."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

        def forward(self, images):
            return self.a(images.flatten(1)) + self.b(images.flatten(1))

    torch.manual_seed(0)
    net = Sum()
    scorer = Scorer(net, digits_data, {}, Decomposition(batchnorm_images=0), "cpu")
    spec = SeKronSpec(((10, 1), (1, 64)), (8,))
    plain = contributions(scorer, {"a": spec}, IMAGES, torch.Generator().manual_seed(3))
    with torch.no_grad():
        scorer.layer("a", spec).bias[0] += 1.0
    shifted = contributions(scorer, {"a": spec}, IMAGES, torch.Generator().manual_seed(3))
    assert shifted["a"] > 2 * plain["a"] > 0


def test_a_layer_whose_output_does_not_reach_the_networks_contributes_nothing(digits_data):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.last = nn.Linear(64, 2), nn.Linear(64, 10)

        def forward(self, images):
            flat = images.flatten(1)
            return self.last(flat) * (1 + self.router(flat).argmax(1, keepdim=True))

    scorer = Scorer(Routed(), digits_data, {}, Decomposition(batchnorm_images=0), "cpu")
    specs = {"router": SeKronSpec(((2, 1), (1, 64)), (1,)), "last": SeKronSpec(((10, 1), (1, 64)), (4,))}
    found = contributions(scorer, specs, IMAGES, torch.Generator().manual_seed(3))
    assert found["router"] == 0
    assert found["last"] > 0


def test_gradients_of_strided_pixels_are_right_in_the_layout_for_images(digits_data):
    """Else torch crashes here, or gives any gradient: see `shield_gradients`."""

    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.widen, self.pick = nn.Conv2d(1, 5, 1), nn.Conv2d(5, 32, 1, stride=2)

        def forward(self, images):
            large = self.widen(nn.functional.interpolate(images, size=(112, 112)))
            return self.pick(large).square().mean((2, 3))[:, :10]

    torch.manual_seed(0)
    scorer = Scorer(Strided(), digits_data, {}, Decomposition(batchnorm_images=0), "cpu")
    specs = {"pick": SeKronSpec(((32, 1, 1, 1), (1, 5, 1, 1)), (4,))}
    found = contributions(scorer, specs, IMAGES, torch.Generator().manual_seed(3))
    whole = divergence(scorer, scorer.build(specs))
    assert found["pick"] == pytest.approx(whole, rel=0.2)


def test_neither_the_dense_network_nor_the_layers_that_are_kept_are_changed(problem, scorer):
    specs = specs_of(problem.candidates, problem.allocate(Weighing()))
    kept = {name: scorer.layer(name, spec) for name, spec in specs.items()}
    before = copy.deepcopy((scorer.dense.state_dict(), {name: layer.state_dict() for name, layer in kept.items()}))
    contributions(scorer, specs, IMAGES, torch.Generator().manual_seed(3))
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in scorer.dense.state_dict().items())
    for name, layer in kept.items():
        assert all(torch.equal(tensor, before[1][name][key]) for key, tensor in layer.state_dict().items())
        assert all(parameter.requires_grad for parameter in layer.parameters())


class Counted:
    """Stands for the measurement: a layer contributes what was thought up, and runs are counted."""

    def __init__(self, found):
        self.found, self.runs = found, []

    def __call__(self, scorer, specs, images, generator):
        self.runs.append(set(specs))
        assert images == 2_048
        return {name: self.found(name) for name in self.runs[-1]}


def known(scorer, problem, measure, monkeypatch, shelf=None, told=None):
    monkeypatch.setattr(module, "contributions", measure)
    tell = [] if told is None else told
    context = Context(
        scorer, problem.cost.macs, {"weights": "w"}, shelf or Shelf(None), lambda *step: tell.append(step)
    )
    return context.known(problem)


def test_after_two_rounds_of_the_same_the_logarithm_is_one_minus_the_square_of_what_a_step_leaves(
    problem, scorer, monkeypatch
):
    """Here contributions are always e^2 times the weighed error of one layer, and the weighed error of the others."""
    odd = problem.candidates[2].name
    rounds = []

    def measure(scorer, specs, images, generator):
        current = problem if not rounds else rounds[-1]
        chosen = current.allocate(Weighing(context=1.0)).chosen
        return {
            layer.name: float(problem.weighed(layer, Weighing())[index]) * (math.e**2 if layer.name == odd else 1.0)
            for layer, index in zip(problem.candidates, chosen, strict=True)
            if layer.spec(index) is not None
        }

    refine = module._refined

    def kept(problem, allocation, found):
        context = refine(problem, allocation, found)
        rounds.append(Problem(**vars(problem) | {"context": context}))
        return context

    monkeypatch.setattr(module, "_refined", kept)
    told = []
    found = known(scorer, problem, measure, monkeypatch, told=told)
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert found.allocate(Weighing()) == problem.allocate(Weighing())
    assert found.context[odd] == pytest.approx(2 * (1 - 0.6**2), abs=0.05)
    others = [value for name, value in found.context.items() if name != odd]
    assert max(map(abs, others)) < 0.05


def test_what_is_not_finite_changes_nothing_and_what_is_negative_little(problem, scorer, monkeypatch):
    found = known(scorer, problem, Counted(lambda name: math.nan), monkeypatch)
    assert found.context == {}
    names = [layer.name for layer in problem.candidates]
    found = known(scorer, problem, Counted(lambda name: -1.0 if name == names[2] else 1.0), monkeypatch)
    assert all(abs(value) < 3 for value in found.context.values())


def test_what_is_expected_to_contribute_next_to_nothing_and_does_is_no_more_important(problem, scorer, monkeypatch):
    first = problem.allocate(Weighing()).chosen
    tiny = problem.candidates[2].name
    error = problem.candidates[2].error.copy()
    error[first[2]] = 1e-15
    exact = replace(
        problem,
        candidates=[*problem.candidates[:2], replace(problem.candidates[2], error=error), *problem.candidates[3:]],
    )

    def measure(scorer, specs, images, generator):
        chosen = exact.allocate(Weighing()).chosen
        return {
            layer.name: float(exact.weighed(layer, Weighing())[index])
            for layer, index in zip(exact.candidates, chosen, strict=True)
            if layer.name in specs
        }

    found = known(scorer, exact, measure, monkeypatch)
    assert found.context[tiny] == 0
    assert max(map(abs, found.context.values())) < 1e-6


def test_what_was_measured_is_taken_from_the_shelf(problem, scorer, monkeypatch, tmp_path):
    measure = Counted(lambda name: 0.1 / 3)
    first = known(scorer, problem, measure, monkeypatch, Shelf(tmp_path))
    ran = len(measure.runs)
    assert 1 <= ran <= 2  # the plan of the second round may be that of the first
    again = known(scorer, problem, measure, monkeypatch, Shelf(tmp_path))
    assert len(measure.runs) == ran
    assert again == first


def test_on_a_large_network_it_is_measured_on_fewer_images(problem, scorer, monkeypatch):
    seen = []

    def measure(scorer, specs, images, generator):
        seen.append(images)
        return {}

    monkeypatch.setattr(module, "contributions", measure)
    for macs in (1, 4 * 10**9, 10**13):
        Context(scorer, macs, {}, Shelf(None), lambda *step: None).known(problem)
    assert seen == [2_048, 2_048, 1_000, 1_000, 64, 64]
