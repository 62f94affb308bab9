"""A study's journal: a file of one line a record, in which a record that was cut off costs no other one."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from kronsearch.errors import first_line

__all__ = ["Journal"]

_BLOCK = 2**16  # bytes that are looked through at once for the end of a line


class Journal(JournalFileBackend):
    """Optuna's journal in a file, which is written to the end of its last whole line.

    What a full disk, or a machine that fell, has left behind that is a part of a record: Optuna's own would write the
    next one behind it on the same line, and no record from there on could be read again.

    Args:
        path: of the file, which is made where there is none.

    Raises:
        OSError: it can't be opened.
        ValueError: it is no file, or has no whole line though it isn't empty: it isn't a journal, or not ours to mend.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        self._lock: Any = JournalFileOpenLock(str(path))
        super().__init__(str(path), lock_obj=self._lock)
        self._path = path
        with self._alone() as file:
            if _end(file, size := _size(file)) == 0 < size:
                raise ValueError("it has no whole line")

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Yield the records from a number on; StorageInternalError if they can't be read."""
        with _as_storage_error():
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write records, all of them or none; StorageInternalError if they can't be written."""
        text = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs).encode()
        with _as_storage_error(), self._alone() as file:
            size = _size(file)
            end = _end(file, size)
            if end < size == _size(file):
                file.truncate(end)
            written = 0
            try:
                while written < len(text):  # a disk that fills up takes a part
                    written += file.write(text[written:])
            except OSError:
                if _size(file) == end + written:
                    file.truncate(end)
                raise
            os.fsync(file.fileno())

    @contextmanager
    def _alone(self) -> Iterator[io.FileIO]:
        """Hold the lock, which others take from one who is stopped for long, and the file.

        What is written goes to its end, wherever that is by then.
        """
        self._lock.acquire()
        try:
            with io.FileIO(self._path, "a+") as file:
                yield file
        finally:
            with suppress(RuntimeError):  # it was taken
                self._lock.release()


def _size(file: io.FileIO) -> int:
    return os.fstat(file.fileno()).st_size


def _end(file: io.FileIO, place: int) -> int:
    """Return where the last whole line before a place ends."""
    while place > 0:
        start = max(0, place - _BLOCK)
        file.seek(start)
        found = file.read(place - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        place = start
    return 0


@contextmanager
def _as_storage_error() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise StorageInternalError(first_line(error)) from error
