"""What stages are made from, told when it is not what it was: weights, teachers, examples, labels."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from small_project import last_line, tif

import tif_jax
from tif_jax.__main__ import main
from tif_jax.commands import _results
from tif_jax.data import open_source
from tif_jax.data.source import fingerprint
from tif_jax.runtime import records, workdir
from tif_jax.training import stage
from tif_jax.training.checkpoints import newest


def write_weights(place, bias: float):
    """The backbone as a weight file, its head's bias moved."""
    path = place / "weights.safetensors"
    path.unlink(missing_ok=True)
    assert main(["convert", str(place / "run" / "backbone"), str(path)]) == 0
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors["head.bias"] += bias
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


def unfinished(run):
    """The backbone's newest checkpoint says that there are steps to go."""
    path = newest(run / "backbone" / "checkpoints") / "config" / "metadata"
    config = records.opened(json.loads(path.read_bytes()))
    path.write_text(json.dumps(records.sealed(config | {"of": config["step"] + 1})))


def test_an_imported_backbone_is_that_of_its_file(place, capsys):
    imported = "train --stage=backbone --workdir=other --config.backbone.init_from=weights.safetensors"
    write_weights(place, 0.0)
    assert tif(imported) == tif(imported) == 0
    write_weights(place, 1.0)
    assert tif(imported) == 2
    assert "was made with another weights, which has changed" in last_line(capsys)


@pytest.mark.parametrize(
    "line", ["train --stage=backbone --workdir=other --config.backbone.init_from=run/backbone",
             "train --stage=finetune --config.reducer.name=random --config.finetune.distillation.kind=hard "
             "--config.finetune.distillation.teacher=copy/backbone"],
)  # fmt: skip
def test_nothing_begins_with_a_run_that_is_still_training(place, capsys, line):
    shutil.copytree(place / "run", place / "copy")
    unfinished(place / ("copy" if "copy" in line else "run"))
    assert tif(line) == 2
    assert "stands at step" in last_line(capsys)


def test_fine_tuning_goes_on_with_the_same_teacher_alone(place, capsys):
    write_weights(place, 0.0)
    line = (
        "train --stage=finetune --config.reducer.name=random --config.finetune.distillation.kind=hard "
        "--config.finetune.distillation.teacher=weights.safetensors"
    )
    assert tif(line) == tif(line) == 0
    write_weights(place, 1.0)
    assert tif(line) == 2
    assert "made_from.teacher" in last_line(capsys)


def an_image_more(place):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(place / "data" / "8.png")
    table = place / "data" / "train.csv"
    table.write_text(table.read_text().replace("file,label\n", "file,label\n8.png,0\n"))


def other_labels(place):
    table = place / "data" / "train.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([head, *(f"{row[:-1]}{1 - int(row[-1])}" for row in rows)]))


def another_order(place):
    table = place / "data" / "train.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([head, *rows[::-1]]))


@pytest.mark.parametrize("change", [an_image_more, other_labels, another_order])
def test_impacts_are_of_the_examples_that_were_scored(place, capsys, change):
    before = fingerprint(open_source(dict(name="image_table", root="data", train_split="train.csv"), "train"))
    change(place)
    after = fingerprint(open_source(dict(name="image_table", root="data", train_split="train.csv"), "train"))
    assert before != after
    assert tif("train --stage=filter") == 2
    assert "impact in run/impact does not match" in last_line(capsys)


def test_the_folder_may_be_another(place, capsys):
    (place / "data").rename(place / "moved")
    assert tif("train --stage=filter --config.data.root=moved") == 0
    (place / "moved").rename(place / "data")
    capsys.readouterr()
    assert tif("train --stage=filter") == 0
    assert (
        "run/filter: data.root is data now, and was moved; images and labels have the same" in capsys.readouterr().err
    )


@pytest.mark.parametrize("given", [dict(gelu="tanh"), dict(norm_eps=1e-2), dict(num_heads=4)])
def test_what_a_checkpoint_leaves_at_its_default_is_known_too(place, given):
    with pytest.raises(tif_jax.InputError, match="contradicts"):
        tif_jax.load("run/backbone", **given)


def test_rooms_are_attributes_of_the_package():
    assert tif_jax.models.create_model is tif_jax.create_model
    with pytest.raises(AttributeError, match="'nothing'"):
        tif_jax.nothing  # noqa: B018


def test_a_stage_that_several_workdirs_link_to_is_trained_by_one_of_them(place, capsys):
    """As soon as there is something to train: to look at what is finished takes no lock."""
    (place / "other").mkdir()
    (place / "other" / "backbone").symlink_to(place / "run" / "backbone")
    with workdir.only_run(place / "run" / "backbone"):
        assert tif("train --stage=backbone --workdir=other") == 0
        shutil.rmtree(newest(place / "run" / "backbone" / "checkpoints"))
        (being_written := place / "run" / "backbone" / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
        assert tif("train --stage=backbone --workdir=other") == 2
        assert being_written.exists()
    assert "run/backbone is in use by" in last_line(capsys)


def test_a_stage_is_locked_until_its_checkpoints_are_closed(tmp_path, monkeypatch):
    """Whether there are steps to go is known before, or from its last checkpoint, which may be damaged."""
    events = []

    @contextmanager
    def noted(name):
        events.append(name)
        yield
        events.append(f"{name} ends")

    monkeypatch.setattr(stage, "only_run", lambda folder: noted("lock"))
    monkeypatch.setattr(stage, "Checkpoints", lambda folder: noted("open"))
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with stage.opened(tmp_path, 8), stage.opened(tmp_path / "new", 4):
        pass
    assert events == ["lock", "open", "lock", "open", "open ends", "lock ends", "open ends", "lock ends"]
    events.clear()
    with stage.opened(tmp_path, 4):
        pass
    with stage.opened(tmp_path, 4) as (_, lock):
        lock()
        lock()
    assert events == ["open", "open ends", "open", "lock", "open ends", "lock ends"]


def test_rows_of_a_report_that_are_not_of_the_same_images_are_told(caplog):
    row = dict(
        reducer="full", keep_ratio=1.0, tokens_left=4, gmac=1.0, images_per_second=1.0, top1=0.5, top1_before=0.5
    )
    rows = [row | dict(label="full-1", num_images=16), row | dict(label="evit-0.5", num_images=15)]
    assert [row["num_images"] for row in _results.summarise(rows)] == ["16", "15"]
    assert "not of the same images: 15 or 16" in caplog.text
    assert "num_images" not in _results.summarise(rows[:1])[0]


def test_an_imported_backbone_that_guesses_worse_than_chance_is_told(place, capsys):
    write_weights(place, 0.0)
    imported = "--workdir=other --config.backbone.init_from=weights.safetensors"
    assert tif(f"train --stage=backbone {imported}") == tif(f"evaluate --stage=backbone {imported}") == 0
    assert "worse than guessing" not in capsys.readouterr().err
    other_labels(place)
    shutil.copy(place / "data" / "train.csv", place / "data" / "test.csv")
    assert tif(f"evaluate --stage=backbone {imported}") == 0
    assert "worse than guessing" in capsys.readouterr().err
