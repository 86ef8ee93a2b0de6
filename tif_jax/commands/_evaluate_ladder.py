"""Metrics of a ladder on the test split: what `tif evaluate --ladder FILE` says."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from tif_jax.adaptive.adaptive import Adaptive
from tif_jax.data.loader import evaluation_batches
from tif_jax.errors import InputError
from tif_jax.experiment.folders import backbone_folder, finetune_folder
from tif_jax.experiment.predecessors import standing
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.sources import open_for_model
from tif_jax.models import built_with
from tif_jax.runtime import records
from tif_jax.runtime.progress import Progress
from tif_jax.weights.ladder import load_ladder

_FOLDERS = {
    "backbone": lambda config, workdir: backbone_folder(workdir),
    "finetune": finetune_folder,
}


def evaluated(config: Experiment, workdir: Path, stage: str, ladder: Path) -> dict[str, Any]:
    """DIR/STAGE/ladder-NAME.json of the file NAME.json, with the weights of that stage's checkpoint.

    loss, top1 and gmac as in metrics.json, means over images, of the ladder and (`whole`) of its last model alone;
    agreement: the share of images with the same class from both; rungs: on which model how many stayed. Raises InputError
    for a stage that is no model, a ladder of other weights, and in a run of several processes.
    """
    if stage not in _FOLDERS:
        raise InputError(f"--ladder is of models: --stage is {stage!r}; it is {' or '.join(_FOLDERS)}")
    if jax.process_count() > 1:
        raise InputError("--ladder is evaluated by one process: start it alone")
    directory = _FOLDERS[stage](config, workdir)
    checkpoint, which = standing(directory)
    adaptive = load_ladder(checkpoint, ladder, dtype=config.dtype, batch_size=config.evaluate.batch_size)
    labels: list[int] = []
    whole: list[Float[np.ndarray, "B L"]] = []
    answers = [*adaptive.stream(_read(config, adaptive, labels, whole))]
    if not labels:
        raise InputError("none of the images to evaluate on can be read; the log names them")
    logits, rung, gmac = (np.concatenate([getattr(one, name) for one in answers]) for name in answers[0]._fields)
    by_whole, classes = np.concatenate(whole), np.array(labels)
    found = {
        "checkpoint": which,
        "ladder": str(ladder),
        "num_images": len(labels),
        **_metrics(logits, classes),
        "gmac": float(gmac.mean()),
        "agreement": float((logits.argmax(axis=-1) == by_whole.argmax(axis=-1)).mean()),
        "whole": {**_metrics(by_whole, classes), "gmac": adaptive.costs[-1]},
        "rungs": [
            {
                **built_with(adaptive.models[used])["reducer"],
                "gmac": adaptive.costs[used],
                "share": float((rung == used).mean()),
            }
            for used in adaptive.route.rungs
        ],
    }
    records.write(directory / f"ladder-{ladder.stem}.json", found)
    return found


def _read(
    config: Experiment, adaptive: Adaptive, labels: list[int], whole: list[Float[np.ndarray, "B L"]]
) -> Iterator[Float[np.ndarray, "B Y X 3"]]:
    """The test images that can be read; notes their labels, and what the last model says of each."""
    source = open_for_model(config, "test", adaptive.models[-1])
    batches = evaluation_batches(source, config.data, batch_size=config.evaluate.batch_size)
    with Progress("evaluate", len(source), "image") as progress, closing(batches):
        for batch in batches:
            is_read = batch["weight"] > 0
            if is_read.any():
                images = np.asarray(batch["image"][is_read], np.float32)
                labels.extend(batch["label"][is_read].tolist())
                whole.append(adaptive.whole(images))
                yield images
            progress.update(min(len(is_read), len(source) - progress.done))


def _metrics(logits: Float[np.ndarray, "I L"], labels: Int[np.ndarray, " I"]) -> dict[str, float]:
    """Mean cross-entropy (nats) and top-1."""
    wide = logits.astype(np.float64)
    loss = logsumexp(wide, axis=-1) - wide[np.arange(len(labels)), labels]
    return {"loss": float(loss.mean()), "top1": float((wide.argmax(axis=-1) == labels).mean())}
