"""AdamW for factorised networks, and its state as tensors by name."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
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


class _Bundle:
    """Factors of as many columns, of few rows, whose steps are taken together.

    Each has its part of tensors of them all, which are filled up with rows of zeros: two products take the place of two
    for each of them, and AdamW moves one tensor.

    Args:
        factors: of one dtype and device.
        rows: of each of them as a matrix.
        decay: of all of them.
    """

    def __init__(self, factors: Sequence[nn.Parameter], rows: Sequence[int], decay: float) -> None:
        self.factors, self._rows, self.decay = list(factors), list(rows), decay
        count, most, columns = len(factors), max(rows), factors[0].numel() // rows[0]
        like = factors[0].detach()
        self.moved, self._slopes, self._step = (like.new_zeros(count, most, columns) for _ in range(3))
        self._left = like.new_zeros(count, most, most)
        self._slope_of, self._step_of = self.parts(self._slopes), self.parts(self._step)

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Return each factor's part of a tensor like `moved`, in the factor's shape."""
        return [own[:n].view(f.shape) for own, n, f in zip(whole.unbind(), self._rows, self.factors, strict=True)]

    def maps(self) -> list[Rows]:
        """Return where the map of each factor lies."""
        return [Rows(own[None, :n, :n]) for own, n in zip(self._left.unbind(), self._rows, strict=True)]

    def slope(self) -> Tensor | None:
        """Return the gradient by the coordinates, None if no factor has one; of those that have none it is zero."""
        told = [(part, f.grad) for part, f in zip(self._slope_of, self.factors, strict=True) if f.grad is not None]
        if not told:
            return None
        if len(told) < len(self.factors):
            self._slopes.zero_()
        torch._foreach_copy_([part for part, _ in told], [gradient for _, gradient in told])
        return torch.bmm(self._left, self._slopes)

    def add(self, kept: float | Tensor) -> None:
        """Add to what is kept of the factors where the step of their coordinates takes them, in place."""
        torch.bmm(self._left, self.moved, out=self._step)
        factors: list[Tensor] = [*self.factors]
        torch._foreach_mul_(factors, kept)
        torch._foreach_add_(factors, self._step_of)
        self.moved.zero_()


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
        together: dict[tuple[object, ...], list[nn.Parameter]] = defaultdict(list)
        for p, extents in self._extents.items():
            if len(extents) == 1 and block_shape(extents[0])[0] == 1:
                size = (
                    (extents[0] - 1).bit_length() + 1
                ) // 2  # so that few are filled up to more than four times theirs
                together[size, p.numel() // extents[0], self._decays[p], p.dtype].append(p)
        self._bundles = [
            _Bundle(members, [self._extents[p][0] for p in members], self._decays[members[0]])
            for members in together.values()
        ]
        self._places = {p: rows for x in self._bundles for p, rows in zip(x.factors, x.maps(), strict=True)}
        # of the other factors, too, AdamW moves in their place how far their coordinates go in a step
        self._alone = {
            p: torch.zeros_like(p, memory_format=torch.contiguous_format)
            for p in self._extents
            if p not in self._places
        }
        self._rows: dict[nn.Parameter, Rows] = {}
        self._taken = 0
        # Fused: one kernel instead of several per tensor, and factorised networks have many small tensors.
        self._fused = device.type in ("cpu", "cuda")
        moved = (
            [p for p in self._names if p not in self._extents],
            self._alone.values(),
            (x.moved for x in self._bundles),
        )
        self._moments = {tensor: _Moments.of(tensor, fused=self._fused) for tensor in chain(*moved)}
        self._kept = {p: self._moments[self._alone.get(p, p)] for p in self._names if p not in self._places}
        for bundle in self._bundles:
            average, square, step = self._moments[bundle.moved]
            for p, own, its in zip(bundle.factors, bundle.parts(average), bundle.parts(square), strict=True):
                self._kept[p] = _Moments(own, its, step)
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
        slopes: dict[float, dict[Tensor, Tensor]] = defaultdict(dict)  # by what AdamW itself shrinks tensors by
        for p in self._names:
            if p.grad is None or p in self._places:
                continue
            if (moved := self._alone.get(p)) is None:
                slopes[self._decays[p]][p] = p.grad
            else:
                slopes[0.0][moved] = self._mapped(p, p.grad).view_as(moved)
        for bundle in self._bundles:
            if (slope := bundle.slope()) is not None:
                slopes[0.0][bundle.moved] = slope
        for decay, tensors in slopes.items():
            self._adamw(tensors, decay)
        for bundle in self._bundles:
            if bundle.moved in slopes[0.0]:
                bundle.add(1 - self._rate * bundle.decay)
        for p, moved in self._alone.items():
            if p.grad is not None:
                p.mul_(1 - self._rate * self._decays[p]).add_(self._mapped(p, moved).view_as(p))
                moved.zero_()
        for p in self._names:
            p.grad = None

    def _adamw(self, slopes: Mapping[Tensor, Tensor], decay: float) -> None:
        """Take AdamW's step of tensors along their slopes.

        By torch's function: its class imports torch's compiler with the first parameter, which takes two seconds.
        """
        moments = [self._moments[tensor] for tensor in slopes]
        adamw(
            list(slopes),
            list(slopes.values()),
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

    def _renew(self) -> None:
        """Take the coordinates at the factors as they are, in the place of older ones: a recorded step reads there."""
        for layer in self._layers:
            factors = list(layer.factors)
            matrices = as_matrices([f.to(torch.promote_types(f.dtype, torch.float32)) for f in factors], layer.spec)
            for factor, matrix, rows in zip(factors, matrices, row_coordinates(matrices, layer.spec), strict=True):
                if factor in self._extents:
                    self._set(factor, self._shortened(rows, matrix).to(factor.dtype))

    def _set(self, factor: nn.Parameter, rows: Rows) -> None:
        """Keep the coordinates of a factor."""
        own = self._rows.setdefault(factor, self._places.get(factor, rows))
        for into, part in zip(own, rows, strict=True):
            if into is not None and part is not None:
                into.copy_(part)

    def _shortened(self, rows: Rows, matrix: Tensor) -> Rows:
        """Return coordinates in which a step of AdamW, of about the rate in each, moves a factor matrix a short way."""
        rate, (_, columns) = self._highest_rate, matrix.shape
        reach = rate * rows.size * math.sqrt(columns)
        far = max(_FAR * float(torch.linalg.vector_norm(matrix)), rate * math.sqrt(matrix.numel()))
        return Rows(rows.left * (far / reach), rows.right) if reach > far else rows

    def state(self) -> dict[str, Tensor]:
        """Return what the steps to come depend on besides the parameters, by names: `PARAMETER/exp_avg` and such."""
        found = {"/taken": torch.tensor(self._taken)}
        for p, name in self._names.items():
            kinds = {**self._kept[p]._asdict(), **(self._rows[p]._asdict() if p in self._rows else {})}
            found |= {f"{name}/{kind}": part for kind, part in kinds.items() if part is not None}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state`. Raises KeyError or ValueError where the tensors are not of this model."""
        parameters = {name: p for p, name in self._names.items()}
        self._taken, self._rows = int(state["/taken"]), {}
        for p, extents in self._extents.items() if self._taken else ():
            parts = zip(Rows._fields, extents, strict=False)
            self._set(p, Rows(*(_of_shape(state, f"{self._names[p]}/{side}", block_shape(n), p) for side, n in parts)))
        for moments in self._moments.values():
            torch._foreach_zero_(list(moments))
        for key in state.keys() - {"/taken"}:
            name, _, kind = key.rpartition("/")
            if kind in Rows._fields:
                continue
            if kind not in _Moments._fields:
                raise ValueError(f"{key} is no state of a parameter")
            into: Tensor = getattr(self._kept[parameters[name]], kind)
            into.copy_(_of_shape(state, key, into.shape, into))


def _extents(layer: SeKronLayer, k: int) -> tuple[int, ...]:
    """Return how many rows a factor has, or of a chain's core the two ranks that they are made of."""
    edges = (1, *layer.spec.ranks, 1)
    return edges[k : k + 2] if layer.spec.coupling == "chain" else (math.prod(layer.spec.rank_shape(k)),)


def _of_shape(state: Mapping[str, Tensor], key: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if state[key].shape != torch.Size(shape):
        raise ValueError(f"{key} has the shape {tuple(state[key].shape)}, not {tuple(shape)}")
    return state[key].to(like)
