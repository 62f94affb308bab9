"""Data specifications: `digits`, `cifar10:DIR`, `imagefolder:DIR` and `MODULE:CALLABLE`."""

import importlib
import stat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kronsearch.errors import DataError
from kronsearch.training.data import Batch, Data, TensorData
from kronsearch.training.imagefolder import IMAGENET_MEAN, IMAGENET_STD, ImageFolderData
from kronsearch.training.split import stratified_split
from kronsearch.training.task import Classification
from kronsearch.usercode import working_directory_importable

__all__ = ["load_data"]

_VAL_FRACTION = 0.1
_DIGITS_TEST_SEED = 0
_CIFAR_TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_CIFAR_TEST_FILES = ("test_batch.bin",)
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_RECORDS_PER_FILE = 10_000


def load_data(spec: str, *, seed: int = 0, val_fraction: float | None = None) -> Data:
    """Return the data that `spec` names. The validation split is cut from the training set by the seed, class by class.

    Of each class `val_fraction` is held out so, a tenth unless it is told. With the same seed smaller parts lie within
    larger ones.

    - `digits`: scikit-learn's 8×8 digits, 1×8×8 inputs; a fifth is the test split, the same for every seed.
    - `cifar10:DIR`: CIFAR-10, 3×32×32. The binary files in DIR or DIR/cifar-10-batches-bin, or else the python files in
      DIR/cifar-10-batches-py (through torchvision, which checks them before it unpickles).
    - `imagefolder:DIR`: DIR/train and DIR/val or DIR/test with one folder a class, 3×224×224, ImageNet's normalisation.
      With both, they are validation and test split; with one, it is the test split.
    - `MODULE:CALLABLE`: what CALLABLE(seed=seed) of an importable module returns (the working directory is searched
      first), a `Data` with splits of its own.

    Raises DataError if the specification is unknown, or the data are missing or malformed, or have a validation split
    of their own though a part is told.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise DataError(f"a validation fraction of {val_fraction} was asked for: it must be between 0 and 1")
    fraction = _VAL_FRACTION if val_fraction is None else val_fraction
    kind, colon, rest = spec.partition(":")
    if spec == "digits":
        return _digits(seed, fraction)
    if not (colon and kind and rest):
        raise DataError(f"unknown data {spec!r}: possible are digits, cifar10:DIR, imagefolder:DIR and MODULE:CALLABLE")
    if kind == "cifar10":
        return _cifar10(spec, Path(rest).expanduser(), seed, fraction)
    if kind == "imagefolder":
        images = ImageFolderData(Path(rest).expanduser(), spec=spec, seed=seed, val_fraction=fraction)
        data: Data = images
        is_cut = images.val_is_cut
    else:
        data, is_cut = _from_callable(spec, kind, rest, seed), False
    if val_fraction is not None and not is_cut:
        raise DataError(
            f"a validation fraction of {val_fraction} was asked for: data {spec!r} have a validation split of their "
            "own; leave it out"
        )
    return data


def _digits(seed: int, val_fraction: float) -> Data:
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    raw = load_digits()
    images = torch.from_numpy(np.rint(raw.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(raw.target.astype(np.int64))
    rest, test = stratified_split(labels, 0.2, _DIGITS_TEST_SEED)
    train, val = stratified_split(labels[rest], val_fraction, seed)
    return TensorData(
        {
            "train": (images[rest[train]], labels[rest[train]]),
            "val": (images[rest[val]], labels[rest[val]]),
            "test": (images[test], labels[test]),
        },
        spec="digits",
        seed=seed,
        task=Classification(10),
        mean=(0.305,),
        std=(0.376,),
        pad=1,
        flip=False,
    )


def _cifar10(spec: str, folder: Path, seed: int, val_fraction: float) -> Data:
    for binary in (folder / "cifar-10-batches-bin", folder):
        if (binary / _CIFAR_TEST_FILES[0]).exists():
            images, labels = _read_cifar_files(binary, _CIFAR_TRAIN_FILES)
            test = _read_cifar_files(binary, _CIFAR_TEST_FILES)
            break
    else:
        if not (folder / "cifar-10-batches-py").is_dir():
            raise DataError(
                f"no CIFAR-10 in {folder}: unpack cifar-10-binary.tar.gz (or cifar-10-python.tar.gz) there, and give "
                "the folder that holds cifar-10-batches-bin (or cifar-10-batches-py)"
            )
        images, labels = _read_cifar_pickles(folder, train=True)
        test = _read_cifar_pickles(folder, train=False)
    train, val = stratified_split(labels, val_fraction, seed)
    return TensorData(
        {"train": (images[train], labels[train]), "val": (images[val], labels[val]), "test": test},
        spec=spec,
        seed=seed,
        task=Classification(10),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        pad=4,
        flip=True,
    )


def _read_cifar_files(folder: Path, names: tuple[str, ...]) -> Batch:
    """Read files of records: one byte of label, then 3×32×32 bytes of pixels."""
    parts: list[Tensor] = []
    for name in names:
        path = folder / name
        try:
            status = path.stat()
            records, rest = divmod(status.st_size, _CIFAR_RECORD)
            if not stat.S_ISREG(status.st_mode) or rest or not 0 < records <= _CIFAR_RECORDS_PER_FILE:
                raise DataError(
                    f"{path} has {status.st_size} bytes: a CIFAR-10 binary file has {_CIFAR_RECORD} for each of 1 to "
                    f"{_CIFAR_RECORDS_PER_FILE} images; unpack it again"
                )
            content = np.fromfile(path, dtype=np.uint8, count=records * _CIFAR_RECORD)
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror}; all six CIFAR-10 files are needed") from error
        part = torch.from_numpy(content).view(-1, _CIFAR_RECORD)
        if part[:, 0].max() > 9:
            raise DataError(f"{path} has a label of {int(part[:, 0].max())}: CIFAR-10's are 0 to 9; unpack it again")
        parts.append(part)
    records_of_all = torch.cat(parts)
    return records_of_all[:, 1:].reshape(-1, 3, 32, 32), records_of_all[:, 0].long()


def _read_cifar_pickles(folder: Path, *, train: bool) -> Batch:
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise DataError(
            "CIFAR-10's python files need torchvision: pip install 'kronsearch[vision]', or unpack the binary version"
        ) from error
    try:
        dataset = CIFAR10(str(folder), train=train, download=False)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{folder / 'cifar-10-batches-py'} is incomplete or altered: unpack it again") from error
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


def _from_callable(spec: str, module_name: str, name: str, seed: int) -> Data:
    try:
        with working_directory_importable():
            factory = getattr(importlib.import_module(module_name), name, None)
            if not callable(factory):
                raise DataError(f"data {spec!r}: module {module_name!r} has no callable {name!r}")
            data = factory(seed=seed)
        if not isinstance(data, Data):
            raise DataError(
                f"data {spec!r}: {name}(seed={seed}) returned a {type(data).__name__}, not a kronsearch Data"
            )
        data.spec, data.seed = spec, seed
    except DataError:
        raise
    except ModuleNotFoundError as error:
        raise DataError(
            f"data {spec!r}: no module named {error.name!r} (neither installed nor in {Path.cwd()}); "
            "possible are digits, cifar10:DIR, imagefolder:DIR and MODULE:CALLABLE"
        ) from error
    except Exception as error:  # whatever the user's code raises
        raise DataError(
            f"data {spec!r}: its code failed with {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    missing = [attribute for attribute in ("task", "input_shape") if not hasattr(data, attribute)]
    if missing:
        raise DataError(f"data {spec!r}: {type(data).__name__} does not set {' and '.join(missing)}")
    return data
