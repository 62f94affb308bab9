"""Training batches that can be gone on with, exactly, from where they were left."""

from collections.abc import Iterator

import torch

from kronsearch.training.data import Batch, Data, no_training_batch

__all__ = ["Batches"]


class Batches:
    """The training batches of one epoch after the other, each with a seed for what else is random in its step.

    All is drawn from one generator, which nothing else may draw from meanwhile.

    Args:
        data: whose training split.
        batch_size: examples in a batch.
        generator: on the CPU.
        device: where the batches shall be.
    """

    def __init__(
        self, data: Data, batch_size: int, *, generator: torch.Generator, device: str | torch.device = "cpu"
    ) -> None:
        self._data, self._batch_size, self._generator, self._device = data, batch_size, generator, device
        self._ahead: Batch | None = None
        self._begin()

    def _begin(self) -> None:
        """Begin an epoch."""
        self._start, self._taken = self._generator.get_state(), 0
        self._epoch: Iterator[Batch] = iter(
            self._data.train_batches(self._batch_size, generator=self._generator, device=self._device)
        )

    def take(self) -> tuple[Batch, int]:
        """Return the next batch and its seed; DataError if an epoch has none."""
        if not self._look_ahead():
            self._begin()
            if not self._look_ahead():
                raise no_training_batch(self._data, self._batch_size)
        assert self._ahead is not None
        batch, self._ahead = self._ahead, None
        self._taken += 1
        return batch, int(torch.randint(2**62, (), generator=self._generator))

    def _look_ahead(self) -> bool:
        """Have the next batch of this epoch at hand, or tell that there is none."""
        if self._ahead is None:
            self._ahead = next(self._epoch, None)
        return self._ahead is not None

    def place(self) -> tuple[torch.Tensor, int]:
        """Return where they stand: the generator's state when the epoch began, and how many batches were taken since.

        At the end of an epoch that is the beginning of the next one.
        """
        if self._taken and not self._look_ahead():
            self._begin()
        return self._start, self._taken

    def go_to(self, start: torch.Tensor, taken: int) -> None:
        """Go to a place: what was taken of its epoch is made again, whatever the data are, and passed over."""
        self.close()
        self._generator.set_state(start)
        self._begin()
        for _ in range(taken):
            self.take()

    def close(self) -> None:
        """Let go of the epoch, and of what reads ahead for it."""
        close = getattr(self._epoch, "close", None)  # a generator's
        if close is not None:
            close()
        self._ahead = None
