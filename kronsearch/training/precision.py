"""The forward pass as this package runs it: in the precision and memory layout that the hardware is fastest in."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kronsearch.errors import ModelError, TrainingError, first_line
from kronsearch.sekron.convolution import ONEDNN_BLOCK

__all__ = [
    "KERNELS",
    "Precision",
    "compiling",
    "eval_mode",
    "forward",
    "forward_watched",
    "precision_for",
    "require_compiler",
    "require_device",
    "shield_gradients",
]

Precision = Literal["bf16", "float32"]
KERNELS: Mapping[Precision, torch.dtype | None] = {"bf16": torch.bfloat16, "float32": None}  # for `kernels_formed`


def precision_for(device: str | torch.device) -> Precision:
    """Return "bf16" (autocast; weights stay float32) where the device computes in it natively, else "float32"."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if kind == "cpu":
        # torch before 2.10 has no public way to ask.
        capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"
    return "float32"


def forward(model: nn.Module, inputs: Tensor, precision: Precision) -> Tensor:
    """Run the model on a batch and return its outputs as float32 (float64 stays so).

    Images (four dimensions) are handed over in the channels_last layout. Raises ModelError if the model can't run on
    them, or returns anything but one tensor.
    """
    return _one_tensor(_run(model, inputs, precision, model), model)


def forward_watched(
    watched: nn.Module, inputs: Tensor, precision: Precision, model: nn.Module
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a watched network, compiled or not, and return what `forward` does, and the outputs of its blocks.

    Raises ModelError as `forward` does, and TrainingError where it can't be compiled; the model is what they name.
    """
    outputs, blocks = _run(watched, inputs, precision, model)
    return _one_tensor(outputs, model), blocks


def _run(network: nn.Module, inputs: Tensor, precision: Precision, named: nn.Module) -> Any:
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    try:
        with compiling(), torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return network(inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = first_line(error)
        raise ModelError(
            f"{type(named).__name__} can't run on inputs of shape {tuple(inputs.shape)} ({reason}): {_advice(named)}"
        ) from error


def shield_gradients(model: nn.Module, precision: Precision, device: torch.device) -> list[RemovableHandle]:
    """Hand contiguous images to those convolutions that `forward`'s layout would give wrong gradients; by these hooks.

    Those of a float32 kernel of one pixel, strided, of fewer in channels than oneDNN takes at once: of large images
    with channels last its gradient writes where it mustn't (oneDNN's issue 6035). Factorised layers do without it.
    """
    if precision != "float32" or device.type != "cpu":
        return []

    def contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(image.contiguous() for image in inputs)

    return [
        module.register_forward_pre_hook(contiguous)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < ONEDNN_BLOCK
    ]


def _one_tensor(outputs: object, model: nn.Module) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"{type(model).__name__} returned a {type(outputs).__name__}, one tensor is needed: switch auxiliary "
            "outputs off where the model is made, or wrap it"
        )
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


@contextmanager
def compiling() -> Iterator[None]:
    """Raise TrainingError in the place of what `torch.compile` raises, whose errors have no public class."""
    try:
        yield
    except RuntimeError as error:
        if any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__):
            raise _no_compiling(error) from error
        raise


def require_device(device: str | torch.device) -> None:
    """Raise ModelError if there is no such device, of which nothing is taken by asking."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"there is no device {device!r}: pass cpu, or cuda where there is one") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"there is no CUDA device {str(found)!r} that this torch can use: pass another, or cpu")


def require_compiler(device: str | torch.device) -> None:
    """Raise TrainingError if `torch.compile` does not work on a device, for the want of a compiler for instance."""
    try:
        probe = torch.ones(2, device=device, requires_grad=True)
        torch.autograd.grad(torch.compile(torch.nn.functional.gelu)(probe).sum(), probe)
    except Exception as error:  # whatever it raises
        raise _no_compiling(error) from error


def _no_compiling(error: Exception) -> TrainingError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = 2 if lines and lines[0].endswith("raised:") else 1  # by a backend, and what that was stands below
    reason = " ".join(lines[:told])
    return TrainingError(f"torch.compile does not work here ({reason}): install what it needs, or train without it")


def _advice(model: nn.Module) -> str:
    others = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if others:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        return f"it has {names} parameters, and float32 inputs; pass it as float32 (`.float()`)"
    return "pass the data that it was made for"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and every one of its modules back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
