"""Measure the impact of every patch token of a data split: a batch job that goes on where it stopped."""

import importlib.metadata
import logging
import re
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from tif_jax import data, oracle, shards
from tif_jax.commands import _arguments, train
from tif_jax.data.loader import evaluation_batches
from tif_jax.errors import InputError
from tif_jax.loading import load
from tif_jax.models.vit import ViT
from tif_jax.progress import Progress
from tif_jax.state import make_mesh, shard

logger = logging.getLogger(__name__)

_ROWS_PER_PART = 256  # what a killed job loses at most


def main(argv: list[str]) -> None:
    arguments = _arguments.parse("score", __doc__, argv)
    score(arguments.config, arguments.workdir)


def score(config: ConfigDict, workdir: Path) -> None:
    """DIR/impact: shards of the training split, with the estimator, mask, target and views of config.score."""
    _score(config, workdir, workdir / "impact", "train", config.score.target, config.score.num_images)


def score_heldout(config: ConfigDict, workdir: Path) -> None:
    """DIR/heldout-label and DIR/heldout-teacher: both oracles on config.evaluate.num_images test images."""
    for target in oracle.TARGETS:
        if (config.score.estimator, target) != ("gradient", "teacher"):  # zero everywhere
            _score(config, workdir, workdir / f"heldout-{target}", "test", target, config.evaluate.num_images)


def _score(config: ConfigDict, workdir: Path, directory: Path, split: str, target: str, num_images: int) -> None:
    recipe = config.score
    views, part = (1, "") if split == "test" else (recipe.views, recipe.part)
    settings = check(config, split, target)
    model = load(workdir / "backbone", dtype=config.dtype)
    source = train.open_source(config, split, model)
    mesh = make_mesh(recipe.batch_size)
    scorer = oracle.scorer(model, mesh, seed=config.seed, **settings)
    rows = _rows(len(source), num_images, views)
    chosen, num_parts = _parts(part, len(rows))
    manifest = _manifest(config, model, settings, split, len(source), views, num_parts)
    shards.open_manifest(directory, manifest)
    todo = [k for k in shards.missing_parts(directory, num_parts) if k in chosen]
    sizes = {k: len(shards.part_rows(len(rows), k, num_parts)) for k in chosen}
    finished = sum(sizes[k] for k in chosen if k not in todo)
    if todo:
        logger.info("%s: %d of %d parts to score on %d devices", directory, len(todo), len(chosen), mesh.size)
    with Progress(directory.name, sum(sizes.values()), "image", finished) as progress:
        for k in todo:
            batches = evaluation_batches(
                source,
                config.data,
                batch_size=recipe.batch_size,
                records=rows[shards.part_rows(len(rows), k, num_parts)],
            )
            columns = []
            for batch in batches:
                columns.append(_columns(scorer, batch, mesh, target))
                progress.update(len(columns[-1]["index"]))
            batches.close()
            shards.write_part(
                directory, k, num_parts, {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
            )


def check(config: ConfigDict, split: str, target: str) -> dict[str, Any]:
    """The oracle's options for a split. Raises InputError where config.score is wrong, before any work is done."""
    recipe = config.score
    if recipe.views < 1:
        raise InputError(f"score.views is {recipe.views}; at least 1 (the evaluation view)")
    if recipe.views > 1 and data.read_options(config.data).augment == "none":
        raise InputError(
            f"score.views is {recipe.views}, but data.augment 'none' has the evaluation view only: set score.views=1"
        )
    _parts(recipe.part, 1)
    return oracle.check_options(
        estimator=recipe.estimator,
        mask=recipe.mask if recipe.estimator == "exact" else "drop",
        target=target,
        num_samples=(config.evaluate if split == "test" else recipe).num_samples,
        keep_ratio=recipe.keep_ratio,
    )


def _columns(scorer, batch, mesh, target: str) -> dict[str, np.ndarray]:
    """The shard columns of a batch's real rows."""
    real = batch["weight"] > 0
    if target == "label" and (unlabelled := real & (batch["label"] < 0)).any():
        raise InputError(f"{batch['id'][unlabelled][0]} has no label; set score.target to 'teacher'")
    arrays = shard({key: batch[key] for key in ("image", "label")}, mesh)
    scores = jax.device_get(scorer(arrays["image"], arrays["label"]))
    columns = {
        "index": batch["index"], "view": batch["view"], "id": batch["id"],
        "label": batch["label"], "prediction": scores.prediction, "loss": scores.loss, "impact": scores.impact,
    }  # fmt: skip
    return {name: column[real] for name, column in columns.items()}


def _rows(num_examples: int, num_images: int, views: int) -> np.ndarray:
    """(index, view) of what is scored: all examples, or num_images of them evenly spaced; in split order."""
    count = min(num_images or num_examples, num_examples)
    index = np.arange(count) * num_examples // count
    return np.stack([np.repeat(index, views), np.tile(np.arange(views), count)], axis=1)


def _parts(part: str, num_rows: int) -> tuple[range, int]:
    """This job's parts and the number of parts of all jobs together. part: 'K/N', or '' for a job that does them all."""
    if not part:
        num_parts = -(-num_rows // _ROWS_PER_PART)
        return range(1, num_parts + 1), num_parts
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"score.part is {part!r}; it is K/N with 1 <= K <= N, as in 3/64")
    return range(int(match[1]), int(match[1]) + 1), int(match[2])


def _manifest(
    config: ConfigDict, model: ViT, settings: dict, split: str, num_examples: int, views: int, num_parts: int
) -> shards.Manifest:
    estimator = {"name": settings["estimator"], "seed": config.seed, "dtype": config.dtype}
    if settings["estimator"] == "sampled":
        estimator |= {key: settings[key] for key in ("num_samples", "keep_ratio")}
    manifest = {
        "num_examples": num_examples,
        "views": views,
        "num_parts": num_parts,
        "estimator": estimator,
        "mask": settings["mask"],
        "target": settings["target"],
        "data": {"name": config.data.name, "split": split},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "tif_jax")},
    }
    return cast(shards.Manifest, manifest | train.expected_manifest(config, model))
