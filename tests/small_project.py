"""A small project as a user has it, and the program as a user calls it."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tif_jax.__main__ import main

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    recipe = dict(
        batch_size=8, learning_rate=1e-3, final_learning_rate=1e-5, warmup_epochs=1.0, weight_decay=0.05,
        clip_norm=1.0,
    )
    return ConfigDict(dict(
        seed=0, seeds=1, quick=False, dtype="float32",
        data=dict(
            name="image_table", root="data", train_split="train.csv", test_split="test.csv", image_size=16,
            crop_fraction=1.0, augment="none", on_error="raise", num_workers=2,
        ),
        backbone=dict(
            recipe, init_from="", num_heads=0, num_epochs=10.0, label_smoothing=0.0, drop_path=0.0,
            model=dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, num_classes=2, pool="class"),
        ),
        score=dict(
            estimator="sampled", mask="drop", target="label", num_samples=2, keep_ratio=0.5, views=1, num_images=0,
            batch_size=8, chunk=0, dtype="", part="",
        ),
        reducer=dict(name="tif", keep_ratio=0.5),
        filter=dict(recipe, labels="top", rho=0.0, balance=False, num_epochs=2.0),
        finetune=dict(recipe, num_epochs=2.0, label_smoothing=0.0, drop_path=0.0),
        evaluate=dict(batch_size=8, num_images=0, num_samples=2),
        benchmark=dict(batch_size=8, dtype="float32", reducers=("full", "tif")),
        when_quick=dict(),
    ))
"""


def tif(line: str) -> int:
    """`tif LINE`, with the config and workdir of `place` where the line names none."""
    forget_handlers()
    words = line.split()
    for flag, value in (("--config", "config.py"), ("--workdir", "run")):
        if not any(word.startswith(f"{flag}=") for word in words):
            words.append(f"{flag}={value}")
    return main(words)


def prepare(folder: Path) -> Path:
    """Writes a config and 8 images into the folder."""
    (folder / "config.py").write_text(CONFIG)
    (folder / "data").mkdir()
    rows = ["file,label"]
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / "data" / f"{i}.png")
        rows.append(f"{i}.png,{i % 2}")
    for split in ("train", "test"):
        (folder / "data" / f"{split}.csv").write_text("\n".join(rows))
    return folder


def finish(folder: Path) -> Path:
    """`prepare`, and a workdir with a trained backbone and its impacts."""
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert tif("train --stage backbone") == 0
        assert tif("score") == 0
    forget_handlers()
    return folder


def forget_handlers():
    """So that the program logs to the stderr of now, whatever it or pytest did to its logger before."""
    logger = logging.getLogger("tif_jax")
    logger.handlers.clear()
    logger.propagate = True


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last_line(capsys) -> str:
    """The one line in which the program says how it failed; it comes last, and before it there is nothing but the log."""
    *log, line = capsys.readouterr().err.splitlines()
    assert line.startswith("tif") and all(re.match(r"\d\d:\d\d:\d\d ", entry) for entry in log), (log, line)
    return line
