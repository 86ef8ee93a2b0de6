"""Measure the impact of every patch token of a data split: a batch job that goes on where it stopped."""

from tif_jax.commands import _arguments
from tif_jax.experiment.scoring import score_training
from tif_jax.runtime import processes
from tif_jax.runtime.workdir import begin_log


def main(argv: list[str]) -> None:
    arguments = _arguments.parse("score", __doc__, argv, **processes.FLAGS)
    processes.join(arguments)
    begin_log(arguments.workdir, arguments.config.score.part)
    score_training(arguments.config, arguments.workdir)
