"""Folders of images, one folder a class, prepared as ImageNet's are."""

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kronsearch.errors import DataError, first_line
from kronsearch.training.data import Batch, Data, Normalisation, Split, epoch_order, fixed_subset, to_device
from kronsearch.training.split import stratified_split
from kronsearch.training.task import Classification

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageFolderData"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SIDE = 224
_SHORT_SIDE = 256
_LONGEST = 16  # times the short side of an image that is resized as a whole
_FINGERPRINT_FILES = 64
# Of the extensions that are read, and GIF, which others' files often are. Pillow goes by the content, and for
# PostScript starts another program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_TRIES = 10
_MIN_AREA = 0.08
_MAX_RATIO = 4 / 3

# Path, label, and random numbers in [0, 1): area, ratio, x, y of each try, then the flip; None outside training.
_Job = tuple[str, int, list[list[float]] | None]


class ImageFolderData(Data):
    """Images under DIR/train and DIR/val and/or DIR/test, 3×224×224, normalised with ImageNet's mean and deviation.

    In training a random box of 8 to 100 % of the area and of ratio 3/4 to 4/3 is resized and every other image
    mirrored; otherwise the short side becomes 256 and the middle 224×224 is taken. Each batch is decoded by as many
    threads as torch has, while the batch before is used. `val_is_cut` tells whether the validation split is a part of
    DIR/train. Raises DataError if folders are missing or their classes differ.
    """

    def __init__(self, folder: Path, *, spec: str, seed: int, val_fraction: float) -> None:
        self.spec = spec
        self.seed = seed
        self.input_shape = (3, _SIDE, _SIDE)
        self._folder = folder
        present = [name for name in ("val", "test") if (folder / name).is_dir()]
        if not (folder / "train").is_dir() or not present:
            raise DataError(
                f"no image folders in {folder}: {folder}/train and {folder}/val or {folder}/test are needed"
            )
        classes, train = _list_images(folder / "train")
        held: dict[str, list[tuple[str, int]]] = {}
        for name in present:
            held_classes, held[name] = _list_images(folder / name)
            if held_classes != classes:
                differing = sorted(set(classes) ^ set(held_classes))
                raise DataError(
                    f"{folder}/train and {folder}/{name} must have the same class folders, but only one of them has "
                    f"{', '.join(differing[:3])}{' …' if len(differing) > 3 else ''}"
                )
        self.task = Classification(len(classes))
        self._classes = classes
        self.val_is_cut = len(present) == 1
        if not self.val_is_cut:
            self._samples: dict[Split, list[tuple[str, int]]] = {
                "train": train,
                "val": held["val"],
                "test": held["test"],
            }
        else:
            kept, cut = stratified_split(torch.tensor([label for _, label in train]), val_fraction, seed)
            self._samples = {
                "train": [train[i] for i in kept.tolist()],
                "val": [train[i] for i in cut.tolist()],
                "test": held[present[0]],
            }
        if not self._samples["val"]:
            raise DataError(f"{folder}/train has one image a class: none is left for validation, add {folder}/val")
        self._normalise = Normalisation(IMAGENET_MEAN, IMAGENET_STD)

    def size(self, split: Split) -> int:
        """Return the number of images of a split."""
        return len(self._samples[split])

    @property
    def fingerprint(self) -> str:
        """Hash of the classes, of every file's place below the folder, and of an even sample of the files."""
        digest = hashlib.sha256(repr(self._classes).encode())
        for split in sorted(self._samples):
            samples = self._samples[split]
            digest.update(repr((split, len(samples))).encode())
            for path, label in samples:
                name = os.fsencode(Path(path).relative_to(self._folder).as_posix())  # which needn't be UTF-8
                digest.update(f"{label}/".encode() + name + b"\n")
            for path, _ in samples[:: max(1, math.ceil(len(samples) / _FINGERPRINT_FILES))]:
                try:
                    digest.update(Path(path).read_bytes())
                except OSError as error:
                    raise DataError(f"{path} can't be read ({error.strerror}): mend or remove it") from error
        return digest.hexdigest()

    def train_batches(
        self, batch_size: int, *, generator: torch.Generator, device: str | torch.device = "cpu"
    ) -> Iterator[Batch]:
        """Yield one epoch of random boxes and flips, see `Data.train_batches`."""
        samples = self._samples["train"]

        def jobs() -> Iterator[list[_Job]]:
            for chosen in epoch_order(len(samples), batch_size, generator):
                # Drawn here, in order: what the threads do must not depend on which of them is first.
                draws = torch.rand(len(chosen), _TRIES + 1, 4, generator=generator).tolist()
                yield [(*samples[i], draw) for i, draw in zip(chosen.tolist(), draws, strict=True)]

        return self._load(jobs(), device)

    def batches(
        self, split: Split, batch_size: int, *, limit: int | None = None, device: str | torch.device = "cpu"
    ) -> Iterator[Batch]:
        """Yield a split in its order, see `Data.batches`."""
        samples = self._samples[split]
        chunks = torch.split(fixed_subset(len(samples), limit, self.seed), batch_size)
        return self._load(([(*samples[i], None) for i in chunk.tolist()] for chunk in chunks), device)

    def _load(self, jobs: Iterator[list[_Job]], device: str | torch.device) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(torch.get_num_threads())
        ahead: deque[tuple[list[Future[Tensor]], list[int]]] = deque()

        def finished() -> Batch:
            futures, labels = ahead.popleft()
            images = torch.stack([future.result() for future in futures]).permute(0, 3, 1, 2)
            return self._normalise(to_device(images, device)), to_device(torch.tensor(labels), device)

        try:
            for batch in jobs:
                ahead.append(([pool.submit(_read, path, draw) for path, _, draw in batch], [job[1] for job in batch]))
                if len(ahead) > 1:
                    yield finished()
            while ahead:
                yield finished()
        finally:
            pool.shutdown(cancel_futures=True)


