"""`tif run` of a depth model and of a segmentation model, from pictures whose brightness says what they are of."""

import numpy as np
import pytest
from PIL import Image
from small_project import forget_handlers

import tif_jax
from tif_jax.__main__ import main
from tif_jax.commands import benchmark
from tif_jax.runtime import records

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    recipe = dict(batch_size=8, learning_rate=5e-3, warmup_epochs=1.0)
    return ConfigDict(dict(
        seeds=1,
        data=dict(
            name="image_pairs", root={root!r}, test_split="val", image_size=(16, 24), crop_fraction=1.0, augment="none",
            mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), num_workers=2, num_validation=8, {data}
        ),
        backbone=dict(recipe, num_epochs=12.0, model=dict(
            image_size=(16, 24), patch_size=8, width=16, depth=1, num_heads=2, decoder="linear", decoder_blocks=(0,), {model}
        )),
        reducer=dict(name="random", keep_ratio=0.5),
        finetune=dict(recipe, num_epochs=2.0),
        evaluate=dict(batch_size=8),
        benchmark=dict(batch_size=8, reducers=("random",)),
    ))
"""
KINDS = {
    "depth": ("label_scale=0.04", "task='depth', num_classes=0"),
    "segmentation": ("label_kind='segmentation', num_classes=2", "task='segmentation', num_classes=2"),
}


def write(folder, task):
    """Pictures of one grey each: the brighter, the farther, or above the middle the second class."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 40), ("val", 8)):
        for kind in ("image", "depth"):
            (folder / "data" / split / kind).mkdir(parents=True)
        for i, grey in enumerate(rng.integers(20, 236, number)):
            pixels = np.full((16, 24), grey, np.uint8)
            label = pixels.copy() if task == "depth" else np.uint8(pixels > 127)
            if task == "depth":
                label[:2] = 0  # not measured
            Image.fromarray(pixels).convert("RGB").save(folder / "data" / split / "image" / f"{i}.png")
            Image.fromarray(label).save(folder / "data" / split / "depth" / f"{i}.png")
    data, model = KINDS[task]
    (folder / "config.py").write_text(CONFIG.format(root=str(folder / "data"), data=data, model=model))
    return folder


@pytest.fixture(params=["depth", pytest.param("segmentation", marks=pytest.mark.long)], scope="module")
def finished(request, tmp_path_factory):
    """(task, folder) of a finished run."""
    folder = write(tmp_path_factory.mktemp(request.param), request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "_SECONDS_PER_ROUND", 0.02)
        patch.chdir(folder)
        forget_handlers()
        assert main(["run", "--config=config.py", "--workdir=run"]) == 0
    return request.param, folder


def test_a_run_ends_in_a_report_of_its_task(finished, monkeypatch, capsys):
    task, folder = finished
    monkeypatch.chdir(folder)
    run = folder / "run"
    report, text = records.read(run / "report.json"), (run / "report.md").read_text()
    decides = {"depth": "rmse", "segmentation": "miou"}[task]
    heading = {
        "depth": "| reducer | before m | RMSE m | AbsRel | delta1 | tokens left | GMAC | images/s |",
        "segmentation": "| reducer | before % | mIoU % | pixel accuracy % | tokens left | GMAC | images/s |",
    }[task]
    assert heading in text and "top-1" not in text and "accuracy_speed.png" in text
    for name in ("accuracy_cost.png", "accuracy_speed.png", "training.png"):
        assert (run / name).stat().st_size > 0
    sign = -1 if task == "depth" else 1
    (row,) = report["rows"]
    assert (report["best"], report["best_chosen_on"]) == (row["directory"], "validation")
    for found in report["baselines"].values():
        assert sign * report["backbone"][decides] > sign * found[decides]  # it looks at the picture
    main(["report", "run"])
    table = text.split("## Accuracy")[1].split("![")[0].rstrip()
    assert capsys.readouterr().out.split("## Accuracy")[1].startswith(table)
    main(["status", "run"])
    assert {"depth": "RMSE 0.", "segmentation": "mIoU "}[task] in capsys.readouterr().out


def test_again_it_does_no_finished_work(finished, monkeypatch):
    task, folder = finished
    monkeypatch.chdir(folder)
    results = [path for path in (folder / "run").rglob("*.json") if "report" not in path.name]
    times = {path: path.stat().st_mtime_ns for path in results}
    assert folder / "run" / "baselines.json" in times
    forget_handlers()
    assert main(["run", "--config=config.py", "--workdir=run"]) == 0
    assert {path: path.stat().st_mtime_ns for path in results} == times
    model = tif_jax.load(folder / "run")
    assert (model.task, type(model.reducer).__name__) == (task, "Random")
