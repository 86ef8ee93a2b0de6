"""report.json, report.md and the figures of a finished run: what was gained, from the files its stages left."""

import logging
import statistics
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from tif_jax.commands._plots import accuracy_cost, picture_page, training_curves
from tif_jax.commands._tables import Column, fixed, markdown, percent
from tif_jax.commands.evaluate import KEEP_RATIOS
from tif_jax.data.loader import evaluation_batches
from tif_jax.errors import WorkError
from tif_jax.experiment import config as config_file
from tif_jax.experiment.folders import adapter_folder, backbone_folder, filter_folder, finetune_folder, heldout_folder
from tif_jax.experiment.predecessors import finished
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.sources import open_for_model
from tif_jax.impact import shards
from tif_jax.models import Model
from tif_jax.models.budget import AMOUNTS
from tif_jax.runtime import files, metrics_log, records
from tif_jax.tokens import num_kept, top_k
from tif_jax.weights.loading import load

logger = logging.getLogger(__name__)

_NUM_PICTURES = 8
_SUMMARY = (
    Column("reducer", ("label",)),
    Column("before %", ("top1_before",), percent),
    Column("top-1 %", ("top1",), percent),
    Column("among classes %", ("top1_among_classes",), percent),  # where the data set has fewer classes than the model
    Column("images", ("num_images",)),  # where the rows are not of the same ones
    Column("tokens left", ("tokens_left",)),
    Column("GMAC", ("gmac",), fixed(4)),
    Column("images/s", ("images_per_second",), fixed(1)),
    Column("x full", ("speed_up",), fixed(2)),
)


def write_report(
    config: Experiment, workdir: Path, runs: Sequence[Experiment], of_filter: Experiment | None = None
) -> None:
    """DIR/report.json, DIR/report.md, accuracy_cost.png, training.png and, of a token filter, tokens.png.

    runs: one config per fine-tuning. of_filter: that of the token filter of the first seed, if there is one.
    """
    speed = records.read(workdir / "benchmark.json")
    per_label = {row["label"]: row for row in speed["rows"]}
    rows = []
    for of_run in runs:
        directory = finetune_folder(of_run, workdir)
        label = of_run.reducer.label
        metrics, measured = records.read(directory / "metrics.json"), per_label[label]
        if metrics["checkpoint"] != finished(directory)[1]:  # by `tif evaluate` that looked in between
            raise WorkError(f"{directory}/metrics.json is of another checkpoint; run the same command again")
        row = {
            "reducer": of_run.reducer.name,
            "label": label,
            "keep_ratio": metrics["keep_ratio"],
            "tokens_left": metrics["tokens_left"],
            "seed": of_run.seed,
            "top1": metrics["top1"],
            "top1_before": metrics["before"]["top1"],
            "num_images": metrics["num_images"],
            "gmac": metrics["gmac"],
            "images_per_second": measured["images_per_second"],
            "checkpoint": metrics["checkpoint"],
            "directory": str(directory.relative_to(workdir)),
        }
        if "validation" in metrics:
            row["validation_top1"] = metrics["validation"]["top1"]
            row["validation_loss"] = metrics["validation"]["loss"]
        rows.append(row | {key: metrics[key] for key in ("top1_among_classes",) if key in metrics})
    ranking = records.read(filter_folder(of_filter, workdir) / "metrics.json") if of_filter else None
    best, chosen_on = _best([row for row in rows if row["label"] == config.reducer.label])
    result = {
        "config": config_file.to_json(config),
        "versions": records.versions(),
        "device": speed["device"],
        "backbone": records.read(backbone_folder(workdir) / "metrics.json"),
        "rows": rows,
        "filter": _filter_summary(ranking["rankings"]) if ranking else None,
        "rankings": ranking,
        "best": best,
        "best_chosen_on": chosen_on,
        "left_out": _left_out(workdir, rows),
    }
    records.write(workdir / "report.json", result)
    summary = summarise(rows)
    accuracy_cost(summary, workdir / "accuracy_cost.png")
    training_curves(_curves(config, workdir, runs, of_filter), workdir / "training.png")
    if of_filter:
        picture_page(_pictures(of_filter, workdir), workdir / "tokens.png")
    files.write(workdir / "report.md", _markdown(result, summary).encode())


