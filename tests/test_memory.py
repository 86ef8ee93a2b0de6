"""How many arrays a training stage keeps alive on its devices."""

import gc
from pathlib import Path

import jax
import pytest

from tif_jax.experiment import config, stages
from tif_jax.training import stage as training
from tif_jax.training.checkpoints import Checkpoints

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")
SETTINGS = [
    "--config.data.num_train=26", "--config.data.num_test=16", "--config.data.num_validation=0",
    "--config.data.num_workers=2", "--config.backbone.num_epochs=0.0", "--config.backbone.model.width=64",
    "--config.backbone.model.depth=2", "--config.backbone.model.num_heads=2", "--config.finetune.num_epochs=2.0",
    "--config.finetune.batch_size=13", "--config.reducer.name=norm",
    f"--config.finetune.phases={tuple({'until': i / 10, 'keep_ratio': 1 - i / 10} for i in range(1, 3))}",
]  # fmt: skip


def live_bytes():
    """Of all buffers on devices; arrays that are views of the same buffer count once."""
    gc.collect()
    parts = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    return sum({part.unsafe_buffer_pointer(): part.nbytes for part in parts}.values())


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """A function that fine-tunes, and returns in bytes: the state, what was alive at most before the first step."""
    experiment = config.load(CONFIG, SETTINGS)
    stages.train("backbone", experiment, tmp_path)
    restore, run = Checkpoints.restore, training.run

    def fit():
        before, held, states = live_bytes(), [], []

        def watched_restore(self, template):
            found = restore(self, template)
            held.append(live_bytes() - before)
            return found

        def watched_run(step, state, *rest, **options):
            held.append(live_bytes() - before)
            states.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            return run(step, state, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "restore", watched_restore)
            patch.setattr(training, "run", watched_run)
            stages.train("finetune", experiment, tmp_path)
        return states[0], max(held)

    return fit


def test_neither_phases_nor_a_resume_hold_what_they_do_not_need(fit, tmp_path):
    state, held = fit()  # parameters and two moments, on one device
    assert held < 1.5 * state  # when the state is made, the weights that it begins with are there, too
    checkpoints = tmp_path / "finetune" / "norm-0.25-0" / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    (checkpoints / str(steps[-1])).rename(tmp_path / "aside")
    again, held = fit()
    assert again == state and held < 1.5 * state
