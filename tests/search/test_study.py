import itertools
import multiprocessing
import os
import pwd
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
import warnings
from contextlib import closing
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from kronsearch.errors import StudyError
from kronsearch.search.storage import kept
from kronsearch.search.study import OVER, SCORE, Study
from kronsearch.search.workers import BEAT, Lookout

IDENTITY = {"model": "m", "budget": "flops 50%", "seed": 0}
PROCESSES = multiprocessing.get_context("forkserver")
# a worker is there in milliseconds, not in seconds
PROCESSES.set_forkserver_preload(
    [
        "kronsearch.search.study",
        "alembic.command",
        "sqlalchemy.dialects.sqlite",
        "torch",
        "scipy.stats",
        "optuna._gp.gp",
    ]
)
GIVEN = [{"x": 0.25, "y": 0.5}, {"x": 0.5, "y": 0.5}, {"x": 0.75, "y": 0.5}]
MANY = 1000


def at(path):
    return f"sqlite:///{path}"


def opened(path, identity=IDENTITY, *, seed=0):
    return Study(at(path), "s", identity, seed=seed)


def no_given(_):
    return None


def given(slot):
    return GIVEN[slot] if slot < len(GIVEN) else None


def run_trial(study, trial):
    """Run a trial that is over in no time, and is over a budget now and then."""
    x, y = trial.suggest_float("x", -1, 1), trial.suggest_float("y", -1, 1)
    trial.set_constraint("x", x - 0.6)
    if x > 0.6:
        trial.set_user_attr(OVER, x - 0.6)
    trial.set_user_attr(SCORE, -y)
    return study.tell(trial, x**2 + y)


def run_trials(study, count):
    while len(study.finished()) < count:
        assert run_trial(study, study.ask(range(count), given))
    return outcome(study)


def outcome(study):
    """Return all that a study tells of its finished trials, but for their numbers and times."""
    return study.table().drop(columns=["trial", "seconds"]).to_csv()


def work(url, count):
    """Work on a study like `search` does until it is done."""
    study = Study(url, "s", IDENTITY, seed=0)
    while len(study.finished()) < count:
        trial = study.ask(range(count), given)
        if trial is None:
            time.sleep(0.01)
        else:
            with study.at_work(trial):
                run_trial(study, trial)


def begin_and_hang(path, ready):
    trial = opened(path).ask(range(MANY), given)
    trial.suggest_float("x", -1, 1)
    ready.set()
    time.sleep(600)


def started(target, *args):
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    return process


def kill(process):
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_resumed_study_asks_what_it_would_have_asked(tmp_path):
    whole = run_trials(opened(tmp_path / "a.db"), 11)
    run_trials(opened(tmp_path / "b.db"), 7)
    assert run_trials(opened(tmp_path / "b.db"), 11) == whole
    table = opened(tmp_path / "a.db").table()
    assert table["x"].tolist()[:3] == [params["x"] for params in GIVEN]
    assert set(table["state"]) == {"complete", "over budget"}


def test_another_seed_asks_something_else(tmp_path):
    run_trials(one := opened(tmp_path / "a.db"), 4)
    run_trials(other := opened(tmp_path / "b.db", seed=1), 4)
    asked, else_asked = one.table()["x"].tolist(), other.table()["x"].tolist()
    assert asked[:3] == else_asked[:3]
    assert asked[3] != else_asked[3]


def work_until_killed(url, statement):
    """Work on a study without an end, and die right before so many statements have been sent to its database."""
    left = itertools.count(statement, -1)

    def die(*_):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", die)
    work(url, MANY)


def test_killed_at_any_moment_a_study_is_the_one_without(tmp_path):
    """Of workers that run one after the other: what is finished, and what the sampler asked, is the same."""
    moments = random.Random(0)
    for _ in range(7):
        worker = started(work_until_killed, at(tmp_path / "killed.db"), moments.randrange(300))
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
    killed = opened(tmp_path / "killed.db")
    finished = len(killed.finished())
    assert finished > 8  # so that the sampler has had its say
    assert TrialState.FAIL in [trial.state for trial in killed._study.get_trials(deepcopy=False)]
    assert outcome(killed) == run_trials(opened(tmp_path / "whole.db"), finished)


