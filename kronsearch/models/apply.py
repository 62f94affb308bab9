"""Applying a plan: the layers it names are replaced by factorised ones, in a copy of the network."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from kronsearch.errors import CheckpointError, PlanError, check_kind
from kronsearch.models.checkpoint import fill, load_state_dict, read_metadata, save_safetensors
from kronsearch.models.factorised import empty_layer, factorise, replace_layers
from kronsearch.models.profile import ModelCost, profile_model
from kronsearch.models.sequential import factorise_in_order
from kronsearch.models.statistics import gather_moments
from kronsearch.plan import Cost, Decomposition, Plan, holds_weights, parse_plan
from kronsearch.progress import Progress, Watcher, ignore
from kronsearch.sekron.layers import Conv
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.shapes import holds_groups
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.batchnorm import reestimate_batchnorm
from kronsearch.training.copies import check_network, copied
from kronsearch.training.data import Data, check_data
from kronsearch.training.modes import own_modes
from kronsearch.training.precision import require_device
from kronsearch.training.streams import Purpose, stream

__all__ = [
    "apply_plan",
    "calibrate",
    "decomposed",
    "is_compressed",
    "load_compressed",
    "measured",
    "save_compressed",
    "settle",
    "skeleton",
    "stored_plan",
]

_FORMAT = "kronsearch"


@own_modes()
def apply_plan(
    model: nn.Module,
    plan: Plan,
    data: Data | None = None,
    *,
    device: torch.device | str = "cpu",
    watch: Watcher = ignore,
) -> nn.Module:
    """Return a copy of a network with the layers of a plan replaced; the network itself is left untouched.

    Args:
        model: a network that has the layers which the plan replaces, with these kernel shapes.
        plan: what to replace by what.
        data: with data the decomposition is as the plan says: data-aware, layer by layer (`factorise_in_order`, which
            fits layers that stay dense, too), or with batch norms re-estimated; without, it rests on the weights alone.
        device: to calibrate on; the returned network is there.
        watch: is told of each layer.

    Raises:
        PlanError: the plan was made for another network.
    """
    check_kind("a plan is a Plan, such as load_plan returns", plan, Plan, PlanError)
    if data is not None:
        check_data(data)
    cost = check_fits(model, plan)
    require_device(device)
    dense = copied(model).to(device)
    settings = plan.decomposition
    metrics: dict[str, Metric] = {}
    if data is not None and settings.calibration_images > 0:
        watch(Progress(phase="calibrate", done=0, total=1))
        metrics = calibrate(
            dense, data, list(plan.replaced), images=settings.calibration_images, seed=settings.seed, device=device
        )
    count = len(plan.replaced)

    def tell(done: int, words: str) -> None:
        watch(Progress(phase="apply", done=done, total=count, message=words))

    return decomposed(dense, plan.replaced, cost, metrics, data, settings, device=device, tell=tell)


def decomposed(
    dense: nn.Module,
    specs: Mapping[str, SeKronSpec],
    cost: ModelCost,
    metrics: Mapping[str, Metric],
    data: Data | None,
    settings: Decomposition,
    *,
    device: torch.device | str,
    tell: Callable[[int, str], None],
) -> nn.Module:
    """Return a copy of a network with layers replaced, as the settings say.

    Args:
        dense: the network, on `device`.
        specs: of the layers.
        cost: its profile, which tells what else may be fitted.
        metrics: of the layers; those that have none are decomposed as their weights are.
        data: whose training split is read, or None.
        settings: of the decomposition.
        device: to run on.
        tell: is called with the number of layers that are replaced, and the name of the next.
    """
    if data is not None and settings.sequential_images > 0:
        free = [layer.name for layer in cost.layers if layer.keeps_dense is None]
        generator, images = stream(settings.seed, Purpose.FITTING), settings.sequential_images
        return factorise_in_order(
            dense, specs, free, metrics, data, images=images, generator=generator, device=device, tell=tell
        )
    layers: dict[str, nn.Module] = {}
    for name, spec in specs.items():
        tell(len(layers), name)
        layers[name] = factorise(dense.get_submodule(name), spec, metrics.get(name))
    small = replace_layers(dense, layers)
    if data is not None and settings.batchnorm_images > 0:
        tell(len(layers), "batch norms")
        settle(small, data, images=settings.batchnorm_images, seed=settings.seed, device=device)
    return small


def calibrate(
    model: nn.Module, data: Data, names: list[str], *, images: int, seed: int, device: torch.device | str
) -> dict[str, Metric]:
    """Return the metric of each named layer; the same seed, network and data give the same."""
    moments = gather_moments(
        model, data, names, images=images, generator=stream(seed, Purpose.CALIBRATION), device=device
    )
    return {name: Metric(moment) for name, moment in moments.items()}


def settle(model: nn.Module, data: Data, *, images: int, seed: int, device: torch.device | str) -> None:
    """Re-estimate batch-norm statistics in place; the same seed, network and data give the same."""
    reestimate_batchnorm(model, data, images=images, generator=stream(seed, Purpose.SETTLING), device=device)


def check_fits(model: nn.Module, plan: Plan) -> ModelCost:
    """Return a network's profile; `PlanError` unless it has what a plan replaces, and that can be replaced there."""
    check_network(model)
    modules = dict(model.named_modules())
    for name, spec in plan.replaced.items():
        layer = modules.get(name)
        shape = tuple(layer.weight.shape) if isinstance(layer, Conv | nn.Linear) else None
        if shape != spec.kernel_shape:
            found = "no such layer" if layer is None else f"a {type(layer).__name__} of kernel shape {shape}"
            raise PlanError(
                f"the plan ({_made_for(plan)}) replaces {name!r} of kernel shape {spec.kernel_shape}, the model has "
                f"{found}: pass a checkpoint of the network that the plan was made for"
            )
        if isinstance(layer, Conv) and not holds_groups(spec.factor_shapes, layer.groups):
            raise PlanError(
                f"the plan ({_made_for(plan)}) replaces {name!r} by {spec}, which the model's layer of {layer.groups} "
                "groups can't be: pass a checkpoint of the network that the plan was made for"
            )
    cost = profile_model(model, input_shape=plan.input_shape)
    for name in plan.replaced:
        if (reason := cost.layer(name).keeps_dense) is not None:
            raise PlanError(f"the plan ({_made_for(plan)}) replaces {name!r}, which this model can't have: {reason}")
    return cost


