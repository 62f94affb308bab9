import socket
from pathlib import Path

import pytest

from kronsearch.errors import StudyError
from kronsearch.search.storage import hidden, kept, open_study


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("sqlite:////a/b:c@d/study.db", "sqlite:////a/b:c@d/study.db"),
        ("grpc://host:13000", "grpc://host:13000"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("postgresql+psycopg://me:s3cret@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("mysql+pymysql://me:s@cr:e/t@host/db", "mysql+pymysql://me:***@host/db"),
        ("postgresql://:s3cret@host/db", "postgresql://:***@host/db"),
        ("postgresql://host/db?user=me&password=s3cret&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("postgresql://host/db?sslPassword=s3cret", "postgresql://host/db?sslPassword=***"),
    ],
)
def test_passwords_are_hidden(url, shown):
    assert hidden(url) == shown


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "Could not parse"),
        ("sqlite:////no/such/folder/study.db", "unable to open"),
        ("mysql+nodriver://host/db", "Can't load plugin"),
        ("journal:////no/such/folder/study.log", "No such file"),
        ("grpc://host", "a server is HOST:PORT"),
        ("grpc://:13000", "a server is HOST:PORT"),
        ("redis://host/0", "Can't load plugin"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_line(url, reason):
    with pytest.raises(StudyError, match=f"can't open the storage .*{reason}.*: pass a URL such as sqlite:") as caught:
        open_study(url, "s")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("password", ["s3cret", "s3/cret", "s3@cret", "s3:cret", "s3%40cret"])
def test_a_server_that_is_not_there_tells_no_password(password):
    pytest.importorskip("psycopg", reason="needs psycopg")
    with pytest.raises(StudyError, match="can't open the storage") as caught:
        open_study(f"postgresql+psycopg://me:{password}@127.0.0.1:1/db", "s")
    assert "cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_storage_server_that_does_not_answer_is_one_line(monkeypatch):
    pytest.importorskip("grpc", reason="needs grpcio")
    monkeypatch.setattr("kronsearch.search.storage._SERVER", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(StudyError, match=r"no server answers there: start one"):
            open_study(f"grpc://127.0.0.1:{silent.getsockname()[1]}", "s")


@pytest.mark.parametrize(
    ("name", "kind"), [("a.db", "sqlite"), ("a.log", "journal"), ("b.log", "journal"), ("c.log", "journal")]
)
def test_a_file_of_another_kind_is_one_line(tmp_path, name, kind):
    contents = {"a.db": "long enough to be looked at by SQLite as a database" * 30, "b.log": "{}\n", "c.log": "5\n5\n"}
    (tmp_path / name).write_text(contents.get(name, "not a journal\nnot at all\n"))
    with pytest.raises(StudyError, match="can't open the storage") as caught:
        open_study(f"{kind}:///{tmp_path / name}", "s")
    assert "\n" not in str(caught.value)


def test_a_journal_is_a_file_that_is_opened_again(tmp_path, monkeypatch):
    """By a path that is relative with three slashes and absolute with four, as for SQLite."""
    monkeypatch.chdir(tmp_path)
    study = open_study("journal:///a.log", "s")
    study.tell(study.ask(), 0.5)
    assert open_study(f"journal:///{tmp_path / 'a.log'}", "s").best_value == 0.5
    assert [path.name for path in Path().iterdir()] == ["a.log"]  # and no lock stays


def test_a_server_that_goes_away_is_told_in_one_line():
    grpc = pytest.importorskip("grpc", reason="needs grpcio")

    class Gone(grpc.RpcError):
        def details(self):
            return "Socket closed"

        def __str__(self):
            return "<Gone:\n\tSocket closed>"

    told = r"the storage grpc://host:1 failed \(Socket closed\): mend it, and run the same line again to resume"
    with pytest.raises(StudyError, match=told), kept("grpc://host:1"):
        raise Gone
