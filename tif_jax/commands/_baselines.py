"""DIR/baselines.json of a run whose models are dense: how far one gets without looking at the picture."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tif_jax.commands import evaluate
from tif_jax.commands._results import BASELINES
from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.data.source import Source, fingerprint
from tif_jax.experiment.folders import backbone_folder
from tif_jax.experiment.predecessors import finished
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.sources import open_for_model
from tif_jax.models import Model
from tif_jax.runtime import processes, records
from tif_jax.runtime.progress import told
from tif_jax.tasks import CLASSIFICATION, DEPTH
from tif_jax.training import baselines, tasks
from tif_jax.training.checkpoints import read_config
from tif_jax.weights.loading import load


def make(config: Experiment, workdir: Path) -> None:
    """Writes the file, unless it is there, of these data; of a classification run there is none."""
    checkpoint, _ = finished(backbone_folder(workdir))
    fields = read_config(checkpoint)["model"]
    if fields.get("task", CLASSIFICATION.name) == CLASSIFICATION.name:
        return
    told = {name: fields[name] for name in ("task", "max_depth", "num_classes") if name in fields}
    made_from = {
        "model": told,
        "settings": evaluate.settings_of(config),
        "trained_on": fingerprint(open_source(config.data, "train")),
    }
    path = workdir / BASELINES
    if processes.first_says(records.read_result(path, made_from) is None):
        model = load(checkpoint, dtype=config.dtype)
        sources = (open_for_model(config, split, model) for split in ("train", "test"))
        records.write(path, {**made_from, "baselines": judged(config, model, *sources)})


def judged(config: Experiment, model: Model, train: Source, test: Source) -> dict[str, dict[str, Any]]:
    """By its name, what each of `baselines.predictions` is measured by on the test images, as in metrics.json.

    The training images are seen as in evaluation, without augmentation. Of several processes each does the whole work: it is
    little beside training.
    """
    judged_by = tasks.of_model(model, config.evaluate.eigen_crop)
    sums: dict[str, np.ndarray] = {}
    for batch in _batches(config, train, "baselines, train"):
        maps = batch["label_map"][batch["weight"] > 0]
        if judged_by.task is DEPTH:
            more = baselines.sums_of_depth(maps, getattr(model, "max_depth", tasks.MAX_DEPTH))
        else:
            more = baselines.sums_of_classes(maps, model.num_classes)
        sums = {name: sums.get(name, 0) + each for name, each in more.items()}
    said = baselines.predictions(judged_by.task, sums)
    score = jax.jit(partial(_score, judged_by))
    totals: dict[str, list[dict[str, Any]]] = {name: [] for name in said}
    for batch in _batches(config, test, "baselines, test"):
        for name, prediction in said.items():
            needed = {key: batch[key] for key in ("label_map", "weight")}
            totals[name].append(jax.device_get(score(np.float32(prediction), needed)))
    found = {name: evaluate.measured(judged_by, of_name, len(test)) for name, of_name in totals.items()}
    return {name: {key: value for key, value in row.items() if key != "task"} for name, row in found.items()}


def _score(judged_by: tasks.Judged, prediction: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    same = jax.numpy.broadcast_to(prediction, (len(batch["weight"]), *prediction.shape))
    return evaluate.sums_of(judged_by.terms(same, {}, batch), batch["weight"])


def _batches(config: Experiment, source: Source, label: str) -> Iterator[dict[str, Any]]:
    batches = evaluation_batches(source, config.data, batch_size=config.evaluate.batch_size)
    return told(batches, label, len(source))