def test_a_killed_workers_trial_is_asked_again_and_nothing_finished_is_lost(tmp_path):
    study, ready = opened(tmp_path / "a.db"), PROCESSES.Event()
    run_trials(study, 3)
    worker = started(begin_and_hang, tmp_path / "a.db", ready)
    assert ready.wait(60)
    assert study.ask(range(4), given) is None  # the fourth is in hand
    assert [trial.number for trial in study.others()] == [3]
    kill(worker)
    assert len(study.finished()) == 3
    trial = study.ask(range(4), given)
    assert [t.state for t in study._study.get_trials(deepcopy=False)][3:] == [TrialState.FAIL, TrialState.RUNNING]
    assert run_trial(study, trial)
    assert outcome(study) == run_trials(opened(tmp_path / "b.db"), 4)


def test_what_this_process_gave_up_is_asked_again(tmp_path):
    """As when a search in a notebook is interrupted and begun anew."""
    assert opened(tmp_path / "a.db").ask(range(2), given).suggest_float("x", -1, 1) == 0.25
    study = opened(tmp_path / "a.db")
    for params in GIVEN[:2]:
        trial = study.ask(range(2), given)
        assert trial.suggest_float("x", -1, 1) == params["x"]
        study.tell(trial, 1.0)
    assert len(study.finished()) == 2


def test_a_worker_of_another_machine_is_left_alone_until_it_is_silent(tmp_path):
    here, there, now = opened(tmp_path / "a.db"), opened(tmp_path / "a.db"), [0.0]
    there._me["machine"] = "elsewhere"
    here._lookout = Lookout(grace=100, clock=lambda: now[0])
    trial = there.ask(range(1), given)
    for second in (0.0, 100.0):
        now[0] = second
        assert here.ask(range(1), given) is None
    trial.set_user_attr(BEAT, 1)
    now[0] = 150.0
    assert here.ask(range(1), given) is None
    now[0] = 251.0
    assert run_trial(here, here.ask(range(1), given))
    assert not there.tell(trial, 1.0)


def test_of_two_that_claim_a_slot_at_once_the_first_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr("kronsearch.search.study.is_gone", lambda worker, me: False)  # as of two processes
    first, second = opened(tmp_path / "a.db"), opened(tmp_path / "a.db")
    claim, early = second._claim, []

    def claim_too_late(slot, params):
        if not early:
            early.append(first.ask(range(2), given))
        return claim(slot, params)

    monkeypatch.setattr(second, "_claim", claim_too_late)
    late = second.ask(range(2), given)
    assert early[0].suggest_float("x", -1, 1) == GIVEN[0]["x"]
    assert late.suggest_float("x", -1, 1) == GIVEN[1]["x"]
    assert [trial.state.name for trial in first._study.get_trials()] == ["RUNNING", "FAIL", "RUNNING"]


def test_what_was_taken_over_does_not_count_twice(tmp_path):
    slow = opened(tmp_path / "a.db")
    trial = slow.ask(range(1), given)
    fast = opened(tmp_path / "a.db")  # of the same process: it takes the other one for gone
    assert run_trial(fast, fast.ask(range(1), given))
    with slow.at_work(trial):
        trial.set_user_attr(SCORE, 1.0)
        pytest.fail("it goes on with a trial that isn't its own")
    assert not slow.tell(trial, 1.0)
    assert len(slow.finished()) == 1


def told(study, *objectives):
    """Run a trial for each objective; None for one that has none."""
    for objective in objectives:
        trial = study.ask(range(MANY), no_given)
        study.tell(trial, *(() if objective is None else (objective,)))
    return study


def test_the_best_is_the_first_of_equals_and_trials_without_an_objective_count_as_finished(tmp_path):
    study = opened(tmp_path / "a.db")
    assert study.ranked() == []
    told(study, 1.0, None, 0.5, 0.5)
    assert [trial.number for trial in study.ranked()] == [2, 3, 0]
    assert len(study.finished()) == 4
    assert study.table()["state"].tolist() == ["complete", "pruned", "complete", "complete"]


