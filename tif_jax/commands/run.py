"""The whole pipeline: backbone, score, filter, adapter, finetune, evaluate, benchmark, report. Goes on where it stopped."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tif_jax.commands import _arguments, _baselines, evaluate
from tif_jax.commands._report import write_report
from tif_jax.commands.benchmark import benchmark, is_measured
from tif_jax.experiment import plan
from tif_jax.experiment.checks import check_on_backbone
from tif_jax.experiment.earlier import check as check_earlier
from tif_jax.experiment.folders import backbone_folder, filter_folder, finetune_folder
from tif_jax.experiment.predecessors import as_begun, finished, oracles_of
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.scoring import score_heldout, score_training
from tif_jax.experiment.sources import check_splits
from tif_jax.experiment.stages import before_backbone, train
from tif_jax.runtime import processes, records
from tif_jax.runtime.workdir import begin_log, only_run
from tif_jax.training.checkpoints import read_config

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    earlier = dict(
        dest="earlier",
        metavar="DIR",
        help="another workdir: what is finished there and has the same settings is taken over, the rest is made anew",
    )
    arguments = _arguments.parse("run", __doc__, argv, **{"from": earlier}, **processes.FLAGS)
    processes.join(arguments)
    if arguments.earlier is not None:
        arguments.earlier = Path(arguments.earlier).expanduser()
        check_earlier(arguments.earlier, arguments.workdir)
    with only_run(arguments.workdir), plan.kept(arguments.workdir):
        begin_log(arguments.workdir)
        run(arguments.config, arguments.workdir, arguments.earlier)
    if processes.is_first():
        print((arguments.workdir / "report.md").read_text())


def run(experiment: Experiment, workdir: Path, earlier: Path | None = None) -> None:
    """Every stage that is needed, in order. A finished one notices that itself, or is known by the file it leaves last.

    earlier: another workdir, whose finished stages are taken over where they are the same.
    """
    check_splits(experiment, workdir)
    runs, filters = _finetunings(experiment), _filters(experiment)
    imported = experiment.backbone.init_from and not experiment.backbone.is_trained
    if not imported:  # else its file says what it is
        begins = experiment.backbone.init_from or experiment.backbone.head
        fields = before_backbone(experiment)[1] if begins else experiment.backbone.model
        for of_run in runs:
            _check(of_run, fields, workdir)
    plan.write(experiment, workdir, runs, filters, earlier)
    logger.info("stage backbone")
    train("backbone", experiment, workdir, earlier)
    _once(backbone_folder(workdir), evaluate.backbone, experiment, workdir)
    _baselines.make(experiment, workdir)
    if imported:
        fields = read_config(finished(backbone_folder(workdir))[0])["model"]
        for of_run in runs:
            _check(of_run, fields, workdir)
    if filters or any(of_run.reducer.name == "prior" for of_run in runs):
        logger.info("stage score")
        score_training(experiment, workdir, earlier)
    if filters:
        score_heldout(experiment, workdir, earlier)
    processes.wait_for_all("scored")
    for of_seed in filters:
        logger.info("stage filter, seed %d", of_seed.seed)
        train("filter", of_seed, workdir, earlier)
        _once(filter_folder(of_seed, workdir), evaluate.ranking_table, of_seed, workdir, oracles=oracles_of(workdir))
    for of_run in runs:
        _finetune(of_run, workdir, earlier)
    logger.info("stage benchmark")
    if not processes.first_says(processes.is_first() and is_measured(experiment, workdir)):
        benchmark(experiment, workdir)
    logger.info("stage report")
    if processes.is_first():
        write_report(workdir, filters[0] if filters else None)
    processes.wait_for_all("reported")


def _check(of_run: Experiment, fields: Mapping[str, Any], workdir: Path) -> None:
    """That a run fits the backbone, with the amount that its fine-tuning has begun with."""
    check_on_backbone(of_run.under(as_begun(of_run.reducer, finetune_folder(of_run, workdir))), fields)


def _finetune(of_run: Experiment, workdir: Path, earlier: Path | None) -> None:
    """Fine-tunes one reducer, after what it has to learn before, and evaluates it."""
    entry, folder = of_run.reducer, finetune_folder(of_run, workdir)
    if entry.is_fitted_first and entry.name != "tif":
        logger.info("stage filter, %s, seed %d", entry.label, of_run.seed)
        train("filter", of_run, workdir, earlier)
    if entry.has_adapter:
        logger.info("stage adapter, %s", folder.name)
        train("adapter", of_run, workdir, earlier)
    logger.info("stage finetune, %s", folder.name)
    train("finetune", of_run, workdir, earlier)
    _once(folder, evaluate.finetuned, of_run, workdir)


def _finetunings(experiment: Experiment) -> list[Experiment]:
    """One for each seed and each of benchmark.reducers."""
    return [experiment.under(entry, seed) for seed in _seeds(experiment) for entry in experiment.benchmark.reducers]


def _filters(experiment: Experiment) -> list[Experiment]:
    """For each seed the experiment that its token filter is fitted by; none if nothing here has a token filter."""
    entries = (experiment.reducer, *experiment.benchmark.reducers)
    tif = next((entry for entry in entries if entry.name == "tif"), None)
    return [] if tif is None else [experiment.under(tif, seed) for seed in _seeds(experiment)]


def _seeds(experiment: Experiment) -> range:
    return range(experiment.seed, experiment.seed + experiment.seeds)


def _once(
    folder: Path, stage: Callable[[Experiment, Path], object], experiment: Experiment, workdir: Path, **made_from: Any
) -> None:
    """Makes FOLDER/metrics.json, unless it is there, whole, of the checkpoint that there is now and of these data."""
    made_from |= {"checkpoint": finished(folder)[1], "settings": evaluate.settings_of(experiment)}
    if processes.first_says(records.read_result(folder / "metrics.json", made_from) is None):
        stage(experiment, workdir)
