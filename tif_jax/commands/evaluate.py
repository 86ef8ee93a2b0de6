"""Metrics of a checkpoint on the test split: of a fine-tuned model, the backbone, or the filter's ranking of tokens."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from tif_jax.commands import _arguments
from tif_jax.data.loader import evaluation_batches
from tif_jax.errors import InputError
from tif_jax.experiment.folders import filter_folder, finetune_folder
from tif_jax.experiment.scoring import expected_manifest, label_options
from tif_jax.experiment.sections import Experiment
from tif_jax.experiment.sources import open_source
from tif_jax.experiment.stages import before_finetuning
from tif_jax.impact import rankings, shards
from tif_jax.impact.labels import keep_labels, position_prior
from tif_jax.impact.oracle import TARGETS
from tif_jax.models import Model, ViT, plain_vit
from tif_jax.models.cost import cost
from tif_jax.models.params import params_of, with_params
from tif_jax.runtime import processes, records
from tif_jax.runtime.mesh import make_mesh, replicate, shard
from tif_jax.runtime.progress import Progress
from tif_jax.tokens import image_keys, split
from tif_jax.training import losses
from tif_jax.weights.loading import load

KEEP_RATIOS = (0.7, 0.5, 0.25)  # of the ranking table: 137, 98 and 49 of 196 tokens
UNREDUCED = ("unreduced", 1.0)


def main(argv: list[str]) -> None:
    stages = {"backbone": backbone, "filter": ranking_table, "finetune": finetuned}
    stage = dict(choices=stages, default="finetune", help="whose checkpoint (default: finetune)")
    arguments = _arguments.parse("evaluate", __doc__, argv, stage=stage, **processes.FLAGS)
    processes.join(arguments)
    metrics = stages[arguments.stage](arguments.config, arguments.workdir)
    if processes.is_first():
        print(json.dumps(metrics, indent=2))


def backbone(config: Experiment, workdir: Path) -> dict[str, Any]:
    """DIR/backbone/metrics.json."""
    directory = workdir / "backbone"
    metrics = _evaluate(config, load(directory, dtype=config.dtype))
    records.write(directory / "metrics.json", metrics)
    return metrics


def finetuned(config: Experiment, workdir: Path) -> dict[str, Any]:
    """DIR/finetune/.../metrics.json of config.reducer and config.seed; under `before`, those before fine-tuning."""
    directory = finetune_folder(config, workdir)
    model = load(directory, dtype=config.dtype)
    metrics = _evaluate(config, model) | {"keep_ratio": getattr(model.reducer, "keep_ratio", 1.0)}
    before, _ = before_finetuning(config, workdir)
    metrics["before"] = _evaluate(config, before)
    records.write(directory / "metrics.json", metrics)
    return metrics


def _evaluate(config: Experiment, model: Model) -> dict[str, Any]:
    source = open_source(config, "test", model)
    classes = sorted((config.data.class_index or {}).values())
    return {"num_images": len(source), "gmac": cost(model).gmac, **accuracy(model, source, config, classes)}


def accuracy(model: Model, source, config: Experiment, classes: list[int]) -> dict[str, float]:
    """Mean cross-entropy (nats) and top-1 (fraction); with `classes` also top-1 among those classes alone.

    The images are divided among all devices of all processes.
    """
    batch_size = config.evaluate.batch_size
    mesh = make_mesh(batch_size)
    graphdef, params = nnx.split(model)[0], replicate(params_of(model), mesh)

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def score(params, batch):
        prediction, aux = with_params(graphdef, params)(batch["image"])
        terms = losses.classification(prediction, aux, batch)
        if classes:
            among = jnp.asarray(classes)[prediction[:, jnp.asarray(classes)].argmax(axis=-1)]
            terms["top1_among_classes"] = (among == batch["label"]).astype(jnp.float32)
        return {name: (term * batch["weight"]).sum() for name, term in terms.items()} | {
            "images": batch["weight"].sum()
        }

    totals = []
    with Progress("evaluate", len(source), "image") as progress:
        batches = evaluation_batches(source, config.data, batch_size=batch_size, shared=True)
        for batch in batches:
            totals.append(score(params, shard(batch, mesh)))
            progress.update(min(batch_size, len(source) - progress.done))
        batches.close()
    sums = {name: sum(float(t[name]) for t in jax.device_get(totals)) for name in totals[0]}
    images = sums.pop("images")
    return {name: total / images for name, total in sums.items()}


def ranking_table(config: Experiment, workdir: Path) -> dict[str, Any]:
    """DIR/filter/metrics.json: `judge_rankings` of the filter on held-out images, by its config's own labels."""
    directory = filter_folder(config, workdir)
    model = load(directory, dtype=config.dtype)
    expected = expected_manifest(config, model)
    oracles = read_oracles(workdir, expected)
    if "label" not in oracles:
        raise InputError(f"{workdir}/heldout-label is missing; `tif run` makes it: score held-out images first")
    metrics = judge_rankings(model, config, oracles, shards.read_impact(workdir, expected=expected).impact)
    records.write(directory / "metrics.json", metrics)
    return metrics


def read_oracles(workdir: Path, expected: Mapping[str, Any]) -> dict[str, shards.ImpactTable]:
    """Those of DIR/heldout-label and DIR/heldout-teacher that are there, by their target."""
    folders = {target: workdir / f"heldout-{target}" for target in TARGETS}
    return {t: shards.read_impact(folder, expected=expected) for t, folder in folders.items() if folder.exists()}


