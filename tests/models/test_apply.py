import copy

import pytest
import torch
from torch import nn

import kronsearch as ks
from kronsearch.errors import CheckpointError, PlanError
from kronsearch.models.apply import apply_plan, is_compressed, load_compressed, measured, save_compressed
from kronsearch.models.checkpoint import save_safetensors
from kronsearch.plan import (
    Cost,
    Decomposition,
    LayerPlan,
    ModelIdentity,
    Plan,
    PlanBudget,
    Provenance,
    fingerprint,
)
from kronsearch.sekron import SeKronConv2d, SeKronLinear, SeKronSpec, cp_sequence
from kronsearch.training.data import TensorData
from kronsearch.training.task import Classification


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def make(seed=0, classes=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(classes).eval()


def plan_for(specs, shapes, input_shape=(3, 6, 6), **decomposition):
    layers = {
        name: LayerPlan(kernel_shape=shape, spec=specs.get(name), dense=None if name in specs else "left")
        for name, shape in shapes.items()
    }
    return Plan(
        model=ModelIdentity(spec="mine:Net", fingerprint=fingerprint(layers)),
        input_shape=input_shape,
        budget=PlanBudget(flops="50%"),
        dense=Cost(macs=1, params=1),
        compressed=Cost(macs=1, params=1),
        layers=layers,
        decomposition=Decomposition(**decomposition),
        predicted_error=0.0,
        provenance=Provenance(versions={}, seed=0),
    )


SHAPES = {"conv": (8, 3, 3, 3), "head": (5, 8)}
SPECS = {
    "conv": SeKronSpec(cp_sequence((8, 3, 3, 3)), (4, 1)),
    "head": SeKronSpec(((5, 1), (1, 8)), (2,)),
}
SETTINGS = {"calibration_images": 8, "batchnorm_images": 8}
INPUT = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


def make_data():
    split = (torch.arange(20 * 3 * 6 * 6).reshape(20, 3, 6, 6).remainder(251).to(torch.uint8), torch.arange(20) % 5)
    splits = {"train": split, "val": split, "test": split}
    of_three = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    return TensorData(splits, spec="tiny", seed=0, task=Classification(5), **of_three, pad=0, flip=False)


def test_the_network_is_left_untouched_and_the_layers_are_replaced():
    model, plan = make(), plan_for(SPECS, SHAPES)
    before = copy.deepcopy(model.state_dict())
    small = apply_plan(model, plan)
    assert isinstance(small.conv, SeKronConv2d)
    assert isinstance(small.head, SeKronLinear)
    assert type(model.conv) is nn.Conv2d
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert small.norm.weight is not model.norm.weight


class Several(Net):
    """A network that holds its layers at several places, and calls them there."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(self.conv, self.norm)
        self.tail = {"heads": [(self.head, nn.Identity())]}

    def forward(self, x):
        return self.tail["heads"][0][0](self.body(x).relu().mean((2, 3)))


def test_a_layer_is_replaced_wherever_the_network_holds_it(tmp_path):
    model, plan = Several().eval(), plan_for(SPECS, SHAPES)
    small = apply_plan(model, plan)
    assert isinstance(small.body[0], SeKronConv2d)
    assert small.body[0] is small.conv
    assert isinstance(small.head, SeKronLinear)
    assert small.tail["heads"][0][0] is small.head
    assert small.body[1] is small.norm
    assert type(model.body[0]) is nn.Conv2d
    assert type(model.tail["heads"][0][0]) is nn.Linear
    twin = make()
    twin.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(apply_plan(twin, plan)(INPUT), small(INPUT))
    save_compressed(small, plan, tmp_path / "small.safetensors")
    assert torch.equal(load_compressed(Several(), tmp_path / "small.safetensors")(INPUT), small(INPUT))


def test_who_watches_is_told_of_each_layer():
    told = []
    apply_plan(make(), plan_for(SPECS, SHAPES), watch=told.append)
    assert [(p.phase, p.done, p.total, p.message) for p in told] == [("apply", 0, 2, "conv"), ("apply", 1, 2, "head")]
    told.clear()
    apply_plan(make(), plan_for(SPECS, SHAPES, **SETTINGS), make_data(), watch=told.append)
    assert [(p.phase, p.done, p.message) for p in told] == [
        ("calibrate", 0, ""),
        ("apply", 0, "conv"),
        ("apply", 1, "head"),
        ("apply", 2, "batch norms"),
    ]
    told.clear()
    apply_plan(make(), plan_for(SPECS, SHAPES, sequential_images=8, **SETTINGS), make_data(), watch=told.append)
    assert [(p.phase, p.done, p.message) for p in told] == [
        ("calibrate", 0, ""),
        ("apply", 0, "conv"),
        ("apply", 1, "head"),
    ]


def test_layers_are_fitted_one_after_the_other_if_the_plan_says_so():
    """Those that stay dense, too; without data the plan rests on the weights."""
    model, data, specs = make(), make_data(), {"conv": SPECS["conv"]}
    plain = apply_plan(model, plan_for(specs, SHAPES, **SETTINGS), data)
    plan = plan_for(specs, SHAPES, sequential_images=20, **SETTINGS)
    fitted, (images, _) = apply_plan(model, plan, data), next(data.batches("val", 20))
    with torch.no_grad():
        wanted = model(images)
        far = [float((network(images) - wanted).square().sum()) for network in (fitted, plain)]
    assert far[0] < 0.5 * far[1]
    assert not torch.equal(fitted.head.weight, model.head.weight)
    assert torch.equal(plain.head.weight, model.head.weight)
    without = apply_plan(model, plan)
    assert torch.equal(without.head.weight, model.head.weight)
    assert torch.equal(without.conv.kernel, apply_plan(model, plan_for(specs, SHAPES)).conv.kernel)


def test_an_all_dense_plan_gives_bit_equal_outputs():
    model = make()
    assert torch.equal(apply_plan(model, plan_for({}, SHAPES))(INPUT), model(INPUT))


def test_full_ranks_give_equal_outputs():
    model = make().double()
    specs = {"conv": SeKronSpec(((8, 1, 3, 1), (1, 3, 1, 3)), (9,)), "head": SeKronSpec(((5, 1), (1, 8)), (5,))}
    small = apply_plan(model, plan_for(specs, SHAPES))
    assert torch.allclose(small(INPUT.double()), model(INPUT.double()), atol=1e-12)


def test_another_head_on_the_same_body_is_no_mismatch():
    plan = plan_for({"conv": SPECS["conv"]}, SHAPES)
    assert apply_plan(make(classes=7), plan)(INPUT).shape == (2, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: delattr(net, "conv"), "the model has no such layer"),
        (lambda net: setattr(net, "conv", nn.Conv2d(3, 9, 3, padding=1)), r"kernel shape \(9, 3, 3, 3\)"),
        (lambda net: setattr(net, "conv", nn.ConvTranspose2d(8, 3, 3)), "the model has a ConvTranspose2d"),
        (
            lambda net: setattr(net.conv, "forward", net.conv.forward),
            "which this model can't have: forward is replaced on the instance",
        ),
        (
            lambda net: nn.utils.parametrize.register_parametrization(net.conv, "weight", nn.Identity()),
            "parametrized weight",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_refused_in_one_line(change, message):
    model = make()
    change(model)
    with pytest.raises(PlanError, match=message) as caught:
        apply_plan(model, plan_for(SPECS, SHAPES))
    assert "\n" not in str(caught.value)


def test_a_layer_whose_groups_do_not_divide_the_first_factor_is_refused():
    grouped, deeper = nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.Conv2d(8, 8, 3, groups=4, padding=1)
    specs = {"0": SeKronSpec(((2, 2, 3, 1), (4, 1, 1, 3)), (1,))}
    plan = plan_for(specs, {"0": (8, 2, 3, 3)}, input_shape=(4, 6, 6))
    assert isinstance(apply_plan(nn.Sequential(grouped), plan)[0], SeKronConv2d)
    other = plan_for(specs, {"0": (8, 2, 3, 3)}, input_shape=(8, 6, 6))
    with pytest.raises(PlanError, match="which the model's layer of 4 groups can't be: pass a checkpoint"):
        apply_plan(nn.Sequential(deeper), other)


def test_save_load_save_gives_the_same_bytes_and_the_same_outputs(tmp_path):
    model, plan = make(), plan_for(SPECS, SHAPES)
    small = apply_plan(model, plan)
    save_compressed(small, plan, tmp_path / "a.safetensors")
    again = load_compressed(make(seed=1), tmp_path / "a.safetensors")
    save_compressed(again, plan, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(again(INPUT), small(INPUT))


def test_a_file_that_is_not_compressed_or_of_another_plan_is_refused(tmp_path):
    model, plan = make(), plan_for(SPECS, SHAPES)
    save_safetensors(model, tmp_path / "dense.safetensors")
    assert not is_compressed(tmp_path / "dense.safetensors")
    with pytest.raises(CheckpointError, match="is not a compressed network"):
        load_compressed(model, tmp_path / "dense.safetensors", plan)
    save_compressed(apply_plan(model, plan), plan, tmp_path / "small.safetensors")
    other = plan_for({**SPECS, "head": SeKronSpec(((5, 1), (1, 8)), (3,))}, SHAPES)
    with pytest.raises(
        CheckpointError, match=r"doesn't fit the plan: .* \(head.factors.0 \(2, 5, 1\), expected \(3, 5, 1\)"
    ):
        load_compressed(model, tmp_path / "small.safetensors", other)


@pytest.mark.parametrize("damage", [lambda factor: factor * torch.nan, lambda factor: factor.double() + 1e300])
def test_a_file_with_factors_that_are_not_finite_is_refused(tmp_path, damage):
    model, plan = make(), plan_for(SPECS, SHAPES)
    state = apply_plan(model, plan).state_dict()
    state["head.factors.0"] = damage(state["head.factors.0"])
    save_safetensors(state, tmp_path / "bad.safetensors", {"format": "kronsearch", "plan": plan.model_dump_json()})
    with pytest.raises(CheckpointError, match=r"bad.safetensors doesn't fit the plan: 1 not finite \(head.factors.0\)"):
        load_compressed(model, tmp_path / "bad.safetensors")


def test_measured_costs_are_those_of_the_networks():
    model, plan = make(), plan_for(SPECS, SHAPES)
    small = apply_plan(model, plan)
    found = measured(plan, model, small)
    assert found.compressed.macs == ks.profile_model(small, input_shape=(3, 6, 6)).macs
    assert found.dense.params == sum(parameter.numel() for parameter in model.parameters())
    assert found.layers == plan.layers