def _best(rows: Sequence[dict[str, Any]]) -> tuple[str | None, str | None]:
    """The folder of the best of these fine-tunings, and on what it was chosen: never on the test split.

    Without validation images nothing is chosen: it is the first, that of the first seed.
    """
    if not rows:
        return None, None
    if "validation_top1" not in rows[0]:
        return rows[0]["directory"], None
    best = max(rows, key=lambda row: (row["validation_top1"], -row["validation_loss"]))
    return best["directory"], "validation"


def _left_out(workdir: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Folders of evaluated fine-tunings that are not among the rows. They are told, lest a table shrink in silence."""
    there = (str(file.parent.relative_to(workdir)) for file in (workdir / "finetune").glob("*/metrics.json"))
    found = sorted(set(there) - {row["directory"] for row in rows})
    if found:
        logger.warning("the report has no row for %s, which this config does not name", ", ".join(found))
    return found


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per reducer: of each top-1, mean and sample standard deviation over the seeds; speed beside the full model.

    The deviation is None where nothing varies: of one seed, or of what no seed touches, as a reducer off the shelf.
    """
    summary = []
    same = ("label", "reducer", "keep_ratio", "tokens_left", "gmac", "images_per_second")
    for label in dict.fromkeys(row["label"] for row in rows):
        of_label = [row for row in rows if row["label"] == label]
        row = {key: of_label[0][key] for key in same}
        for metric in ("top1", "top1_before", "top1_among_classes"):
            if metric in of_label[0]:
                values = [r[metric] for r in of_label]
                row[metric] = statistics.mean(values), statistics.stdev(values) if len({*values}) > 1 else None
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
    return [row | ({"speed_up": row["images_per_second"] / full} if full else {}) for row in summary]


def _markdown(result: dict[str, Any], summary: list[dict[str, Any]]) -> str:
    seeds = summary[0]["num_seeds"]
    spread = "one seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds, where these differ"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# Report",
        "",
        f"{result['device']}; {versions}. Backbone before fine-tuning: top-1 {100 * result['backbone']['top1']:.2f} %.",
        "",
        "## Accuracy and cost after fine-tuning",
        "",
        f"Every row is fine-tuned from the same backbone by the same recipe; {spread}. Before: top-1 of the same weights "
        "under the reducer, not yet fine-tuned. Tokens left: patch tokens that leave the last block. Images/s: interleaved "
        "in one process.",
        "",
        *markdown([column for column in _SUMMARY if column.key[0] in summary[0]], summary),
        "",
        *_notes(result),
        "![accuracy against cost](accuracy_cost.png)",
        "",
        *(_of_filter(result["rankings"]) if result["rankings"] else []),
        "![training curves](training.png)",
        "",
    ]
    return "\n".join(lines)


def _notes(result: dict[str, Any]) -> list[str]:
    """Paragraphs: which run is taken for the best, and which have no row."""
    how = "the best on validation images" if result["best_chosen_on"] else "the first: no validation images, no choice"
    left_out = ", ".join(f"`{name}`" for name in result["left_out"])
    told = [f"This folder loads as `{result['best']}`, {how}."] if result["best"] else []
    told += [f"There are runs that this config does not name: {left_out}."] if left_out else []
    return [line for paragraph in told for line in (paragraph, "")]


def _of_filter(found: dict[str, Any]) -> list[str]:
    """The sections about the token filter."""
    return [
        "## What the filter knows",
        "",
        f"{found['num_images']} held-out images, the frozen backbone, only each ranking's best tokens kept: "
        "cross-entropy in nats / top-1 / agreement with the unreduced model, whose own cross-entropy and top-1 are "
        f"{fixed(3)(found['unreduced']['cross_entropy'])} / {fixed(3)(found['unreduced']['top1'])}. "
        "AUC: for the labels the filter is trained on; Spearman: mean per image, with each oracle.",
        "",
        *_ranking_table(found["rankings"]),
        "",
        "## Pictures",
        "",
        "Each row: the image; the oracle's impact; the filter's prediction; the tokens that the filter keeps.",
        "",
        "![impact, prediction, kept tokens](tokens.png)",
        "",
    ]


