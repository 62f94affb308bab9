"""AdamW for factorised networks, and its state as tensors by name."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from kronsearch.sekron.coordinates import Rows, block_shape, row_coordinates
from kronsearch.sekron.layers import SeKronLayer
from kronsearch.sekron.tensors import as_matrices

__all__ = ["FactorAdamW"]

_FAR = 0.1  # of a factor's size; CIFAR's ResNets at their highest rates go 0.005 as a rule, and up to 0.02
_RENEWAL = 100  # steps until coordinates are taken anew; then twice as many, and so on, so that they never cost much


class _Moments(NamedTuple):
    """What AdamW keeps of a tensor, laid out as the tensor is: the fused step walks through all by their places."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @classmethod
    def of(cls, tensor: Tensor, *, fused: bool) -> Self:
        """Return them as before the first step."""
        count = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu")
        return cls(torch.zeros_like(tensor), torch.zeros_like(tensor), count)


class FactorAdamW:
    """AdamW (Loshchilov and Hutter, 2019) over a model's trainable parameters, of factors in coordinates of their own.

    In these coordinates a kernel moves as far as they do (`row_coordinates`), whatever its structure and ranks and
    however its factors are scaled: a rate means about what it does for dense kernels. They are those of the factors
    at the first step, and are taken anew after 100, 200, 400 steps and so on. Of a kernel that is small beside the rate
    they are shortened, so that no factor moves farther in a step than by a tenth of its size, or by the rate: how far a
    product of factors goes is told by its slope only while each of them goes a short way.

    Tensors of two or more dimensions decay. A kernel of S factors decays by the product of what its factors do, so each
    of them has an S-th of it: else the more factors a kernel has, the faster it would shrink.

    Args:
        model: with its parameters on the device.
        weight_decay: of tensors of two or more dimensions.
        highest_rate: that steps will be taken with.
        device: of the parameters.
    """

    def __init__(self, model: nn.Module, *, weight_decay: float, highest_rate: float, device: torch.device) -> None:
        self._highest_rate = highest_rate
        self._layers = [module for module in model.modules() if isinstance(module, SeKronLayer)]
        shares = {factor: len(layer.factors) for layer in self._layers for factor in layer.factors}
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._decays = {p: weight_decay / shares.get(p, 1) if p.dim() >= 2 or p in shares else 0.0 for p in self._names}
        self._extents = {
            factor: _extents(layer, k)
            for layer in self._layers
            for k, factor in enumerate(layer.factors)
            if factor.requires_grad
        }
        self._rows: dict[nn.Parameter, Rows] = {}
        # what AdamW moves: in the place of a factor how far its coordinates go in a step
        self._moved = {
            p: torch.zeros_like(p, memory_format=torch.contiguous_format) if p in shares else p for p in self._names
        }
        self._taken = 0
        self._groups: dict[float, list[nn.Parameter]] = defaultdict(list)  # by what AdamW itself shrinks them by
        for p, moved in self._moved.items():
            self._groups[0.0 if moved is not p else self._decays[p]].append(p)
        # Fused: one kernel instead of several per tensor, and factorised networks have many small tensors.
        self._fused = device.type in ("cpu", "cuda")
        self._moments = {p: _Moments.of(moved, fused=self._fused) for p, moved in self._moved.items()}
        # on the device, where a step that was recorded reads it
        self._rate = torch.zeros((), dtype=torch.float32, device=device) if device.type == "cuda" else 0.0

    def step(self, rate: float) -> None:
        """Take a step of this learning rate along the parameters' gradients, which are dropped."""
        self.prepare(rate)
        self.move()

    @torch.no_grad()
    def prepare(self, rate: float) -> None:
        """Do what the host does for a step of this learning rate; it is taken by `move`."""
        if self._taken == 0 or (self._taken % _RENEWAL == 0 and (self._taken // _RENEWAL).bit_count() == 1):
            self._renew()
        if isinstance(self._rate, Tensor):
            self._rate.fill_(rate)
        else:
            self._rate = rate
        self._taken += 1

    @torch.no_grad()
    def move(self) -> None:
        """Take the step that is prepared, by work on the device alone, and drop the gradients."""
        slopes = {
            p: self._mapped(p, p.grad).view_as(moved) if p in self._rows else p.grad
            for p, moved in self._moved.items()
            if p.grad is not None
        }
        for decay, group in self._groups.items():
            self._adamw([p for p in group if p in slopes], slopes, decay)
        factors = [p for p in self._rows if p in slopes]
        kept: dict[float, list[Tensor]] = defaultdict(list)
        for p in factors:
            kept[self._decays[p]].append(p)
        for decay, decaying in kept.items():
            torch._foreach_mul_(decaying, 1 - self._rate * decay)
        for p in factors:
            self._add(p, self._moved[p])
        if factors:
            torch._foreach_zero_([self._moved[p] for p in factors])
        for p in slopes:
            p.grad = None

    def _adamw(self, group: list[nn.Parameter], slopes: Mapping[nn.Parameter, Tensor], decay: float) -> None:
        """Take AdamW's step of what is moved in the place of these parameters.

        By torch's function: its class imports torch's compiler with the first parameter, which takes two seconds.
        """
        if not group:
            return
        moments = [self._moments[p] for p in group]
        adamw(
            [self._moved[p] for p in group],
            [slopes[p] for p in group],
            [each.exp_avg for each in moments],
            [each.exp_avg_sq for each in moments],
            [],
            [each.step for each in moments],
            fused=self._fused or None,
            capturable=isinstance(self._rate, Tensor),
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self._rate,
            weight_decay=decay,
            eps=1e-8,
            maximize=False,
        )

    def _mapped(self, factor: nn.Parameter, tensor: Tensor) -> Tensor:
        """Return what a tensor like a factor, or of its coordinates, is mapped to, as a matrix."""
        extents = self._extents[factor]
        return self._rows[factor].on(tensor.reshape(math.prod(extents), -1), extents)

    def _add(self, factor: nn.Parameter, step: Tensor) -> None:
        """Add to a factor where a step of its coordinates takes it, in place."""
        left, right = self._rows[factor]
        if right is None and len(left) == 1 and factor.is_contiguous():  # as nearly all are, in one operation
            factor.view(len(left[0]), -1).addmm_(left[0], step.view(len(left[0]), -1))
        else:
            factor.add_(self._mapped(factor, step).view_as(factor))

    def _renew(self) -> None:
        """Take the coordinates at the factors as they are, in the place of older ones: a recorded step reads there."""
        for layer in self._layers:
            factors = list(layer.factors)
            matrices = as_matrices([f.to(torch.promote_types(f.dtype, torch.float32)) for f in factors], layer.spec)
            for factor, matrix, rows in zip(factors, matrices, row_coordinates(matrices, layer.spec), strict=True):
                if factor in self._moved:
                    fresh = self._shortened(rows, matrix).to(factor.dtype)
                    for old, new in zip(self._rows.setdefault(factor, fresh), fresh, strict=True):
                        if old is not None and new is not None:
                            old.copy_(new)

    def _shortened(self, rows: Rows, matrix: Tensor) -> Rows:
        """Return coordinates in which a step of AdamW, of about the rate in each, moves a factor matrix a short way."""
        rate, (_, columns) = self._highest_rate, matrix.shape
        reach = rate * rows.size * math.sqrt(columns)
        far = max(_FAR * float(torch.linalg.vector_norm(matrix)), rate * math.sqrt(matrix.numel()))
        return Rows(rows.left * (far / reach), rows.right) if reach > far else rows

    def state(self) -> dict[str, Tensor]:
        """Return what the steps to come depend on besides the parameters, by names: `PARAMETER/exp_avg` and such."""
        found = {"/taken": torch.tensor(self._taken)}
        for p, moments in self._moments.items():
            kinds = {**moments._asdict(), **(self._rows[p]._asdict() if p in self._rows else {})}
            found |= {f"{self._names[p]}/{kind}": part for kind, part in kinds.items() if part is not None}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state`. Raises KeyError or ValueError where the tensors are not of this model."""
        parameters = {name: p for p, name in self._names.items()}
        taken, rows = int(state["/taken"]), {}
        for p, extents in self._extents.items() if taken else ():
            parts = zip(Rows._fields, extents, strict=False)
            rows[p] = Rows(*(_of_shape(state, f"{self._names[p]}/{side}", block_shape(n), p) for side, n in parts))
        moments = {p: _Moments.of(moved, fused=self._fused) for p, moved in self._moved.items()}
        for key in state.keys() - {"/taken"}:
            name, _, kind = key.rpartition("/")
            if kind in Rows._fields:
                continue
            if kind not in _Moments._fields:
                raise ValueError(f"{key} is no state of a parameter")
            into: Tensor = getattr(moments[parameters[name]], kind)
            into.copy_(_of_shape(state, key, into.shape, into))
        self._moments, self._rows, self._taken = moments, rows, taken


def _extents(layer: SeKronLayer, k: int) -> tuple[int, ...]:
    """Return how many rows a factor has, or of a chain's core the two ranks that they are made of."""
    edges = (1, *layer.spec.ranks, 1)
    return edges[k : k + 2] if layer.spec.coupling == "chain" else (math.prod(layer.spec.rank_shape(k)),)


def _of_shape(state: Mapping[str, Tensor], key: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if state[key].shape != torch.Size(shape):
        raise ValueError(f"{key} has the shape {tuple(state[key].shape)}, not {tuple(shape)}")
    return state[key].to(like)
