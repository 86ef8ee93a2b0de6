"""What else can go wrong: full disks, numbers that are none and damaged checkpoints; what is said, and what is kept."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import mostly_long
from small_project import contents, last_line, tif

from tif_jax.data.views import Views


def flipped_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage(checkpoint: Path) -> None:
    """Changes one bit of every file that holds parameters."""
    for path in (checkpoint / "params").rglob("d/*"):
        flipped_byte(path)


def checkpoints(place) -> list[Path]:
    """Of the backbone, oldest first."""
    folder = place / "run" / "backbone" / "checkpoints"
    return sorted((child for child in folder.iterdir() if child.name.isdigit()), key=lambda child: int(child.name))


def test_read_only_workdir(place, capsys, monkeypatch):
    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "touch", refuse)  # permissions would not stop root
    assert tif("score") == 2
    assert "workdir run can not be written (Read-only file system); choose another" in last_line(capsys)


def full_record(self, *_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")  # as a failed write says it: without a file name


def full_checkpoint(self, step, *_, **__):
    # as tensorstore says it
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write 256 bytes: No space left on device [os_error_code='28']")


@pytest.mark.parametrize(
    ("owner", "method", "replacement", "named"),
    [
        (os, "fsync", full_record, "new/backbone/config.json"),
        (ocp.CheckpointManager, "save", full_record, "new/backbone/checkpoints"),
        (ocp.CheckpointManager, "save", full_checkpoint, "new/backbone/checkpoints"),
    ],
)
def test_disk_full(place, capsys, monkeypatch, owner, method, replacement, named):
    before = contents(place / "run")
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, replacement)
        assert tif("train --stage=backbone --workdir=new") == 1
    line = last_line(capsys)
    assert named in line and "No space left on device" in line and "make room" in line
    assert contents(place / "run") == before
    assert not list((place / "new").rglob(".config.json*"))


def test_nan_stops_and_the_same_command_goes_on_once_the_cause_is_gone(place, capsys, monkeypatch):
    view = Views.of_image

    def nan_from_step_5(self, image, position, index, number):
        return view(self, image, position, index, number) + np.float32("nan" if position >= 5 * 8 else 0)

    with monkeypatch.context() as patch:
        patch.setattr(Views, "of_image", nan_from_step_5)
        assert tif("train --stage=backbone --workdir=new") == 1
    line = last_line(capsys)
    assert "loss nan" in line and "step 5" in line and "last checkpoint is intact" in line
    assert {child.name for child in (place / "new" / "backbone" / "checkpoints").iterdir()} == {"5"}
    assert tif("train --stage=backbone --workdir=new") == 0
    assert "steps 5 to 10" in capsys.readouterr().err
    metrics = "backbone/metrics.jsonl"
    assert (place / "new" / metrics).read_text().count("\n") == (place / "run" / metrics).read_text().count("\n") == 10


def test_learning_rate_out_of_reason(place, capsys):
    line = "train --stage=backbone --workdir=new --config.backbone.learning_rate=1e6 --config.backbone.warmup_epochs=0"
    assert tif(line) == 1
    assert "lower the learning rate" in last_line(capsys)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(place, capsys):
    previous, newest = checkpoints(place)
    damage(newest)
    damaged = contents(newest)
    assert tif("train --stage=backbone") == 0
    log = capsys.readouterr().err
    assert f"{newest} is damaged" in log and f"steps {previous.name} to {newest.name}" in log
    aside = place / "run" / "backbone" / f"damaged-{newest.name}"
    assert {path.relative_to(aside): data for path, data in contents(aside).items()} == {
        path.relative_to(newest): data for path, data in damaged.items()
    }
    assert checkpoints(place) == [previous, newest]


def one_flipped_byte(checkpoint):
    flipped_byte(max((checkpoint / "params").rglob("d/*"), key=lambda path: path.stat().st_size))


def other_ratio(checkpoint):
    """A digit of what the checkpoint says of itself."""
    path = checkpoint / "config" / "metadata"
    path.write_text(path.read_text().replace('"keep_ratio": 0.5', '"keep_ratio": 0.6'))


def next_batch(checkpoint):
    """A digit of where it stands in the data."""
    path = checkpoint / "config" / "metadata"
    path.write_text(path.read_text().replace('"next_batch": 10', '"next_batch": 11'))


def no_metadata(checkpoint):
    (checkpoint / "params" / "_METADATA").unlink()


def another_step(checkpoint):
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("5"), checkpoint)


@pytest.mark.parametrize(
    "harm", mostly_long([one_flipped_byte, other_ratio, next_batch, no_metadata, another_step], (0, 2))
)
def test_a_later_stage_does_not_take_the_older_checkpoint_in_silence(place, capsys, harm):
    newest = checkpoints(place)[-1]
    before = contents(newest)
    harm(newest)
    assert contents(newest) != before
    for line in ("evaluate --stage=backbone", "score --workdir=run", "train --stage=filter"):
        assert tif(line) == 2
        said = last_line(capsys)
        assert f"{newest} is damaged" in said and "run the stage that made it again" in said
    assert tif("train --stage=backbone") == 0  # the same definition of whole
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert tif("score") == 0  # the parts that are there are those of the backbone that came out again


def test_no_checkpoint_is_whole(place, capsys):
    for checkpoint in checkpoints(place):
        damage(checkpoint)
    before = contents(place / "run" / "backbone" / "checkpoints")
    for _ in range(2):
        assert tif("train --stage=backbone") == 2
        line = last_line(capsys)
        assert "run/backbone/checkpoints" in line and "is whole" in line and "start anew" in line
        assert contents(place / "run" / "backbone" / "checkpoints") == before