def _list_images(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise DataError("image folders need torchvision: pip install 'kronsearch[vision]'") from error
    try:
        dataset = ImageFolder(str(folder))
    except OSError as error:
        raise DataError(f"{folder} needs one folder a class with an image in each: {error}") from error
    return dataset.classes, dataset.samples


def _read(path: str, draw: list[list[float]] | None) -> Tensor:
    """Return one image as uint8 (224, 224, 3): the box and flip that `draw` gives, or the middle."""
    from PIL import Image

    image = _decode(path)
    if draw is None:
        image = _middle(image)
    else:
        image = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box=_random_box(*image.size, draw[:_TRIES]))
        if draw[_TRIES][0] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image))


def _decode(path: str) -> "Image":
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode.startswith("I;16"):  # convert() would make white of all above 255
                return Image.fromarray((np.array(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no known range, 8 or 16 bits have")
            return image.convert("RGB")
    except Exception as error:  # of a damaged file decoders raise anything
        reason = first_line(error) or type(error).__name__
        raise DataError(f"{path} can't be read as an image: {reason}; repair or remove it") from error


def _middle(image: "Image") -> "Image":
    from PIL import Image

    length = _LONGEST * min(image.size)
    if max(image.size) > length:  # of which torchvision's transforms would make gigabytes to cut the middle out of
        left, top = (max(0, (side - length) // 2) for side in image.size)
        image = image.crop((left, top, min(left + length, image.width), min(top + length, image.height)))
    scale = _SHORT_SIDE / min(image.size)
    width, height = (max(_SHORT_SIDE, int(side * scale)) for side in image.size)
    left, top = round((width - _SIDE) / 2), round((height - _SIDE) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + _SIDE, top + _SIDE))


def _random_box(width: int, height: int, tries: list[list[float]]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom: the first of the tries (area, ratio, x, y in [0, 1)) that lies in the image."""
    for area, ratio, x, y in tries:
        pixels = width * height * (_MIN_AREA + (1 - _MIN_AREA) * area)
        aspect = math.exp((2 * ratio - 1) * math.log(_MAX_RATIO))
        box_width, box_height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(x * (width - box_width + 1)), int(y * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width, box_height = min(width, round(height * _MAX_RATIO)), min(height, round(width * _MAX_RATIO))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height