def test_what_is_over_a_budget_is_known_to_the_sampler_but_does_not_win(tmp_path):
    study = opened(tmp_path / "a.db")
    trial = study.ask(range(MANY), no_given)
    trial.set_user_attr(OVER, 0.25)
    told(study, 1.0)
    assert study.tell(trial, 0.5)
    assert [trial.number for trial in study.ranked()] == [1]
    assert study.table()["state"].tolist() == ["over budget", "complete"]
    assert [found.value for found in study.finished() if found.state is TrialState.COMPLETE] == [0.5, 1.0]


def test_the_sampler_comes_near_to_the_least_divergence(tmp_path):
    """And not to the best score, which here is at the other end."""
    study = opened(tmp_path / "a.db")
    while len(study.finished()) < 16:
        trial = study.ask(range(MANY), no_given)
        x = trial.suggest_float("x", -1, 1)
        trial.set_user_attr(SCORE, x)
        study.tell(trial, x**2)
    late = [abs(trial.params["x"]) for trial in study.finished()[10:]]
    assert sum(late) / len(late) < 0.25  # of a random sampler: 0.5


def test_another_identity_is_refused_with_what_differs(tmp_path):
    run_trials(opened(tmp_path / "a.db"), 1)
    with pytest.raises(StudyError, match=r"\(budget was flops 50%, is params 20%\)") as caught:
        opened(tmp_path / "a.db", {**IDENTITY, "budget": "params 20%"})
    assert "\n" not in str(caught.value)


def test_a_study_without_trials_takes_other_settings(tmp_path):
    opened(tmp_path / "a.db")
    other = {**IDENTITY, "budget": "params 20%"}
    begin_and_give_up(tmp_path / "a.db", other)
    run_trials(opened(tmp_path / "a.db", IDENTITY), 1)
    with pytest.raises(StudyError, match=r"\(budget was flops 50%, is params 20%\)"):
        opened(tmp_path / "a.db", other)


def begin_and_give_up(path, identity):
    assert opened(path, identity).ask(range(2), no_given) is not None


def test_of_workers_with_different_settings_the_first_to_begin_goes_on(tmp_path):
    other = {**IDENTITY, "budget": "params 20%"}
    loser = opened(tmp_path / "a.db")
    winner = opened(tmp_path / "a.db", other)
    latest = opened(tmp_path / "a.db")  # writes its settings over the winner's
    trial = winner.ask(range(2), no_given)
    for each in (loser, latest):
        with pytest.raises(StudyError, match=r"\(budget was params 20%, is flops 50%\)"):
            each._claim(1, None)
    assert run_trial(winner, trial)
    assert [trial.number for trial in winner.finished()] == [0]
    assert winner.others() == []
    with pytest.raises(StudyError, match=r"\(budget was params 20%, is flops 50%\)"):
        opened(tmp_path / "a.db")
    run_trials(opened(tmp_path / "a.db", other), 2)


def test_a_study_of_another_number_of_objectives_is_refused_without_trials(tmp_path):
    opened(tmp_path / "a.db")
    with pytest.raises(StudyError, match=r"\(objective was None, is two\)"):
        Study(at(tmp_path / "a.db"), "s", {**IDENTITY, "objective": "two"}, seed=0, objectives=2)


def test_a_study_with_another_objective_is_refused(tmp_path):
    """As those are that an earlier version made, which had none in their identity."""
    run_trials(opened(tmp_path / "a.db"), 1)
    with pytest.raises(StudyError, match=r"\(objective was None, is divergence\)"):
        opened(tmp_path / "a.db", {**IDENTITY, "objective": "divergence"})