def judge_rankings(
    model: Model,
    config: Experiment,
    oracles: Mapping[str, shards.ImpactTable],
    trained_on: Float[np.ndarray, "E N"],
    *,
    baselines: bool = True,
    others: Mapping[tuple[str, float], Model] = MappingProxyType({}),
) -> dict[str, Any]:
    """The filter of `model` beside the rankings it has to beat and the oracles it is to learn from.

    On the test images of `config` that the oracles scored, with the frozen backbone: cross-entropy (nats), top-1 and
    agreement with the unreduced model when only a ranking's best tokens are kept; mean per-image Spearman with each
    oracle; ROC AUC for the label oracle's labels. trained_on: impacts whose labels the position prior is read off.
    baselines: whether the other rankings and the oracles have rows, too. others: reducers that are no ranking, by name and
    the keep_ratio in whose column they stand.
    """
    model = plain_vit(model, "a ranking of patches")
    source = open_source(config, "test", model)
    table = oracles["label"]
    labelling = label_options(config, trained_on)
    fixed = {}
    if baselines:
        prior = position_prior(keep_labels(trained_on, **labelling))
        fixed = {f"{target} oracle": oracle.impact for target, oracle in oracles.items()}
        fixed["position prior"] = np.broadcast_to(np.asarray(prior), table.impact.shape)
    rows = np.stack([table.index, table.view], axis=1)
    found, outcomes = _follow(model, source, config, rows, fixed, baselines, others)
    labels = np.asarray(keep_labels(table.impact, **labelling))
    result: dict[str, Any] = {}
    for name, ranking in {**found, **fixed}.items():
        result[name] = {
            "auc": rankings.roc_auc(ranking, labels),
            "spearman": {t: rankings.mean_spearman(ranking, o.impact) for t, o in oracles.items()},
        }
    unreduced = outcomes.pop(UNREDUCED)
    for (name, k), outcome in outcomes.items():
        result.setdefault(name, {}).setdefault("keep", {})[str(k)] = outcome
    return {"num_images": len(table.index), "unreduced": unreduced, "rankings": result}


def _follow(
    model: ViT,
    source,
    config: Experiment,
    rows: np.ndarray,
    fixed: dict[str, np.ndarray],
    baselines: bool,
    others: Mapping[tuple[str, float], Model],
):
    """The rankings computed from the images, and what the frozen model makes of the best tokens of every ranking."""
    batch_size = config.evaluate.batch_size
    mesh = make_mesh(batch_size, processes=1)  # of several, each does the whole work: it is little
    graphdef, params = nnx.split(model)[0], replicate(params_of(model), mesh)
    graphdefs = {key: nnx.split(other)[0] for key, other in others.items()}
    others_params = {key: replicate(params_of(other), mesh) for key, other in others.items()}

    @jax.jit
    def compute(params, others_params, seed, images, fixed):
        model = plain_vit(with_params(graphdef, params), "a ranking of patches")
        found = {"filter": model(images)[1]["filter_logits"]}
        if baselines:
            patches = split(model.embed(images), model.num_special)[1]
            uniform = jax.vmap(lambda key: jax.random.uniform(key, patches.shape[1:2]))
            found["random"] = uniform(image_keys(seed, images))
            found["token norm"] = jnp.linalg.norm(patches.astype(jnp.float32), axis=-1)
            if model.pool == "class":  # otherwise nothing has taught a class token where to look
                found["class attention"] = rankings.class_attention_ranking(model, images)
        ranked = {**found, **fixed}
        outputs = {UNREDUCED: rankings.unreduced_logits(model, images)}
        for name, ranking in ranked.items():
            outputs |= {(name, k): rankings.logits_of_best(model, images, ranking, k) for k in KEEP_RATIOS}
        outputs |= {key: with_params(graphdefs[key], own)(images)[0] for key, own in others_params.items()}
        return found, outputs

    parts = []
    batches = evaluation_batches(source, config.data, batch_size=batch_size, records=rows)
    with Progress("rankings", len(rows), "image") as progress:
        for i, batch in enumerate(batches):
            index = np.minimum(np.arange(i * batch_size, (i + 1) * batch_size), len(rows) - 1)
            arrays = shard({"image": batch["image"], **{n: r[index] for n, r in fixed.items()}}, mesh)
            found, outputs = jax.device_get(compute(params, others_params, config.seed, arrays.pop("image"), arrays))
            real = batch["weight"] > 0
            parts.append(jax.tree.map(lambda x, real=real: x[real], (found, outputs, batch["label"])))
            progress.update(int(real.sum()))
    batches.close()
    found, outputs, label = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return found, {key: _outcome(logits, outputs[UNREDUCED], label) for key, logits in outputs.items()}


def _outcome(logits: np.ndarray, unreduced: np.ndarray, label: np.ndarray) -> dict[str, float]:
    cross_entropy = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    cross_entropy = cross_entropy - logits[np.arange(len(label)), label]
    predicted = logits.argmax(1)
    return {
        "cross_entropy": float(cross_entropy.mean()),
        "top1": float((predicted == label).mean()),
        "agreement": float((predicted == unreduced.argmax(1)).mean()),
    }
