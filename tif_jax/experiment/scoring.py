"""What an experiment scores, and what it makes of the impacts: manifests, oracles on test images, labels of the filter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Float

from tif_jax.data.source import Source, fingerprint
from tif_jax.errors import InputError
from tif_jax.experiment.earlier import take_impacts
from tif_jax.experiment.folders import backbone_folder, heldout_folder, impact_folder
from tif_jax.experiment.predecessors import finished
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.sources import open_for_model
from tif_jax.impact import job
from tif_jax.impact.manifest import Manifest, is_claimed, read_manifest
from tif_jax.impact.objective import TARGETS, described
from tif_jax.models import Model, plain_vit
from tif_jax.models.build import RUNNING_FIELDS, built_with
from tif_jax.models.params import backbone_digest, params_of
from tif_jax.runtime import records
from tif_jax.tasks import CLASSIFICATION
from tif_jax.weights.loading import load

_ROWS_PER_PART = 256
_IDENTITY = ("name", "tfds_name", "train_split", "test_split", "num_train", "num_validation", "num_test", "seed")
_OF_LABEL_MAPS = ("label_map", "label_folder", "label_kind", "label_scale", "num_classes")


def score_training(experiment: Experiment, workdir: Path, earlier: Path | None = None) -> None:
    """DIR/impact: shards of the training split, with the estimator, mask, target and views of the section `score`.

    earlier: another workdir, which they are taken over from if they are the same there.
    """
    job.run(_job(experiment, impact_folder(workdir), workdir, "train", experiment.score.target, earlier))


def score_heldout(experiment: Experiment, workdir: Path, earlier: Path | None = None) -> None:
    """DIR/heldout-label and DIR/heldout-teacher: both oracles on evaluate.num_images test images."""
    for target in heldout_targets(experiment):
        job.run(_job(experiment, heldout_folder(workdir, target), workdir, "test", target, earlier))


def heldout_targets(experiment: Experiment) -> list[str]:
    """The oracles that test images are scored by."""
    by_gradient = experiment.score.estimator == "gradient"
    return [target for target in TARGETS if not (by_gradient and target == "teacher")]  # zero everywhere


def expected_manifest(experiment: Experiment, model: Model, source: Source) -> dict[str, Any]:
    """What the manifest of impact shards must say to fit this backbone, these examples and their views."""
    options = experiment.data
    identity = _IDENTITY if options.task == CLASSIFICATION.name else (*_IDENTITY, *_OF_LABEL_MAPS)
    return {
        "num_examples": len(source),
        "backbone": backbone_digest(params_of(model)),
        # Of some of these no parameter tells: with other heads the same weights are another network.
        "model": {key: value for key, value in built_with(model)["model"].items() if key not in RUNNING_FIELDS},
        "num_tokens": model.grid[0] * model.grid[1],
        # These decide which image an index is, and its label.
        "data": {key: getattr(options, key) for key in identity} | {"examples": fingerprint(source)},
        "image_size": list(options.size),
        "preprocessing": {**vars(options.preprocessing), "augment": options.augment},
    }


def label_options(experiment: Experiment, impact: Float[np.ndarray, "E N"]) -> dict[str, Any]:
    """Arguments of `keep_labels`, as the section `filter` has them. impact: of all training images, for `quantile`."""
    options = experiment.filter
    if options.labels == "top":
        return {"rho": "top", "keep_ratio": options.keep_ratio}
    return {"rho": options.rho if options.labels == "above" else float(np.quantile(impact, options.rho))}


def _job(
    experiment: Experiment, directory: Path, workdir: Path, split: str, target: str, earlier: Path | None
) -> job.Job:
    """What is to be scored. Impacts that another workdir has are taken over first: how many parts they have is theirs."""
    options, judged = experiment.score, experiment.evaluate
    views, part, num_images, num_samples = options.views, options.part, options.num_images, options.num_samples
    if split == "test":
        views, part, num_images, num_samples = 1, "", judged.num_images, judged.num_samples
    of_oracle = options.oracle_options(target, num_samples)
    model = load(finished(backbone_folder(workdir))[0], dtype=_dtype(options.dtype, options.estimator))
    source = open_for_model(experiment, split, model, labelled=False)  # a teacher needs none
    rows = _rows(len(source), num_images, views)
    manifest = _manifest(experiment, model, of_oracle, split, source, len(rows), views)
    if earlier:
        take_impacts(earlier, workdir, directory, manifest)
    parts, num_parts = _parts(part, len(rows), directory)
    return job.Job(
        directory=directory,
        manifest=cast(Manifest, {**manifest, "num_parts": num_parts}),
        model=model,
        source=source,
        data=experiment.data,
        rows=rows,
        parts=parts,
        batch_size=min(options.batch_size, len(rows)),  # the rest would be black pictures
        seed=experiment.seed,
        chunk=options.chunk or None,
        options=of_oracle,
    )


def _rows(num_examples: int, num_images: int, views: int) -> np.ndarray:
    """(index, view) of what is scored: all examples, or num_images of them evenly spaced; in split order."""
    count = min(num_images or num_examples, num_examples)
    index = np.arange(count) * num_examples // count
    return np.stack([np.repeat(index, views), np.tile(np.arange(views), count)], axis=1)


def _parts(part: str, num_rows: int, directory: Path) -> tuple[Sequence[int], int]:
    """This process's parts and the number of parts of all jobs together.

    part: 'K/N', the K-th of N; or '' for all, of which each process of a multi-process run takes its share. They are as
    many as in the directory, where a job in N parts may have begun or finished.
    """
    if not part:
        num_parts = -(-num_rows // _ROWS_PER_PART)
        if is_claimed(directory):
            num_parts = read_manifest(directory)["num_parts"]
        return range(1 + jax.process_index(), num_parts + 1, jax.process_count()), num_parts
    number, num_parts = map(int, part.split("/"))
    if num_parts > num_rows:
        raise InputError(f"score.part is {part!r}, but there are only {num_rows} rows to score; use fewer parts")
    return [number], num_parts


def _dtype(name: str, estimator: str) -> str:
    """score.dtype, where '' stands for what suits: differences of losses lose in bfloat16 what gradients do not."""
    fast = estimator != "exact" and jax.default_backend() != "cpu"
    return name or ("bfloat16" if fast else "float32")


def _manifest(
    experiment: Experiment,
    model: Model,
    of_oracle: dict[str, Any],
    split: str,
    source: Source,
    num_rows: int,
    views: int,
) -> dict[str, Any]:
    """But for the number of parts."""
    estimator = {"name": of_oracle["estimator"], "seed": experiment.seed, "dtype": np.dtype(model.dtype).name}
    if of_oracle["estimator"] == "sampled":
        estimator |= {key: of_oracle[key] for key in ("num_samples", "keep_ratio")}
    expected = expected_manifest(experiment, model, source)
    manifest: dict[str, Any] = {
        "num_images": num_rows // views,
        "views": views,
        "estimator": estimator,
        "mask": of_oracle["mask"],
        "target": of_oracle["target"],
        "versions": records.versions(),
    }
    if model.task != CLASSIFICATION.name:
        manifest |= {"task": model.task, "loss": described(plain_vit(model, "impact"), of_oracle["target"])}
    return manifest | expected | {"data": expected["data"] | {"split": split}}
