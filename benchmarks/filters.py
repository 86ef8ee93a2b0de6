"""Token filters side by side, each a config: what they know of impact, and how the network fares with what they keep.

    python -m benchmarks.filters --workdir runs/filters --scored runs/label runs/teacher --seeds 3 \\
        --judge "validation: configs/imagenette.py" "all classes: configs/imagenette.py:photographs" -- \\
        "paper: configs/imagenette.py:paper" "ours: configs/imagenette.py" \\
        "wider: configs/imagenette.py --config.reducer.hidden=(384,192)"

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

import numpy as np
from ml_collections import ConfigDict

from tif_jax import cost, load
from tif_jax.__main__ import use_all_cores
from tif_jax.commands import evaluate, score, train
from tif_jax.commands.benchmark import with_reducer
from tif_jax.commands.evaluate import KEEP_RATIOS
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.impact import shards
from tif_jax.models import Model
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


def read_filter(text: str) -> tuple[str, ConfigDict]:
    name, _, rest = text.partition(": ")
    config, *overrides = rest.split()
    return name, config_file.load(config, overrides)


def of_seed(config: ConfigDict, seed: int) -> ConfigDict:
    return with_reducer(config, "tif", config.seed + seed)


def folder_of(name: str, config: ConfigDict, arguments: argparse.Namespace) -> Path:
    """Of one filter's seeds: a workdir with links to backbone and impacts."""
    folder = arguments.workdir / re.sub(r"\W+", "-", name)
    folder.mkdir(parents=True, exist_ok=True)
    scored = next(place for place in arguments.scored if fits(place, config))
    for part in ("backbone", "impact"):
        if not (folder / part).exists():
            (folder / part).symlink_to((scored / part).absolute())
    return folder


def parts_of(config: ConfigDict) -> str:
    """What the filter does not do alone."""
    then = config.reducer.get("then")
    adapter = f" with adapter {config.reducer.adapter}" if train.has_adapter(config) else ""
    return adapter + (f" then {then.name} {then.get('num_merged', '')} at equal GMAC" if then else "")


def fits(scored: Path, config: ConfigDict) -> bool:
    manifest = records.read(scored / "impact" / "manifest.json")
    recipe = config.score
    same = {"target": recipe.target, "views": recipe.views}
    return all(manifest[key] == value for key, value in same.items()) and (
        recipe.estimator != "sampled" or manifest["estimator"].get("num_samples") == recipe.num_samples
    )


def judged(name: str, config: ConfigDict, filters: dict[str, ConfigDict], arguments: argparse.Namespace) -> str:
    folder = arguments.workdir / ("judge-" + re.sub(r"\W+", "-", name))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "backbone").exists():
        (folder / "backbone").symlink_to((arguments.scored[0] / "backbone").absolute())
    score.score_heldout(config, folder)
    rows: dict[str, list[dict[str, Any]]] = {}
    added: dict[str, float] = {}
    for label, of_filter in filters.items():
        whole = label + parts_of(of_filter)
        added |= {label: added_gmac(of_filter, adapter=0), whole: added_gmac(of_filter)}
        for seed in range(arguments.seeds):
            found = rankings(label, of_seed(of_filter, seed), config, folder, baselines=not rows, arguments=arguments)
            metrics = found["rankings"]
            if "random" in metrics:
                rows |= {other: [row] for other, row in metrics.items() if other not in ("filter", WHOLE)}
                unreduced, number = found["unreduced"], found["num_images"]
            rows.setdefault(label, []).append(metrics["filter"])
            if WHOLE in metrics:
                rows.setdefault(whole, []).append(metrics[WHOLE])
    lines = [
        f"{number} images of {name}; unreduced: cross-entropy {unreduced['cross_entropy']:.3f}, top-1 "
        f"{unreduced['top1']:.3f}. Each keep: cross-entropy / top-1 / agreement ± standard deviation over the seeds; one "
        f"standard error of an agreement of .8 is {(0.16 / number) ** 0.5:.3f}.",
        "",
        "| ranking | MMAC | AUC | rho(label) | rho(teacher) | " + " | ".join(f"keep {k:g}" for k in KEEP_RATIOS) + " |",
        "|---" * (5 + len(KEEP_RATIOS)) + "|",
    ]
    middle = str(KEEP_RATIOS[1])
    for label, of_seeds in sorted(rows.items(), key=lambda item: mean(item[1], "keep", middle, "agreement")):
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


