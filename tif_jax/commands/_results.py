"""What a run found, from the files that its stages left: the content of report.json, without images or weights."""

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tif_jax.dense_losses import MAX_DEPTH
from tif_jax.errors import InputError
from tif_jax.experiment.earlier import NOTE
from tif_jax.experiment.predecessors import finished
from tif_jax.runtime import log_file, metrics_log, records
from tif_jax.tasks import CLASSIFICATION, DEPTH, Metric, Task, of_metrics

logger = logging.getLogger(__name__)

BASELINES = "baselines.json"
_OF_RUN = ("command", "config", "versions", "machine", "from")  # of run.json


def result_of(workdir: Path) -> dict[str, Any]:
    """What there is by now: rows of the fine-tunings that are finished and evaluated, and speeds if they are measured.

    Raises InputError for a folder that `tif run` has not worked in, or where nothing is evaluated yet.
    """
    plan = records.read(workdir / "run.json", "`tif run` writes it anew") if workdir.is_dir() else None
    if plan is None:
        raise InputError(
            f"{workdir} has no run.json, which `tif run` writes: give the --workdir of a run, or run it there again"
        )
    backbone = records.read(workdir / "backbone" / "metrics.json")
    if backbone is None:
        raise InputError(
            f"{workdir} has no results yet: its backbone is not evaluated; `tif status {workdir}` says more"
        )
    speed = records.read(workdir / "benchmark.json") or {}
    per_label = {row.get("label"): row for row in speed.get("rows", [])}
    planned = [stage for stage in plan["stages"] if "label" in stage]
    task = of_metrics(backbone)
    rows = [row for stage in planned if (row := _row(workdir, stage, per_label.get(stage["label"], {}), task))]
    ranked = next((stage["folder"] for stage in plan["stages"] if stage.get("ranked")), None)
    rankings = records.read(workdir / ranked / "metrics.json") if ranked else None
    best, chosen_on = _best([row for row in rows if row["label"] == plan["label"]], task.headline)
    baselines = records.read(workdir / BASELINES)
    return {
        **{key: plan[key] for key in _OF_RUN},
        "begun": plan["date"],
        "date": time.strftime(log_file.TIME),
        "device": speed.get("device"),
        "speed": speed
        and {
            **{key: speed["rows"][0][key] for key in ("batch_size", "dtype")},
            "device": speed["device"],
            **speed["machine"],
        },
        "test": {"num_images": backbone["num_images"], **backbone["settings"], **_depth_range(baselines)},
        "taken_from": _taken_from(workdir, plan["stages"]),
        "backbone": backbone,
        **({"baselines": baselines["baselines"]} if baselines else {}),
        "rows": rows,
        "filter": _filter_summary(rankings["rankings"]) if rankings else None,
        "rankings": rankings,
        "best": best,
        "best_chosen_on": chosen_on,
        "unfinished": [stage["folder"] for stage in planned if stage["folder"] not in {r["directory"] for r in rows}],
        "left_out": _left_out(workdir, [stage["folder"] for stage in planned]),
    }


def _depth_range(baselines: Mapping[str, Any] | None) -> dict[str, Any]:
    """Which depths count, where the task is depth and its model is noted."""
    model = (baselines or {}).get("model", {})
    return {"max_depth": model.get("max_depth", MAX_DEPTH)} if model.get("task") == DEPTH.name else {}


def _row(workdir: Path, stage: Mapping[str, Any], measured: Mapping[str, Any], task: Task) -> dict[str, Any] | None:
    """Of a fine-tuning; None if it is not finished, or its metrics are of another checkpoint."""
    directory = workdir / stage["folder"]
    metrics = records.read(directory / "metrics.json")
    try:
        if metrics is None or metrics["checkpoint"] != finished(directory)[1]:
            return None
    except InputError:  # it has steps to go
        return None
    decides = task.headline.key
    row = {
        "reducer": stage["reducer"],
        "label": stage["label"],
        "keep_ratio": metrics["keep_ratio"],
        "tokens_left": metrics["tokens_left"],
        "seed": stage["seed"],
        decides: metrics[decides],
        f"{decides}_before": metrics["before"][decides],
        "num_images": metrics["num_images"],
        "gmac": metrics["gmac"],
        "images_per_second": measured.get("images_per_second"),
        "checkpoint": metrics["checkpoint"],
        "directory": stage["folder"],
    }
    if "validation" in metrics:
        row[f"validation_{decides}"] = metrics["validation"][decides]
        row["validation_loss"] = metrics["validation"]["loss"]
    return row | {metric.key: metrics[metric.key] for metric in task.others if metric.key in metrics}


