"""The whole pipeline: backbone, score, filter, adapter, finetune, evaluate, benchmark, report. Goes on where it stopped."""

import logging
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tif_jax.commands import _arguments, evaluate, score, train
from tif_jax.commands._report import write_report
from tif_jax.commands.benchmark import benchmark, is_measured, with_reducer
from tif_jax.errors import InputError
from tif_jax.runtime import processes, records
from tif_jax.weights.loading import load_with_fields

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    arguments = _arguments.parse("run", __doc__, argv, **processes.FLAGS)
    processes.join(arguments)
    run(arguments.config, arguments.workdir)
    if processes.is_first():
        print((arguments.workdir / "report.md").read_text())


def run(config: ConfigDict, workdir: Path) -> None:
    """Every stage that is needed, in order. A finished one notices that itself, or is known by the file it leaves last."""
    seeds = range(config.seed, config.seed + config.seeds)
    runs = [with_reducer(config, entry, seed) for seed in seeds for entry in config.benchmark.reducers]
    filters = _filters(config, seeds)
    scored = [*filters, *(of_run for of_run in runs if of_run.reducer.name == "prior")]
    labels = [train.label(of_run) for of_run in runs if of_run.seed == config.seed]
    if len(labels) > len(set(labels)) or not labels:
        raise InputError(f"benchmark.reducers is {', '.join(labels) or 'empty'}; name at least one, each once")
    for of_run in runs:  # mistakes that would otherwise come to light after hours
        train.check_reducer(of_run)
    if scored:
        score.check(config, "train", config.score.target)
        train.labelling(scored[0], np.zeros((1, 1)))
    logger.info("stage backbone")
    train.train("backbone", config, workdir)
    _once(workdir / "backbone" / "metrics.json", evaluate.backbone, config, workdir)
    _, fields = load_with_fields(workdir / "backbone", reducer="full")
    for of_run in runs:
        train.check_on_backbone(of_run, fields)
    if scored:
        logger.info("stage score")
        score.score(config, workdir)
    if filters:
        score.score_heldout(config, workdir)
    processes.wait_for_all("scored")
    for of_seed in filters:
        logger.info("stage filter, seed %d", of_seed.seed)
        train.train("filter", of_seed, workdir)
        done = train.filter_directory(of_seed, workdir) / "metrics.json"
        _once(done, evaluate.ranking_table, of_seed, workdir)
    for of_run in runs:
        if train.is_fitted(of_run) and of_run.reducer.name != "tif":
            logger.info("stage filter, %s, seed %d", train.label(of_run), of_run.seed)
            train.train("filter", of_run, workdir)
        directory = train.finetune_directory(of_run, workdir)
        if train.has_adapter(of_run):
            logger.info("stage adapter, %s", directory.name)
            train.train("adapter", of_run, workdir)
        logger.info("stage finetune, %s", directory.name)
        train.train("finetune", of_run, workdir)
        _once(directory / "metrics.json", evaluate.finetuned, of_run, workdir)
    logger.info("stage benchmark")
    if not processes.first_says(is_measured(config, workdir)):
        benchmark(config, workdir)
    logger.info("stage report")
    if processes.is_first():
        write_report(config, workdir, runs, filters[0] if filters else None)
    processes.wait_for_all("reported")


def _filters(config: ConfigDict, seeds: range) -> list[ConfigDict]:
    """For each seed the config that its token filter is fitted by: the config's own reducer, or the first, that is 'tif'."""
    for entry in (config.reducer.name, *config.benchmark.reducers):
        of_seeds = [with_reducer(config, entry, seed) for seed in seeds]
        if of_seeds[0].reducer.name == "tif":
            return of_seeds
    return []


def _once(result: Path, stage, config: ConfigDict, workdir: Path) -> None:
    if processes.first_says(records.read(result) is None):
        stage(config, workdir)
