"""A program for tests that stop, kill or divide a training run: trains a tiny backbone on digits, slowly.

`forks.Server` runs it: run(SECONDS_PER_STEP, FILE, ARGUMENTS... [, "evaluate"]); FILE gets the number of steps begun.
"""

import sys
import time
from pathlib import Path

from tif_jax import __main__ as program
from tif_jax.commands import evaluate, train
from tif_jax.data.digits import Digits
from tif_jax.runtime import mesh as mesh_module
from tif_jax.runtime import processes
from tif_jax.training import stage as training

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")
TINY = [
    f"--config={CONFIG}",
    "--config.data.num_train=64", "--config.data.num_test=20", "--config.data.num_validation=0",
    "--config.data.num_workers=2",
    "--config.backbone.model.width=16", "--config.backbone.model.depth=1", "--config.backbone.model.num_heads=2",
    "--config.backbone.batch_size=16", "--config.evaluate.batch_size=16", "--config.backbone.save_every=5",
    "--config.backbone.ema=0.9", "--config.backbone.num_epochs=10.0",
]  # fmt: skip
NUM_STEPS, SAVE_EVERY = 40, 5  # what these come to


def prepare():
    """What every run would spend seconds on: scikit-learn is imported, and its digits are drawn."""
    for split in ("train", "test"):
        Digits(split, 1)


def run(seconds, file, *argv):
    """Ends as `tif train` does."""
    begun = Path(file)

    def slowly(batch, mesh):
        if processes.is_first():
            count = int(begun.read_text()) + 1 if begun.exists() else 1
            whole = begun.with_suffix(".new")  # whenever this process is killed
            whole.write_text(str(count))
            whole.replace(begun)
        time.sleep(float(seconds))
        return mesh_module.shard(batch, mesh)

    trained = train.train

    def train_and_evaluate(stage, config, workdir):
        trained(stage, config, workdir)
        evaluate.backbone(config, workdir)

    if argv[-1] == "evaluate":
        argv, train.train = argv[:-1], train_and_evaluate
    training.shard = slowly
    sys.argv[1:] = ["train", "--stage=backbone", *TINY, *argv]
    program.program()
