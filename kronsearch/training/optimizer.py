"""AdamW for factorised networks, and its state as tensors by name."""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kronsearch.sekron.coordinates import Rows, block_shape, row_coordinates
from kronsearch.sekron.layers import SeKronLayer
from kronsearch.sekron.tensors import as_matrices

__all__ = ["FactorAdamW"]

_FAR = 0.1  # of a factor's size; CIFAR's ResNets at their highest rates go 0.005 as a rule, and up to 0.02
_RENEWAL = 100  # steps until coordinates are taken anew; then twice as many, and so on, so that they never cost much


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
            p: torch.zeros_like(p, memory_format=torch.contiguous_format).requires_grad_() if p in shares else p
            for p in self._names
        }
        self._taken = 0
        groups: dict[float, list[Tensor]] = defaultdict(list)
        for p, moved in self._moved.items():
            groups[0.0 if moved is not p else self._decays[p]].append(moved)
        # on the device, where a step that was recorded reads it
        self._rate = torch.zeros((), dtype=torch.float32, device=device) if device.type == "cuda" else 0.0
        # Fused: one kernel instead of several per tensor, and factorised networks have many small tensors.
        self._adam = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
            lr=self._rate,
            fused=device.type in ("cpu", "cuda"),
        )

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
        """Take the step that is prepared, by work on the device alone, and drop the gradients.

        Raises RuntimeError if it is recorded as a CUDA graph, and a parameter has its first gradient.
        """
        factors = [(p, self._moved[p]) for p in self._rows]
        for p, moved in factors:
            moved.grad = None if p.grad is None else self._mapped(p, p.grad).view_as(moved)
        recorded = isinstance(self._rate, Tensor) and torch.cuda.is_current_stream_capturing()
        if recorded and any(moved.grad is not None and moved not in self._adam.state for moved in self._moved.values()):
            raise RuntimeError("a parameter has its first gradient in a step that is recorded: its state would be lost")
        for group in self._adam.param_groups:
            group["lr"] = self._rate
            group["capturable"] = recorded  # else torch refuses; a fused step is the same
        self._adam.step()
        kept: dict[float, list[Tensor]] = defaultdict(list)
        for p, _ in factors:
            if p.grad is not None:
                kept[self._decays[p]].append(p)
        for decay, decaying in kept.items():
            torch._foreach_mul_(decaying, 1 - self._rate * decay)
        for p, moved in factors:
            if p.grad is not None:
                self._add(p, moved)
        if factors:
            torch._foreach_zero_([moved for _, moved in factors])
        for p, moved in self._moved.items():
            p.grad = moved.grad = None

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
        for p, moved in self._moved.items():
            kinds = {**self._adam.state.get(moved, {}), **(self._rows[p]._asdict() if p in self._rows else {})}
            found |= {f"{self._names[p]}/{kind}": part for kind, part in kinds.items() if part is not None}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state`. Raises KeyError or ValueError where the tensors are not of this model."""
        moved = {name: self._moved[p] for p, name in self._names.items()}
        taken, rows = int(state["/taken"]), {}
        for p, extents in self._extents.items() if taken else ():
            parts = zip(Rows._fields, extents, strict=False)
            rows[p] = Rows(*(_of_shape(state, f"{self._names[p]}/{side}", block_shape(n), p) for side, n in parts))
        self._adam.state.clear()
        for key in state.keys() - {"/taken"}:
            name, _, kind = key.rpartition("/")
            if kind in Rows._fields:
                continue
            if kind not in ("exp_avg", "exp_avg_sq", "step"):
                raise ValueError(f"{key} is no state of a parameter")
            own = moved[name]
            # laid out as the parameter is: the fused step walks through both by their places in memory
            into = torch.empty_like(own) if kind != "step" else torch.empty((), device=own.device)
            self._adam.state[own][kind] = into.detach().copy_(_of_shape(state, key, into.shape, into))
        self._rows, self._taken = rows, taken


def _extents(layer: SeKronLayer, k: int) -> tuple[int, ...]:
    """Return how many rows a factor has, or of a chain's core the two ranks that they are made of."""
    edges = (1, *layer.spec.ranks, 1)
    return edges[k : k + 2] if layer.spec.coupling == "chain" else (math.prod(layer.spec.rank_shape(k)),)


def _of_shape(state: Mapping[str, Tensor], key: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if state[key].shape != torch.Size(shape):
        raise ValueError(f"{key} has the shape {tuple(state[key].shape)}, not {tuple(shape)}")
    return state[key].to(like)
