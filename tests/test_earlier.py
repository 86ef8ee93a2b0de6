"""`tif run --from DIR`: what is the same in another workdir is taken over, what is not is made anew and said."""

import json
import shutil

import numpy as np
import pytest
from cases import mostly_long
from PIL import Image
from small_project import contents, last_line, tif

from tif_jax.experiment import config as config_file
from tif_jax.experiment import plan, stages
from tif_jax.experiment.scoring import score_heldout, score_training
from tif_jax.impact import job
from tif_jax.runtime import records
from tif_jax.training.checkpoints import newest


def begin(place, *overrides, wanted=("backbone", "impact")):
    """The first stages of `tif run --workdir=new --from=run`."""
    experiment = config_file.load("config.py", overrides)
    new, run = place / "new", place / "run"
    for stage in wanted:
        if stage == "impact":
            score_training(experiment, new, run)
        else:
            stages.train(stage, experiment, new, run)
    return new


def test_what_is_the_same_is_taken_over_and_outlives_where_it_was(place, caplog):
    (place / "run" / "backbone" / "metrics.jsonl").write_bytes(b"\n" * 2**17)  # is appended to: never linked
    before = contents(place / "run")
    new = begin(place, "--config.finetune.num_epochs=1", "--config.reducer.keep_ratio=0.25")
    assert contents(place / "run") == before
    assert all(
        "is taken over from" in record.message for record in caplog.records if record.message.startswith(str(new))
    )
    for name in ("backbone", "impact"):
        note = records.read(new / name / "taken_from.json")
        assert note["workdir"] == str(place / "run")
        there = {path.relative_to(place / "run"): data for path, data in before.items()}
        here = {path.relative_to(new): data for path, data in contents(new / name).items()}
        same = {path for path, data in here.items() if there.get(path) == data}
        assert {path.name for path in set(here) - same} <= {"taken_from.json", "config.json"}
        assert len(same) >= 3
    assert newest(new / "backbone" / "checkpoints").name == newest(place / "run" / "backbone" / "checkpoints").name
    shutil.rmtree(place / "run")
    assert tif("train --stage=filter --workdir=new --config.reducer.keep_ratio=0.25") == 0


