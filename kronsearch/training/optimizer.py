"""AdamW for factorised networks, and its state as tensors by name."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from kronsearch.sekron.coordinates import THIN, Rows, block_shape, row_coordinates
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


class _Alone:
    """A factor whose steps are taken by itself: a chain's core, or one of many rows.

    Args:
        factor: to move.
        extents: its number of rows, or of a chain's core its two ranks.
        decay: of the factor.
    """

    def __init__(self, factor: nn.Parameter, extents: Sequence[int], decay: float) -> None:
        self.factors, self._extents, self.decay = [factor], extents, decay
        self.moved = torch.zeros_like(factor, memory_format=torch.contiguous_format)
        self._map = Rows(*(factor.detach().new_zeros(block_shape(n)) for n in extents))

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Return the one part of a tensor like `moved`, which is all of it."""
        return [whole]

    def maps(self) -> list[Rows]:
        """Return where the map of the factor lies."""
        return [self._map]

    def slope(self) -> Tensor | None:
        """Return the gradient by the coordinates, None if there is none; it lies as `moved` does."""
        gradient = self.factors[0].grad
        return None if gradient is None else self._mapped(gradient).view_as(self.moved).contiguous()

    def add(self, kept: float | Tensor) -> None:
        """Add to what is kept of the factor where the step of its coordinates takes it, in place."""
        [factor] = self.factors
        factor.mul_(kept).add_(self._mapped(self.moved).view_as(factor))
        self.moved.zero_()

    def _mapped(self, tensor: Tensor) -> Tensor:
        return self._map.on(tensor.reshape(math.prod(self._extents), -1), self._extents)


