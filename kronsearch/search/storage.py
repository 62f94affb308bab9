"""Where studies are kept: opened by URL, ready for several workers, and told of without their passwords."""

import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import optuna
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from kronsearch.errors import StudyError, first_line
from kronsearch.files import make_folder

__all__ = ["MALFORMED", "hidden", "kept", "open_study", "url_of"]

_URLS = "sqlite:///study.db, journal:///study.log, postgresql+psycopg://USER@HOST/NAME or grpc://HOST:PORT"
_FAILURES = (
    *(SQLAlchemyError, optuna.exceptions.OptunaError),
    *(ImportError, ValueError, LookupError, OSError, RuntimeError),
)
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, AssertionError)  # raised at what Optuna did not write
_LOCKED = 60  # seconds that a writer of SQLite waits for others
_SERVER = 10  # seconds that a gRPC server has to answer
_AGAIN = (0.2, 0.4, 0.8)  # seconds; of workers that begin at the same moment, one makes the tables and the others fail
_SECRETS = (
    re.compile(
        r"(?P<before>://[^:/@?]*:)(?P<secret>.+)(?=@)"
    ),  # to the last @: it may be an unescaped one of a password
    re.compile(r"(?i)(?P<before>[?&][^=&]*pass[^=&]*=)(?P<secret>[^&]+)"),
)


def open_study(url: str | None, name: str, objectives: int = 1) -> optuna.Study:
    """Open a study, or make it.

    Args:
        url: an SQLAlchemy URL of a database; `journal:///FILE` for a journal (three slashes for a relative path, four
            for an absolute one, as for SQLite); `grpc://HOST:PORT` for Optuna's storage server; None is memory.
        name: of the study in it.
        objectives: how many numbers it minimises.

    Raises:
        StudyError: it can't be opened.
    """
    for wait in (*_AGAIN, None):
        try:
            return optuna.create_study(
                storage=None if url is None else _storage(url),
                study_name=name,
                directions=["minimize"] * objectives,
                load_if_exists=True,
            )
        except _failures_in_use(_FAILURES) as error:
            if wait is None or not isinstance(error, DBAPIError | optuna.exceptions.StorageInternalError):
                raise StudyError(
                    f"can't open the storage {hidden(url or '')} ({_reason(error, url)}): pass a URL such as {_URLS}"
                ) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def url_of(storage: str | None, folder: Path | None) -> str | None:
    """Return where a study is kept, None for memory: where no URL is given `study.db` in the folder, which is made.

    Raises:
        StudyError: the folder's name means something else in a URL.
    """
    if storage is not None or folder is None:
        return storage
    if set("?%") & set(str(folder)):
        raise StudyError(f"a study can't be kept in {folder} for its ? or %: pass another --out, or a --storage")
    make_folder(folder)
    return f"sqlite:///{folder / 'study.db'}"


@contextmanager
def kept(url: str | None) -> Iterator[None]:
    """Turn failures of a storage in use, such as a full disk, into errors of one line.

    Raises:
        StudyError: the storage at this URL, or memory, failed.
    """
    try:
        yield
    except _failures_in_use() as error:
        reason = _reason(error.__cause__ or error, url)
        raise StudyError(
            f"the storage {hidden(url or 'memory')} failed ({reason}): mend it, and run the same line again to resume"
        ) from error


def _failures_in_use(others: tuple[type[Exception], ...] = ()) -> tuple[type[Exception], ...]:
    """Return what storages raise, a server's if there is one, and others."""
    grpc = sys.modules.get("grpc")
    servers = () if grpc is None else (grpc.RpcError,)
    return (SQLAlchemyError, optuna.exceptions.StorageInternalError, *servers, *others)


def hidden(url: str) -> str:
    """Return a storage URL with asterisks for its passwords."""
    for pattern in _SECRETS:
        url = pattern.sub(r"\g<before>***", url)
    return url


def _reason(error: BaseException, url: str | None) -> str:
    """Return the first line of an error, without the passwords of the URL, or parts of a wrongly escaped one."""
    told = error.details() if hasattr(error, "details") else None  # of a call that failed
    reason = first_line(RuntimeError(told) if told else error)
    secrets = [found["secret"] for pattern in _SECRETS for found in pattern.finditer(url or "")]
    for secret in secrets:
        for part in (secret, unquote(secret), *re.split("[@:/]", secret)):
            reason = reason.replace(part, "***") if part else reason
    return reason


def _storage(url: str) -> BaseStorage:
    kind, _, place = url.partition("://")
    if kind == "journal":
        return _journal(place)
    if kind == "grpc":
        return _server(place)
    if make_url(url).get_backend_name() == "sqlite":
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _LOCKED}})
    return RDBStorage(url, engine_kwargs={"poolclass": NullPool})  # a trial outlasts what servers keep idle


def _journal(place: str) -> BaseStorage:
    from optuna.storages.journal import JournalStorage

    from kronsearch.search.journal import Journal

    try:
        return JournalStorage(Journal(Path(place.removeprefix("/")).absolute()))
    except (*MALFORMED, optuna.exceptions.StorageInternalError) as error:
        raise ValueError(f"it is not a journal of Optuna: {error}") from error


def _server(place: str) -> BaseStorage:
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("a server is HOST:PORT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        server = GrpcStorageProxy(host=host, port=int(port))
    try:
        server.wait_server_ready(timeout=_SERVER)
    except ConnectionError as error:
        raise ConnectionError(
            "no server answers there: start one with optuna.storages.run_grpc_proxy_server"
        ) from error
    return server
