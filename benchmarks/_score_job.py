"""For `benchmarks.scale`: `tif score` of a tiny model's gradients on digits; prints the peak resident set in bytes.

python -m benchmarks._score_job WORKDIR CONFIG NUM_IMAGES
"""

import resource
import sys
from pathlib import Path

import jax.numpy as jnp

from tif_jax.__main__ import main as tif
from tif_jax.models import create_model
from tif_jax.models.params import params_of
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.state import State

FIELDS = dict(
    image_size=64, patch_size=8, width=96, depth=2, num_heads=3, num_classes=10, pool="mean", class_token=False
)


def main(workdir: str, config: str, num_images: str) -> int:
    with Checkpoints(Path(workdir) / "backbone" / "checkpoints") as checkpoints:
        state = State(jnp.zeros((), jnp.int32), params_of(create_model(FIELDS)), ())
        checkpoints.save(state, dict(model=FIELDS, reducer=dict(name="full")), {})
    flags = [f"--config.score.num_images={num_images}", "--config.score.estimator=gradient"]
    status = tif(["score", "--config", config, "--workdir", workdir, *flags])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
