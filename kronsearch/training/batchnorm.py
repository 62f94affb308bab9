"""Re-estimating batch-norm statistics after the layers before them have changed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kronsearch.sekron.convolution import kernels_formed
from kronsearch.training.data import Data, train_inputs
from kronsearch.training.memory import freed_memory_kept
from kronsearch.training.precision import KERNELS, eval_mode, forward, precision_for

__all__ = ["batch_statistics", "reestimate_batchnorm"]


def reestimate_batchnorm(
    model: nn.Module,
    data: Data,
    *,
    images: int = 2048,
    batch_size: int = 128,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
) -> None:
    """Replace the running statistics of all batch norms, in place, by averages over about `images` training images.

    The images are augmented as in training: that is what the weights behind were trained with, and on plain images even
    an untouched network loses accuracy. Each batch counts the same; everything but the batch norms (dropout) is in eval
    mode; modes and momenta are put back after. Batch norms that track no statistics are left alone; without others
    nothing is run. The model must be on `device`.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    norms = [module for module in model.modules() if isinstance(module, kinds) and module.track_running_stats]
    if not norms:
        return
    precision = precision_for(device)
    momenta = [norm.momentum for norm in norms]
    with freed_memory_kept(device), torch.no_grad(), eval_mode(model), kernels_formed(model, KERNELS[precision]):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's way to say: the plain average of all batches
                norm.train()
            for inputs in train_inputs(data, batch_size, images, generator=generator, device=device):
                forward(model, inputs, precision)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms take their statistics from the batch, all else in eval mode; running statistics move with it.

    For copies of a network, which nobody evaluates after: it comes to what their re-estimation would.
    """
    with eval_mode(model):
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        yield
