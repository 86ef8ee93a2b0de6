"""Train one stage: the backbone, the token filter on impact, its adapter, or the ViT with its reducer in front."""

from tif_jax.commands import _arguments
from tif_jax.experiment.stages import STAGES, train
from tif_jax.runtime import processes
from tif_jax.runtime.workdir import begin_log, only_run


def main(argv: list[str]) -> None:
    arguments = _arguments.parse("train", __doc__, argv, stage=dict(required=True, choices=STAGES), **processes.FLAGS)
    processes.join(arguments)
    with only_run(arguments.workdir):
        begin_log(arguments.workdir)
        train(arguments.stage, arguments.config, arguments.workdir)
