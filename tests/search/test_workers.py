import os
import subprocess
import sys
import threading

import optuna
import pytest

from kronsearch.search.workers import BEAT, Lookout, Pulse, _born, is_gone, new_worker


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def process():
    """A process that lives as long as the test."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def told(process):
    """Return what a worker in that process would say of itself."""
    return new_worker() | {"pid": str(process.pid), "born": _born(process.pid)}


def test_a_worker_is_gone_with_its_process_also_if_its_parent_has_not_noticed(process):
    me, worker = new_worker(), told(process)
    assert not is_gone(worker, me)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and still in the table of processes
    assert is_gone(worker, me)
    process.communicate()
    assert is_gone(worker, me)


def test_a_process_that_has_the_number_of_a_dead_one_is_another(process):
    assert is_gone(told(process) | {"born": "1"}, new_worker())


def test_of_another_machine_nothing_is_known(process):
    worker = told(process) | {"machine": "elsewhere"}
    process.kill()
    process.communicate()
    assert not is_gone(worker, new_worker())


def test_a_process_has_one_worker_at_a_time():
    me = new_worker()
    assert not is_gone(me, me)
    assert is_gone(new_worker(), me)


@pytest.mark.parametrize("worker", [{}, {"machine": "x"}, {"machine": new_worker()["machine"], "pid": "one"}])
def test_what_is_no_worker_is_nobody_or_unknown(worker):
    assert is_gone(worker, new_worker()) == ("pid" in worker)


def test_silent_is_who_gives_no_sign_for_longer_than_the_grace():
    clock = Clock()
    lookout, study = Lookout(grace=100, clock=clock), optuna.create_study()
    trial = study.ask()

    def is_silent(now):
        clock.now = now
        return lookout.is_silent(study.get_trials()[0])

    assert not is_silent(1000)  # the first look: nothing is known of the time before
    assert not is_silent(1100)
    trial.set_user_attr(BEAT, 1)
    assert not is_silent(1101)
    assert not is_silent(1201)
    assert is_silent(1202)


def test_a_pulse_beats_while_it_is_open():
    study = optuna.create_study()
    trial, beaten = study.ask(), threading.Event()
    write = trial.set_user_attr

    def note(key, value):
        write(key, value)
        if value == 2:
            beaten.set()

    trial.set_user_attr = note
    with Pulse(trial, every=0.001):
        assert beaten.wait(60)
    assert study.get_trials()[0].user_attrs[BEAT] >= 2


def test_a_pulse_goes_on_when_a_sign_can_not_be_given():
    study = optuna.create_study()
    trial, tried = study.ask(), threading.Semaphore(0)

    def fail(key, value):
        tried.release()
        raise OSError("the server is away")

    trial.set_user_attr = fail
    with Pulse(trial, every=0.001):
        assert tried.acquire(timeout=60)
        assert tried.acquire(timeout=60)