class _Bundle:
    """Factors of as many columns, of few rows, whose steps are taken together.

    Each has its part of tensors of them all, which are filled up with rows of zeros: two products take the place of two
    for each of them, and AdamW moves one tensor. They share a count of steps: one that only some take counts for all.
    Of few columns all parts lie transposed.

    Args:
        factors: of one dtype and device.
        rows: of each of them as a matrix.
        decay: of all of them.
    """

    def __init__(self, factors: Sequence[nn.Parameter], rows: Sequence[int], decay: float) -> None:
        self.factors, self._rows, self.decay = list(factors), list(rows), decay
        count, most, columns = len(factors), max(rows), factors[0].numel() // rows[0]
        like = factors[0].detach()
        self._thin = columns < THIN
        extents = (columns, most) if self._thin else (most, columns)
        self.moved, self._slopes, self._step = (like.new_zeros(count, *extents) for _ in range(3))
        self._left = like.new_zeros(count, most, most)
        self._slope_of, self._step_of = self.parts(self._slopes), self.parts(self._step)

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Return each factor's part of a tensor like `moved`, in the factor's shape."""
        each = whole.transpose(1, 2) if self._thin else whole
        return [own[:n].view(f.shape) for own, n, f in zip(each.unbind(), self._rows, self.factors, strict=True)]

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
        return torch.bmm(*self._mapped(self._slopes))

    def add(self, kept: float | Tensor) -> None:
        """Add to what is kept of the factors where the step of their coordinates takes them, in place."""
        torch.bmm(*self._mapped(self.moved), out=self._step)
        factors: list[Tensor] = [*self.factors]
        torch._foreach_mul_(factors, kept)
        torch._foreach_add_(factors, self._step_of)
        self.moved.zero_()

    def _mapped(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to multiply to take a tensor like `moved` through the maps, which are symmetric."""
        return (whole, self._left) if self._thin else (self._left, whole)


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
        self._movers = _movers(self._extents, self._decays)
        self._maps = {p: rows for mover in self._movers for p, rows in zip(mover.factors, mover.maps(), strict=True)}
        self._taken = 0
        # Fused: one kernel instead of several per tensor, and factorised networks have many small tensors.
        self._fused = device.type in ("cpu", "cuda")
        # of what AdamW moves: in the place of factors how far their coordinates go in a step
        self._moments: dict[Tensor, _Moments] = {
            tensor: _Moments.of(tensor, fused=self._fused)
            for tensor in (*(p for p in self._names if p not in self._maps), *(mover.moved for mover in self._movers))
        }
        self._kept = {p: self._moments[p] for p in self._names if p not in self._maps}
        for mover in self._movers:
            average, square, step = self._moments[mover.moved]
            for p, own, its in zip(mover.factors, mover.parts(average), mover.parts(square), strict=True):
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
            if p.grad is not None and p not in self._maps:
                slopes[self._decays[p]][p] = p.grad
        moving = [(mover, slope) for mover in self._movers if (slope := mover.slope()) is not None]
        # what has no gradient stays where it is, though it lies beside what has one
        still = [
            part for mover, _ in moving for p in mover.factors if p.grad is None for part in (p, *self._kept[p][:2])
        ]
        before = [part.clone() for part in still]
        for mover, slope in moving:
            slopes[0.0][mover.moved] = slope
        for decay, tensors in slopes.items():
            self._adamw(tensors, decay)
        for mover, _ in moving:
            mover.add(1 - self._rate * mover.decay)
        if still:
            torch._foreach_copy_(still, before)
        for p in self._names:
            p.grad = None

    def _adamw(self, slopes: Mapping[Tensor, Tensor], decay: float) -> None:
        """Take AdamW's step of tensors along their slopes.

        By torch's function: its class imports torch's compiler with the first parameter, which takes seconds.
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
        for into, part in zip(self._maps[factor], rows, strict=True):
            if into is not None and part is not None:
                into.copy_(part)

    def _shortened(self, rows: Rows, matrix: Tensor) -> Rows:
        """Return coordinates in which a step of AdamW, of about the rate in each, moves a factor matrix a short way."""
        rate, (_, columns) = self._highest_rate, matrix.shape
        reach = rate * rows.size * math.sqrt(columns)
        far = max(_FAR * float(torch.linalg.vector_norm(matrix)), rate * math.sqrt(matrix.numel()))
        return Rows(rows.left * (far / reach), rows.right) if reach > far else rows

    def state(self) -> dict[str, Tensor]:
        """Return what the steps to come depend on besides the parameters, by names: `PARAMETER/exp_avg` and such.

        The tensors are its own, and at every step alike but for their entries.
        """
        found = {"/taken": torch.tensor(self._taken)}
        for p, name in self._names.items():
            kinds = {**self._kept[p]._asdict(), **(self._maps[p]._asdict() if p in self._maps else {})}
            found |= {f"{name}/{kind}": part for kind, part in kinds.items() if part is not None}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state`, which is of an optimizer that was made alike."""
        self._taken = int(state["/taken"])
        for name, into in self.state().items():
            into.copy_(state[name])


def _extents(layer: SeKronLayer, k: int) -> tuple[int, ...]:
    """Return how many rows a factor has, or of a chain's core the two ranks that they are made of."""
    edges = (1, *layer.spec.ranks, 1)
    return edges[k : k + 2] if layer.spec.coupling == "chain" else (math.prod(layer.spec.rank_shape(k)),)


def _movers(
    extents: Mapping[nn.Parameter, Sequence[int]], decays: Mapping[nn.Parameter, float]
) -> list[_Bundle | _Alone]:
    """Return what takes the steps of all factors; those of like sizes are taken together."""
    alone, together = [], defaultdict(list)
    for p, own in extents.items():
        if len(own) > 1 or block_shape(own[0])[0] > 1:
            alone.append(_Alone(p, own, decays[p]))
            continue
        size = ((own[0] - 1).bit_length() + 1) // 2  # so that rows are filled up to no more than four times theirs
        together[size, p.numel() // own[0], decays[p], p.dtype].append(p)
    bundles = [_Bundle(each, [extents[p][0] for p in each], decays[each[0]]) for each in together.values()]
    return [*alone, *bundles]
