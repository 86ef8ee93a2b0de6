"""Signals: what they do to work that asks and to work that does not, in Python's doors and in the program."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest

from tif_jax import __main__ as program
from tif_jax.__main__ import main
from tif_jax.errors import Preempted, WorkError
from tif_jax.runtime import preemption

KINDS = [(signal.SIGTERM, "SIGTERM", 75), (signal.SIGHUP, "SIGHUP", 75), (signal.SIGINT, "Ctrl-C", 130)]


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def outcome(monkeypatch, capsys, work):
    """Exit status and last line of a command that is this function."""
    monkeypatch.setattr(program, "_run", lambda argv: work())
    return main(["score"]), capsys.readouterr().err.strip()


@pytest.mark.parametrize("number, name, status", KINDS)
def test_work_that_does_not_ask_ends(monkeypatch, capsys, number, name, status):
    def work():
        try:
            send(number)
        except Exception:  # as of somebody who takes any failure for a damaged file
            pytest.fail("a signal is no failure")

    line = f"tif score: stopped by {name}; run the same command again to go on"
    assert outcome(monkeypatch, capsys, work) == (status, line)


@pytest.mark.parametrize("number, name, status", KINDS)
def test_work_that_asks_saves_first(monkeypatch, capsys, number, name, status):
    saved = []

    def work():
        with preemption.stop_flag() as stop:
            send(number)
            assert stop.is_set()
            saved.append("all")
            raise Preempted("stopped at step 3")

    assert outcome(monkeypatch, capsys, work) == (status, "tif score: stopped at step 3") and saved


def test_where_nobody_asked_in_time_the_work_ends_with_the_block(monkeypatch, capsys):
    def work():
        with preemption.stop_flag():
            send()
        pytest.fail("something else was begun")

    assert outcome(monkeypatch, capsys, work)[0] == 75


def test_what_fails_while_it_saves_has_failed(monkeypatch, capsys):
    def work():
        with preemption.stop_flag():
            send()
            raise WorkError("the disk is full")

    assert outcome(monkeypatch, capsys, work) == (1, "tif score: the disk is full")


def test_in_python_it_is_about_sigterm_alone():
    with preemption.stop_flag(), pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    with pytest.raises(Preempted), preemption.stop_flag() as stop:
        send()
        assert stop.is_set()


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with preemption.handled():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_in_c_hears_of_it_too_and_is_put_back():
    heard = []
    theirs = ctypes.CFUNCTYPE(None, ctypes.c_int)(heard.append)
    libc, before = ctypes.CDLL(None), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted), preemption.handled():
        libc.signal(signal.SIGTERM, theirs)  # as JAX does when processes join
        preemption.take_back()
        send()
    assert heard == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


# The program

STUCK = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # in C, for minutes
STARTED = """
import sys
from tif_jax import __main__ as program
from tif_jax.runtime import preemption
def began():
    print("began", flush=True)
def work(argv):
    {work}
program._run = work
sys.argv = ["tif", "score"]
program.program()
"""


def start(work):
    """`tif score` in a process of its own, which has begun to do this."""
    command = [sys.executable, "-c", STARTED.format(work=work)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "began\n"
    return run


@pytest.mark.parametrize("number, name, status", KINDS)
def test_the_program_ends_at_once_even_if_python_is_deaf(number, name, status):
    run = start(f"began(); {STUCK}")
    run.send_signal(number)
    assert run.communicate(timeout=20)[1] == f"tif score: stopped by {name}; run the same command again to go on\n"
    assert run.returncode == status


def test_a_second_ctrl_c_ends_it_at_once_whatever_it_still_has_to_save():
    run = start(f"with preemption.stop_flag(): began(); {STUCK}")
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=20)[1] == "tif score: ended at once by Ctrl-C; what is finished is intact\n"
    assert run.returncode == 130


def test_a_thread_that_never_ends_does_not_keep_a_failed_program():
    hangs = "import threading; threading.Thread(target=threading.Event().wait).start()"
    run = start(f"{hangs}; began(); raise program.WorkError('the disk is full')")
    assert run.communicate(timeout=20)[1] == "tif score: the disk is full\n" and run.returncode == 1


def test_a_reader_who_has_seen_enough_gets_no_trace():
    run = start("began(); print('many lines ' * 10**6)")
    run.stdout.close()
    assert (run.stderr.read(), run.wait(20)) == ("", 0)
    run.stderr.close()


def test_a_broken_pipe_that_is_not_that_of_the_reader_is_told():
    run = start("began(); raise BrokenPipeError('of a network file')")
    assert "of a network file" in run.communicate(timeout=20)[1] and run.returncode == 1
