"""`tif report`: of one run and of several, from their files; what can be compared and what can not."""

import json
import shutil

import pytest
from PIL import Image
from small_project import contents, last_line

from tif_jax.__main__ import main
from tif_jax.commands import _comparison
from tif_jax.experiment.predecessors import finished
from tif_jax.runtime import records

MACHINE = {"host": "here", "processor": "Z80", "cores": 2, "system": "CP/M"}
DATA = {"name": "image_table", "root": "/data/birds", "test_split": "test.csv", "image_size": 16, "mean": [0.5] * 3}
FULL = dict(gmac=2.0, tokens_left=4, keep_ratio=1.0)
HALF = dict(gmac=1.0, tokens_left=2, keep_ratio=0.5)


def write_run(workdir, backbone, top1s, machine=MACHINE, device="2 x cpu", config=None, **test):
    """What `tif run` leaves of the reducers full and evit, with these top-1 by seed; weights are of no importance."""
    stages = [{"folder": "backbone", "kind": "train", "seed": 0}]
    settings = {"data": DATA | test.pop("data", {}), "examples": "abc", "dtype": "float32"} | test
    for seed, of_seed in enumerate(top1s):
        for name, counted, top1 in zip(("full-1", "evit-0.5"), (FULL, HALF), of_seed, strict=True):
            folder = workdir / "finetune" / f"{name}-{seed}"
            shutil.copytree(backbone, folder)
            found = {"checkpoint": finished(folder)[1], "settings": settings, "num_images": 8, "top1": top1, **counted}
            records.write(folder / "metrics.json", found | {"before": {"top1": 0.25}})
            stage = {"folder": f"finetune/{folder.name}", "kind": "train", "seed": seed, "label": name}
            stages.append(stage | {"reducer": name.partition("-")[0]})
    (workdir / "backbone").mkdir(exist_ok=True)
    records.write(workdir / "backbone" / "metrics.json", {"settings": settings, "num_images": 8, "top1": 0.5})
    rows = [
        {"label": label, "images_per_second": speed, "batch_size": 8, "dtype": "float32"}
        for label, speed in zip(("full-1", "evit-0.5"), (10.0, 25.0), strict=True)
    ]
    records.write(workdir / "benchmark.json", {"device": device, "machine": machine, "rows": rows})
    plan = dict(command=f"tif run --workdir {workdir.name}", date="2026-01-01", label="evit-0.5", machine=machine)
    plan |= {"config": {"seed": 0, "finetune": {"num_epochs": 2, "save_every": 5}} | (config or {}), "from": None}
    records.write(workdir / "run.json", plan | {"versions": {"jax": "1.2"}, "stages": stages})


@pytest.fixture
def runs(place):
    """Two runs that can be compared: a with two seeds, b with another recipe and one seed."""
    backbone = place / "run" / "backbone"
    write_run(place / "a", backbone, [(0.5, 0.25), (0.75, 0.25)])
    longer = {
        "finetune": {"num_epochs": 4, "save_every": 1},
        "benchmark": {"reducers": [{"name": "evit", "fuse": True}]},
    }
    write_run(place / "b", backbone, [(0.875, 0.625)], config=longer)
    return place


def test_one_run_is_told_from_its_files_alone_and_nothing_is_written(runs, capsys):
    shutil.rmtree(runs / "data")
    before = contents(runs / "a")
    assert main(["report", "a"]) == 0
    text = capsys.readouterr().out
    assert contents(runs / "a") == before
    for row in (
        "| data | image_table `birds` (`test.csv`), 8 test images |", "| command | `tif run --workdir a` |",
        "| begun | 2026-01-01 |", "| machine | 2 x cpu on Z80, 2 cores, here |",
        "| full-1 | 25.00 | 62.50 ± 17.68 | 4 | 2.0000 | 10.0 | 1.00 |",
        "| evit-0.5 | 25.00 | 25.00 | 2 | 1.0000 | 25.0 | 2.50 |",
    ):  # fmt: skip
        assert row in text
    assert "loads as `finetune/evit-0.5-0`" in text and ".png" not in text
    assert main(["report", "a", "--output", "out"]) == 0
    assert {path.name for path in (runs / "out").iterdir()} == {
        "report.md", "report.json", "accuracy_cost.png", "training.png"
    }  # fmt: skip
    assert records.read(runs / "out" / "report.json")["best"] == "finetune/evit-0.5-0"


