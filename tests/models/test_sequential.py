"""Layers that are fitted one after the other, each to what the dense one puts out."""

import copy

import pytest
import torch
from torch import nn

from kronsearch.models import sequential
from kronsearch.models.factorised import factorise, replace_layers
from kronsearch.models.sequential import factorise_in_order
from kronsearch.sekron import SeKronSpec
from kronsearch.sekron.layers import SeKronLayer
from kronsearch.training.batchnorm import reestimate_batchnorm
from kronsearch.training.data import TensorData, train_inputs
from kronsearch.training.task import Classification

IMAGES = 64


def make_data():
    generator = torch.Generator().manual_seed(0)
    waves = torch.rand(IMAGES, 3, 2, 2, generator=generator)  # neighbours are alike, as in images
    images = nn.functional.interpolate(waves, size=(8, 8), mode="bilinear").mul(255).to(torch.uint8)
    split = (images, torch.randint(0, 3, (IMAGES,), generator=generator))
    return TensorData(
        {"train": split, "val": split, "test": split},
        spec="made",
        seed=0,
        task=Classification(),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        pad=0,
        flip=False,
    )


DATA = make_data()


class Net(nn.Module):
    """A stem with a batch norm, a grouped one, one that is called twice and changed in place, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.twice = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8, 5)
        self.unused = nn.Linear(8, 6)

    def forward(self, x):
        y = self.plain(self.grouped(self.norm(self.stem(x)).relu())).relu()
        y = self.twice(y).relu_() + y
        return self.head((self.twice(y).relu_() + y).mean((2, 3)))


SPECS = {
    "stem": SeKronSpec(((8, 1, 1, 1), (1, 1, 3, 3), (1, 3, 1, 1)), (4, 1)),
    "grouped": SeKronSpec(((8, 1, 3, 1), (1, 4, 1, 3)), (4,)),
    "twice": SeKronSpec(((8, 1, 1, 1), (1, 8, 1, 1)), (4,)),
}
EXACT = {
    "stem": SeKronSpec(((8, 1, 3, 1), (1, 3, 1, 3)), (9,)),
    "grouped": SeKronSpec(((8, 1, 3, 1), (1, 4, 1, 3)), (12,)),
    "twice": SeKronSpec(((8, 1, 1, 1), (1, 8, 1, 1)), (8,)),
}
FREE = ["stem", "grouped", "twice", "head"]


@pytest.fixture
def dense():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
    reestimate_batchnorm(net, DATA, images=IMAGES, generator=generator())
    return net.eval()


def generator():
    return torch.Generator().manual_seed(1)


def images():
    return torch.cat(list(train_inputs(DATA, IMAGES, IMAGES, generator=generator())))


def in_order(dense, specs, free=FREE, **options):
    return factorise_in_order(dense, specs, free, {}, DATA, images=IMAGES, generator=generator(), **options)


def test_what_loses_nothing_is_the_dense_network(dense):
    small, inputs = in_order(dense, EXACT), images()
    assert {name for name, module in small.named_modules() if isinstance(module, SeKronLayer)} == set(EXACT)
    torch.testing.assert_close(small(inputs), dense(inputs), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(small.head.weight, dense.head.weight, rtol=1e-3, atol=1e-3)


def far(small, dense):
    inputs = images()
    with torch.no_grad():
        return float((small(inputs) - dense(inputs)).square().mean())


def test_the_network_is_nearer_than_of_layers_that_were_factorised_by_themselves(dense):
    plain = replace_layers(dense, {name: factorise(dense.get_submodule(name), spec) for name, spec in SPECS.items()})
    reestimate_batchnorm(plain, DATA, images=IMAGES, generator=generator())
    small = in_order(dense, SPECS)
    assert far(small, dense) < 0.5 * far(plain, dense)
    untouched = in_order(dense, SPECS, free=[])
    assert torch.equal(untouched.head.weight, dense.head.weight)
    assert far(small, dense) < far(untouched, dense)


def test_a_layer_that_stays_dense_is_the_nearest_by_least_squares(dense):
    """Of its inputs in the new network to the outputs in the old one, with a ridge towards its weights."""
    small = in_order(dense, SPECS)
    seen = {}
    for key, network in (("old", dense), ("new", small)):
        handle = network.head.register_forward_hook(lambda _, args, out, key=key: seen.update({key: (args[0], out)}))
        with torch.no_grad():
            network(images())
        handle.remove()
    rows, wanted = seen["new"][0].double(), seen["old"][1].double()
    centred, aim = rows - rows.mean(0), wanted - wanted.mean(0)
    squares, weight = centred.T @ centred / IMAGES, dense.head.weight.detach().double()
    ridge = 0.1 * squares.diagonal().mean()
    best = (aim.T @ centred / IMAGES + ridge * weight) @ torch.linalg.inv(squares + ridge * torch.eye(8))
    torch.testing.assert_close(small.head.weight.detach().double(), best, rtol=1e-3, atol=1e-4)
    bias = wanted.mean(0) - best @ rows.mean(0)
    torch.testing.assert_close(small.head.bias.detach().double(), bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("layer", "norm"), [("stem", "norm"), ("grouped", "plain")])
def test_a_batch_norm_has_the_statistics_of_its_layer_and_the_dense_networks_mean(dense, layer, norm):
    small = in_order(dense, SPECS)
    found = {}
    for key, network in (("old", dense), ("new", small)):
        for name in (layer, norm):
            network.get_submodule(name).register_forward_hook(
                lambda _, __, out, key=key, name=name: found.update({(key, name): out.double()})
            )
        with torch.no_grad():
            network(images())
    own, new, old = found["new", layer], found["new", norm], found["old", norm]
    torch.testing.assert_close(new.mean((0, 2, 3)), old.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    if norm == "norm":  # which has an affine part
        statistics = small.norm.running_mean.double(), small.norm.running_var.double()
        torch.testing.assert_close(statistics[0], own.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics[1], own.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-4)
        small.norm.train()  # so a training begins with the same function
        torch.testing.assert_close(small.norm(own.float()).double(), new, rtol=1e-3, atol=1e-3)


def test_what_can_not_be_fitted_is_factorised_by_itself(dense, monkeypatch):
    specs = {**SPECS, "unused": SeKronSpec(((6, 1), (1, 8)), (2,))}
    small = in_order(dense, specs)
    alone = factorise(dense.unused, specs["unused"])
    torch.testing.assert_close(small.unused.kernel, alone.kernel)
    monkeypatch.setattr(sequential, "WIDEST", 30)  # the grouped kernel's 36 are more
    small = in_order(dense, specs)
    torch.testing.assert_close(small.grouped.kernel, factorise(dense.grouped, specs["grouped"]).kernel)


def test_the_dense_network_is_left_as_it_was_and_the_same_comes_of_it_again(dense):
    before, told = copy.deepcopy(dense.state_dict()), []
    dense.train()
    small = in_order(dense, SPECS, tell=lambda done, name: told.append((done, name)))
    assert dense.training
    assert small.training
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in (*dense.modules(), *small.modules())
    )
    assert told == [(0, "stem"), (1, "grouped"), (2, "twice"), (3, "head")]
    again = in_order(dense.eval(), SPECS)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())


def test_a_group_that_nothing_enters_keeps_its_kernel(dense):
    with torch.no_grad():
        dense.norm.weight.zero_()
        dense.norm.bias.fill_(-1.0)
    small = in_order(dense, EXACT)
    torch.testing.assert_close(small.grouped.kernel, dense.grouped.weight, rtol=1e-4, atol=1e-4)
    assert all(bool(value.isfinite().all()) for value in small.state_dict().values())


class Inferred(Net):
    """Its stem runs in inference mode, where no versions of tensors are counted."""

    def forward(self, x):
        with torch.inference_mode():
            y = self.stem(x)
        return self.head(self.norm(y).relu().mean((2, 3)))


def test_a_layer_that_runs_in_inference_mode_is_fitted_without_its_norm():
    dense = Inferred().eval()
    small = in_order(dense, {"stem": SPECS["stem"]}, free=["stem", "head"])
    assert isinstance(small.stem, SeKronLayer)
    assert torch.equal(small.norm.running_mean, dense.norm.running_mean)
    with torch.no_grad():
        assert far(small, dense) < float(dense(images()).square().mean())
