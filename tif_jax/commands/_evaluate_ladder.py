"""Metrics of a ladder on the test split: what `tif evaluate --ladder FILE` says."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from tif_jax.adaptive.adaptive import Adaptive
from tif_jax.data.loader import evaluation_batches
from tif_jax.errors import InputError
from tif_jax.experiment.folders import backbone_folder, finetune_folder
from tif_jax.experiment.predecessors import standing
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.sources import open_for_model
from tif_jax.impact import judge
from tif_jax.models import built_with
from tif_jax.runtime import records
from tif_jax.runtime.progress import told
from tif_jax.weights.ladder import load_ladder

_FOLDERS = {
    "backbone": lambda config, workdir: backbone_folder(workdir),
    "finetune": finetune_folder,
}
_Given = tuple[Int[np.ndarray, " B"], Float[np.ndarray, "B L"]]  # labels, and logits of the last model alone


def evaluated(config: Experiment, workdir: Path, stage: str, ladder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """DIR/STAGE/ladder-NAME.json of the file NAME.json, which was found for the weights of that stage's checkpoint.

    Means over the test images that can be read: cross_entropy (of the prediction, nats), top1 (a fraction) and gmac, of the
    ladder and (`whole`) of its last model alone; agreement: the share with the same class from both. rungs: on which model
    how many stayed. settings: which images, and the dtype. Raises InputError for a stage that is no model, a ladder of other
    weights, and in a run of several processes.
    """
    if stage not in _FOLDERS:
        raise InputError(f"--ladder is of models: --stage is {stage!r}; it is {' or '.join(_FOLDERS)}")
    if jax.process_count() > 1:
        raise InputError("--ladder is evaluated by one process: start it alone")
    directory = _FOLDERS[stage](config, workdir)
    checkpoint, which = standing(directory)
    adaptive = load_ladder(checkpoint, ladder, dtype=config.dtype, batch_size=config.evaluate.batch_size)
    given: deque[_Given] = deque()
    sums: dict[str, float] = dict.fromkeys(("cross_entropy", "top1", "agreement", "gmac", "whole", "whole_top1"), 0.0)
    stayed = dict.fromkeys(adaptive.route.rungs, 0)
    number = 0
    for answers in adaptive.stream(_read(config, adaptive, given)):
        labels, whole = given.popleft()
        alone = judge.outcome(whole, whole, labels)
        found = judge.outcome(answers.logits, whole, labels) | {"gmac": answers.gmac.mean()}
        found |= {"whole": alone["cross_entropy"], "whole_top1": alone["top1"]}
        for name in sums:
            sums[name] += len(labels) * float(found[name])
        for rung in stayed:
            stayed[rung] += int((answers.rung == rung).sum())
        number += len(labels)
    if not number:
        raise InputError("none of the images to evaluate on can be read; the log names them")
    means = {name: total / number for name, total in sums.items()}
    whole_means = {"cross_entropy": means.pop("whole"), "top1": means.pop("whole_top1"), "gmac": adaptive.costs[-1]}
    rungs = [
        {**built_with(adaptive.models[rung])["reducer"], "gmac": adaptive.costs[rung], "share": count / number}
        for rung, count in stayed.items()
    ]
    said = {"checkpoint": which, "settings": settings, "ladder": str(ladder), "route": adaptive.route._asdict()}
    result = {**said, "num_images": number, **means, "whole": whole_means, "rungs": rungs}
    records.write(directory / f"ladder-{ladder.stem}.json", result)
    return result


def _read(config: Experiment, adaptive: Adaptive, given: deque[_Given]) -> Iterator[Float[np.ndarray, "B Y X 3"]]:
    """The test images that can be read; notes their labels, and what the last model says of each."""
    source = open_for_model(config, "test", adaptive.models[-1])
    batches = evaluation_batches(source, config.data, batch_size=config.evaluate.batch_size)
    for batch in told(batches, "evaluate", len(source)):
        is_read = batch["weight"] > 0
        if is_read.any():
            images = np.asarray(batch["image"][is_read], np.float32)
            given.append((batch["label"][is_read], adaptive.whole(images)))
            yield images
