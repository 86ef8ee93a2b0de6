"""Token filters side by side, each a config: what they know of impact, and how the network fares with what they keep.

    python -m benchmarks.filters --workdir runs/filters --scored runs/label runs/teacher --seeds 3 \\
        --judge "validation: configs/imagenette.py" "all classes: configs/imagenette.py:photographs" -- \\
        "plain: configs/imagenette.py:plain" "ours: configs/imagenette.py" \\
        "wider: configs/imagenette.py --config.reducer.adapter=96"

NAME: CONFIG [--config.KEY=VALUE ...] is fitted to the impacts of the first of the workdirs --scored (`tif score`) whose
target, num_samples and views are those of its section `score`. There is a table for each config of --judge, on whose
test images both oracles are scored first; default: the first filter's own. Other reducers stand at the GMAC of tif with
the keep_ratio of the column; a filter whose reducer has an adapter or `then` has a row for its ranking alone and one for the
whole, with `then` at equal GMAC. --finetune RATIO,...: also top-1 of filters and baselines, fine-tuned at these ratios.
What is done stays in --workdir: the same command goes on where it stopped, and filters can be added.
"""

import argparse
import functools
import logging
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tif_jax import cost, load
from tif_jax.__main__ import use_all_cores
from tif_jax.commands import evaluate
from tif_jax.commands.evaluate import KEEP_RATIOS
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.experiment.folders import adapter_folder, filter_folder, finetune_folder
from tif_jax.experiment.reducer_entry import read_entry
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.scoring import score_heldout
from tif_jax.experiment.stages import train
from tif_jax.impact import judge, shards
from tif_jax.impact.rankings import filter_ranking, untrained_rankings
from tif_jax.models import Model, ViT, plain_vit
from tif_jax.models.cost import multiply_adds
from tif_jax.runtime import records

BASELINES: dict[str, str | dict[str, Any]] = {
    "full": "full", "random": "random", "prior": "prior", "evit": "evit", "evit, earlier": dict(name="evit", sites=(1, 4, 7)),
}  # fmt: skip
MERGERS = ("evit", "bat", "tome")  # that reduce inside the blocks
WHOLE = "whole"  # a filter with its adapter and what comes then


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filters", nargs="+", metavar="NAME: CONFIG [--config.KEY=VALUE ...]")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--scored", type=Path, nargs="+", required=True)
    parser.add_argument("--judge", nargs="+", default=[], metavar="NAME: CONFIG [...]")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--finetune", type=lambda text: [float(ratio) for ratio in text.split(",")], default=[])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)
    use_all_cores()
    filters = dict(map(read_filter, arguments.filters))
    first = next(iter(filters.values()))
    judges = dict(map(read_filter, arguments.judge)) or {"the test split": first}
    for name, config in judges.items():
        print(judged(name, config, filters, arguments), flush=True)
    if arguments.finetune:
        print(finetuned(filters, arguments), flush=True)


def read_filter(text: str) -> tuple[str, Experiment]:
    name, _, rest = text.partition(": ")
    config, *overrides = rest.split()
    return name, config_file.load(config, overrides)


def of_seed(config: Experiment, seed: int) -> Experiment:
    return config.under(config.reducer, config.seed + seed)


def folder_of(name: str, config: Experiment, arguments: argparse.Namespace) -> Path:
    """Of one filter's seeds: a workdir with links to backbone and impacts."""
    folder = arguments.workdir / re.sub(r"\W+", "-", name)
    folder.mkdir(parents=True, exist_ok=True)
    scored = next(place for place in arguments.scored if fits(place, config))
    for part in ("backbone", "impact"):
        if not (folder / part).exists():
            (folder / part).symlink_to((scored / part).absolute())
    return folder


def parts_of(config: Experiment) -> str:
    """What the filter does not do alone."""
    then = config.reducer.options.get("then")
    adapter = f" with adapter {config.reducer.options['adapter']}" if config.reducer.has_adapter else ""
    return adapter + (f" then {then['name']} {then.get('num_merged', '')} at equal GMAC" if then else "")


def fits(scored: Path, config: Experiment) -> bool:
    manifest = records.read(scored / "impact" / "manifest.json")
    recipe = config.score
    same = {"target": recipe.target, "views": recipe.views}
    return all(manifest[key] == value for key, value in same.items()) and (
        recipe.estimator != "sampled" or manifest["estimator"].get("num_samples") == recipe.num_samples
    )