def rankings(
    label: str,
    of_filter: ConfigDict,
    judge: ConfigDict,
    folder: Path,
    *,
    baselines: bool,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """`evaluate.judge_rankings` of one filter and seed, fitted if need be."""
    workdir = folder_of(label, of_filter, arguments)
    train.train("filter", of_filter, workdir)
    directory = train.filter_directory(of_filter, workdir)
    file = directory / f"{folder.name}{'-with-baselines' * baselines}.json"
    if (stored := records.read(file)) is not None:
        return stored
    budgets = {ratio: gmac_alone(directory, ratio) for ratio in KEEP_RATIOS}
    others = {}
    for name in MERGERS if baselines else ():
        reduced = {k: within_budget(workdir, name, budget=gmac) for k, gmac in budgets.items()}
        others |= {(f"{name} at equal GMAC", k): model for k, model in reduced.items() if model is not None}
    whole = directory
    if train.has_adapter(of_filter):
        train.train("adapter", of_filter, workdir)
        whole = train.adapter_directory(of_filter, workdir)
    if then := of_filter.reducer.get("then"):
        others |= {(WHOLE, k): load(whole, budget=gmac, then=then.to_dict()) for k, gmac in budgets.items()}
    elif whole != directory:
        others |= {(WHOLE, k): load(whole, keep_ratio=k) for k in KEEP_RATIOS}
    model = load(directory, keep_ratio=KEEP_RATIOS[0], then=None)
    expected = train.expected_manifest(judge, model)
    trained_on = shards.read_impact(workdir).impact
    oracles = evaluate.read_oracles(folder, expected)
    metrics = evaluate.judge_rankings(model, judge, oracles, trained_on, baselines=baselines, others=others)
    records.write(file, metrics)
    return metrics


def finetuned(filters: dict[str, ConfigDict], arguments: argparse.Namespace) -> str:
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
        fitted = train.filter_directory(of_seed(config, 0), workdir)
        cells = [name]
        for ratio in [1.0] if name == "full" else arguments.finetune:
            at_cost = ConfigDict(config.to_dict())  # its keep_ratio still says what labels are for
            at_cost.reducer.budget = gmac_alone(fitted, ratio)
            runs = [with_reducer(at_cost, entry, config.seed + seed) for seed in range(arguments.seeds)]
            reducer, options = train.reducer_options(runs[0])
            possible = within_budget(workdir, reducer, **options) is not None
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


def finetuned_once(run: ConfigDict, workdir: Path) -> dict[str, Any]:
    stages = ["filter"] * train.is_fitted(run) + ["adapter"] * train.has_adapter(run) + ["finetune"]
    for stage in stages:
        train.train(stage, run, workdir)
    return records.read(train.finetune_directory(run, workdir) / "metrics.json") or evaluate.finetuned(run, workdir)


def outcome(found: Sequence[dict[str, Any]]) -> str:
    """The cell of runs that differ in their seed."""
    top1, loss = (with_spread([metrics[key] for metrics in found]) for key in ("top1", "loss"))
    return f"{top1}; {loss}; {mean(found, 'gmac'):.3f}; {mean(found, 'before', 'top1'):.3f}"


def added_gmac(config: ConfigDict, **changed: Any) -> float:
    """Multiply-adds in front of the first block: of filter and adapter."""
    given = config.reducer.to_dict() | changed
    options = {key: given[key] for key in ("features", "hidden", "adapter") if key in given}
    model = load(config.backbone.init_from, reducer="tif", keep_ratio=1.0, **options)
    return cost(model).gmac - cost(load(config.backbone.init_from, reducer="full")).gmac


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
