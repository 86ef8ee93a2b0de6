"""Train one stage: the backbone, the token filter on impact, or the ViT with its reducer in front."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from tif_jax import config as config_file
from tif_jax import data, losses, optim, records, reducers, shards
from tif_jax.commands import _arguments
from tif_jax.data.loader import Batches, training_batches
from tif_jax.errors import InputError
from tif_jax.loading import load_with_fields
from tif_jax.loop import init_state, make_step, run
from tif_jax.metrics_log import MetricsLog
from tif_jax.models import create_model
from tif_jax.models.vit import ViT
from tif_jax.state import Checkpoints, State, make_mesh, params_of, replicate, shard

logger = logging.getLogger(__name__)

FROZEN_REDUCER = ((r"^reducer/", False),)
REDUCER_ALONE = ((r"^reducer/", True),)
_SAVE_EVERY = 1000  # steps that a killed run loses at most; shorter runs save once on the way, to have one in reserve


def main(argv: list[str]) -> None:
    stages = {"backbone": backbone, "filter": token_filter, "finetune": finetune}
    arguments = _arguments.parse("train", __doc__, argv, stage=dict(required=True, choices=stages))
    stages[arguments.stage](arguments.config, arguments.workdir)


def backbone(config: ConfigDict, workdir: Path) -> None:
    """DIR/backbone: trained from random weights, or imported from `backbone.init_from`."""
    recipe, directory = config.backbone, workdir / "backbone"
    if recipe.init_from:
        _import_backbone(config, directory)
        return
    fields = {**recipe.model, "drop_path": recipe.drop_path, "dtype": config.dtype}
    model = create_model(fields, seed=config.seed)
    source = open_source(config, "train", model)
    batches = training_batches(source, config.data, batch_size=recipe.batch_size, seed=config.seed)
    loss = partial(losses.classification, label_smoothing=recipe.label_smoothing)
    _fit(directory, model, loss, (), True, batches, len(source), recipe, config, fields, {"name": "full"})


def token_filter(config: ConfigDict, workdir: Path) -> None:
    """DIR/filter (DIR/filter-SEED for further seeds): the reducer's filter, fitted to DIR/impact; the backbone rests."""
    recipe, seed = config.filter, config.seed
    name, options = reducer_options(config)
    model, fields = load_with_fields(workdir / "backbone", reducer=name, seed=seed, dtype=config.dtype, **options)
    table = shards.read_impact(workdir, expected=expected_manifest(config, model))
    labelled = labelling(config, table.impact)
    positives = float(np.mean(losses.keep_labels(table.impact, **labelled)))
    logger.info("%.1f%% of %d tokens are labelled worth keeping (%s)", 100 * positives, table.impact.size, labelled)
    if not 0 < positives < 1:
        raise InputError(
            f"{positives:.0%} of the tokens are worth keeping with filter.rho {recipe.rho}; choose another rho"
        )
    loss = partial(losses.impact, **labelled, positive_weight=(1 / positives - 1) if recipe.balance else 1.0)
    batches = training_batches(
        data.open_source(config.data, "train"),
        config.data,
        batch_size=recipe.batch_size,
        seed=seed,
        records=np.stack([table.index, table.view], axis=1),
        extra={"impact": table.impact.astype(np.float32)},
    )
    _fit(
        filter_directory(config, workdir), model, loss, REDUCER_ALONE, False, batches, len(table.index), recipe, config,
        fields, {"name": name, **options}, stochastic=False,
    )  # fmt: skip


def finetune(config: ConfigDict, workdir: Path) -> None:
    """DIR/finetune/REDUCER-KEEP_RATIO-SEED: the whole ViT with its reducer in front; the reducer's own parameters rest."""
    recipe, (name, options) = config.finetune, reducer_options(config)
    # The filter has its own stage; every other reducer starts from the backbone.
    start = filter_directory(config, workdir) if name == "tif" else workdir / "backbone"
    model, fields = load_with_fields(
        start, reducer=name, seed=config.seed, dtype=config.dtype, drop_path=recipe.drop_path, **options
    )
    if name == "prior":  # nothing to train: its one parameter is read off the shards
        table = shards.read_impact(workdir, expected=expected_manifest(config, model))
        labels = losses.keep_labels(table.impact, **labelling(config, table.impact))
        nnx.update(model, {"reducer": {"logits": losses.position_prior(labels)}})
    source = open_source(config, "train", model)
    batches = training_batches(source, config.data, batch_size=recipe.batch_size, seed=config.seed)
    loss = partial(losses.classification, label_smoothing=recipe.label_smoothing)
    frozen = FROZEN_REDUCER if "reducer" in params_of(model) else ()
    _fit(
        finetune_directory(config, workdir), model, loss, frozen, True, batches, len(source), recipe, config,
        fields, {"name": name, **options},
    )  # fmt: skip


def filter_directory(config: ConfigDict, workdir: Path) -> Path:
    return workdir / ("filter" if config.seed == 0 else f"filter-{config.seed}")


def finetune_directory(config: ConfigDict, workdir: Path) -> Path:
    keep_ratio = reducer_options(config)[1].get("keep_ratio", 1.0)
    return workdir / "finetune" / f"{config.reducer.name}-{keep_ratio:g}-{config.seed}"


def reducer_options(config: ConfigDict) -> tuple[str, dict[str, Any]]:
    """Name and options of config.reducer; a baseline takes those of the options that it knows."""
    name = config.reducer.name
    known = reducers.options(name)
    return name, {key: value for key, value in config.reducer.items() if key in known}