def _filter_summary(rankings: dict[str, Any]) -> dict[str, Any]:
    """AUC and Spearman correlation of the filter and of the two rankings it has to beat."""
    known = {name: {"auc": row["auc"], "spearman": row["spearman"]["label"]} for name, row in rankings.items()}
    return {**known["filter"], "position_prior": known["position prior"], "random": known["random"]}


def _ranking_table(rankings: dict[str, Any]) -> list[str]:
    """The rankings by their agreement at the middle keep ratio, the worst first."""
    middle = str(KEEP_RATIOS[1])
    rows = [row | {"name": name} for name, row in rankings.items()]
    columns = [
        Column("ranking", ("name",)),
        Column("AUC", ("auc",), fixed(3)),
        *(Column(f"rho({target})", ("spearman", target), fixed(3)) for target in rows[0]["spearman"]),
        *(Column(f"keep {ratio:g}", ("keep", str(ratio)), _outcome) for ratio in KEEP_RATIOS),
    ]
    return markdown(columns, sorted(rows, key=lambda row: row["keep"][middle]["agreement"]))


def _outcome(outcome: dict[str, float]) -> str:
    return " / ".join(fixed(3)(outcome[key]) for key in ("cross_entropy", "top1", "agreement"))


def _curves(
    config: Experiment, workdir: Path, runs: Sequence[Experiment], of_filter: Experiment | None
) -> dict[str, list[dict[str, Any]]]:
    directories = [backbone_folder(workdir), *([filter_folder(of_filter, workdir)] if of_filter else [])]
    for of_run in (r for r in runs if r.seed == config.seed):
        directories += [adapter_folder(of_run, workdir)] if of_run.reducer.has_adapter else []
        directories += [finetune_folder(of_run, workdir)]
    return {directory.name: metrics_log.read(directory) for directory in directories}


def _pictures(config: Experiment, workdir: Path) -> list[dict[str, np.ndarray]]:
    """Test images with oracle impact, filter logits and kept mask, each (rows, columns) of the patch raster."""
    table = shards.read_impact(heldout_folder(workdir, "label"))
    amount = {key: value for key, value in config.reducer.arguments.items() if key in AMOUNTS}
    model = load(filter_folder(config, workdir), **amount)
    return pictures(model, config, table, np.arange(_NUM_PICTURES) * len(table.index) // _NUM_PICTURES)


def pictures(
    model: Model, config: Experiment, table: shards.ImpactTable, chosen: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """For `plots.picture_page`: the chosen rows of an oracle's table of test images, and what the filter says of them."""
    rows = np.stack([table.index, table.view], axis=1)[chosen]
    source = open_for_model(config, "test", model)
    with closing(evaluation_batches(source, config.data, batch_size=len(rows), records=rows)) as batches:
        images = next(batches)["image"]
    found = model(images)[1]["filter_logits"]
    # What the filter lets through, even where another reducer merges it then.
    passed = top_k(found, num_kept(getattr(model.reducer, "keep_ratio", 1.0), found.shape[1]))
    logits = np.asarray(found)
    kept = (np.arange(logits.shape[1])[None, None] == np.asarray(passed)[..., None]).any(axis=1)
    how = config.data.preprocessing
    pixels = np.clip(images * np.asarray(how.std) + np.asarray(how.mean), 0, 1)
    raster = lambda x: x.reshape(-1, *model.grid)  # noqa: E731
    columns = zip(pixels, raster(table.impact[chosen]), raster(logits), raster(kept), strict=True)
    return [dict(zip(("image", "impact", "logits", "kept"), column, strict=True)) for column in columns]