@pytest.mark.parametrize("begun", [True, False])
def test_a_full_disk_is_told_in_one_line(tmp_path, begun):
    study = opened(tmp_path / "a.db")
    trial = study.ask(range(2), no_given) if begun else None
    full = "PRAGMA max_page_count = 1"  # SQLite takes the pages that there are
    engine = study._study._storage._backend.engine
    sqlalchemy.event.listen(engine, "checkout", lambda connection, *_: connection.execute(full))
    told = pytest.raises(StudyError, match=r"storage sqlite:///.*a.db failed \(.*database or disk is full\): mend it,")
    much = "x" * 2**20
    if begun:
        with told, kept(at(tmp_path / "a.db")), study.at_work(trial):
            trial.set_user_attr("plan", much)
    else:
        study._identity = {"model": much}
        with told, kept(at(tmp_path / "a.db")):
            study.ask(range(2), no_given)


def test_a_finished_trial_without_objective_is_told(tmp_path):
    run_trials(opened(tmp_path / "a.db"), 1)
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection, connection:
        connection.execute("delete from trial_values")
    with pytest.raises(StudyError, match="damaged, or others wrote to it: trial 0 has no objective; pass another"):
        opened(tmp_path / "a.db")


@pytest.mark.parametrize(
    "statement",
    [
        "update study_user_attributes set value_json = '{no'",
        "update trial_user_attributes set value_json = 'no' where key = 'slot'",
        "update trial_system_attributes set value_json = ''",
        "update trial_params set distribution_json = 'no'",
        """update trial_params set distribution_json = '{"name": "Other", "attributes": {}}'""",
        """update trial_params set distribution_json = '{"name": "FloatDistribution", "attributes": {"law": 0}}'""",
        "update trial_params set distribution_json = '[]'",
        "update trials set state = 'OTHER'",
        "update trials set datetime_start = 'yesterday'",
        "update trials set number = null",
        "update trial_user_attributes set value_json = '7' where key = 'identity'",
    ],
)
def test_what_optuna_does_not_write_is_told(tmp_path, statement):
    run_trials(opened(tmp_path / "a.db"), 2)
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection, connection:
        assert connection.execute(statement).rowcount > 0
    with pytest.raises(
        StudyError, match=r"^the study 's' in .* is damaged, or others wrote to it \(.+\): pass another"
    ):
        opened(tmp_path / "a.db")


def test_so_are_directions_that_it_does_not_know(tmp_path):
    opened(tmp_path / "a.db")
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection, connection:
        connection.execute("update study_directions set direction = 'OTHER'")
    with pytest.raises(StudyError, match=r"^can't open the storage sqlite:.* \('OTHER' is not among"):
        opened(tmp_path / "a.db")


def test_a_study_of_somebody_elses_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    optuna.create_study(storage=url, study_name="s").ask()
    with pytest.raises(StudyError, match="is not kronsearch's"):
        opened(tmp_path / "a.db")


@pytest.mark.parametrize(
    ("attributes", "lacks"),
    [({}, "slot and no plan"), ({"slot": 1}, "plan"), ({"plan": "{}"}, "slot"), ({"slot": [1], "plan": "{}"}, "slot")],
)
def test_a_study_that_others_wrote_to_is_refused(tmp_path, attributes, lacks):
    url = at(tmp_path / "a.db")
    study = Study(url, "s", IDENTITY, seed=0, told=("plan",))
    trial = study.ask(range(2), given)
    trial.set_user_attr("plan", "{}")
    study.tell(trial, 1.0)
    dropped = study.ask(range(2), given)
    study.tell(dropped)
    Study(url, "s", IDENTITY, seed=0, told=("plan",))  # one that can't win needs no plan
    optuna.load_study(study_name="s", storage=url).add_trial(optuna.create_trial(value=0.5, user_attrs=attributes))
    with pytest.raises(
        StudyError, match=rf"others wrote to it: trial 2 has no {lacks}; pass another --study"
    ) as caught:
        Study(url, "s", IDENTITY, seed=0, told=("plan",))
    assert "\n" not in str(caught.value)
    with pytest.raises(StudyError, match="others wrote to it"):  # while it is open
        study.finished()