def check_reducer(config: ConfigDict) -> None:
    """Raises InputError if config.reducer can not be built, whatever the model."""
    name, options = reducer_options(config)

    def build() -> None:  # a reducer need not be something that jit can return
        reducers.build(name, width=2, num_heads=1, depth=12, num_patches=4, rngs=nnx.Rngs(0), **options)

    nnx.eval_shape(build)


def labelling(config: ConfigDict, impact: np.ndarray) -> dict[str, Any]:
    """Arguments of `losses.keep_labels` for config.filter: 'top', 'above' rho nats, or above the data set's quantile rho."""
    kind, rho = config.filter.labels, config.filter.rho
    if kind == "top":
        return {"rho": "top", "keep_ratio": config.reducer.keep_ratio}
    if kind == "above":
        return {"rho": float(rho)}
    if kind == "quantile":
        if not 0 < rho < 1:
            raise InputError(f"filter.rho is {rho}; with filter.labels 'quantile' it is a fraction in (0, 1)")
        return {"rho": float(np.quantile(impact, rho))}
    raise InputError(f"filter.labels is {kind!r}; allowed: 'top', 'above', 'quantile'")


def expected_manifest(config: ConfigDict, model: ViT) -> dict[str, Any]:
    """What the manifest of impact shards must say to fit this backbone and these views."""
    options = data.read_options(config.data)
    return {
        "backbone": shards.digest(params_of(model)),
        "num_tokens": model.grid[0] * model.grid[1],
        "image_size": list(options.size),
        "preprocessing": {
            "crop_fraction": options.crop_fraction, "mean": options.mean, "std": options.std, "augment": options.augment
        },
    }  # fmt: skip


def open_source(config: ConfigDict, split: str, model: ViT) -> data.Source:
    """The split's examples, whose labels are checked against the model's classes."""
    source = data.open_source(config.data, split)
    num_classes = model.head.out_features
    if source.num_classes > num_classes:
        raise InputError(
            f"{config.data.name} has labels up to {source.num_classes - 1}; the model has classes 0..{num_classes - 1}"
        )
    if source.num_classes < num_classes and config.data.name == "image_folder" and not config.data.get("class_index"):
        raise InputError(
            f"{config.data.root} has {source.num_classes} class folders and the model {num_classes} classes: "
            "say in data.class_index which folder is which class"
        )
    return source


def _import_backbone(config: ConfigDict, directory: Path) -> None:
    recipe = config.backbone
    given = {key: recipe[key] for key in ("num_heads",) if recipe.get(key)}
    given["image_size"] = config.data.image_size
    model, fields = load_with_fields(recipe.init_from, seed=config.seed, **given)
    records.claim(directory, {"init_from": str(recipe.init_from), "model": fields})
    with Checkpoints(directory / "checkpoints") as checkpoints:
        if not checkpoints.steps():
            state = State(jnp.int32(0), params_of(model), ())
            checkpoints.save(state, _description(config, fields, {"name": "full"}), {})
            checkpoints.wait()


def _description(config: ConfigDict, fields: Mapping[str, Any], reducer: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself: enough to build its model again."""
    return {"model": dict(fields), "reducer": dict(reducer), "config": config_file.to_json(config)}


def _fit(
    directory: Path,
    model: ViT,
    loss: losses.Loss,
    trainable: optim.Table,
    trainable_default: bool,
    batches: Batches,
    num_examples: int,
    recipe: ConfigDict,
    config: ConfigDict,
    fields: Mapping[str, Any],
    reducer: Mapping[str, Any],
    *,
    stochastic: bool = True,
) -> None:
    """Trains, or goes on where an interrupted run of the same recipe stopped, until recipe.num_epochs are done."""
    keys = ("seed", "dtype", "data")
    records.claim(
        directory,
        {"model": dict(fields), "reducer": dict(reducer), "recipe": recipe.to_dict()}
        | {key: config_file.to_json(config)[key] for key in keys},
    )
    steps_per_epoch = num_examples / recipe.batch_size
    num_steps = max(1, round(recipe.num_epochs * steps_per_epoch))
    optimizer = optim.adamw(
        num_steps,
        learning_rate=recipe.learning_rate,
        final_learning_rate=recipe.final_learning_rate,
        warmup_steps=min(num_steps - 1, round(recipe.warmup_epochs * steps_per_epoch)),
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
    )
    params = params_of(model)
    mask = optim.match(trainable, params, trainable_default)
    mesh = make_mesh(recipe.batch_size)
    state = replicate(init_state(params, optimizer, mask), mesh)
    step = make_step(model, loss, optimizer, mask, seed=config.seed, stochastic=stochastic)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        if restored := checkpoints.restore(state):
            state, position = restored
            batches.set_state(position)
        if (start := int(state.step)) < num_steps:
            logger.info(
                "%s: steps %d to %d on %d %s devices", directory, start, num_steps, mesh.size, jax.default_backend()
            )
        log = MetricsLog(directory, start)
        description = _description(config, fields, reducer)
        run(
            step,
            state,
            (shard(batch, mesh) for batch in batches),
            until=num_steps,
            log_every=max(1, min(50, num_steps // 20)),
            save_every=min(-(-num_steps // 2), _SAVE_EVERY),
            log=log.write,
            save=lambda state: checkpoints.save(state, description, batches.get_state()),
            label=directory.name,
        )
    batches.close()
