"""What a search measures before its first trial, each piece kept as it is made: metrics and candidates."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kronsearch.models.apply import calibrate
from kronsearch.models.checkpoint import fingerprint_weights
from kronsearch.models.profile import LayerCost, ModelCost
from kronsearch.models.shelf import Shelf, versions
from kronsearch.models.structure import fingerprint_structure
from kronsearch.plan import Decomposition
from kronsearch.search.candidates import Candidates, layer_candidates
from kronsearch.search.space import SearchSpace
from kronsearch.sekron.metrics import Metric, Moments
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.data import Data

__all__ = ["Prepared", "measure", "tabulate"]

_COLUMNS = ("sequence", "rank", "macs", "params", "error")
_PARTS = ("inputs", "outputs", "mean")


@dataclass(frozen=True)
class Prepared:
    """The metrics of layers, and what they were gathered from.

    Attributes:
        metrics: by layer; empty without data.
        origin: what they depend on, None without data.
    """

    metrics: Mapping[str, Metric]
    origin: Mapping[str, Any] | None


def measure(
    dense: nn.Module,
    data: Data,
    names: list[str],
    settings: Decomposition,
    *,
    shelf: Shelf,
    device: torch.device | str,
) -> Prepared:
    """Gather the metrics of these layers, or take them from the shelf."""
    origin = {
        "structure": fingerprint_structure(dense),
        "weights": fingerprint_weights(dense),
        "data": data.fingerprint,
        "images": settings.calibration_images,
        "seed": settings.seed,
        "device": torch.device(device).type,
        "versions": versions(),
    }
    key = {**origin, "layers": names}
    kept = shelf.get("moments", key)
    metrics = None if kept is None else _metrics(kept, dense, names, device)
    if metrics is None:
        metrics = calibrate(dense, data, names, images=settings.calibration_images, seed=settings.seed, device=device)
        tensors = {
            f"{name}/{part}": tensor
            for name, metric in metrics.items()
            for part in _PARTS
            if (tensor := getattr(metric.moments, part)) is not None
        }
        shelf.put("moments", key, tensors)
    return Prepared(metrics, origin)


def tabulate(
    dense: nn.Module,
    cost: ModelCost,
    names: list[str],
    space: SearchSpace,
    prepared: Prepared,
    *,
    shelf: Shelf,
    tell: Callable[[int, str], None],
) -> list[Candidates]:
    """Return the candidates that are of use for each layer.

    Args:
        dense: the network.
        cost: its profile.
        names: the replaceable layers.
        space: the search space.
        prepared: the metrics.
        shelf: where tables are kept.
        tell: is called with the number of layers done and the name of the next.
    """
    candidates = []
    for done, name in enumerate(names):
        tell(done, name)
        kernel, metric = dense.get_parameter(f"{name}.weight").detach(), prepared.metrics.get(name)
        candidates.append(_candidates(kernel, cost.layer(name), space, prepared, shelf))
        if metric is not None:
            metric.forget()
    tell(len(names), "")
    return candidates


def _candidates(kernel: Tensor, cost: LayerCost, space: SearchSpace, prepared: Prepared, shelf: Shelf) -> Candidates:
    metric = prepared.metrics.get(cost.name)
    key = {
        "layer": cost.name,
        "kernel": hashlib.sha256(kernel.float().cpu().contiguous().numpy().tobytes()).hexdigest(),
        "shape": list(kernel.shape),
        "geometry": repr(cost.geometry),
        "calls": [list(call) for call in cost.calls],
        "space": space.model_dump(mode="json", exclude={"keep_dense"}),
        "metric": None if metric is None else prepared.origin,
        "versions": versions(),
    }
    kept = shelf.get("table", key)
    if kept is not None and (found := _from_tensors(kept, cost)) is not None:
        return found
    made = layer_candidates(kernel, cost, space, metric=metric).without_pointless()
    shelf.put("table", key, _to_tensors(made))
    return made


def _to_tensors(candidates: Candidates) -> dict[str, Tensor]:
    columns = {name: torch.from_numpy(np.ascontiguousarray(getattr(candidates, name))) for name in _COLUMNS}
    units = candidates.sequences
    flat = [n for unit in units for shape in unit.factor_shapes for n in shape]
    stages = [{k: stage for stage, group in enumerate(unit.order) for k in group} for unit in units]
    return columns | {
        "lengths": torch.tensor([unit.sequence_length for unit in units]),
        "shapes": torch.tensor(flat).reshape(-1, len(candidates.kernel_shape)),
        "stages": torch.tensor([stage[k] for stage in stages for k in range(len(stage))]),  # in which a factor runs
    }


def _from_tensors(kept: Mapping[str, Tensor], cost: LayerCost) -> Candidates | None:
    """Undo `_to_tensors`; None where the tensors don't belong together."""
    shape = cost.kernel_shape
    if shape is None or set(kept) != {*_COLUMNS, "lengths", "shapes", "stages"}:
        return None
    columns = [kept[name].numpy() for name in _COLUMNS]
    lengths, shapes, stages = (kept[name].tolist() for name in ("lengths", "shapes", "stages"))
    if any(len(column) != len(columns[0]) for column in columns) or sum(lengths) != len(shapes):
        return None
    try:
        factors = iter(list(zip(shapes, stages, strict=True)))
        sequences = tuple(_unit(list(islice(factors, length))) for length in lengths)
    except ValueError:  # a SpecError among others
        return None
    whole = all(unit.kernel_shape == shape for unit in sequences)
    if not whole or not ((columns[0] >= 0) & (columns[0] < len(sequences))).all():
        return None
    return Candidates(cost.name, shape, sequences, *columns)


def _unit(factors: list[tuple[list[int], int]]) -> SeKronSpec:
    """Return the spec of ranks 1 of factors, each given by its shape and the stage in which it runs."""
    shapes, stages = zip(*factors, strict=True)
    run = tuple(tuple(k for k, own in enumerate(stages) if own == stage) for stage in sorted(set(stages)))
    return SeKronSpec(tuple(map(tuple, shapes)), (1,) * (len(shapes) - 1), run=run)


def _metrics(
    kept: Mapping[str, Tensor], dense: nn.Module, names: list[str], device: torch.device | str
) -> dict[str, Metric] | None:
    """Return the metrics that tensors hold; None where they are not of these layers."""
    metrics = {}
    for name in names:
        weight = dense.get_parameter(f"{name}.weight")
        parts = {part: kept[f"{name}/{part}"].to(device) for part in _PARTS if f"{name}/{part}" in kept}
        if not parts:
            continue  # too wide to be calibrated
        if not all(bool(part.isfinite().all()) for part in parts.values()):
            return None
        width, height = weight[0].numel(), len(weight)
        wanted = {"inputs": (width, width), "outputs": (height, height)}
        if any(tuple(parts[part].shape) != size for part, size in wanted.items() if part in parts):
            return None
        if "inputs" not in parts or ("mean" in parts and parts["mean"].shape[-1] != width):
            return None
        metrics[name] = Metric(Moments(parts["inputs"], parts.get("outputs"), parts.get("mean")))
    return metrics
