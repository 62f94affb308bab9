"""Files that are whole or not there: written beside their place, then renamed. And what becomes of stdout."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from kronsearch.errors import FileError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Results", "alone", "make_folder", "read_text", "replacing", "write_text"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside the target to write to; at the end flush it to disk and rename it to the target.

    Of a link the target is what it leads to. Devices and pipes are refused: renamed over, they would be gone.
    On an error the temporary file is removed and the target is as it was.

    Raises:
        FileError: the file can't be written.
    """
    target = Path(os.path.realpath(path))
    # not by the number of the process: in containers that share a folder all have the same
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("it is a device or a pipe")
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise FileError(f"can't write {path} ({error.strerror or error}): pass another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def alone(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Hold a lock that one process on a machine has at a time; it falls free when that ends, however it does.

    Args:
        path: of the lock's file, which stays.
        waits: is called if another process holds it.

    Raises:
        FileError: the file can't be made.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waits()
        lock.acquire()
    except OSError as error:
        raise FileError(f"can't write {path} ({error.strerror or error}): pass another --out") from error
    try:
        yield
    finally:
        lock.release()


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there: what can't be written later is known before.

    Raises:
        FileError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"can't make the folder {folder} ({error.strerror}): pass another --out") from error


def read_text(path: Path, largest: int) -> str | None:
    """Return the content of a text file in UTF-8, None where it has more bytes than that, as devices without an end do.

    Raises:
        OSError, UnicodeDecodeError: it can't be read, or is no such text.
    """
    with path.open("rb") as file:
        content = file.read(largest + 1)
    return None if len(content) > largest else content.decode("utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class Results(FileIO):
    """What stdout writes to: once that fails, all of it goes nowhere, and nothing fails again as the process ends."""

    def write(self, content: "ReadableBuffer", /) -> int:
        """Write.

        Raises:
            FileError: it can't be written, for another reason than that nobody reads it.
        """
        try:
            return super().write(content)
        except BrokenPipeError:
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise FileError(f"can't write the results to stdout ({error.strerror}): pass another place") from error
