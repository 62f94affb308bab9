"""Sensitivities: what a relative squared error of 1 in a layer would cost, by several measures."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from kronsearch.choices import SensitivityName
from kronsearch.models.factorised import factorise, replace_layers
from kronsearch.models.shelf import Shelf
from kronsearch.search.candidates import Candidates
from kronsearch.search.effort import affordable
from kronsearch.search.prepare import Prepared
from kronsearch.sekron.convolution import kernels_formed
from kronsearch.sekron.metrics import Metric
from kronsearch.training.batchnorm import batch_statistics
from kronsearch.training.copies import copied
from kronsearch.training.data import Data, train_inputs
from kronsearch.training.memory import freed_memory_kept
from kronsearch.training.precision import KERNELS, eval_mode, forward, precision_for
from kronsearch.training.streams import Purpose, stream

__all__ = ["Damage", "estimated"]

_LEVEL = 0.05  # relative squared error of the candidate by which a layer is replaced
_IMAGES = (32, 256)  # the fewest and the most that a network is run on
_BATCH = 128
_WORK = 8 * 10**12  # MACs of all runs together, as far as the fewest images allow
_ENTRIES = 2**27  # of the dense network's outputs that are kept


def estimated(
    name: SensitivityName, dense: nn.Module, names: Iterable[str], metrics: Mapping[str, Metric]
) -> dict[str, float]:
    """Return the sensitivity of layers by their weights and metrics, without running the network.

    Args:
        name: `plain`, 1 for each layer: its relative error is all that counts; `absolute`, its kernel's squared norm;
            `inputs`, the mean square of what it puts out; `fisher` (and where it can't be measured, `measured`), the
            mean square of what that changes in the network's outputs: the energy of the kernel in its metric. Of a
            layer without a metric, or for `fisher` without gradients, it is the median of the others'; 1 where no layer
            has one.
        dense: the network.
        names: its replaceable layers.
        metrics: of these.
    """
    names = list(names)
    if name == "plain":
        return dict.fromkeys(names, 1.0)
    kernels = {each: dense.get_parameter(f"{each}.weight").detach() for each in names}
    if name == "absolute":
        return {each: float(kernel.double().square().sum()) for each, kernel in kernels.items()}
    if name == "inputs":
        metrics = {each: Metric(replace(metric.moments, outputs=None)) for each, metric in metrics.items()}
    else:
        metrics = {each: metric for each, metric in metrics.items() if metric.moments.outputs is not None}
    # below zero by rounding, where inputs are constant
    return _filled({each: max(0.0, metric.energy(kernels[each])) for each, metric in metrics.items()}, names)


class Damage:
    """Measures sensitivities: each layer alone is replaced, and the squared change of the network's outputs is told.

    The layer becomes the cheapest candidate of a relative squared error of at most 0.05, whatever the budget is, so
    that all budgets share what is measured. Batch norms take their statistics from the batch, which is what their
    re-estimation comes to. The network sees up to 256 training images, augmented as in training; fewer
    where it or its output is large.

    Args:
        dense: the network.
        data: whose training split is read.
        macs: of one example.
        prepared: the metrics of its layers.
        seed: of the images.
        shelf: where each layer's change is kept as it is measured.
        device: to run on.
    """

    def __init__(
        self,
        dense: nn.Module,
        data: Data,
        macs: int,
        prepared: Prepared,
        *,
        seed: int,
        shelf: Shelf,
        device: torch.device | str,
    ) -> None:
        self._dense, self._data, self._macs, self._prepared = dense, data, macs, prepared
        self._seed, self._shelf, self._device = seed, shelf, device
        self._inputs: list[Tensor] = []
        self._wanted: list[Tensor] = []

    def sensitivity(self, candidates: Sequence[Candidates], tell: Callable[[int, str], None]) -> dict[str, float]:
        """Return the change of the outputs of each layer's candidate, divided by its error; the median where none is.

        Args:
            candidates: of each replaceable layer.
            tell: is called with the number of layers done and the name of the next.
        """
        images = affordable(self._macs * len(candidates), _WORK, *_IMAGES)
        found = {}
        for done, layer in enumerate(candidates):
            tell(done, layer.name)
            index = _nearest(layer)
            if index is not None:
                change = self._change(layer, index, images)
                if math.isfinite(change):
                    found[layer.name] = change / float(layer.error[index])
        tell(len(candidates), "")
        self._inputs, self._wanted = [], []
        return _filled(found, [layer.name for layer in candidates])

    def _change(self, layer: Candidates, index: int, images: int) -> float:
        """Return the mean squared change of the outputs when a layer becomes this candidate."""
        spec = layer.spec(index)
        assert spec is not None
        key = {**(self._prepared.origin or {}), "layer": layer.name, "spec": repr(spec), "runs on": images}
        kept = self._shelf.get("damage", key)
        if kept is not None and set(kept) == {"change"} and kept["change"].numel() == 1 and kept["change"] >= 0:
            return float(kept["change"])
        if not self._wanted:
            self._inputs = self._fitting(self._images(images))
            self._wanted = self._outputs(copied(self._dense))
        metric = self._prepared.metrics.get(layer.name)
        small = factorise(self._dense.get_submodule(layer.name), spec, metric)
        if metric is not None:
            metric.forget()
        outputs = self._outputs(replace_layers(self._dense, {layer.name: small}))
        pairs = zip(outputs, self._wanted, strict=True)
        squares = sum(float((ours - theirs).square().sum(dtype=torch.float64)) for ours, theirs in pairs)
        change = squares / sum(map(len, self._inputs))
        self._shelf.put("damage", key, {"change": torch.tensor(change, dtype=torch.float64)})
        return change

    def _images(self, count: int) -> list[Tensor]:
        generator = stream(self._seed, Purpose.SENSITIVITY)
        return list(train_inputs(self._data, min(_BATCH, count), count, generator=generator, device=self._device))

    def _fitting(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return as many of the inputs as may have their outputs kept, one at least."""
        with torch.no_grad(), eval_mode(self._dense):
            entries = forward(self._dense, inputs[0][:1], "float32").numel()
        left = max(1, _ENTRIES // max(1, entries))
        fitting = []
        for batch in inputs:
            if left > 0:
                fitting.append(batch[:left])
                left -= len(batch)
        return fitting

    def _outputs(self, network: nn.Module) -> list[Tensor]:
        """Return the outputs for each batch, with the batch's own statistics in batch norms; it changes the network."""
        precision = precision_for(self._device)
        formed = kernels_formed(network, KERNELS[precision])
        with freed_memory_kept(self._device), torch.no_grad(), batch_statistics(network), formed:
            return [forward(network, inputs, precision) for inputs in self._inputs]


def _nearest(layer: Candidates) -> int | None:
    """Return the cheapest candidate of at most the error level, else that of least error; None if all are exact."""
    inexact = np.flatnonzero((layer.rank > 0) & (layer.error > 0))
    if not len(inexact):
        return None
    near = inexact[layer.error[inexact] <= _LEVEL]
    if not len(near):
        return int(inexact[np.argmin(layer.error[inexact])])
    cost = layer.macs[near] / layer.macs[0] * (layer.params[near] / layer.params[0])
    return int(near[np.argmin(cost)])


def _filled(found: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    usual = statistics.median(found.values()) if found else 1.0
    return {name: found.get(name, usual) for name in names}
