"""report.json, report.md and the figures of a finished run: what was gained, from the files its stages left."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from tif_jax.commands._results import curves_of, result_of, summarise
from tif_jax.commands._tables import Column, fixed, markdown, spread
from tif_jax.commands.evaluate import KEEP_RATIOS
from tif_jax.data.loader import evaluation_batches
from tif_jax.errors import WorkError
from tif_jax.experiment.folders import filter_folder, heldout_folder
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.sources import open_for_model
from tif_jax.figures.plots import accuracy_cost, picture_page, training_curves
from tif_jax.impact import shards
from tif_jax.impact.judge import OUTCOMES
from tif_jax.models import Model
from tif_jax.models.budget import AMOUNTS
from tif_jax.runtime import files, records
from tif_jax.tasks import CLASSIFICATION, DEPTH, Metric, Task, of_metrics
from tif_jax.tokens import num_kept, top_k
from tif_jax.weights.loading import load

TOKENS = "tokens.png"
_SPEED = "accuracy_speed.png"
_NUM_PICTURES = 8
_OF_COST = (
    Column("images", ("num_images",)),  # where the rows are not of the same ones
    Column("tokens left", ("tokens_left",)),
    Column("GMAC", ("gmac",), fixed(4)),
    Column("images/s", ("images_per_second",), fixed(1)),
    Column("x full", ("speed_up",), fixed(2)),
)
_SHOWN = (
    "## Pictures",
    "",
    "Each row: the image; the oracle's impact; the filter's prediction; the tokens that the filter keeps.",
    "",
    "![impact, prediction, kept tokens](tokens.png)",
    "",
)


def write_report(workdir: Path, of_filter: Experiment | None = None) -> None:
    """DIR/report.json, DIR/report.md, the figures of `write_markdown` and, of a token filter, tokens.png.

    of_filter: the config of the token filter of the first seed, if there is one.
    """
    result = result_of(workdir)
    if result["unfinished"]:  # by `tif evaluate` that looked in between
        raise WorkError(
            f"{workdir}/{result['unfinished'][0]} has no metrics of its checkpoint; run the same command again"
        )
    records.write(workdir / "report.json", result)
    if of_filter:
        # The oracle's loss is the task's: of depth it has no unit.
        unit = "of the loss" if of_filter.data.task == DEPTH.name else "nats"
        picture_page(_pictures(of_filter, workdir), workdir / TOKENS, unit)
    write_markdown(workdir, result, workdir)


def write_markdown(workdir: Path, result: Mapping[str, Any], folder: Path) -> None:
    """FOLDER/report.md of the run in a workdir, with accuracy_cost.png and training.png; tokens.png is there or not.

    Of a dense task also accuracy_speed.png, if the speed of all rows is measured.
    """
    task = of_metrics(result["backbone"])
    summary, shown = summarise(result["rows"], task), ["accuracy_cost.png", "training.png"]
    accuracy_cost(summary, folder / "accuracy_cost.png", task.headline)
    if task is not CLASSIFICATION and summary and all(row["images_per_second"] for row in summary):
        accuracy_cost(summary, folder / _SPEED, task.headline, ("images_per_second", "images/s"))
        shown.append(_SPEED)
    curves = {Path(name).name: lines for name, lines in curves_of(workdir).items()}
    training_curves(curves, folder / "training.png", task)
    shown += [TOKENS] if result["rankings"] and (folder / TOKENS).exists() else []
    files.write(folder / "report.md", markdown_of(result, summary, shown).encode())


def markdown_of(result: Mapping[str, Any], summary: Sequence[dict[str, Any]], pictures: Collection[str] = ()) -> str:
    """The report. pictures: which figures lie beside it."""
    task = of_metrics(result["backbone"])
    decides, seeds = task.headline, max((row["num_seeds"] for row in summary), default=1)
    over = "one seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds, where these differ"
    how = (
        f"Every row is fine-tuned from the same backbone by the same recipe; {over}. Before: {decides.name} of the same "
        "weights under the reducer, not yet fine-tuned. Tokens left: patch tokens that leave the last block. Images/s: "
        "interleaved in one process."
    )
    lines = [
        "# Report",
        "",
        *heading(result),
        "",
        f"Backbone before fine-tuning: {decides.name} {decides.text(result['backbone'][decides.key])}.",
        "",
        "## Accuracy and cost after fine-tuning",
        "",
        how,
        "",
        *_of_baselines(result.get("baselines", {}), task),
        *(table_of(summary, task) if summary else ["Nothing is fine-tuned yet."]),
        "",
        *_notes(result),
        *(["![accuracy against cost](accuracy_cost.png)", ""] if "accuracy_cost.png" in pictures else []),
        *([f"![accuracy against speed]({_SPEED})", ""] if _SPEED in pictures else []),
        *(_of_filter(result["rankings"], task) if result["rankings"] else []),
        *(_SHOWN if "tokens.png" in pictures else []),
        *(["![training curves](training.png)", ""] if "training.png" in pictures else []),
    ]
    return "\n".join(lines)


def heading(result: Mapping[str, Any]) -> list[str]:
    """A table of what was run, when and where."""
    data = result["test"]["data"]
    facts = {
        "data": f"{name_of(data)}, {result['test']['num_images']} test images{_of_training(data)}",
        "command": f"`{result['command']}`",
        "begun": result["begun"],
        "reported": result["date"],
        "machine": machine_of(result),
        "software": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    if result["test"].get("eigen_crop"):
        facts["compared"] = "within the Eigen crop"
    if result["taken_from"]:
        facts["taken over"] = "; ".join(
            f"{', '.join(of)} from `{origin}`" for origin, of in result["taken_from"].items()
        )
    columns = [Column("run", ("key",)), Column("", ("value",))]
    return markdown(columns, [{"key": key, "value": value} for key, value in facts.items()])


def _of_training(data: Mapping[str, Any]) -> str:
    same = data.get("train_split", "") == data["test_split"] and not data.get("test_fraction")
    return ", **which are the training images**" if same and data["name"] != "digits" else ""


def name_of(data: Mapping[str, Any]) -> str:
    """Of a data set, for a reader: what it is, where it lies, which split is the test split."""
    where = data.get("tfds_name") or Path(data.get("root") or "").name
    name = f"{data['name']} `{where}`" if where else data["name"]
    return name if data["name"] == "digits" else f"{name} (`{data['test_split']}`)"


def machine_of(result: Mapping[str, Any]) -> str:
    """Where the speeds were measured; before there are any, where the run began."""
    machine = result["speed"] or result["machine"]
    devices = f"{result['device']} on " if result["device"] else ""
    return f"{devices}{machine['processor']}, {machine['cores']} cores, {machine['host']}"


def table_of(summary: Sequence[dict[str, Any]], task: Task, *columns: Column) -> list[str]:
    """Lines: the rows of a summary, with further columns before. What a row lacks is '-'."""
    decides = task.headline
    known = [
        Column("reducer", ("label",)),
        Column(f"before {decides.unit}", (f"{decides.key}_before",), spread(decides.digits, decides.factor)),
        *(Column(metric.heading, (metric.key,), spread(metric.digits, metric.factor)) for metric in task.metrics),
        *_OF_COST,
    ]
    shown = [column for column in known if any(row.get(column.key[0]) is not None for row in summary)]
    rows = [{column.key[0]: None for column in shown} | row for row in summary]
    return markdown([*columns, *(column._replace(text=_or_dash(column.text)) for column in shown)], rows)


def _or_dash(text: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "-" if value is None else text(value)


def _of_baselines(found: Mapping[str, Mapping[str, Any]], task: Task) -> list[str]:
    """Lines about what does not look at the picture."""
    if not found:
        return []
    columns = [
        Column("the same for every picture", ("name",)),
        *(Column(metric.heading, (metric.key,), fixed(metric.digits, metric.factor)) for metric in task.metrics),
    ]
    rows = [{"name": name, **row} for name, row in found.items()]
    told = (
        "What every model has to beat, read off the label maps of the training images and measured on the test images:"
    )
    return [told, "", *markdown(columns, rows), ""]


def _notes(result: Mapping[str, Any]) -> list[str]:
    """Paragraphs: which run is taken for the best, and which have no row."""
    how = "the best on validation images" if result["best_chosen_on"] else "the first: no validation images, no choice"
    left_out = ", ".join(f"`{name}`" for name in result["left_out"])
    told = [f"This folder loads as `{result['best']}`, {how}."] if result["best"] else []
    unfinished = ", ".join(f"`{name}`" for name in result["unfinished"])
    told += [f"Not finished, or not evaluated: {unfinished}."] if unfinished else []
    told += [f"There are runs that this config does not name: {left_out}."] if left_out else []
    return [line for paragraph in told for line in (paragraph, "")]


def _of_filter(found: dict[str, Any], task: Task) -> list[str]:
    """The sections about the token filter."""
    said = OUTCOMES[task.name]
    own = ", ".join(f"{metric.name} {metric.text(found['unreduced'][metric.key])}" for metric in said[:-1])
    return [
        "## What the filter knows",
        "",
        f"{found['num_images']} held-out images, the frozen backbone, only each ranking's best tokens kept: "
        f"{' / '.join(metric.label for metric in said)}; the unreduced model: {own}. "
        "AUC: for the labels the filter is trained on; Spearman: mean per image, with each oracle.",
        "",
        *_ranking_table(found["rankings"], said),
        "",
    ]


def _ranking_table(rankings: dict[str, Any], said: Sequence[Metric]) -> list[str]:
    """The rankings by how near they are to the unreduced model at the middle keep ratio, the worst first."""
    middle, nearness = str(KEEP_RATIOS[1]), said[-1]

    def outcome(found: Mapping[str, float]) -> str:
        return " / ".join(fixed(3)(found[metric.key]) for metric in said)

    rows = [row | {"name": name} for name, row in rankings.items()]
    columns = [
        Column("ranking", ("name",)),
        Column("AUC", ("auc",), fixed(3)),
        *(Column(f"rho({target})", ("spearman", target), fixed(3)) for target in rows[0]["spearman"]),
        *(Column(f"keep {ratio:g}", ("keep", str(ratio)), outcome) for ratio in KEEP_RATIOS),
    ]
    return markdown(columns, sorted(rows, key=lambda row: nearness.merit(row["keep"][middle][nearness.key])))


def _pictures(config: Experiment, workdir: Path) -> list[dict[str, np.ndarray]]:
    """Test images with oracle impact, filter logits and kept mask, each (rows, columns) of the patch raster."""
    table = shards.read_impact(heldout_folder(workdir, "label"))
    amount = {key: value for key, value in config.reducer.arguments.items() if key in (*AMOUNTS, "round_to")}
    model = load(filter_folder(config, workdir), reducer="tif", **amount)
    return pictures(model, config, table, np.arange(_NUM_PICTURES) * len(table.index) // _NUM_PICTURES)


def pictures(
    model: Model, config: Experiment, table: shards.ImpactTable, chosen: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """For `picture_page`: the chosen rows of an oracle's table of test images, and what the filter says of them."""
    rows = np.stack([table.index, table.view], axis=1)[chosen]
    source = open_for_model(config, "test", model)
    with closing(evaluation_batches(source, config.data, batch_size=len(rows), records=rows)) as batches:
        batch = next(batches)
    images, names = batch["image"], source.class_names
    found = model(images)[1]["filter_logits"]
    # What the filter lets through, even where another reducer merges it then.
    keep_ratio, round_to = getattr(model.reducer, "keep_ratio", 1.0), getattr(model.reducer, "round_to", 1)
    passed = top_k(found, num_kept(keep_ratio, found.shape[1], model.num_special, round_to))
    logits = np.asarray(found)
    kept = (np.arange(logits.shape[1])[None, None] == np.asarray(passed)[..., None]).any(axis=1)
    how = config.data.preprocessing
    pixels = np.clip(images * np.asarray(how.std) + np.asarray(how.mean), 0, 1)
    raster = lambda x: x.reshape(-1, *model.grid)  # noqa: E731
    classes = [names[label] if 0 <= label < len(names) else "" for label in batch["label"]]
    columns: Any = zip(pixels, raster(table.impact[chosen]), raster(logits), raster(kept), classes, strict=True)
    return [dict(zip(("image", "impact", "logits", "kept", "class"), column, strict=True)) for column in columns]
