"""How long layers take inside of their network: one run of it times what stands in for each of many layers.

A layer by itself, run over and over, finds its weights and inputs in the fastest cache, and leaves its outputs in a
layout that may cost those who read them. In its network that shows, so that is where it is timed: each layer is
replaced by a slot, and what passes from its beginning to that of the next slot is its time, norms and activations
between them included. So the times of all layers, and what comes before the first of them, add up to the network's.
What is to be compared, a *line-up* of one spec for each of some layers, is dealt into the slots, and the dense network
is run before every run of a line-up, so that what else the machine does falls on both.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kronsearch.models.factorised import empty_layer, replace_layers
from kronsearch.models.timing import Clock, Run, wait_for
from kronsearch.sekron.layers import SeKronLayer
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.streams import Purpose, stream

__all__ = ["Lineup", "random_layer", "random_network", "time_lineups"]

Lineup = Mapping[str, SeKronSpec]

_AT_ONCE = 2**26  # entries of factors in memory at a time


def time_lineups(
    network: nn.Module,
    lineups: Sequence[Lineup],
    inputs: Tensor,
    *,
    names: Sequence[str],
    rounds: int,
    clock: Clock = time.perf_counter,
) -> list[dict[str, NDArray[np.float64]]]:
    """Return for each line-up, by layer, the seconds of the dense layer and of what stood in for it, (rounds, 2).

    Under "" are those of the whole network. Line-ups take turns: every one is run once in each round, after the dense
    network. A layer that a line-up doesn't name stays dense. Factors are random: it's their shapes that take time.

    Args:
        network: dense, in eval mode, in the memory layout of the inputs; it is left as it is.
        lineups: what to time.
        inputs: of the network.
        names: of the layers to be timed, those of all line-ups among them.
        rounds: how often each line-up is run, after one run to warm up.
        clock: seconds of a clock that only goes forward.
    """
    dense = {name: network.get_submodule(name) for name in names}
    watch = _Watch(clock, inputs.device)
    slots = {name: _Slot(layer, name, watch) for name, layer in dense.items()}
    whole = replace_layers(network, slots)
    found: list[dict[str, NDArray[np.float64]]] = []

    def run(layers: Mapping[str, nn.Module]) -> dict[str, float]:
        for name, slot in slots.items():
            slot.layer = layers.get(name, dense[name])
        with torch.inference_mode():
            return watch.times(lambda: whole(inputs), names)

    for part in _parts(lineups):
        built = [_layers(dense, lineup, inputs) for lineup in part]
        for layers in ({}, *built):
            run(layers)
        times = [[(run({}), run(layers)) for layers in built] for _ in range(rounds)]
        for place in range(len(built)):
            own = [of_round[place] for of_round in times]
            found.append({name: np.array([(large[name], small[name]) for large, small in own]) for name in own[0][0]})
    return found


class _Watch:
    """Is told when a slot begins, and adds up the time until the next one does."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock, self._device = clock, device
        self._looks: list[tuple[str, float]] = []

    def look(self, name: str) -> None:
        """Note that this slot begins now."""
        wait_for(self._device)
        self._looks.append((name, self._clock()))

    def times(self, run: Run, names: Sequence[str]) -> dict[str, float]:
        """Return the seconds of each slot during a run, and of the whole under ""."""
        self._looks = []
        self.look("")
        run()
        self.look("")
        seconds = dict.fromkeys(("", *names), 0.0)
        for (name, began), (_, ended) in pairwise(self._looks):
            seconds[name] += ended - began
        return seconds | {"": self._looks[-1][1] - self._looks[0][1]}


class _Slot(nn.Module):
    """Stands in the place of a layer, tells when it begins, and runs it."""

    def __init__(self, layer: nn.Module, name: str, watch: _Watch) -> None:
        super().__init__()
        self.layer, self._name, self._watch = layer, name, watch

    def forward(self, *args: object, **kwargs: object) -> object:
        self._watch.look(self._name)
        return self.layer(*args, **kwargs)


def _parts(lineups: Sequence[Lineup]) -> Iterator[list[Lineup]]:
    """Yield the line-ups in parts that are held in memory together."""
    part: list[Lineup] = []
    entries = 0
    for lineup in lineups:
        own = sum(spec.params for spec in lineup.values())
        if part and entries + own > _AT_ONCE:
            yield part
            part, entries = [], 0
        part, entries = [*part, lineup], entries + own
    if part:
        yield part


def _layers(dense: Mapping[str, nn.Module], lineup: Lineup, inputs: Tensor) -> dict[str, nn.Module]:
    """Return the factorised layers of a line-up, in the memory layout of the inputs."""
    layers = _random_layers(dense, lineup)
    if inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last):
        return {name: layer.to(memory_format=torch.channels_last) for name, layer in layers.items()}
    return layers


def _random_layers(dense: Mapping[str, nn.Module], lineup: Lineup) -> dict[str, nn.Module]:
    generator = stream(0, Purpose.FACTORS)
    return {name: random_layer(dense[name], spec, generator) for name, spec in lineup.items()}


def random_layer(layer: nn.Module, spec: SeKronSpec, generator: torch.Generator) -> SeKronLayer:
    """Return the factorised layer of a dense one with random factors, whose kernel has the dense one's variance.

    So nothing in the network runs into numbers too large or too small, which would take other times.
    """
    new = empty_layer(layer, spec).eval()
    terms, spread = prod(spec.ranks), float(layer.get_parameter("weight").detach().float().std(unbiased=False))
    with torch.no_grad():
        for factor in new.factors:
            values = torch.randn(factor.shape, generator=generator)
            factor.copy_(values * (spread / terms**0.5) ** (1 / spec.sequence_length))
        if new.bias is not None:
            new.bias.copy_(layer.get_parameter("bias"))
    return new


def random_network(network: nn.Module, lineup: Lineup) -> nn.Module:
    """Return a copy of a dense network with random factorised layers, which takes the time of any with their shapes."""
    return replace_layers(network, _random_layers({name: network.get_submodule(name) for name in lineup}, lineup))
