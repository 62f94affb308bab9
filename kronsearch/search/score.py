"""Measuring a plan: before any fine-tune on training images, after a short proxy one on the validation split."""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from kronsearch.finetuning.validation import Validation
from kronsearch.models.apply import settle
from kronsearch.models.factorised import factorise, replace_layers
from kronsearch.plan import Decomposition
from kronsearch.search.effort import affordable
from kronsearch.sekron.layers import SeKronLayer
from kronsearch.sekron.metrics import Metric
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.blocks import block_names
from kronsearch.training.data import Data
from kronsearch.training.evaluate import Evaluation
from kronsearch.training.finetune import finetune, trainable
from kronsearch.training.schedule import TrainSettings, default_rate, total_steps
from kronsearch.training.streams import Purpose, stream

__all__ = ["Scorer"]

_PROXY_IMAGES = 16_000  # that a proxy fine-tune sees
_SETTLED_IMAGES = (2_500, 4_000)  # the fewest and the most that a network is measured on before a fine-tune
_SETTLED_WORK = 16 * 10**12  # MACs of the dense network for these, as far as the fewest allow
_KEPT = 2**30  # bytes of factors that are kept between trials


class Scorer:
    """A dense network, its data, and what is kept between trials.

    `validate` evaluates on the validation split, `tuning` is how many seconds its fine-tunes took, evaluated after.

    Args:
        dense: the network, on `device`; it is the teacher, and is never changed.
        data: of which the training and the validation split are read.
        metrics: of each replaceable layer.
        settings: of the decomposition.
        device: to run on.
        macs: of one example in the dense network, 0 where it is small.
    """

    def __init__(
        self,
        dense: nn.Module,
        data: Data,
        metrics: Mapping[str, Metric],
        settings: Decomposition,
        device: torch.device | str,
        *,
        macs: int = 0,
    ) -> None:
        self._settled_images = affordable(macs, _SETTLED_WORK, *_SETTLED_IMAGES)
        self.dense, self.data, self.metrics, self.settings, self.device = dense, data, metrics, settings, device
        self.validate = Validation(dense, data, device)
        self.tuning = 0.0
        self._settled: Validation | None = None
        self._factorised: dict[tuple[str, SeKronSpec], SeKronLayer] = {}

    def build(self, specs: Mapping[str, SeKronSpec]) -> nn.Module:
        """Return the network with these layers replaced, each decomposed by itself, and its batch norms re-estimated.

        What is handed over is made by `decomposed`, which fits them one after the other: several times as long.
        """
        layers = {name: copy.deepcopy(self.layer(name, spec)) for name, spec in specs.items()}
        small = replace_layers(self.dense, layers)
        settle(small, self.data, images=self.settings.batchnorm_images, seed=self.settings.seed, device=self.device)
        return trainable(small)  # frozen or not in the dense network: a factorised one has to be trained

    def layer(self, name: str, spec: SeKronSpec) -> SeKronLayer:
        """Return the factorised layer of a dense one, which is kept and must not be changed."""
        key = (name, spec)
        if key not in self._factorised:
            if sum(p.nbytes for layer in self._factorised.values() for p in layer.parameters()) > _KEPT:
                self._factorised.clear()
            self._factorised[key] = factorise(self.dense.get_submodule(name), spec, self.metrics.get(name))
        return self._factorised[key]

    def settled(self, model: nn.Module) -> Evaluation:
        """Evaluate a network that was built and not trained, on training images.

        How two plans near the best one compare is told with a standard error of 1.2 % by 4,000 images, of 1.5 % by
        2,500 and of 0.7 % by 10,000 (ResNet-20 at half its MACs and at a fifth of its parameters, the twelve best of
        twenty plans each, 30,000 images). The best by 4,000 diverges 0.2 to 0.4 % more than the best of all, and
        finalists are several. A network of more than 4 GMACs is run on fewer all the same, so that a trial takes a
        small part of a fine-tune's time.
        """
        if self._settled is None:
            self._settled = Validation(self.dense, self.data, self.device, split="train", limit=self._settled_images)
        return self._settled(model)

    def proxy(self, model: nn.Module, seed: int) -> Evaluation:
        """Fine-tune a little, in place, and evaluate on the validation split.

        Every call with one seed sees the same images in the same order. If the loss is no longer finite, neither is the
        evaluation.
        """
        settings = TrainSettings(epochs=_PROXY_IMAGES / self.data.size("train"))
        settings = replace(settings, lr=default_rate(total_steps(settings, self.data.size("train"))))
        began = time.monotonic()
        report = finetune(
            model,
            self.data,
            settings,
            teacher=self.dense,
            blocks=block_names(name for name, module in model.named_modules() if isinstance(module, SeKronLayer)),
            generator=stream(seed, Purpose.PROXY),
            device=self.device,
        )
        finite = math.isfinite(report.loss)
        found = self.validate(model) if finite else Evaluation(math.nan, report.loss, math.nan, 0)
        self.tuning += time.monotonic() - began
        return found
