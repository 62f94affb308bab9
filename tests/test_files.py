"""Files that are whole or not there."""

import os
import stat
import sys
from io import BufferedWriter, TextIOWrapper
from pathlib import Path

import pytest

from kronsearch.errors import FileError
from kronsearch.files import Results, make_folder, read_text, replacing, write_text


def test_a_text_is_written_and_replaced(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_text(path, "")
    assert path.read_bytes() == b""
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_no_more_is_read_than_is_wanted(tmp_path):
    write_text(tmp_path / "file.txt", "größer")
    assert read_text(tmp_path / "file.txt", 8) == "größer"
    assert read_text(tmp_path / "file.txt", 7) is None
    if Path("/dev/zero").exists():
        assert read_text(Path("/dev/zero"), 100) is None


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError, match="division"), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        assert temporary.parent == path.parent
        assert path.read_text() == "old"
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_that_can_not_be_encoded_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        write_text(tmp_path / "file.txt", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_text(tmp_path / "folder", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("file.txt", "new.txt"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "file.txt").write_text("old")
    for name in ("file.txt", "new.txt"):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "elsewhere" / name).read_text() == "new"
    assert len(list(tmp_path.rglob("*"))) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes with names")
def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(FileError, match=rf"can't write {path} \(it is a device or a pipe\): pass another place"):
            write_text(path, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_the_target_appears_only_at_the_end(tmp_path):
    path = tmp_path / "file.bin"
    with replacing(path) as temporary:
        temporary.write_bytes(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file.txt", "text")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~umask


def test_a_folder_is_made_or_it_is_told_why_not(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"can't make the folder .*b \(Not a directory\): pass another"):
        make_folder(tmp_path / "file" / "b")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize("length", [10, 100_000])
def test_results_that_do_not_fit_are_told_once(length):
    with TextIOWrapper(BufferedWriter(Results("/dev/full", "w"))) as stdout:
        with pytest.raises(FileError, match=r"can't write the results .*No space left on device"):
            print("x" * length, file=stdout, flush=True)
        print("y" * length, file=stdout, flush=True)


def test_results_that_nobody_reads_are_no_fault_of_the_place():
    reader, writer = os.pipe()
    os.close(reader)
    with Results(writer, "w") as results, pytest.raises(BrokenPipeError, match="Broken pipe"):
        results.write(b"x")