def judged(name: str, config: Experiment, filters: dict[str, Experiment], arguments: argparse.Namespace) -> str:
    """The table of one config of --judge."""
    folder = arguments.workdir / ("judge-" + re.sub(r"\W+", "-", name))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "backbone").exists():
        (folder / "backbone").symlink_to((arguments.scored[0] / "backbone").absolute())
    score_heldout(config, folder)
    found = with_baselines(filters, config, folder, arguments)
    rows = {label: [row] for label, row in found["rankings"].items()}
    added: dict[str, float] = {}
    for label, of_filter in filters.items():
        whole = label + parts_of(of_filter)
        added |= {label: added_gmac(of_filter, adapter=0), whole: added_gmac(of_filter)}
        workdir = folder_of(label, of_filter, arguments)
        of_seeds = [filter_rows(of_seed(of_filter, i), config, folder, workdir) for i in range(arguments.seeds)]
        rows[label] = [row["filter"] for row in of_seeds]
        if WHOLE in of_seeds[0]:
            rows[whole] = [row[WHOLE] for row in of_seeds]
    return as_table(name, found, rows, added)


def as_table(name: str, found: dict[str, Any], rows: dict[str, list[dict[str, Any]]], added: dict[str, float]) -> str:
    """rows: those of a row's seeds. added: MMAC in front of the first block."""
    number, unreduced, middle = found["num_images"], found["unreduced"], str(KEEP_RATIOS[1])
    lines = [
        f"{number} images of {name}; unreduced: cross-entropy {unreduced['cross_entropy']:.3f}, top-1 "
        f"{unreduced['top1']:.3f}. Each keep: cross-entropy / top-1 / agreement ± standard deviation over the seeds; one "
        f"standard error of an agreement of .8 is {(0.16 / number) ** 0.5:.3f}.",
        "",
        "| ranking | MMAC | AUC | rho(label) | rho(teacher) | " + " | ".join(f"keep {k:g}" for k in KEEP_RATIOS) + " |",
        "|---" * (5 + len(KEEP_RATIOS)) + "|",
    ]

    def agreement(item) -> float:
        return mean(item[1], "keep", middle, "agreement") if middle in item[1][0]["keep"] else 0.0

    for label, of_seeds in sorted(rows.items(), key=agreement):
        cells = [label, f"{1e3 * added[label]:.1f}" if label in added else ""]
        known = "auc" in of_seeds[0]
        for keys in (("auc",), ("spearman", "label"), ("spearman", "teacher")):
            cells.append(f"{mean(of_seeds, *keys):.3f}" if known else "")
        for k in map(str, KEEP_RATIOS):
            cells.append(
                f"{mean(of_seeds, 'keep', k, 'cross_entropy'):.3f} / {mean(of_seeds, 'keep', k, 'top1'):.3f} / "
                f"{with_spread([row['keep'][k]['agreement'] for row in of_seeds])}"
                if k in of_seeds[0]["keep"]
                else "not possible"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def with_baselines(
    filters: dict[str, Experiment], judging: Experiment, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """`evaluate.judged` of the rankings that no filter learnt, and of merging at the GMAC of the first filter alone."""
    file = folder / "baselines.json"
    if (stored := records.read(file)) is not None:
        return stored
    first, config = next(iter(filters.items()))
    workdir = folder_of(first, config, arguments)
    fitted = fit_filter(of_seed(config, 0), workdir)
    model, test = model_and_images(fitted, judging, folder, workdir)

    def rank(models, images, _):
        return untrained_rankings(models[0], images, judging.seed)

    found, _ = judge.over_batches(rank, [model], test.batches("rankings"), test.mesh)
    metrics = evaluate.judged(model, test, found | test.fixed_rankings)
    reduced = {
        (name, k): within_budget(workdir, name, budget=gmac_alone(fitted, k)) for name in MERGERS for k in KEEP_RATIOS
    }
    possible = {key: other for key, other in reduced.items() if other is not None}
    for (name, k), outcome in judge.judge_models(model, test.batches("mergers"), test.mesh, possible).items():
        row = metrics["rankings"].setdefault(f"{name} at equal GMAC", {"keep": {}})
        row["keep"][str(k)] = outcome
    records.write(file, metrics)
    return metrics


def filter_rows(of_filter: Experiment, judging: Experiment, folder: Path, workdir: Path) -> dict[str, Any]:
    """The rows of one filter and seed, fitted if need be: 'filter' for its ranking, and WHOLE if there is more to it."""
    fitted = fit_filter(of_filter, workdir)
    file = fitted / f"{folder.name}.json"
    if (stored := records.read(file)) is not None:
        return stored
    model, test = model_and_images(fitted, judging, folder, workdir)

    def rank(models, images, _):
        return {"filter": filter_ranking(models[0], images)}

    found, _ = judge.over_batches(rank, [model], test.batches("rankings"), test.mesh)
    rows = evaluate.judged(model, test, found)["rankings"]
    if whole := whole_models(of_filter, fitted, workdir):
        outcomes = judge.judge_models(model, test.batches("whole"), test.mesh, whole)
        rows[WHOLE] = {"keep": {str(k): outcome for k, outcome in outcomes.items()}}
    records.write(file, rows)
    return rows


def fit_filter(of_filter: Experiment, workdir: Path) -> Path:
    train("filter", of_filter, workdir)
    return filter_folder(of_filter, workdir)


def model_and_images(fitted: Path, judging: Experiment, folder: Path, workdir: Path) -> tuple[ViT, evaluate.Heldout]:
    model = plain_vit(load(fitted, keep_ratio=KEEP_RATIOS[0], then=None), "a ranking of patches")
    return model, evaluate.heldout(judging, folder, model, shards.read_impact(workdir).impact)


def whole_models(of_filter: Experiment, fitted: Path, workdir: Path) -> dict[float, Model]:
    """By keep ratio: the filter with its adapter and what comes then; none if it stands alone."""
    whole = fitted
    if of_filter.reducer.has_adapter:
        train("adapter", of_filter, workdir)
        whole = adapter_folder(of_filter, workdir)
    if then := of_filter.reducer.options.get("then"):
        return {k: load(whole, budget=gmac_alone(fitted, k), then=then) for k in KEEP_RATIOS}
    return {k: load(whole, keep_ratio=k) for k in KEEP_RATIOS} if whole != fitted else {}


def finetuned(filters: dict[str, Experiment], arguments: argparse.Namespace) -> str:
    """All at the GMAC of tif alone with each ratio; the baselines by the first filter's recipe."""
    lines = [
        "Each keep: top-1; cross-entropy (nats); GMAC; top-1 before fine-tuning. ± standard deviation over the seeds.",
        "",
    ]
    lines += ["| reducer | " + " | ".join(f"keep {k:g}" for k in arguments.finetune) + " |"]
    lines.append("|---" * (1 + len(arguments.finetune)) + "|")
    first = next(iter(filters))
    entries = {name: (entry, first) for name, entry in BASELINES.items()} | {label: ("tif", label) for label in filters}
    for name, (entry, label) in entries.items():
        config = filters[label]
        workdir = folder_of(label, config, arguments)
        fitted = filter_folder(of_seed(config, 0), workdir)
        cells = [name]
        for ratio in [1.0] if name == "full" else arguments.finetune:
            at_cost = config.reducer.replaced(budget=gmac_alone(fitted, ratio))
            if entry != "tif":
                at_cost = read_entry(entry, name, {"budget": at_cost.budget})
            runs = [config.under(at_cost, config.seed + seed) for seed in range(arguments.seeds)]
            possible = within_budget(workdir, at_cost.name, **at_cost.arguments) is not None
            cells.append(outcome([finetuned_once(run, workdir) for run in runs]) if possible else "not possible")
        lines.append(f"| {' | '.join(cells)} |")
        logging.info(lines[-1])
    return "\n".join(lines)


@functools.cache
def gmac_alone(fitted: Path, ratio: float) -> float:
    """What tif costs that does nothing but keep so many patches."""
    return cost(load(fitted, keep_ratio=ratio, then=None)).gmac


def within_budget(workdir: Path, reducer: str, **options: Any) -> Model | None:
    """The backbone with this reducer; None where it can not do with so little."""
    try:
        return load(workdir / "backbone", reducer=reducer, **options)
    except InputError as error:
        logging.info("%s: %s", reducer, error)
        return None


def finetuned_once(run: Experiment, workdir: Path) -> dict[str, Any]:
    stages = ["filter"] * run.reducer.is_fitted_first + ["adapter"] * run.reducer.has_adapter + ["finetune"]
    for stage in stages:
        train(stage, run, workdir)
    return records.read(finetune_folder(run, workdir) / "metrics.json") or evaluate.finetuned(run, workdir)


def outcome(found: Sequence[dict[str, Any]]) -> str:
    """The cell of runs that differ in their seed."""
    top1, loss = (with_spread([metrics[key] for metrics in found]) for key in ("top1", "loss"))
    return f"{top1}; {loss}; {mean(found, 'gmac'):.3f}; {mean(found, 'before', 'top1'):.3f}"


def added_gmac(config: Experiment, **changed: Any) -> float:
    """Multiply-adds in front of the first block: of filter and adapter."""
    adapter = {**config.reducer.options, **changed}.get("adapter", 0)
    model = load(config.backbone.init_from, reducer="tif", keep_ratio=0.5, adapter=adapter)
    x = jax.eval_shape(model.embed, jax.ShapeDtypeStruct((1, *model.image_size, 3), np.float32))
    half = model.tokens(1).index.shape[1] // 2
    return multiply_adds(lambda x: model.reducer.before_blocks(x, model.tokens(1), half)[0], x) / 1e9


def mean(rows: Sequence[dict[str, Any]], *keys: str) -> float:
    values: list[Any] = list(rows)
    for key in keys:
        values = [value[key] for value in values]
    return float(np.mean(values))


def with_spread(values: Sequence[float], digits: int = 3) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
