"""A program for tests that stop or kill a whole experiment: a tiny `tif run` in the current folder.

`forks.Server` runs it: run(STAGE) waits in the middle of that stage to be killed, run("") goes to the end. run("", BYTES)
can write no file that is longer, and has a thread that never ends, as Orbax has after a failed write.
"""

import os
import resource
import sys
import threading
import time
from pathlib import Path

from tif_jax.__main__ import program
from tif_jax.commands import benchmark, evaluate
from tif_jax.commands import run as command
from tif_jax.data.digits import Digits
from tif_jax.training.checkpoints import Checkpoints

TRAINED = ("backbone", "filter", "adapter", "finetune")
STAGES = (
    "backbone", "evaluate backbone", "score", "score heldout", "filter", "rank", "adapter", "finetune", "evaluate",
    "benchmark", "report",
)  # fmt: skip
LINE = ["run", "--config=config.py", "--workdir=run"]
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    recipe = dict(batch_size=8, learning_rate=1e-3, warmup_epochs=0.5, save_every=2)
    return ConfigDict(dict(
        data=dict(name="digits", image_size=32, num_train=32, num_test=16, num_validation=8, crop_fraction=1.0,
                  augment="none", num_workers=2),
        backbone=dict(recipe, num_epochs=1.0,
                      model=dict(image_size=32, patch_size=16, width=16, depth=1, num_heads=2, num_classes=10)),
        score=dict(estimator="sampled", num_samples=1, batch_size=8),
        reducer=dict(name="tif", keep_ratio=0.5, adapter=4),
        filter=dict(recipe, num_epochs=1.0), adapter=dict(recipe, num_epochs=1.0),
        finetune=dict(recipe, num_epochs=1.0),
        evaluate=dict(batch_size=8, num_images=8, num_samples=1),
        benchmark=dict(batch_size=8, reducers=("tif",)),
    ))
"""


def prepare():
    """What every run would spend seconds on: scikit-learn is imported, and its digits are drawn."""
    Digits("train", 1)


def run(stage, limit=""):
    """Ends as `tif run` does."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        threading.Thread(target=threading.Event().wait).start()
    in_the_middle(stage, wait, setattr)
    sys.argv[1:] = LINE
    program()


def wait():
    Path("waits").touch()
    time.sleep(600)


def in_the_middle(stage, act, setattr):
    """Calls act() once while the stage runs: as a first file of its is about to get its name, or after a first checkpoint.

    setattr: as pytest.MonkeyPatch has it.
    """
    now, acted = [], []

    def once():
        if now == [stage] and not acted:
            acted.append(stage)
            act()

    def named(name, function):
        def wrapped(*arguments, **options):
            now.append(arguments[0] if name == "train" else name)
            try:
                return function(*arguments, **options)
            finally:
                now.pop()

        return wrapped

    def replace(*paths, whole=os.replace):
        if stage not in TRAINED:  # they begin with a note of what is trained
            once()
        return whole(*paths)

    def save(*arguments, whole=Checkpoints.save):
        whole(*arguments)
        once()

    for owner, attribute, name in (
        (command, "train", "train"), (evaluate, "backbone", "evaluate backbone"), (command, "score_training", "score"),
        (command, "score_heldout", "score heldout"), (evaluate, "ranking_table", "rank"),
        (evaluate, "finetuned", "evaluate"), (command, "benchmark", "benchmark"), (command, "write_report", "report"),
    ):  # fmt: skip
        setattr(owner, attribute, named(name, getattr(owner, attribute)))
    setattr(os, "replace", replace)
    setattr(Checkpoints, "save", save)
    setattr(benchmark, "_SECONDS_PER_ROUND", 0.02)


def line_of(folder: Path) -> list[str]:
    """The config in the folder, which then is a place to start in."""
    (folder / "config.py").write_text(CONFIG)
    return LINE
