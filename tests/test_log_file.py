"""The log of a workdir: what is said, by whom and when, how programs ended; and that it can never be in the way."""

import logging
import os
import re
import signal

import pytest
from small_project import last_line, tif

from tif_jax.commands import train
from tif_jax.runtime import log_file
from tif_jax.runtime.progress import Progress

LINE = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{{4}} {os.getpid()} "


@pytest.fixture
def log(tmp_path):
    log_file.begin(tmp_path / "log.txt", "about")
    yield tmp_path / "log.txt"
    log_file.end(None)


def test_it_says_what_was_asked_what_was_said_and_how_it_ended(place, capsys):
    (place / "run" / "log.txt").unlink()
    assert tif("score") == 0
    assert tif("train --stage=filter --config.filter.labels=above --config.filter.rho=1e9") == 2
    said = last_line(capsys)
    begun, *others = (place / "run" / "log.txt").read_text().splitlines()
    assert re.fullmatch(LINE + r"begins: tif score --config=config.py --workdir=run \(jax .*, Python .*\)", begun)
    assert re.fullmatch(LINE + r"ends: status 0 after \d+ s", others[0])
    assert "begins: tif train --stage=filter" in others[1] and "0.0% of 32 tokens" in others[-3]
    assert others[-2].endswith(said) and "ends: status 2" in others[-1]
    assert all(re.match(LINE, line) for line in others)


def test_what_was_said_before_a_command_is_no_part_of_it(place):
    logging.getLogger("tif_jax").warning("to whoever calls the library")  # a command's handler may be there already
    log_file.Handler().emit(logging.makeLogRecord({"msg": "and to a handler"}))
    (place / "run" / "log.txt").unlink()
    assert tif("score") == 0
    begun, ended = (place / "run" / "log.txt").read_text().splitlines()
    assert "begins: tif score" in begun and "ends: status 0" in ended


def test_an_error_that_nobody_expects_is_there_with_its_trace(place, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(train, "train", broken)
    with pytest.raises(ZeroDivisionError):
        tif("train --stage=filter")
    *_, trace, error, end = re.split(r"^(?=\d{4}-|    Zero)", (place / "run" / "log.txt").read_text(), flags=re.M)
    assert "Traceback (most recent call last):\n    " in trace and "in broken" in trace
    assert error.startswith("    ZeroDivisionError: of a test") and "ends: status 1" in end


def test_a_second_run_that_is_refused_leaves_no_line(place):
    from tif_jax.runtime import workdir

    before = (place / "run" / "log.txt").read_bytes()
    with workdir.only_run(place / "run"):
        assert tif("train --stage=filter") == 2
    assert (place / "run" / "log.txt").read_bytes() == before


def test_a_signal_is_told(place, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert tif("train --stage=filter") == 75
    *_, told, end = (place / "run" / "log.txt").read_text().splitlines()
    assert "tif train: stopped by SIGTERM" in told and "ends: status 75" in end


def test_parts_of_array_jobs_have_logs_of_their_own(place):
    assert tif("score --config.score.part=2/8 --workdir=array") == 2  # it has no backbone
    log = place / "array" / "logs" / "score-00002-of-00008.txt"
    assert "ends: status 2" in log.read_text() and not (place / "array" / "log.txt").exists()


def test_what_was_said_before_the_folder_was_known_is_there(tmp_path, log):
    log_file.end(None)
    logger = logging.getLogger("tif_jax.test")
    handler = log_file.Handler()
    logger.addHandler(handler)
    logger.warning("early")
    log_file.begin(log, "again")
    logger.warning("a line\nand another")
    logger.removeHandler(handler)
    assert re.search(r"\(again\)\n\S+ \S+ \d+ early\n\S+ \S+ \d+ a line\n    and another\n$", log.read_text())


def test_a_bar_on_a_terminal_leaves_lines_in_the_log(log, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("score", 8, "image") as progress:
        progress.update(4)
        progress.update(4, loss=0.5)
    assert re.search(r"score: 8 of 8 image, loss 0\.5, 00:00 left\n$", log.read_text())


def test_it_has_a_bound(tmp_path, log, monkeypatch):
    monkeypatch.setattr(log_file, "_MOST_BYTES", 1000)
    for number in range(100):
        log_file.note(f"line {number}")
    now, before = log.read_text(), (tmp_path / "log.1.txt").read_text()
    assert len(now) < 1100 and len(before) < 1100 and now.endswith("line 99\n") and "line 7" in before + now
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "log.1.txt"}


def test_what_two_processes_write_is_not_lost(tmp_path, log, monkeypatch):
    """One finds that the other has begun a new file."""
    monkeypatch.setattr(log_file, "_MOST_BYTES", 1000)
    other = log_file._Log(log)
    for number in range(40):
        log_file.note(f"here {number}")
    before = (tmp_path / "log.1.txt").read_text()
    other.write("there")  # into the old one, which is too long
    other.write("there again")
    assert (tmp_path / "log.1.txt").read_text().startswith(before) and log.read_text().endswith("there again\n")


def test_a_log_that_can_not_be_written_ends_nothing(place, capsys):
    (place / "run" / "log.txt").unlink()
    (place / "run" / "log.txt").mkdir()
    assert tif("score") == 0
    assert "no log: can not write run/log.txt (Is a directory)" in capsys.readouterr().err
    (place / "run" / "log.txt").rmdir()
    (place / "run" / "log.txt").symlink_to("/dev/full")
    assert tif("score") == 0
    assert capsys.readouterr().err == ""
