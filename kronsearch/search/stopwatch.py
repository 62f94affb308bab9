"""How long candidates and plans take on this machine: each is measured once, and kept."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import kronsearch.sekron
from kronsearch.choices import check_counts
from kronsearch.models.bench import Timing, bench
from kronsearch.models.latency import Lineup, random_network, time_lineups
from kronsearch.models.profile import ModelCost
from kronsearch.models.shelf import Shelf, versions
from kronsearch.models.structure import fingerprint_structure
from kronsearch.models.timing import (
    LAYOUTS,
    Layout,
    Network,
    as_model_error,
    device_name,
    random_inputs,
    timing_conditions,
)
from kronsearch.plan import Latency
from kronsearch.search.candidates import Candidates
from kronsearch.search.curves import Group, Ratio, deal, digest, groups_of
from kronsearch.sekron.spec import SeKronSpec

__all__ = ["Setting", "Stopwatch"]

_SURVEY = 7  # runs of the dense network
_SECONDS = 20.0  # for which line-ups are run, if that is enough for the fewest rounds
_LONGEST = 60.0  # for the fewest rounds; what doesn't fit is left out
_FEWEST, _MOST = 3, 7  # rounds
_AT_A_TIME = 16  # line-ups that take turns
_SEQUENCES = 24  # of a group, of which more than the lowest rank is measured
_GRID = 3  # ranks of a sequence that are measured beside the lowest
_QUARTILE = 0.25
_PAIRS, _COMPARING = 80, 2.0  # of the dense network and a plan's, or seconds, if that is less
_PLAN = ("dense_ms", "compressed_ms", "ratio", "ratio_low", "ratio_high")


@dataclass(frozen=True)
class Setting:
    """How latency is measured: examples in a run, and threads of torch."""

    batch: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        check_counts(latency_batch=self.batch, latency_threads=self.threads)


@dataclass(frozen=True)
class _Dense:
    """The dense network's seconds, whole and by layer, in the memory layout that it is faster in.

    The whole is the sum of its parts' quartiles: where the machine is busy, the quartile of the sum is far above it.
    """

    whole: float
    layers: Mapping[str, float]
    layout: Layout


class Stopwatch:
    """Measures a network's candidates and plans, each of them once: it is kept in memory and on the shelf.

    On the CPU and one thread it goes by the thread's own time, which others' use of the machine hardly changes, else by
    the clock. Of a layer's runs the lower quartile counts, for other programs only ever add; plans are timed in pairs
    with the dense network, as `bench` does.

    Args:
        dense: the network, on `device` and in eval mode.
        cost: its profile.
        names: of its replaceable layers.
        setting: batch and threads.
        shelf: where measurements are kept: of candidates by machine, versions, setting, types, geometry and spec, of
            whole networks by their structure, too.
        device: to run on.
        tell: is called with the line-ups that were measured, and how many there are.
        timer: what times line-ups, as `time_lineups`.
        comparer: what times plans, as `bench`.
    """

    def __init__(
        self,
        dense: nn.Module,
        cost: ModelCost,
        names: Sequence[str],
        setting: Setting,
        *,
        shelf: Shelf,
        device: torch.device | str,
        tell: Callable[[int, int], None],
        timer: Callable[..., list[dict[str, NDArray[np.float64]]]] = time_lineups,
        comparer: Callable[..., list[Timing]] = bench,
    ) -> None:
        self.setting = setting
        self._model, self._cost, self._names = dense, cost, list(names)
        self._device, self._shelf, self._tell = torch.device(device), shelf, tell
        self._machine: dict[str, Any] = {
            "device": device_name(self._device),
            "versions": versions(),
            "code": _digest_of_code(),
            "batch": setting.batch,
            "threads": setting.threads,
            "types": sorted({str(parameter.dtype) for parameter in dense.parameters()}),
        }
        # layers alone don't tell how long a network takes: one of slower activations may have the same
        layers = [f"{layer.kind} {layer.kernel_shape} {layer.calls} {layer.geometry}" for layer in cost.layers]
        self._identity = [fingerprint_structure(dense), *layers]
        self._timer, self._comparer = timer, comparer
        self._plans: dict[str, Latency] = {}
        self._timed: tuple[Sequence[Candidates], bool, list[Candidates]] | None = None
        alone = self._device.type == "cpu" and setting.threads == 1
        self._clock = time.thread_time if alone else time.perf_counter

    @property
    def nanoseconds(self) -> int:
        """The latency of the dense network in the terms of the candidates' latencies."""
        return round(1e9 * self._dense.whole)

    def timed(self, candidates: Sequence[Candidates], *, keep_slower: bool) -> list[Candidates]:
        """Return the candidates with their latencies, those that were measured.

        All sequences are measured at the lowest rank that they have; those slower there than the dense layer, beyond
        the measurement's error, are slower at any. Of the others, the 24 that have most candidates are measured at
        four ranks; see `Group.ratios` for those between. What is beaten in MACs, params and error by a candidate of the
        same structure isn't among the candidates, though it may be faster.

        Args:
            candidates: of the replaceable layers.
            keep_slower: whether to keep those that are slower than the dense layer.
        """
        if self._timed is not None and self._timed[0] is candidates and self._timed[1] == keep_slower:
            return self._timed[2]
        groups = groups_of(candidates, self._cost)
        for group in groups:
            self._recall(group)
        most = max(_AT_A_TIME, int(_LONGEST / (2 * _FEWEST * self._dense.whole)))  # line-ups
        lowest = [(group, unit) for group in groups for unit in group.common()[: most * len(group.layers)]]
        self._measure([(group, group.lowest(unit)) for group, unit in lowest])
        wanted = []
        for group in groups:
            fast = [unit for own, unit in lowest if own is group and (keep_slower or not group.is_slower(unit))]
            few = min(_SEQUENCES, max(1, most * len(group.layers) // _GRID))
            wanted += [(group, spec) for unit in fast[:few] for spec in group.grid(unit)]
        self._measure(wanted)
        of_layer = {name: group for group in groups for name in group.layers}
        found = [self._with_latency(layer, of_layer[layer.name], keep_slower) for layer in candidates]
        self._timed = (candidates, keep_slower, found)
        return found

    def compare(self, specs: Lineup) -> Latency:
        """Measure the network of a plan against the dense one."""
        told = repr(sorted(specs.items()))
        if told not in self._plans:
            key = self._machine | {"network": self._identity, "plan": told}
            kept = self._shelf.get("plan-latency", key)
            if kept is None or {name: len(tensor) for name, tensor in kept.items()} != {"times": 5, "layouts": 2}:
                kept = self._compared(specs)
                self._shelf.put("plan-latency", key, kept)
            dense_layout, compressed_layout = (LAYOUTS[int(place)] for place in kept["layouts"])
            self._plans[told] = Latency(
                **dict(zip(_PLAN, map(float, kept["times"]), strict=True)),
                batch=self.setting.batch,
                threads=self.setting.threads,
                device=self._machine["device"],
                dense_layout=dense_layout,
                compressed_layout=compressed_layout,
            )
        return self._plans[told]

    def _compared(self, specs: Lineup) -> dict[str, Tensor]:
        (timing,) = self._comparer(
            self._model,
            random_network(self._model, specs),
            input_shape=self._cost.input_shape,
            batches=(self.setting.batch,),
            threads=(self.setting.threads,),
            seconds=min(_COMPARING, 2 * _PAIRS * self._dense.whole),
            layers=False,
            device=self._device,
            clock=self._clock,
        )
        ratios = (1 / timing.speedup, 1 / timing.speedup_high, 1 / timing.speedup_low)
        layouts = [LAYOUTS.index(layout) for layout in (timing.dense_layout, timing.compressed_layout)]
        times = torch.tensor([timing.dense_ms, timing.compressed_ms, *ratios], dtype=torch.float64)
        return {"times": times, "layouts": torch.tensor(layouts)}

    @cached_property
    def _copies(self) -> Network:
        return Network(self._model, self._device)

    @cached_property
    def _dense(self) -> _Dense:
        key = self._machine | {"network": self._identity, "layers": self._names}
        kept = self._shelf.get("dense-latency", key)
        if kept is None or {name: len(t) for name, t in kept.items()} != {"times": 1 + len(self._names), "layout": 1}:
            conditions = timing_conditions(self.setting.threads, self._device)
            with conditions, torch.inference_mode(), as_model_error(self._shape):
                layout = self._copies.faster_layout(self._inputs("contiguous"), _COMPARING / 4, clock=self._clock)
            (found,) = self._time([{}], layout, _SURVEY)
            found[""] -= sum(found[name] for name in self._names)  # what is before the first layer
            rest, *layers = (float(np.quantile(found[name], _QUARTILE)) for name in ("", *self._names))
            kept = {
                "times": torch.tensor([rest + sum(layers), *layers], dtype=torch.float64),
                "layout": torch.tensor([LAYOUTS.index(layout)]),
            }
            self._shelf.put("dense-latency", key, kept)
        whole, *layers = map(float, kept["times"])
        return _Dense(whole, dict(zip(self._names, layers, strict=True)), LAYOUTS[int(kept["layout"])])

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.setting.batch, *self._cost.input_shape)

    def _inputs(self, layout: Layout) -> Tensor:
        return self._copies.lay_out(layout, random_inputs(*self._shape, device=self._device))

    def _time(self, lineups: Sequence[Lineup], layout: Layout, rounds: int) -> list[dict[str, NDArray[np.float64]]]:
        with timing_conditions(self.setting.threads, self._device), as_model_error(self._shape):
            return self._timer(
                self._copies.copies[layout],
                lineups,
                self._inputs(layout),
                names=self._names,
                rounds=rounds,
                clock=self._clock,
            )

    def _measure(self, wanted: Iterable[tuple[Group, SeKronSpec]]) -> None:
        """Measure those that aren't known yet."""
        lineups = deal((group, spec) for group, spec in wanted if digest(spec) not in group.known)
        whole = self._dense.whole
        rounds = min(_MOST, max(_FEWEST, int(_SECONDS / (2 * whole * max(1, len(lineups))))))
        for start in range(0, len(lineups), _AT_A_TIME):
            self._tell(start, len(lineups))
            part = lineups[start : start + _AT_A_TIME]
            specs = [{name: spec for name, (_, spec) in lineup.items()} for lineup in part]
            found = self._time(specs, self._dense.layout, rounds)
            for lineup, times in zip(part, found, strict=True):
                for name, (group, spec) in lineup.items():
                    group.known[digest(spec)] = _ratio(times[name], np.concatenate([other[name] for other in found]))
        for group in {id(group): group for lineup in lineups for group, _ in lineup.values()}.values():
            self._remember(group)
        if lineups:
            self._tell(len(lineups), len(lineups))

    def _with_latency(self, layer: Candidates, group: Group, keep_slower: bool) -> Candidates:
        ratios, errors = np.full(len(layer), inf), np.zeros(len(layer))
        ratios[0] = 1.0
        for place in np.unique(layer.sequence[1:]):
            members = np.flatnonzero((layer.sequence == place) & (layer.rank > 0))
            if (found := group.ratios(layer.sequences[int(place)], layer.rank[members])) is not None:
                ratios[members], errors[members] = found
        kept = np.isfinite(ratios) & (keep_slower | (ratios - errors <= 1))
        latency = np.rint(1e9 * self._dense.layers[layer.name] * ratios[kept]).astype(np.int64)
        return layer.take(kept).with_latency(latency)

    def _key(self, group: Group) -> dict[str, Any]:
        return self._machine | group.key | {"layout": self._dense.layout}

    def _recall(self, group: Group) -> None:
        kept = self._shelf.get("latency", self._key(group))
        if kept is not None and {name: tensor.ndim for name, tensor in kept.items()} == {"specs": 1, "ratios": 2}:
            rows = zip(kept["specs"].tolist(), kept["ratios"].tolist(), strict=False)
            group.known |= {int(spec): Ratio(value, error) for spec, (value, error) in rows}

    def _remember(self, group: Group) -> None:
        ratios = [(ratio.value, ratio.error) for ratio in group.known.values()]
        specs = torch.tensor([*group.known], dtype=torch.int64)
        self._shelf.put(
            "latency", self._key(group), {"specs": specs, "ratios": torch.tensor(ratios, dtype=torch.float64)}
        )


def _digest_of_code() -> str:
    """Return a digest of what runs factorised layers: what other code took says nothing about this."""
    files = sorted(Path(kronsearch.sekron.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _ratio(times: NDArray[np.float64], others: NDArray[np.float64]) -> Ratio:
    """Return the ratio of a candidate's runs to the dense layer's, those beside other line-ups' among them.

    Args:
        times: seconds of the dense layer and the candidate, (rounds, 2).
        others: of all line-ups that took turns with it, (runs, 2).
    """
    dense, own = others[:, 0], times[:, 1]
    value = float(np.quantile(own, _QUARTILE) / np.quantile(dense, _QUARTILE))
    spreads = [float(np.quantile(t, 0.75) / np.quantile(t, 0.25) - 1) / 2 / sqrt(len(t)) for t in (dense, own)]
    return Ratio(value, value * sqrt(sum(spread**2 for spread in spreads)))