def measured(plan: Plan, model: nn.Module, small: nn.Module) -> Plan:
    """Return a plan with the costs of a network and of what it was made into, by fvcore, in place of its own."""
    costs = [profile_model(network, input_shape=plan.input_shape) for network in (model, small)]
    dense, compressed = (Cost(macs=cost.macs, params=cost.params) for cost in costs)
    return plan.model_copy(update={"dense": dense, "compressed": compressed})


def _made_for(plan: Plan) -> str:
    return f"made for {plan.model.spec}" if plan.model.spec else "made for another network"


def save_compressed(model: nn.Module, plan: Plan, path: str | Path, *, epochs: float = 0.0) -> None:
    """Write a compressed network's weights, with their plan and how long they were fine-tuned, all of it or nothing."""
    save_safetensors(model, Path(path), {"format": _FORMAT, "plan": plan.model_dump_json(), "epochs": str(epochs)})


def is_compressed(path: str | Path) -> bool:
    """Tell whether a file holds a compressed network, as `save_compressed` writes it."""
    path = Path(path)
    return holds_weights(path) and path.is_file() and read_metadata(path).get("format") == _FORMAT


def _check_compressed(path: str | Path) -> None:
    if not is_compressed(path):
        raise CheckpointError(f"{path} is not a compressed network: pass the compressed.safetensors of a run")


def stored_plan(path: str | Path) -> Plan:
    """Return the plan in a file of a compressed network.

    Raises:
        CheckpointError: the file is not one.
        PlanError: the plan is malformed, or of another schema.
    """
    _check_compressed(path)
    return parse_plan(read_metadata(path).get("plan", ""), origin=f"the plan in {path}")


def load_compressed(model: nn.Module, path: str | Path, plan: Plan | None = None) -> nn.Module:
    """Return a compressed network: the structure of the plan, the weights of the file.

    Args:
        model: the dense network; its weights don't matter, and it is left untouched.
        path: a file that `save_compressed` wrote.
        plan: the plan; None takes the one in the file.

    Raises:
        CheckpointError: the file is not of a compressed network, or of another one, or its factors are not finite.
        PlanError: the plan was made for another network.
    """
    path = Path(path)
    _check_compressed(path)
    plan = stored_plan(path) if plan is None else plan
    small = skeleton(model, plan)
    fill(small, load_state_dict(path), f"{path} doesn't fit the plan")
    return small.eval()


def skeleton(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of a network with the layers of a plan replaced by ones whose factors are zeros.

    Raises:
        PlanError: the plan was made for another network.
    """
    check_fits(model, plan)
    return replace_layers(
        model, {name: empty_layer(model.get_submodule(name), spec) for name, spec in plan.replaced.items()}
    )