def test_four_workers_end_with_each_trial_once(tmp_path, url):
    """On every storage that several workers can share."""
    count = 8
    workers = [started(work, url, count) for _ in range(4)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    study = Study(url, "s", IDENTITY, seed=0)
    table = study.table()
    assert sorted(table["slot"]) == list(range(count))
    assert table["trial"].is_unique
    assert study.ask(range(count), given) is None
    assert study.others() == []
    for slot, params in enumerate(GIVEN):
        [x] = table.loc[table["slot"] == slot, "x"]
        assert x == params["x"]


@pytest.fixture(params=["sqlite", "journal", "postgresql", "mysql", "grpc"])
def url(request, tmp_path):
    """Return the URL of an empty storage."""
    if request.param == "sqlite":
        return at(tmp_path / "a.db")
    if request.param == "journal":
        return f"journal:///{tmp_path / 'a.log'}"
    return request.getfixturevalue(request.param)


@pytest.fixture
def grpc(tmp_path):
    """Return the URL of a storage server before a journal."""
    pytest.importorskip("grpc", reason="needs grpcio and protobuf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = PROCESSES.Process(target=serve, args=(str(tmp_path / "served.log"), port))
    server.start()
    yield f"grpc://127.0.0.1:{port}"
    server.terminate()
    server.join()


def serve(path, port):
    backend = optuna.storages.journal.JournalFileBackend(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.storages.run_grpc_proxy_server(
            optuna.storages.journal.JournalStorage(backend), host="127.0.0.1", port=port
        )


@pytest.fixture
def postgresql():
    """Return the URL of an empty database on a server of its own, which ends with the test."""
    pytest.importorskip("psycopg", reason="needs psycopg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [shutil.which("initdb")]
    if found[-1] is None:
        pytest.skip("needs PostgreSQL's server: no initdb in /usr/lib/postgresql or on the path")
    programs = Path(found[-1]).parent
    other = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    if other and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip("needs a user postgres: PostgreSQL's server does not run as root")
    # a short path, as a socket's must be, and one that another user may enter: a folder for the tests' files may not be
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    if other:
        shutil.chown(folder, "postgres", "postgres")

    def run(name, *args):
        subprocess.run([programs / name, *args], check=True, cwd=folder, stdout=subprocess.DEVNULL, **other)

    run("initdb", "-D", folder / "data", "-U", "tester", "-A", "trust", "--no-sync")
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "-D", folder / "data", "-l", folder / "log", "-o", options, "-w", "start")
    yield f"postgresql+psycopg://tester@/postgres?host={folder}"
    run("pg_ctl", "-D", folder / "data", "-m", "immediate", "-w", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def mysql():
    """Return the URL of an empty database on a server of its own (MariaDB), which ends with the test."""
    pytest.importorskip("pymysql", reason="needs pymysql")
    install, server, client = (
        shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
        for name in ("mariadb-install-db", "mariadbd", "mariadb")
    )
    if not (install and server and client):
        pytest.skip("needs MariaDB's server: no mariadb-install-db, mariadbd or mariadb in /usr/sbin or on the path")
    if os.getuid() == 0 and "mysql" not in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip("needs a user mysql: MariaDB's server does not run as root")
    folder = Path(tempfile.mkdtemp(prefix="my", dir="/tmp"))  # a short path, as a socket's must be
    own = [
        f"--user={'mysql' if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name}",
        f"--datadir={folder / 'data'}",
    ]
    if os.getuid() == 0:
        shutil.chown(folder, "mysql", "mysql")
    there = os.environ | {"TMPDIR": str(folder)}  # another user may not enter ours
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": there}
    root = "--auth-root-authentication-method=normal"
    subprocess.run([install, "--no-defaults", *own, root, "--skip-test-db"], check=True, **quiet)
    place = f"--socket={folder / 'socket'}"
    process = subprocess.Popen([server, "--no-defaults", *own, place, "--skip-networking"], **quiet)
    ask = [client, "--no-defaults", "--user=root", place, "--execute=create database studies"]
    while subprocess.run(ask, check=False, **quiet).returncode:
        assert process.poll() is None, "the server has ended"
        time.sleep(0.1)
    yield f"mysql+pymysql://root@localhost/studies?unix_socket={folder / 'socket'}"
    process.terminate()
    process.wait()
    shutil.rmtree(folder)
