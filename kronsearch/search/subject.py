"""What a search is about before there is a budget: the network, measured and checked, its data, its error tables."""

from pathlib import Path

import torch
from torch import nn

from kronsearch.choices import SensitivityName, check_choices, check_seed
from kronsearch.errors import ModelError
from kronsearch.models.profile import profile_model
from kronsearch.models.shelf import Shelf
from kronsearch.models.structure import fingerprint_structure
from kronsearch.plan import Decomposition
from kronsearch.progress import Phase, Progress, Watcher, ignore
from kronsearch.search.candidates import Candidates
from kronsearch.search.context import Context
from kronsearch.search.effort import affordable
from kronsearch.search.prepare import Prepared, measure, tabulate
from kronsearch.search.reach import replaceable
from kronsearch.search.score import Scorer
from kronsearch.search.sensitivity import Damage, estimated
from kronsearch.search.space import SearchSpace, load_space
from kronsearch.search.stopwatch import Setting, Stopwatch
from kronsearch.training.copies import check_network, copied
from kronsearch.training.data import Data, check_data, check_splits
from kronsearch.training.evaluate import evaluate
from kronsearch.training.precision import require_device

__all__ = ["Subject"]

_CALIBRATION_IMAGES = 512
_BATCHNORM_IMAGES = 2048
_FITTED_IMAGES = (256, 1024)  # the fewest and the most that layers are fitted on, one after the other
_FITTED_WORK = 2 * 10**13  # MACs for that, of which each layer takes about those of the dense network an image


class Subject:
    """A network, its data and a search space, and what is computed of them once for all budgets.

    `dense` is a copy of the network in eval mode, `cost` its profile, `names` are its replaceable layers, and
    `settings` say how kernels become factors.

    Args:
        model: the trained network; left untouched.
        data: what it was trained on, or None.
        space: a search space, its name, or a YAML file.
        input_shape: of one example; by default the data's.
        device: to run on.
        seed: of everything random.
        out: folder of the results; statistics and tables are kept in `cache` there, where no `cache` is given.
        cache: folder for those.
        sensitivity: how the layers' sensitivities are had, see `estimated` and `Damage`.
        watch: is told of every step.

    Raises:
        KronsearchError: the space can't be read, or the network, the data and the shape don't go together.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data | None,
        *,
        space: SearchSpace | str | Path = "default",
        input_shape: tuple[int, ...] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        out: Path | None = None,
        cache: str | Path | None = None,
        sensitivity: SensitivityName = "measured",
        watch: Watcher = ignore,
    ) -> None:
        check_network(model)
        if data is not None:
            check_data(data)
        self.data, self.device, self.watch = data, device, watch
        check_choices(sensitivity=sensitivity)
        check_seed(seed)
        require_device(device)
        self._sensitivity = sensitivity
        self.space = space if isinstance(space, SearchSpace) else load_space(space)
        if cache is None and out is not None:
            cache = out / "cache"
        self._shelf = Shelf(None if cache is None else Path(cache))
        shape = input_shape or (data.input_shape if data is not None else None)
        if shape is None:
            raise ModelError("without data the input shape is not known: pass one (--input-shape), such as 3,224,224")
        if data is not None and tuple(shape) != tuple(data.input_shape):
            raise ModelError(
                f"the input shape {tuple(shape)} is not the data's, {tuple(data.input_shape)}: leave it out"
            )
        self.structure = fingerprint_structure(model)[:16]
        self.tell("profile", 0, 1)
        self.cost = profile_model(model, input_shape=tuple(shape))  # which tells whether a copy runs by itself
        self.dense = copied(model).to(device).eval()
        self.names = replaceable(self.cost, self.space)
        for name in self.names:
            if not bool(self.dense.get_parameter(f"{name}.weight").isfinite().all()):
                raise ModelError(f"the weight of {name} has entries that are not finite: pass a trained checkpoint")
        self.settings = Decomposition(seed=seed)
        if data is not None:
            fitted = sum(layer.keeps_dense is None for layer in self.cost.layers)
            self.settings = Decomposition(
                calibration_images=_CALIBRATION_IMAGES,
                batchnorm_images=_BATCHNORM_IMAGES,
                sequential_images=affordable(self.cost.macs * fitted, _FITTED_WORK, *_FITTED_IMAGES),
                seed=seed,
            )
        if data is not None:  # what the data and the network can't do together is known before anything is written
            check_splits(data)
            evaluate(self.dense, data, "val", limit=16, device=device)
        self.tell("profile", 1, 1, macs=self.cost.macs, params=self.cost.params)

    def prepared(self) -> Prepared:
        """Return the metrics of the replaceable layers."""
        if self.data is None:
            return Prepared({}, None)
        self.tell("calibrate", 0, 1)
        found = measure(self.dense, self.data, self.names, self.settings, shelf=self._shelf, device=self.device)
        self.tell("calibrate", 1, 1)
        return found

    def tables(self, prepared: Prepared) -> tuple[list[Candidates], dict[str, float]]:
        """Return the candidates that are of use for each layer, and its sensitivity."""
        candidates = tabulate(
            self.dense,
            self.cost,
            self.names,
            self.space,
            prepared,
            shelf=self._shelf,
            tell=lambda done, name: self.tell("tables", done, len(self.names), name),
        )
        if self.data is None or self._sensitivity != "measured":
            return candidates, estimated(self._sensitivity, self.dense, self.names, prepared.metrics)
        damage = Damage(
            self.dense,
            self.data,
            self.cost.macs,
            prepared,
            seed=self.settings.seed,
            shelf=self._shelf,
            device=self.device,
        )
        return candidates, damage.sensitivity(
            candidates, lambda done, name: self.tell("sensitivity", done, len(candidates), name)
        )

    def context(self, prepared: Prepared, scorer: Scorer) -> Context | None:
        """Return what measures how much layers matter in a plan's network; None where sensitivities aren't measured."""
        if self._sensitivity != "measured":
            return None
        return Context(
            scorer,
            self.cost.macs,
            prepared.origin or {},
            self._shelf,
            lambda done, total: self.tell("context", done, total),
        )

    def stopwatch(self, setting: Setting) -> Stopwatch:
        """Return what measures the latency of candidates and plans."""
        return Stopwatch(
            self.dense,
            self.cost,
            self.names,
            setting,
            shelf=self._shelf,
            device=self.device,
            tell=lambda done, total: self.tell("latency", done, total),
        )

    def tell(
        self,
        phase: Phase,
        done: int,
        total: int,
        message: str = "",
        *,
        best: float | None = None,
        macs: int | None = None,
        params: int | None = None,
    ) -> None:
        """Tell whoever watches of a step."""
        self.watch(Progress(phase=phase, done=done, total=total, message=message, best=best, macs=macs, params=params))
