import errno
import io

import optuna
import pytest
from optuna.exceptions import StorageInternalError

from kronsearch.errors import StudyError
from kronsearch.search import journal as module
from kronsearch.search.journal import Journal
from kronsearch.search.storage import open_study


def finished(url, values):
    study = open_study(url, "s")
    for value in values:
        study.tell(study.ask(), value)
    return [trial.value for trial in study.get_trials() if trial.state is optuna.trial.TrialState.COMPLETE]


@pytest.mark.parametrize("length", [1, 10, 100_000])
def test_a_record_that_was_cut_off_costs_no_other_one(tmp_path, length):
    path, url = tmp_path / "a.log", f"journal:///{tmp_path / 'a.log'}"
    assert finished(url, [1.0, 2.0]) == [1.0, 2.0]
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"x":"' + b"x" * length)
    assert finished(url, []) == [1.0, 2.0]
    assert finished(url, [3.0]) == [1.0, 2.0, 3.0]
    assert path.read_bytes().startswith(whole)
    path.write_bytes(path.read_bytes()[:-5])  # that it is finished
    assert finished(url, [4.0]) == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("content", ['{"my": "notes"}', "x" * 100_000])
def test_a_file_without_a_whole_line_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "notes.json"
    path.write_text(content)
    with pytest.raises(StudyError, match="not a journal of Optuna: it has no whole line"):
        open_study(f"journal:///{path}", "s")
    assert path.read_text() == content
    assert [each.name for each in tmp_path.iterdir()] == ["notes.json"]


def test_what_is_no_file_is_no_journal(tmp_path):
    with pytest.raises(StudyError, match="it is no file"):
        open_study(f"journal:///{tmp_path}", "s")
    with pytest.raises(StudyError, match="it is no file"):
        open_study("journal:////dev/null", "s")


def test_of_records_that_do_not_fit_nothing_is_written(tmp_path, monkeypatch):
    class Full(io.FileIO):
        left = 30

        def write(self, content):
            if Full.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, Full.left = min(Full.left, len(content)), 0
            return super().write(content[:taken])

    path = tmp_path / "a.log"
    journal = Journal(path)
    journal.append_logs([{"a": 1}, {"b": 2}])
    whole = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("kronsearch.search.journal.io.FileIO", Full)
        with pytest.raises(StorageInternalError, match="No space left"):
            journal.append_logs([{"c": "x" * 100}])
    assert path.read_bytes() == whole
    journal.append_logs([{"d": 4}])
    assert list(journal.read_logs(0)) == [{"a": 1}, {"b": 2}, {"d": 4}]
    assert [each.name for each in tmp_path.iterdir()] == ["a.log"]


def test_of_a_writer_whose_lock_was_taken_meanwhile_nothing_is_lost(tmp_path, monkeypatch):
    """As of one that was stopped for longer than locks are waited for."""
    path, real = tmp_path / "a.log", module._end
    slow, quick = Journal(path), Journal(path)
    slow.append_logs([{"a": 1}])

    def stopped(file, place):
        found = real(file, place)
        monkeypatch.setattr(module, "_end", real)
        slow._lock.release()
        quick.append_logs([{"b": 2}, {"c": 3}])
        return found

    monkeypatch.setattr(module, "_end", stopped)
    slow.append_logs([{"d": 4}])
    wanted = [{"a": 1}, {"b": 2}, {"c": 3}, {"d": 4}]
    assert list(slow.read_logs(0)) == list(quick.read_logs(0)) == wanted
    quick.append_logs([{"e": 5}])
    assert list(quick.read_logs(4)) == [{"e": 5}]
