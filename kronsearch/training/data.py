"""Data as batches: one epoch augmented as at training time, or a split in a fixed order without augmentation."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kronsearch.errors import DataError, check_kind
from kronsearch.training.task import Task

__all__ = [
    "Batch",
    "Data",
    "Normalisation",
    "Split",
    "TensorData",
    "check_data",
    "check_splits",
    "endless_train_batches",
    "epoch_order",
    "fixed_subset",
    "no_training_batch",
    "to_device",
    "train_batch_count",
    "train_inputs",
]

Split = Literal["train", "val", "test"]
Batch = tuple[Tensor, Tensor]

_FINGERPRINT_IMAGES = 64


class Data(ABC):
    """A training, a validation and a test split, and what they are for.

    A subclass sets the attributes: `spec` as the user gave it, `seed` of the validation split, `task`, and
    `input_shape` of one example, without the batch. Inputs are float32, normalised as the network expects.
    """

    spec: str
    seed: int
    task: Task
    input_shape: tuple[int, ...]

    @abstractmethod
    def size(self, split: Split) -> int:
        """Return the number of examples of a split."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what the splits contain, wherever they lie: a study is not resumed on data with another one."""

    @abstractmethod
    def train_batches(
        self, batch_size: int, *, generator: torch.Generator, device: str | torch.device = "cpu"
    ) -> Iterator[Batch]:
        """Yield one epoch: shuffled and augmented by the generator, `train_batch_count` batches of `batch_size`.

        The last short batch is dropped, unless it is the only one.
        """

    @abstractmethod
    def batches(
        self, split: Split, batch_size: int, *, limit: int | None = None, device: str | torch.device = "cpu"
    ) -> Iterator[Batch]:
        """Yield the split in a fixed order, not augmented, the last batch as short as it is.

        `limit` takes at most that many examples: a fixed random subset, the same in each call.
        """


@dataclass(frozen=True)
class Normalisation:
    """Pixels of 0 to 255 to float32: (pixel / 255 - mean) / std, with one mean and deviation per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Return uint8 (N, C, H, W) normalised, on the same device, in the channels_last layout."""
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (self.mean, self.std))
        scale = to_device((1 / (255 * std)).to(torch.float32), images.device)
        shift = to_device((-mean / std).to(torch.float32), images.device)
        return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)


