"""Measure the impact of every patch token of a data split: a batch job that goes on where it stopped."""

from tif_jax.commands import _arguments
from tif_jax.experiment.scoring import score_training
from tif_jax.runtime import processes


def main(argv: list[str]) -> None:
    arguments = _arguments.parse("score", __doc__, argv, **processes.FLAGS)
    processes.join(arguments)
    score_training(arguments.config, arguments.workdir)
