"""`tif status`: how far a run is, from its files alone; of one that runs, one that was killed, and damaged ones."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from small_project import contents, last_line

from tif_jax.__main__ import main
from tif_jax.commands import _progress
from tif_jax.commands.status import as_text, status
from tif_jax.runtime import locks, log_file, records, workdir
from tif_jax.training.checkpoints import newest

PLAN = [
    {"folder": "backbone", "kind": "train", "seed": 0},
    {"folder": "impact", "kind": "score", "seed": 0},
    {"folder": "filter", "kind": "train", "seed": 0},
    {"folder": "finetune/tif-0.5-0", "kind": "train", "seed": 0, "label": "tif-0.5"},
    {"folder": "finetune/full-1-0", "kind": "train", "seed": 0, "label": "full-1"},
]


def write_log(run, *lines, process=1, ended=0.0):
    """Lines as (seconds before now, text), by a process."""
    now = datetime.now(UTC) - timedelta(seconds=ended)
    text = [f"{(now - timedelta(seconds=ago)).strftime(log_file.TIME)} {process} {line}\n" for ago, line in lines]
    (run / "log.txt").write_text("".join(text))


def states(found):
    return {stage["folder"]: (stage["state"], stage["done"], stage["of"]) for stage in found["stages"]}


def test_without_a_plan_it_tells_of_what_there_is(place, capsys):
    before = contents(place / "run")
    assert main(["status", "run"]) == 0
    told = capsys.readouterr().out
    assert contents(place / "run") == before
    assert "run: nobody is at it" in told and "10 of 10 steps" in told and "8 of 8 images" in told
    assert "1 of 1 parts" in told and "(status 0 after" in told and "MB on disk" in told
    assert main(["status", "run", "run", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second and states(first) == {"backbone": ("done", 10, 10), "impact": ("done", 8, 8)}


def test_jax_is_not_imported(place):
    """Which takes seconds."""
    code = "import sys; from tif_jax.__main__ import main; sys.exit(main(['status', 'run']) or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_of_a_run_it_says_who_runs_it_where_it_is_and_how_long_still(place):
    run = place / "run"
    records.write(run / "run.json", {"command": "tif run", "stages": PLAN, "label": "tif-0.5"})
    write_log(
        run,
        (300, "begins: tif run (x)"), (300, "stage backbone"), (200, "stage score"), (150, "stage filter, seed 0"),
        (100, "stage finetune, tif-0.5-0"), (90, f"{run}/finetune/tif-0.5-0: steps 0 to 64 on 2 cpu devices"),
        (10, "tif-0.5-0: 48 of 64 step, loss 0.5, images_per_second 3, 00:40 left"), process=os.getpid(),
    )  # fmt: skip
    shutil.copytree(run / "backbone", run / "filter")
    (run / "finetune" / "tif-0.5-0").mkdir(parents=True)
    with workdir.only_run(run):
        found = status(run)
    assert states(found) == {
        "backbone": ("done", 10, 10), "impact": ("done", 8, 8), "filter": ("done", 10, 10),
        "finetune/tif-0.5-0": ("now", 48, 64), "finetune/full-1-0": ("to do", 0, None),
    }  # fmt: skip
    assert found["running"]["pid"] == os.getpid() and not found["was_killed"] and not found["finished"]
    # 40 s of 10 s ago; of the fine-tuning to come, and of the benchmark, nothing is known.
    assert found["seconds_left"] == pytest.approx(30, abs=3) and found["not_known"] == ["finetune", "benchmark"]
    assert "running: " in as_text(found) and re.search(
        r"time left: about \d\d s, and what is not known yet: finetune", as_text(found)
    )
    assert status(run)["running"] is None and states(status(run))["finetune/tif-0.5-0"] == ("begun", 0, 64)


def test_time_left_is_the_mean_of_its_kind(tmp_path):
    write_log(
        tmp_path,
        (1000, "begins: tif run"), (1000, "stage finetune, a-0"), (900, "ends: status 75"),
        (500, "begins: tif run"), (500, "stage finetune, a-0"), (400, "stage finetune, b-0"), (300, "stage finetune, c-0"),
    )  # fmt: skip
    assert _progress.seconds_of(_progress.entries(tmp_path)) == {"finetune": 150}  # a: 100 + 100, b: 100
    write_log(
        tmp_path,
        (500, "begins: tif run"), (500, "stage backbone"), (499, "run/backbone is taken over from old/backbone"),
        (498, "stage finetune, a-0"), (497, "run/finetune/a-0 is taken over from old/finetune/a-0"),
        (496, "stage finetune, b-0"), (396, "stage benchmark"),
    )  # fmt: skip
    assert _progress.seconds_of(_progress.entries(tmp_path)) == {"finetune": 100}


def test_a_run_that_was_killed(place):
    run = place / "run"
    gone = subprocess.Popen(["true"])
    gone.wait()
    who = {"command": "tif run --x", "host": socket.gethostname(), "pid": gone.pid, "since": "2026"}
    (run / ".lock").write_text(json.dumps(who))
    found = status(run)
    assert found["was_killed"] and found["running"] is None
    assert "stopped, its process is gone; go on with `tif run --x`" in as_text(found)
    (run / ".lock").write_text(json.dumps(who | {"host": "elsewhere"}))
    assert "process" in as_text(status(run)) and "can be seen there alone" in as_text(status(run))


def test_who_holds_a_lock_is_known_without_taking_it(tmp_path):
    path = tmp_path / "lock"
    assert locks.is_held(path) is False
    path.touch()
    assert not locks.is_held(path)
    with locks.lock(path):
        assert locks.is_held(path) is not False


def other_digit(run):
    path = run / "backbone" / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def torn_checkpoint(run):
    (newest(run / "backbone" / "checkpoints") / "config" / "metadata").write_text("{")


def dangling_link(run):
    shutil.rmtree(run / "backbone")
    (run / "backbone").symlink_to("gone")


def no_manifest(run):
    (run / "impact" / "manifest.json").unlink()


def torn_part(run):
    next((run / "impact").glob("part-*.json")).write_text("")


def torn_plan(run):
    (run / "run.json").write_text("{}")


@pytest.mark.parametrize(
    "harm, told",
    [
        (other_digit, "put back a copy, or delete run/backbone"), (torn_checkpoint, "goes on from the one before it"),
        (dangling_link, "a link to gone, which is not there"), (no_manifest, "delete run/impact and score again"),
        (torn_part, "impact: "), (torn_plan, "`tif run` writes it anew"),
    ],
)  # fmt: skip
def test_what_is_broken_is_told_with_the_way_to_go_on(place, capsys, harm, told):
    harm(place / "run")
    assert main(["status", "run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  wrong: ")]
    assert len(lines) == 1 and told in lines[0]


def test_a_stage_without_a_checkpoint_yet_and_one_with_steps_to_go(place):
    run = place / "run"
    path = newest(run / "backbone" / "checkpoints") / "config" / "metadata"
    path.write_text(json.dumps(records.sealed(records.opened(json.loads(path.read_text())) | {"of": 12})))
    assert states(status(run))["backbone"] == ("begun", 10, 12)
    shutil.rmtree(run / "backbone" / "checkpoints")
    assert states(status(run))["backbone"] == ("begun", 10, None)
    next((run / "impact").glob("part-*.json")).unlink()
    assert states(status(run))["impact"] == ("begun", 0, 8)


@pytest.mark.parametrize("name", ["nothing", "data"])
def test_what_is_no_workdir(place, capsys, name):
    assert main(["status", name]) == 2
    assert f"{name} is no " in last_line(capsys)


def test_disk_is_counted_once(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10000)
    used = _progress.bytes_in(tmp_path)
    os.link(tmp_path / "a", tmp_path / "b")
    assert used == _progress.bytes_in(tmp_path) >= 10000


def test_it_is_fast_for_many_parts(tmp_path):
    """A thousand parts, as a million images have."""
    folder = tmp_path / "impact"
    folder.mkdir()
    for part in range(1000):
        (folder / f"part-{part:05}.json").write_text('{"rows": 1}')
        (folder / f"part-{part:05}.parquet").touch()
    records.write(folder / "manifest.json", {"num_images": 1000, "views": 1, "num_parts": 1000})
    began = time.process_time()
    assert states(status(tmp_path)) == {"impact": ("done", 1000, 1000)}
    assert time.process_time() - began < 1