def test_what_is_not_finished_or_of_another_checkpoint_has_no_row(runs, capsys):
    (runs / "a" / "finetune" / "full-1-1" / "metrics.json").unlink()
    path = runs / "a" / "finetune" / "evit-0.5-1" / "metrics.json"
    metrics = records.read(path)
    records.write(path, metrics | {"checkpoint": metrics["checkpoint"] | {"step": 9}})
    (runs / "a" / "benchmark.json").unlink()
    assert main(["report", "a"]) == 0
    text = capsys.readouterr().out
    assert "Not finished, or not evaluated: `finetune/full-1-1`, `finetune/evit-0.5-1`." in text
    assert "| full-1 | 25.00 | 50.00 | 4 | 2.0000 |" in text and "| machine | Z80, 2 cores, here |" in text


def test_runs_side_by_side(runs, capsys):
    assert main(["report", "a", "b", "--output", "out"]) == 0
    text = capsys.readouterr().out
    for row in (
        "| `a` | full-1 | 25.00 | 62.50 ± 17.68 | 4 | 2.0000 | 10.0 | 1.00 |",
        "| `b` | evit-0.5 | 25.00 | 62.50 | 2 | 1.0000 | 25.0 | 2.50 |",
        "| `finetune.num_epochs` | 2 | 4 |", "| `benchmark.reducers` | None | evit(fuse=True) |",
    ):  # fmt: skip
        assert row in text
    assert "save_every" not in text and "can not be compared" not in text and "over 1 or 2 seeds" in text
    assert "Images/s are of one machine" in text and "![" not in text
    written = (runs / "out" / "comparison.md").read_text()
    for name in ("accuracy_cost", "accuracy_speed", "training"):
        assert f"({name}.png)" in written and Image.open(runs / "out" / f"{name}.png").size[0] > 300
    assert json.loads((runs / "out" / "comparison.json").read_text())["not_comparable"] == []


@pytest.mark.parametrize(
    "differing, told",
    [
        (dict(examples="xyz"), "**Top-1 can not be compared**: the runs were evaluated on "
         "different test images (`a` has 8, `c` has 8)."),
        (dict(data={"mean": [0.0] * 3}), "prepared differently, data.mean: `a` [0.5, 0.5, 0.5], `c` [0.0, 0.0, 0.0]."),
        (dict(data={"image_size": 32}), "prepared differently, data.image_size: `a` 16, `c` 32."),
        (dict(machine=MACHINE | {"processor": "6502"}), "Images/s are not compared: they were measured with "
         "another processor."),
        (dict(device="1 x cpu"), "Images/s are not compared: they were measured with another device."),
        (dict(eigen_crop=True), "not the same pixels count, eigen_crop: `a` False, `c` True."),
    ],
)  # fmt: skip
def test_what_can_not_be_compared_is_said(runs, differing, told):
    write_run(runs / "c", runs / "run" / "backbone", [(0.875, 0.625)], **differing)
    found = _comparison.compare([runs / "a", runs / "c"])
    text = _comparison.markdown_of(found)
    assert told in text
    assert found["same_speed"] == (not {"machine", "device"} & {*differing}) == ("| images/s |" in text)


def test_a_source_without_a_fingerprint_is_known_by_its_config(runs):
    for name, size in (("c", 10), ("d", 10), ("e", 20)):
        write_run(runs / name, runs / "run" / "backbone", [(0.5, 0.5)], examples=None, data={"num_test": size})
    assert not _comparison.compare([runs / "c", runs / "d"])["not_comparable"]
    assert "different test images" in _comparison.compare([runs / "c", runs / "e"])["not_comparable"][0]


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert _comparison._names(paths) == ["x/run", "y/run"] and _comparison._names(paths[:1]) == ["run"]


@pytest.mark.parametrize(
    "line, told",
    [("nothing", "nothing has no run.json"), ("run", "run has no run.json, which `tif run` writes"),
     ("a b ./a", "a folder is named twice"),
     ("a --output a", "--output is 'a'; give a folder of its own"), ("", "required: DIR")],
)  # fmt: skip
def test_what_there_is_no_report_of(runs, capsys, line, told):
    assert main(["report", *line.split()]) == 2
    assert told in last_line(capsys)
