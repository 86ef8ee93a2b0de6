"""`tif score` as a job that is killed, sent SIGTERM, started twice, divided, and finds its folder damaged."""

import itertools
import os
import random
import shutil
import signal
import socket
import time

import jax.numpy as jnp
import numpy as np
import pytest
from cases import mostly_long
from forks import Server
from scorer import NUM_PARTS, ROWS_PER_PART

from tif_jax.data import open_source
from tif_jax.errors import Preempted, WorkError
from tif_jax.experiment import config as config_file
from tif_jax.experiment import scoring
from tif_jax.experiment.schema import Experiment
from tif_jax.impact import job as scoring_job
from tif_jax.impact import shards
from tif_jax.models import create_model
from tif_jax.models.params import params_of
from tif_jax.runtime import files
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.state import State
from tif_jax.weights.loading import load

NUM_IMAGES = ROWS_PER_PART * NUM_PARTS
MODEL = dict(image_size=32, patch_size=8, width=16, depth=1, num_heads=2, num_classes=10)
CONFIG = f"""
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        data=dict(
            name="digits", image_size=32, num_train={NUM_IMAGES}, num_test=10, crop_fraction=1.0, num_workers=2
        ),
        backbone=dict(model={MODEL}),
        score=dict(estimator="exact", mask="zero", target="label", batch_size=4),
    ))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir with a backbone and its impacts, scored without disturbance."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "config.py").write_text(CONFIG)
    _write_backbone(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_ROWS_PER_PART", ROWS_PER_PART)
        scoring.score_training(_config(), folder / "run")
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a job in the current folder."""
    # A job that is killed may leave half a program in its cache.
    cache = str(tmp_path_factory.mktemp("cache"))
    server = Server("scorer", JAX_COMPILATION_CACHE_DIR=cache, JAX_NUM_CPU_DEVICES="2")
    numbers = itertools.count()
    yield lambda *arguments: server.start(*arguments, log=f"log-{next(numbers)}")
    server.close()


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A folder of its own with config and backbone, where nothing is scored yet, as the current one."""
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "backbone").symlink_to(finished / "run" / "backbone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring, "_ROWS_PER_PART", ROWS_PER_PART)
    return tmp_path


def _write_backbone(workdir):
    model = create_model(MODEL)
    with Checkpoints(workdir / "backbone" / "checkpoints") as checkpoints:
        checkpoints.save(
            State(jnp.zeros((), jnp.int32), params_of(model), ()), {"model": MODEL, "reducer": {"name": "full"}}, {}
        )


def _config(*overrides) -> Experiment:
    namespace: dict = {}
    exec(CONFIG, namespace)
    return config_file.from_settings(namespace["get_config"]().to_dict(), overrides)


def _noting(scored):
    """What makes the columns of a batch, and notes in `scored` which examples they are of."""
    whole = scoring_job._columns
    return lambda batch, *rest: scored.append(batch["index"]) or whole(batch, *rest)


def written(place) -> list[int]:
    return list(map(int, (place / "written").read_text().split())) if (place / "written").exists() else []


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.log.read_text()
        time.sleep(0.002)


def assert_all_scored(place, finished):
    table, expected = shards.read_impact(place / "run"), shards.read_impact(finished / "run")
    for name, column in vars(expected).items():
        if name in ("loss", "impact"):  # batches and devices differ
            np.testing.assert_allclose(getattr(table, name), column, atol=1e-6)
        else:
            np.testing.assert_array_equal(getattr(table, name), column)
    assert not list((place / "run" / "impact").glob(".*"))


def _kill_and_go_on(start, place, finished, num_kills, rng):
    """Kills the job a random moment after it has begun to write; nothing finished is done again, nothing is lost."""
    for _ in range(num_kills):
        size = (place / "written").stat().st_size if (place / "written").exists() else 0
        process = start()
        wait_for(lambda size=size: (place / "written").exists() and (place / "written").stat().st_size > size, process)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.wait()
        if len(written(place)) == NUM_PARTS:
            break
    process = start()
    assert process.wait() == 0, process.log.read_text()
    # A kill between a part and its line in the list leaves a part that is not listed, but never one listed twice.
    assert len(set(written(place))) == len(written(place)) >= NUM_PARTS - num_kills
    assert_all_scored(place, finished)


def test_killed_at_any_moment(start, place, finished):
    _kill_and_go_on(start, place, finished, num_kills=3, rng=random.Random(0))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_many_moments(start, place, finished, seed):
    _kill_and_go_on(start, place, finished, num_kills=4, rng=random.Random(seed))


def test_what_a_killed_job_left_beside_a_finished_part_goes(place, finished):
    scoring.score_training(_config(), place / "run")
    for name in (".part-00004-of-00010.lock", ".part-00004-of-00010.begun"):
        (place / "run" / "impact" / name).touch()
    scoring.score_training(_config(), place / "run")
    assert_all_scored(place, finished)


def test_sigterm_finishes_the_chunk_keeps_it_and_exits_75(start, place, finished):
    process = start()
    begun = lambda: list((place / "run" / "impact").glob(".*.begun"))  # noqa: E731
    wait_for(begun, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    *_, line = process.log.read_text().splitlines()
    assert line.startswith("tif score: stopped") and "run the same command again" in line
    (path,) = begun()  # the first half of that part's rows is not scored again
    part = int(path.name.removeprefix(".part-").split("-")[0])
    rows = shards.read_begun(place / "run" / "impact", part, NUM_PARTS)
    assert rows is not None and len(rows["index"]) in (4, 8)
    scored = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_job, "_columns", _noting(scored))
        scoring.score_training(_config(), place / "run")
    assert not set(np.concatenate([*scored, []])) & set(rows["index"])
    assert_all_scored(place, finished)


def test_two_jobs_started_on_one_folder_share_the_work(start, place, finished):
    processes = [start(), start()]
    statuses = [process.wait() for process in processes]
    messages = [process.log.read_text() for process in processes]
    assert statuses == [0, 0], messages
    assert sorted(written(place)) == list(range(1, NUM_PARTS + 1))
    assert_all_scored(place, finished)


def test_a_job_waits_for_parts_that_another_has_locked(start, place, finished):
    (place / "run" / "impact").mkdir()
    other = start("lock", 2)
    wait_for((place / "locked").exists, other)
    job = start()
    wait_for(lambda: len(written(place)) == NUM_PARTS - 1, job)
    assert job.poll() is None and 2 not in written(place)
    other.kill()  # a lock ends with its process
    other.wait()
    assert job.wait() == 0
    assert "another job is scoring parts [2]; waiting for it" in job.log.read_text()
    assert_all_scored(place, finished)


def test_parts_of_an_array_job_need_no_order(place, finished):
    for k in (2, 3, 1):
        scoring.score_training(_config(f"--config.score.part={k}/3"), place / "run")
    assert_all_scored(place, finished)


def test_two_processes_of_one_run_take_half_each(start, place, finished):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = (f"--coordinator=localhost:{port}", "--num_processes=2")
    processes = [start(*flags, f"--process_id={k}") for k in range(2)]
    statuses = [process.wait() for process in processes]
    messages = [process.log.read_text() for process in processes]
    assert statuses == [0, 0], messages
    assert f"{NUM_PARTS // 2} of {NUM_PARTS // 2} parts to score" in messages[0]
    assert "parts to score" not in messages[1]  # one tells what all do
    assert sorted(written(place)) == list(range(1, NUM_PARTS + 1))
    assert_all_scored(place, finished)


def test_processes_take_parts_in_turn(monkeypatch, tmp_path):
    monkeypatch.setattr("jax.process_count", lambda: 3)
    shares = []
    for k in range(3):
        monkeypatch.setattr("jax.process_index", lambda k=k: k)
        shares.append(list(scoring._parts("", 10 * scoring._ROWS_PER_PART, tmp_path)[0]))
    assert shares == [[1, 4, 7, 10], [2, 5, 8], [3, 6, 9]]


@pytest.mark.parametrize("damage", mostly_long(["removed json", "flipped byte", "removed", "truncated"], short=(0, 1)))
def test_a_damaged_part_alone_is_scored_again(place, finished, damage, monkeypatch, caplog):
    scoring.score_training(_config(), place / "run")
    path = place / "run" / "impact" / f"part-00003-of-{NUM_PARTS:05}.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage.startswith("removed"):
        (path.with_suffix(".json") if damage == "removed json" else path).unlink()
    else:
        path.write_bytes(data if damage == "flipped byte" else data[:-5])
    again = []
    monkeypatch.setattr(shards, "write_part", lambda *a, whole=shards.write_part: again.append(a[1]) or whole(*a))
    scoring.score_training(_config(), place / "run")
    assert again == [3]
    assert ("part-00003" in caplog.text and "is damaged" in caplog.text) == (not damage.startswith("removed"))
    assert_all_scored(place, finished)


def test_damaged_rows_of_a_begun_part_are_scored_again(place, finished, caplog):
    directory = place / "run" / "impact"
    table = shards.read_impact(finished / "run")
    columns = {name: column[:3] for name, column in vars(table).items()}
    directory.mkdir()
    shutil.copy(finished / "run" / "impact" / "manifest.json", directory)
    (directory / ".part-00001-of-00010.parquet.0123.tmp").touch()  # of a job that was killed while it wrote
    (directory / "..part-00001-of-00010.begun.0123.tmp").touch()
    shards.write_begun(directory, 1, NUM_PARTS, columns)
    path = directory / ".part-00001-of-00010.begun"
    path.write_bytes(path.read_bytes()[:-1])
    scoring.score_training(_config(), place / "run")
    assert "its rows are scored again" in caplog.text
    assert_all_scored(place, finished)


def test_a_full_disk_loses_nothing_that_is_finished(place, finished, monkeypatch):
    write, count = files.write, itertools.count(1)

    def full(path, data, **options):
        if next(count) > 6:
            raise WorkError(f"cannot write {path}: No space left on device")
        write(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        with pytest.raises(WorkError, match="No space left"):
            scoring.score_training(_config(), place / "run")
    left = shards.missing_parts(place / "run" / "impact", NUM_PARTS)
    assert 0 < len(left) < NUM_PARTS
    scoring.score_training(_config(), place / "run")
    assert_all_scored(place, finished)


def test_a_finished_job_needs_no_device_and_no_right_to_write(place, monkeypatch):
    scoring.score_training(_config(), place / "run")
    monkeypatch.setattr(scoring_job, "Scorer", None)
    monkeypatch.setattr(files, "write", None)
    scoring.score_training(_config(), place / "run")


def test_a_kept_minute(place, finished, monkeypatch):
    """The rows of each batch are kept once the time has come; an error afterwards costs the next batch alone."""
    monkeypatch.setattr(scoring_job, "_SECONDS_BETWEEN_SAVES", 0)
    batches = []

    def fails(*arguments, whole=scoring_job._columns):
        if len(batches) == 5:
            raise WorkError("the machine is gone")
        batches.append(arguments[0]["index"])
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(scoring_job, "_columns", fails)
        with pytest.raises(WorkError, match="gone"):
            scoring.score_training(_config(), place / "run")
    monkeypatch.setattr(scoring_job, "_columns", _noting(batches))
    scoring.score_training(_config(), place / "run")
    seen = np.concatenate(batches)
    assert len(np.unique(seen)) == len(seen) == NUM_IMAGES
    assert_all_scored(place, finished)


def test_sigterm_in_process(place, monkeypatch):
    """Between two parts as well; afterwards SIGTERM means what it did before."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        shards, "write_part", lambda *a, whole=shards.write_part: (whole(*a), os.kill(os.getpid(), signal.SIGTERM))
    )
    with pytest.raises(Preempted):
        scoring.score_training(_config(), place / "run")
    assert len(shards.missing_parts(place / "run" / "impact", NUM_PARTS)) == NUM_PARTS - 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_progress_says_speed_and_wait(place, caplog):
    caplog.set_level("INFO")
    scoring.score_training(_config(), place / "run")
    said = "images_per_second", "masked_forwards_per_second", "data_wait", "left", "masked images at once on each"
    assert [text for text in said if text not in caplog.text] == []


def test_another_number_of_images_is_another_job(place):
    scoring.score_training(_config(), place / "run")
    config = _config(f"--config.score.num_images={NUM_IMAGES - 1}")
    with pytest.raises(ValueError, match="num_images is 80 there, 79 here"):
        scoring.score_training(config, place / "run")


def test_the_dtype_follows_the_device_and_the_estimator(monkeypatch):
    assert scoring._dtype("", "sampled") == "float32" and scoring._dtype("bfloat16", "exact") == "bfloat16"
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert scoring._dtype("", "sampled") == scoring._dtype("", "gradient") == "bfloat16"
    assert scoring._dtype("", "exact") == "float32"


def test_impacts_fit_the_filter(finished):  # what `tif train` asks for is what `tif score` writes
    source = open_source(_config().data, "train")
    expected = scoring.expected_manifest(_config(), load(finished / "run" / "backbone"), source)
    assert shards.read_impact(finished / "run", expected=expected).impact.shape == (80, 16)