def _best(rows: Sequence[dict[str, Any]], metric: Metric) -> tuple[str | None, str | None]:
    """The folder of the best of these fine-tunings, and on what it was chosen: never on the test split.

    Without validation images nothing is chosen: it is the first, that of the first seed.
    """
    if not rows:
        return None, None
    key = f"validation_{metric.key}"
    if key not in rows[0]:
        return rows[0]["directory"], None

    def merit(row: dict[str, Any]) -> tuple[float, float]:
        value, loss = row[key], row["validation_loss"]  # None: not finite
        return -math.inf if value is None else metric.merit(value), -math.inf if loss is None else -loss

    return max(rows, key=merit)["directory"], "validation"


def _taken_from(workdir: Path, stages: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The stages that were taken over from earlier runs, by the workdir that they were in."""
    found: dict[str, list[str]] = {}
    for folder in (stage["folder"] for stage in stages):
        if note := records.read(workdir / folder / NOTE):
            found.setdefault(note["workdir"], []).append(folder)
    return found


def _left_out(workdir: Path, planned: Sequence[str]) -> list[str]:
    """Folders of evaluated fine-tunings that this config does not name. They are told, lest a table shrink in silence."""
    there = (str(file.parent.relative_to(workdir)) for file in (workdir / "finetune").glob("*/metrics.json"))
    found = sorted({*there} - {*planned})
    if found:
        logger.warning("the report has no row for %s, which this config does not name", ", ".join(found))
    return found


def _filter_summary(rankings: dict[str, Any]) -> dict[str, Any]:
    """AUC and Spearman correlation of the filter and of the two rankings it has to beat."""
    known = {name: {"auc": row["auc"], "spearman": row["spearman"]["label"]} for name, row in rankings.items()}
    return {**known["filter"], "position_prior": known["position prior"], "random": known["random"]}


def curves_of(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """The training logs of the stages of the first seed, by their folder."""
    plan = records.read(workdir / "run.json")
    stages = [stage for stage in plan["stages"] if stage["kind"] == "train" and stage["seed"] == plan["config"]["seed"]]
    return {stage["folder"]: lines for stage in stages if (lines := metrics_log.read(workdir / stage["folder"]))}


def summarise(rows: Sequence[dict[str, Any]], task: Task = CLASSIFICATION) -> list[dict[str, Any]]:
    """One row per reducer: of each metric, mean and sample standard deviation over the seeds; speed beside the full model.

    The deviation is None where nothing varies: of one seed, or of what no seed touches, as a reducer off the shelf.
    """
    summary = []
    same = ("label", "reducer", "keep_ratio", "tokens_left", "gmac", "images_per_second")
    for label in dict.fromkeys(row["label"] for row in rows):
        of_label = [row for row in rows if row["label"] == label]
        row = {key: of_label[0][key] for key in same}
        for metric in (task.headline.key, f"{task.headline.key}_before", *(other.key for other in task.others)):
            if metric in of_label[0]:
                values = [math.nan if r[metric] is None else r[metric] for r in of_label]
                varies = len({*values}) > 1 and all(map(math.isfinite, values))
                row[metric] = statistics.mean(values), statistics.stdev(values) if varies else None
        summary.append(row | {"num_seeds": len(of_label)})
    if len(counts := sorted({row["num_images"] for row in rows})) > 1:
        for row in summary:
            read = sorted({r["num_images"] for r in rows if r["label"] == row["label"]})
            row["num_images"] = " and ".join(map(str, read))
        logger.warning(
            "the rows of the report are not of the same images: %s of them could be read; delete the metrics.json of the "
            "rows with fewer and run the same command again", " or ".join(map(str, counts)),
        )  # fmt: skip
    full = next((row["images_per_second"] for row in summary if row["reducer"] == "full"), None)
    measured = [row["images_per_second"] for row in summary]  # not all are, while a run goes on with other reducers
    return [
        row | ({"speed_up": speed / full} if full and speed else {})
        for row, speed in zip(summary, measured, strict=True)
    ]
