"""Metrics of a checkpoint on the test split: of a fine-tuned model, the backbone, or the filter's ranking of tokens."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from tif_jax import checked
from tif_jax.commands import _arguments, _evaluate_ladder
from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.data.source import Source, fingerprint
from tif_jax.errors import InputError
from tif_jax.experiment.folders import backbone_folder, filter_folder, finetune_folder, heldout_folder
from tif_jax.experiment.predecessors import made_from, oracles_of, standing
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.scoring import expected_manifest, label_options
from tif_jax.experiment.sources import open_for_model
from tif_jax.experiment.stages import before_finetuning
from tif_jax.impact import judge, shards
from tif_jax.impact.labels import keep_labels, position_prior
from tif_jax.impact.oracle import TARGETS
from tif_jax.impact.rankings import filter_ranking, knowledge, untrained_rankings
from tif_jax.layers import true_float32
from tif_jax.models import Model, ViT, plain_vit
from tif_jax.models.cost import cost
from tif_jax.models.params import params_of, with_params
from tif_jax.reducers import Full, Reducer
from tif_jax.runtime import processes, records
from tif_jax.runtime.mesh import make_mesh, replicate, shard
from tif_jax.runtime.progress import told
from tif_jax.runtime.workdir import begin_log
from tif_jax.tasks import CLASSIFICATION
from tif_jax.training import tasks
from tif_jax.training.checkpoints import read_config
from tif_jax.training.recipe import WITHOUT_EFFECT
from tif_jax.weights.loading import load, load_with_fields

logger = logging.getLogger(__name__)

KEEP_RATIOS = (0.7, 0.5, 0.25)  # of the ranking table: 137, 98 and 49 of 196 tokens


def main(argv: list[str]) -> None:
    stages = {"backbone": backbone, "filter": ranking_table, "finetune": finetuned}
    stage = dict(choices=stages, default="finetune", help="whose checkpoint (default: finetune)")
    ladder = dict(type=Path, metavar="FILE", help="of `tif ladder`, for the weights of that stage")
    arguments = _arguments.parse("evaluate", __doc__, argv, stage=stage, ladder=ladder, **processes.FLAGS)
    processes.join(arguments)
    begin_log(arguments.workdir)
    if arguments.ladder is not None:
        of = arguments.config, arguments.workdir, arguments.stage, arguments.ladder
        found = _evaluate_ladder.evaluated(*of, settings_of(arguments.config))
        print(json.dumps(records.strict(found), indent=2))
        return
    # Beside a run that is training, too: the numbers name their step, and that run makes them again.
    metrics = stages[arguments.stage](arguments.config, arguments.workdir)
    if processes.is_first():
        print(json.dumps(records.strict(metrics), indent=2))


def backbone(config: Experiment, workdir: Path) -> dict[str, Any]:
    """DIR/backbone/metrics.json. Like the others it says which checkpoint it belongs to."""
    directory = backbone_folder(workdir)
    checkpoint, which = standing(directory)
    model = load(checkpoint, dtype=config.dtype)
    metrics = _evaluate(config, model)
    imported = config.backbone.init_from and not config.backbone.head
    if imported and "task" not in metrics and metrics["loss"] > math.log(max(2, model.num_classes)):
        logger.warning(
            "the imported backbone has a loss of %.2f nats, worse than guessing: are data.class_index, the labels or "
            "data.mean and data.std those of its training?", metrics["loss"],
        )  # fmt: skip
    metrics = {"checkpoint": which, "settings": settings_of(config), **metrics}
    records.write(directory / "metrics.json", metrics)
    return metrics


def finetuned(config: Experiment, workdir: Path) -> dict[str, Any]:
    """DIR/finetune/.../metrics.json of config.reducer and config.seed, on test images.

    Under `before` those before fine-tuning; under `validation` those that `best` is chosen by, where images are kept for it.
    """
    directory = finetune_folder(config, workdir)
    checkpoint, which = standing(directory)
    begun_with = read_config(checkpoint).get("made", {}).get("made_from", {})
    # Else `before` is of something else. The teacher was checked when the training began.
    records.check_same(directory, begun_with, made_from(config, workdir, "finetune"), ignored=("teacher",))
    model, _ = load_with_fields(checkpoint, dtype=config.dtype, named=config.reducer.modules)
    metrics = {"checkpoint": which, "settings": settings_of(config), **_evaluate(config, model)}
    metrics["keep_ratio"] = _keep_ratio(model.reducer)
    if config.data.num_validation:
        metrics["validation"] = _evaluate(config, model, "validation")
    before, _ = before_finetuning(config, workdir)
    metrics["before"] = _evaluate(config, before)
    records.write(directory / "metrics.json", metrics)
    return metrics


def settings_of(config: Experiment) -> dict[str, Any]:
    """What decides on metrics beside the checkpoint: which images, and the dtype."""
    data = {name: value for name, value in checked.to_json(config.data).items() if name not in WITHOUT_EFFECT}
    examples = fingerprint(open_source(config.data, "test"))
    crop = {"eigen_crop": True} if config.evaluate.eigen_crop else {}
    return {"data": data, "examples": examples, "dtype": config.dtype, **crop}


def _evaluate(config: Experiment, model: Model, split: str = "test") -> dict[str, Any]:
    source = open_for_model(config, split, model)
    some = config.data.class_index and config.data.task == CLASSIFICATION.name
    chosen = [output for output, name in enumerate(source.class_names) if name] if some else []
    counted = cost(model)
    tokens_left = counted.tokens[-1] - model.num_special  # patch tokens that leave the last block
    return accuracy(model, source, config, chosen) | {"gmac": counted.gmac, "tokens_left": tokens_left}


def _keep_ratio(reducer: Reducer) -> Any:
    """What sets how much is kept, where that is a ratio; None where numbers do (`num_kept`, `clusters`, `num_merged`)."""
    by_number = any(getattr(reducer, name, None) is not None for name in ("num_kept", "clusters"))
    return 1.0 if isinstance(reducer, Full) else None if by_number else getattr(reducer, "keep_ratio", None)


def accuracy(model: Model, source: Source, config: Experiment, classes: Sequence[int] = ()) -> dict[str, Any]:
    """num_images that could be read, and what a model of its task is measured by on them (`training.tasks`).

    Of classification: mean cross-entropy (loss, nats) and top-1 (fraction); with `classes` also top-1 among those classes
    alone. Of other tasks also which. The images are divided among all devices of all processes. Raises InputError if none
    can be read, or none has a label.
    """
    batch_size = config.evaluate.batch_size
    mesh = make_mesh(batch_size)
    graphdef, params = nnx.split(model)[0], replicate(params_of(model), mesh)
    judged_by = tasks.of_model(model, config.evaluate.eigen_crop)

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def score(params, batch):
        with true_float32(model.dtype):
            prediction, aux = with_params(graphdef, params)(batch["image"])
        terms = judged_by.terms(prediction, aux, batch)
        if classes:
            among = jnp.asarray(classes)[prediction[:, jnp.asarray(classes)].argmax(axis=-1)]
            terms["top1_among_classes"] = (among == batch["label"]).astype(jnp.float32)
        return sums_of(terms, batch["weight"])

    totals = []
    batches = evaluation_batches(source, config.data, batch_size=batch_size, shared=True)
    for batch in told(batches, "evaluate", len(source), batch_size):
        totals.append(score(params, shard(batch, mesh)))
    return measured(judged_by, jax.device_get(totals), len(source))


def sums_of(terms: Mapping[str, Any], weight: Float[Array | np.ndarray, " B"]) -> dict[str, Array]:
    """Sums over a batch of images with these weights; `images` of these, and `counted`, those that are not without label."""
    terms = dict(terms)
    counts = weight * (terms.pop("valid") > 0) if "valid" in terms else weight

    def total(term: Float[Array, "B ..."]) -> Array:
        counted = counts.reshape(-1, *(1,) * (term.ndim - 1))
        return jnp.where(counted > 0, term * counted, 0).sum(axis=0)  # 0: what fills up a batch, whose loss may be NaN

    return {name: total(term) for name, term in terms.items()} | {"images": weight.sum(), "counted": counts.sum()}


def measured(judged_by: tasks.Judged, totals: Sequence[Mapping[str, Any]], number: int) -> dict[str, Any]:
    """Entries of metrics.json from the `sums_of` of all batches of so many images.

    Raises InputError if none could be read, or none has a label.
    """
    sums: dict[str, Any] = {name: sum(np.asarray(t[name], np.float64) for t in totals) for name in totals[0]}
    images, counted = int(sums.pop("images")), int(sums.pop("counted"))
    if not images:
        raise InputError(f"none of the {number} images to evaluate on can be read; the log names them")
    if not counted:
        raise InputError(
            f"none of the {images} label maps to evaluate on has a pixel that counts; are data.label_folder and "
            "data.label_scale theirs?"
        )
    if counted < images:
        logger.warning("%d of %d label maps have no pixel that counts; they are left out", images - counted, images)
    task = judged_by.task
    named = {} if task is CLASSIFICATION else {"task": task.name}
    return {"num_images": images, **named, **judged_by.measured(sums, counted)}


def ranking_table(config: Experiment, workdir: Path) -> dict[str, Any]:
    """DIR/filter/metrics.json: the filter beside the rankings it has to beat and the oracles it is to learn from.

    On the test images that the oracles scored, with the frozen backbone: the outcome (`impact.judge`) when only a ranking's
    best tokens are kept, and what the ranking knows of impact (`impact.rankings`), by the config's own labels.
    """
    directory = filter_folder(config, workdir)
    checkpoint, which = standing(directory)
    model = plain_vit(load(checkpoint, dtype=config.dtype), "a ranking of patches")
    trained = open_source(config.data, "train")
    trained_on = shards.read_impact(workdir, expected=expected_manifest(config, model, trained)).impact
    test = heldout(config, workdir, model, trained_on)

    def rank(models, images, _):
        return {"filter": filter_ranking(models[0], images), **untrained_rankings(models[0], images, config.seed)}

    found, _ = judge.over_batches(rank, [model], test.batches("rankings"), test.mesh)
    metrics = {"checkpoint": which, "settings": settings_of(config), "oracles": oracles_of(workdir)}
    metrics |= judged(model, test, found | test.fixed_rankings)
    records.write(directory / "metrics.json", metrics)
    return metrics


class Heldout(NamedTuple):
    """Test images with what is known of them. E images, N patches."""

    batches: Callable[[str], Iterator[dict[str, Any]]]  # from a label for their progress
    mesh: Mesh  # for a batch; of several processes each does the whole work: it is little
    impacts: dict[str, Float[np.ndarray, "E N"]]  # by the oracle's target
    labels: Bool[np.ndarray, "E N"]  # which tokens the label oracle finds worth keeping
    fixed_rankings: dict[str, Float[np.ndarray, "E N"]]  # the oracles' own and the position prior's
    eigen_crop: bool  # whether depth is compared in it alone


def heldout(config: Experiment, workdir: Path, model: ViT, trained_on: Float[np.ndarray, "R N"]) -> Heldout:
    """The images of DIR/heldout-label and, if it is there, DIR/heldout-teacher.

    trained_on: impacts whose labels the position prior is read off. Raises InputError if nothing is scored yet.
    """
    folders = {target: heldout_folder(workdir, target) for target in TARGETS}
    source = open_for_model(config, "test", model)
    expected = expected_manifest(config, model, source)
    oracles = {t: shards.read_impact(folder, expected=expected) for t, folder in folders.items() if folder.exists()}
    if "label" not in oracles:
        raise InputError(f"{workdir}/heldout-label is missing; `tif run` makes it: score held-out images first")
    table, labelling = oracles["label"], label_options(config, trained_on)
    # A teacher scores images, too, whose label map is empty.
    impacts = {target: oracle.impact[np.isin(oracle.index, table.index)] for target, oracle in oracles.items()}
    prior = np.asarray(position_prior(keep_labels(trained_on, **labelling)))
    fixed = {f"{target} oracle": impact for target, impact in impacts.items()}
    fixed["position prior"] = np.broadcast_to(prior, table.impact.shape)
    return Heldout(
        batches=partial(_batches, config, source, table),
        mesh=make_mesh(config.evaluate.batch_size, this_process_only=True),
        impacts=impacts,
        labels=np.asarray(keep_labels(table.impact, **labelling)),
        fixed_rankings=fixed,
        eigen_crop=config.evaluate.eigen_crop,
    )


def _batches(config: Experiment, source, table: shards.ImpactTable, label: str) -> Iterator[dict[str, Any]]:
    rows = np.stack([table.index, table.view], axis=1)
    # They could be read when they were scored: without one of them, rows of the table would meet other images.
    options = dataclasses.replace(config.data, on_error="raise")
    batches = evaluation_batches(source, options, batch_size=config.evaluate.batch_size, records=rows)
    return told(batches, label, len(rows))


def judged(model: ViT, test: Heldout, rankings: Mapping[str, Float[np.ndarray, "E N"]]) -> dict[str, Any]:
    """A ranking table as it stands in metrics.json: of each ranking what it knows, and the outcome per keep ratio."""
    unreduced, outcomes = judge.judge_rankings(
        model, test.batches("judge"), test.mesh, rankings, KEEP_RATIOS, test.eigen_crop
    )
    rows = {
        name: knowledge(ranking, test.impacts, test.labels)
        | {"keep": {str(ratio): outcome for ratio, outcome in outcomes[name].items()}}
        for name, ranking in rankings.items()
    }
    return {"num_images": len(test.labels), "unreduced": unreduced, "rankings": rows}