class TensorData(Data):
    """Images in memory: uint8 (N, C, H, W) and int64 labels (N,) per split.

    Pixels are scaled to [0, 1], then normalised by `mean` and `std` (one number per channel). In training, `pad`
    black pixels are put around an image *before* it is normalised, a window of the original size is cut out at
    random, and with `flip` every other image is mirrored.
    """

    def __init__(
        self,
        splits: Mapping[Split, Batch],
        *,
        spec: str,
        seed: int,
        task: Task,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pad: int,
        flip: bool,
    ) -> None:
        images = splits["train"][0]
        for split, (split_images, labels) in splits.items():
            types, shapes = (split_images.dtype, labels.dtype), (tuple(split_images.shape), tuple(labels.shape))
            if types != (torch.uint8, torch.int64) or len(shapes[0]) != 4 or shapes[1] != shapes[0][:1]:
                raise DataError(
                    f"the {split} split has images of {types[0]} and shape {shapes[0]} with labels of {types[1]} and "
                    f"shape {shapes[1]}: uint8 (N, C, H, W) and int64 (N,) are needed"
                )
            if len(labels) == 0 or split_images.shape[1:] != images.shape[1:]:
                raise DataError(
                    f"the {split} split has {len(labels)} images of shape {tuple(split_images.shape[1:])}: at least "
                    f"one is needed, of the training images' shape {tuple(images.shape[1:])}"
                )
        channels = images.shape[1]
        if not len(mean) == len(std) == channels or not all(map(math.isfinite, mean)) or not min(std) > 0:
            raise DataError(
                f"images of shape {tuple(images.shape[1:])} are to be normalised by a mean of {mean} and a deviation "
                f"of {std}: one number per channel is needed of each, deviations above 0"
            )
        self.spec = spec
        self.seed = seed
        self.task = task
        self.input_shape = tuple(images.shape[1:])
        self.pad = pad
        self.flip = flip
        self._splits = dict(splits)
        self._normalise = Normalisation(mean, std)

    def size(self, split: Split) -> int:
        """Return the number of images of a split."""
        return len(self._splits[split][1])

    @property
    def fingerprint(self) -> str:
        """Hash of all labels, an even sample of the images and the settings; the seed counts through the split."""
        digest = hashlib.sha256()
        digest.update(repr((self.pad, self.flip, self._normalise)).encode())
        for split in sorted(self._splits):
            images, labels = self._splits[split]
            sample = images[:: max(1, math.ceil(len(images) / _FINGERPRINT_IMAGES))]
            digest.update(repr((split, tuple(images.shape))).encode())
            digest.update(labels.contiguous().numpy().tobytes())
            digest.update(sample.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def train_batches(
        self, batch_size: int, *, generator: torch.Generator, device: str | torch.device = "cpu"
    ) -> Iterator[Batch]:
        """Yield one epoch of random crops and flips, see `Data.train_batches`."""
        images, labels = self._splits["train"]
        for chosen in epoch_order(len(labels), batch_size, generator):
            batch = to_device(images[chosen], device)
            yield self._normalise(self._augment(batch, generator)), to_device(labels[chosen], device)

    def batches(
        self, split: Split, batch_size: int, *, limit: int | None = None, device: str | torch.device = "cpu"
    ) -> Iterator[Batch]:
        """Yield a split in its order, see `Data.batches`."""
        images, labels = self._splits[split]
        for chosen in torch.split(fixed_subset(len(labels), limit, self.seed), batch_size):
            yield self._normalise(to_device(images[chosen], device)), to_device(labels[chosen], device)

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        if self.pad:
            corners = to_device(torch.randint(2 * self.pad + 1, (2, count), generator=generator), images.device)
            padded = F.pad(images, (self.pad,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (N, C, 2 pad + 1, 2 pad + 1, H, W)
            images = windows[torch.arange(count, device=images.device), :, corners[0], corners[1]]
        if self.flip:
            mirrored = to_device(torch.rand(count, generator=generator) < 0.5, images.device)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images


def train_batch_count(examples: int, batch_size: int) -> int:
    """Return the number of batches of one training epoch: full ones only, but at least one."""
    return max(1, examples // batch_size)


def endless_train_batches(
    data: Data, batch_size: int, *, generator: torch.Generator, device: str | torch.device = "cpu"
) -> Generator[Batch, None, None]:
    """Yield the training batches of one epoch after the other; DataError if an epoch has none."""
    while True:
        empty = True
        for batch in data.train_batches(batch_size, generator=generator, device=device):
            empty = False
            yield batch
        if empty:
            raise no_training_batch(data, batch_size)


def train_inputs(
    data: Data, batch_size: int, images: int, *, generator: torch.Generator, device: str | torch.device = "cpu"
) -> Iterator[Tensor]:
    """Yield the inputs of training batches until there were so many images, the rest of the last batch included."""
    seen = 0
    batches = endless_train_batches(data, batch_size, generator=generator, device=device)
    while seen < images:
        inputs, _ = next(batches)
        yield inputs
        seen += len(inputs)
    batches.close()


def check_data(data: object) -> None:
    """Raise DataError unless these are data."""
    told = "data are a kronsearch.training.data.Data, such as load_data returns or a TensorData of images and labels"
    check_kind(told, data, Data, DataError)


def check_splits(data: Data) -> None:
    """Raise DataError unless each split of the data has an example."""
    if empty := [split for split in get_args(Split) if data.size(split) < 1]:
        raise DataError(
            f"data {data.spec!r} have no example in the {empty[0]} split: one at least is needed to train, one to "
            "validate and one to test"
        )


def no_training_batch(data: Data, batch_size: int) -> DataError:
    """Return the error of data of which an epoch has no batch."""
    return DataError(f"data {data.spec!r} gave no training batch of {batch_size}: one at least is needed")


def epoch_order(examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of each batch of one shuffled epoch, without the last short batch unless it is the only one."""
    order = torch.randperm(examples, generator=generator)
    yield from torch.split(order, batch_size)[: train_batch_count(examples, batch_size)]


def fixed_subset(examples: int, limit: int | None, seed: int) -> Tensor:
    """Return ascending indices: all, or `limit` of them drawn by the seed, a smaller limit's among a larger one's."""
    if limit is None or limit >= examples:
        return torch.arange(examples)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    return order[:limit].sort().values


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Copy a CPU tensor to the device, without waiting for the copy where the device is CUDA."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