def test_large_files_are_links(place):
    shards = sorted((place / "run" / "impact").glob("*.parquet"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tif_jax.experiment.earlier._LINKED", 1)
        new = begin(place)
    assert [path.samefile(new / "impact" / path.name) for path in shards] == [True] * len(shards)
    assert not (new / "backbone" / "metrics.jsonl").samefile(place / "run" / "backbone" / "metrics.jsonl")


def an_image_more(place):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(place / "data" / "8.png")
    table = place / "data" / "train.csv"
    table.write_text(table.read_text().replace("0.png,0\n", "8.png,0\n"))


def unfinished(place):
    path = newest(place / "run" / "backbone" / "checkpoints") / "config" / "metadata"
    config = records.opened(json.loads(path.read_bytes()))
    path.write_text(json.dumps(records.sealed(config | {"of": config["step"] + 1})))


def no_checkpoint(place):
    shutil.rmtree(place / "run" / "backbone" / "checkpoints")


@pytest.mark.parametrize(
    "change, override, reason",
    mostly_long(
        [
            (None, "--config.backbone.learning_rate=2e-3", "recipe.learning_rate is 0.001 there, 0.002 here"),
            (None, "--config.seed=1", "seed is 0 there, 1 here"),
            (None, "--config.data.crop_fraction=0.5", "data.crop_fraction is 1.0 there, 0.5 here"),
            (None, "--config.backbone.model.width=32", "model.width is 16 there, 32 here"),
            (an_image_more, "--config.seeds=1", "examples is "),
            (unfinished, "--config.seeds=1", "stands at step 10 of 11"),
            (no_checkpoint, "--config.seeds=1", "no checkpoint in"),
        ],
        short=(0, 2, 4, 5, 6),
    ),
)
def test_a_backbone_that_is_not_the_same_is_made_anew(place, caplog, monkeypatch, change, override, reason):
    if change:
        change(place)
    trained = []
    monkeypatch.setattr(stages, "fit", trained.append)
    new = begin(place, override, "--config.backbone.num_epochs=10", wanted=("backbone",))
    told = [record.message for record in caplog.records if "is made anew" in record.message]
    assert len(told) == 1 and f"{new}/backbone is made anew: " in told[0] and reason in told[0]
    assert not new.exists() and len(trained) == 1


@pytest.mark.parametrize(
    "override, reason",
    mostly_long(
        [
            ("--config.score.num_samples=1", "estimator.num_samples is 2 there, 1 here"),
            ("--config.score.target=teacher", "target is 'label' there, 'teacher' here"),
            ("--config.score.num_images=4", "num_images is 8 there, 4 here"),
        ]
    ),
)
def test_impacts_that_are_not_the_same_are_made_anew(place, caplog, monkeypatch, override, reason):
    monkeypatch.setattr(job, "run", lambda job: None)
    new = begin(place, override)
    told = [record.message for record in caplog.records if "is made anew" in record.message]
    assert len(told) == 1 and f"{new}/impact is made anew: " in told[0] and reason in told[0]
    assert [path.name for path in new.iterdir()] == ["backbone"]


def test_impacts_with_a_part_missing_are_made_anew_and_what_is_not_there_is(place, caplog, monkeypatch):
    monkeypatch.setattr(job, "run", lambda job: None)
    next((place / "run" / "impact").glob("part-*.json")).unlink()
    new = begin(place)
    score_heldout(config_file.load("config.py"), new, place / "run")
    told = [record.message for record in caplog.records if "is made anew" in record.message]
    assert "lacks 1 of 1 parts" in told[0] and "there is no" in told[1] and len(told) == 3


def test_what_the_workdir_has_begun_itself_stays(place, caplog):
    shutil.copytree(place / "run" / "backbone", place / "new" / "backbone")
    before = contents(place / "new")
    assert contents(begin(place, wanted=("backbone",))) == before
    assert "taken over" not in caplog.text and "anew" not in caplog.text


@pytest.mark.parametrize(
    "earlier, told",
    [
        ("away", "--from away is not there"),
        ("run", "--from is run, as --workdir is"),
        (".", "--workdir lies in --from ."),
        ("data", "no workdir"),
    ],
)
def test_folders_that_nothing_can_be_taken_from(place, capsys, earlier, told):
    assert tif(f"run --from={earlier}") == 2
    line = last_line(capsys)
    assert told in line and "leave --from out" in line
    assert not (place / "run" / "run.json").exists()


# What a run is to make: run.json


def test_a_plan_names_every_stage_once_and_is_written_anew_only_where_something_has_changed(place):
    overrides = ("--config.benchmark.reducers=('full','tif','prior','tosa')", "--config.reducer.adapter=4")
    experiment = config_file.load("config.py", overrides)
    tif, runs = experiment.reducer, experiment.benchmark.reducers
    both = [experiment.under(entry, seed) for seed in (0, 1) for entry in runs]
    plan.write(experiment, place / "run", both, [experiment.under(tif, seed) for seed in (0, 1)])
    noted = records.read(place / "run" / "run.json")
    of_seed = ["finetune/full-1-{}", "adapter{}", "finetune/tif-0.5,adapter=4-{}", "finetune/prior-0.5-{}"]
    of_seed += ["filter-tosa{}", "finetune/tosa-0.5-{}"]
    expected = ["backbone", "impact", "heldout-label", "heldout-teacher", "filter", "filter-1"]
    for seed, suffix in ((0, ""), (1, "-1")):
        expected += [name.format(seed if name.startswith("finetune") else suffix) for name in of_seed]
    assert [stage["folder"] for stage in noted["stages"]] == expected
    assert [stage["folder"] for stage in noted["stages"] if stage.get("ranked")] == ["filter", "filter-1"]
    path = place / "run" / "run.json"
    before = path.stat().st_mtime_ns
    for change in (None, "damaged"):
        if change:
            path.write_text(change)
        plan.write(experiment, place / "run", both, [experiment.under(tif, seed) for seed in (0, 1)])
        assert (path.stat().st_mtime_ns == before) == (change is None)
    assert records.read(path)["stages"] == noted["stages"]
