"""The stages that train, each from an experiment to a `training.stage.Stage`."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tif_jax import data
from tif_jax.data.loader import Batches, training_batches
from tif_jax.data.source import fingerprint
from tif_jax.errors import InputError
from tif_jax.experiment.config import to_json
from tif_jax.experiment.earlier import take_stage
from tif_jax.experiment.folders import adapter_folder, backbone_folder, filter_folder, finetune_folder
from tif_jax.experiment.predecessors import as_begun, check_finished, finished, made_from, start_folder
from tif_jax.experiment.preprocessing import check_prepared, prepare
from tif_jax.experiment.reducer_entry import FITTED, ReducerEntry, phases_of
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.scoring import expected_manifest, label_options
from tif_jax.experiment.sources import open_for_model
from tif_jax.impact import shards
from tif_jax.impact.labels import keep_labels, position_prior
from tif_jax.models import Model, blueprint, create_model
from tif_jax.models.budget import AMOUNTS
from tif_jax.models.params import backbone_digest, params_of
from tif_jax.runtime import records
from tif_jax.tasks import DEPTH
from tif_jax.training import losses, tasks
from tif_jax.training.recipe import NetworkRecipe, Recipe
from tif_jax.training.stage import REDUCER_RESTS, Stage, claim_of, describe, fit, opened
from tif_jax.training.state import State
from tif_jax.weights.loading import load, load_with_fields

logger = logging.getLogger(__name__)

_WITHOUT_WEIGHTS = (
    "the network begins with random weights, and a few thousand pictures teach those little; name pretrained ones, as in "
    "--config.backbone.init_from=hf:timm/deit_tiny_patch16_224.fb_in1k"
)
REDUCER_LEARNS = ((r"^reducer/", True),)
ADAPTER_LEARNS = ((r"^reducer/adapter/", True),)


def train(stage: str, experiment: Experiment, workdir: Path, earlier: Path | None = None) -> None:
    """Makes, or goes on with, DIR/backbone, DIR/filter, DIR/adapter or DIR/finetune/LABEL-SEED.

    earlier: another workdir, which the stage is taken over from if it is the same there.
    """
    if stage == "backbone" and not experiment.backbone.is_trained:
        _begin_backbone(experiment, workdir, earlier)
        return
    made = STAGES[stage](experiment, workdir)
    if earlier:
        take_stage(earlier, workdir, made.directory, claim_of(made), made.num_steps)
    fit(made)


def backbone(experiment: Experiment, workdir: Path) -> Stage:
    """The backbone, from the weights of init_from or random ones."""
    recipe = experiment.backbone
    model, fields = before_backbone(experiment)
    source = open_for_model(experiment, "train", model)
    return _stage(
        experiment,
        directory=backbone_folder(workdir),
        recipe=recipe,
        model=prepare(model, experiment, source),
        fields=fields,
        reducer={"name": "full"},
        loss=_task_loss(model, recipe),
        batches=_fresh_views(experiment, recipe, source),
        num_examples=len(source),
        examples=fingerprint(source),
        made_from={"weights": backbone_digest(params_of(model))} if recipe.init_from else {},
    )


def before_backbone(experiment: Experiment) -> tuple[Model, dict[str, Any]]:
    """The model that the stage `backbone` begins with, and its fields. Its preprocessing is the experiment's."""
    recipe = experiment.backbone
    given: dict[str, Any] = dict(recipe.model)
    if recipe.head:
        given |= {"image_size": experiment.data.image_size}
        if experiment.data.task != DEPTH.name:
            given["num_classes"] = data.open_source(experiment.data, "train").num_classes
    if recipe.is_trained:
        given |= {"drop_path": recipe.drop_path, **_remat(recipe)}
    if not recipe.init_from:
        if recipe.head:
            logger.warning("backbone.init_from is empty: %s", _WITHOUT_WEIGHTS)
        fields = {**given, "dtype": experiment.dtype}
        return prepare(create_model(fields, seed=experiment.seed), experiment), fields
    check_finished(recipe.init_from)
    given |= {"num_heads": recipe.num_heads} if recipe.num_heads else {}
    return load_with_fields(
        recipe.init_from,
        reducer="full",
        dtype=experiment.dtype if recipe.is_trained else "float32",
        seed=experiment.seed,
        preprocessing=experiment.data.preprocessing,  # which agrees with what the weights say
        fresh_head=recipe.head == "fresh",
        **{**given, "image_size": experiment.data.image_size},
    )


def fitted_part(experiment: Experiment, workdir: Path) -> Stage:
    """What the reducer has to learn before fine-tuning; the backbone rests."""
    makers = dict(zip(FITTED, (token_filter, selectors), strict=True))
    name = experiment.reducer.name
    if name not in makers:
        raise InputError(f"reducer {name!r} has no stage 'filter'; it is there for {', '.join(makers)}")
    return makers[name](experiment, workdir)


def token_filter(experiment: Experiment, workdir: Path) -> Stage:
    """The token filter of tif, fitted to the impact in DIR/impact: for any budget and whatever comes then."""
    recipe, entry = experiment.filter, _fitted_entry(experiment).without("adapter")  # it comes after the filter
    begin = made_from(experiment, workdir, "filter")
    loaded = _load(backbone_folder(workdir), entry, experiment)
    source = data.open_source(experiment.data, "train")
    table = shards.read_impact(workdir, expected=expected_manifest(experiment, loaded[0], source))
    labelled = label_options(experiment, table.impact)
    positives = float(np.mean(keep_labels(table.impact, **labelled)))
    logger.info("%.1f%% of %d tokens are labelled worth keeping (%s)", 100 * positives, table.impact.size, labelled)
    if not 0 < positives < 1:
        raise InputError(
            f"{positives:.0%} of the tokens are worth keeping with filter.rho {recipe.rho}; choose another rho"
        )
    batches = training_batches(
        source,
        experiment.data,
        batch_size=recipe.batch_size,
        seed=experiment.seed,
        records=np.stack([table.index, table.view], axis=1),
        extra={"impact": table.impact.astype(np.float32)},
    )
    return _part_alone(
        experiment,
        entry,
        loaded,
        directory=filter_folder(experiment, workdir),
        recipe=recipe,
        loss=partial(losses.impact, **labelled, positive_weight=(1 / positives - 1) if recipe.balance else 1.0),
        batches=batches,
        num_examples=len(table.index),
        examples=fingerprint(source),
        trainable=REDUCER_LEARNS,
        made_from=begin,
    )


def selectors(experiment: Experiment, workdir: Path) -> Stage:
    """The selectors of tosa, fitted to the attention of the blocks that they choose for; nothing is scored, no label read."""
    recipe, entry = experiment.filter, experiment.reducer.without(*AMOUNTS)  # all the same while fitting
    loaded = _load(backbone_folder(workdir), entry, experiment, fitting=True)
    return _part_alone(
        experiment,
        entry,
        loaded,
        directory=filter_folder(experiment, workdir),
        recipe=recipe,
        loss=losses.selector,
        **_all_images(experiment, recipe, loaded[0]),
        trainable=REDUCER_LEARNS,
        made_from=made_from(experiment, workdir, "filter"),
    )


def adapter(experiment: Experiment, workdir: Path) -> Stage:
    """The adapter of tif, behind its fitted filter; it learns from what the backbone says of all tokens, not from labels."""
    recipe, directory = experiment.adapter, adapter_folder(experiment, workdir)
    entry = experiment.reducer if recipe.as_used else _fitted_entry(experiment)
    if not entry.has_adapter:
        raise InputError("stage 'adapter' is for tif with reducer.adapter above 0")
    loaded = _load(filter_folder(experiment, workdir), as_begun(entry, directory), experiment)
    return _part_alone(
        experiment,
        entry,
        loaded,
        directory=directory,
        recipe=recipe,
        loss=tasks.of_model(loaded[0]).divergence,
        **_all_images(experiment, recipe, loaded[0]),
        trainable=ADAPTER_LEARNS,
        teacher=load(finished(backbone_folder(workdir))[0], reducer="full", dtype=experiment.dtype),
        made_from=made_from(experiment, workdir, "adapter"),
    )


def finetune(experiment: Experiment, workdir: Path) -> Stage:
    """The whole network with its reducer.

    What was fitted before (`is_fitted_first`), or read off the shards, rests; other parameters of reducers are trained here.
    """
    recipe, entry = experiment.finetune, experiment.reducer
    model, fields = before_finetuning(experiment, workdir)
    source = open_for_model(experiment, "train", model)
    loss, teacher = _finetuning_loss(experiment, workdir, model)
    begin = made_from(experiment, workdir, "finetune")
    if recipe.distillation.teacher and teacher:
        begin["teacher"] = backbone_digest(params_of(teacher))
    rests = (entry.is_fitted_first or entry.name == "prior") and "reducer" in params_of(model)
    return _stage(
        experiment,
        directory=finetune_folder(experiment, workdir),
        recipe=recipe,
        model=prepare(model, experiment, source),
        fields=fields,
        reducer=entry.described,
        loss=loss,
        batches=_fresh_views(experiment, recipe, source),
        num_examples=len(source),
        examples=fingerprint(source),
        trainable=REDUCER_RESTS if rests else (),
        early=[
            (end, nnx.eval_shape(blueprint(fields, reducer=changed.name, **changed.arguments), jax.random.key(0)))
            for end, changed in phases_of(entry, recipe.phases)
        ],
        teacher=teacher,
        made_from=begin,
    )


STAGES: dict[str, Callable[[Experiment, Path], Stage]] = {
    "backbone": backbone, "filter": fitted_part, "adapter": adapter, "finetune": finetune,
}  # fmt: skip


def before_finetuning(experiment: Experiment, workdir: Path) -> tuple[Model, dict[str, Any]]:
    """The model that fine-tuning begins with, under the experiment's reducer, and its fields."""
    entry, recipe = as_begun(experiment.reducer, finetune_folder(experiment, workdir)), experiment.finetune
    given = {"drop_path": recipe.drop_path, **_remat(recipe), **recipe.model}
    model, fields = _load(start_folder(experiment, workdir), entry, experiment, **given)
    if entry.name == "prior":  # nothing to train: its one parameter is read off the shards
        source = data.open_source(experiment.data, "train")
        # Heads that are for training alone (finetune.model) were not there when impact was scored.
        scored = _load(backbone_folder(workdir), ReducerEntry("full", {}), experiment)[0] if recipe.model else model
        table = shards.read_impact(workdir, expected=expected_manifest(experiment, scored, source))
        labels = keep_labels(table.impact, **label_options(experiment, table.impact))
        nnx.update(model, {"reducer": {"logits": position_prior(labels)}})
    return model, fields


def _stage(experiment: Experiment, **of_stage: Any) -> Stage:
    return Stage(
        settings=to_json(experiment),
        seed=experiment.seed,
        sharding=experiment.sharding,
        peak_tflops=experiment.peak_tflops,
        **of_stage,
    )


def _part_alone(
    experiment: Experiment, entry: ReducerEntry, loaded: tuple[Model, dict[str, Any]], **of_stage: Any
) -> Stage:
    """A stage that trains a part of the reducer while the rest of the network rests; nothing is drawn."""
    model, fields = loaded
    frozen = dict(trainable_default=False, stochastic=False)
    return _stage(experiment, model=model, fields=fields, reducer=entry.described, **frozen, **of_stage)


def _all_images(experiment: Experiment, recipe: Recipe, model: Model) -> dict[str, Any]:
    """Batches of all training images, and how many there are. Their labels are not read: they need not fit the model."""
    check_prepared(model, experiment, "the network")
    source = data.open_source(experiment.data, "train")
    batches = training_batches(source, experiment.data, batch_size=recipe.batch_size, seed=experiment.seed)
    return {"batches": batches, "num_examples": len(source), "examples": fingerprint(source)}


def _load(folder: Path, entry: ReducerEntry, experiment: Experiment, **given: Any) -> tuple[Model, dict[str, Any]]:
    """What a finished stage left, under a reducer."""
    options: dict[str, Any] = {"seed": experiment.seed, "dtype": experiment.dtype, **given, **entry.arguments}
    return load_with_fields(finished(folder)[0], reducer=entry.name, **options)


def _fitted_entry(experiment: Experiment) -> ReducerEntry:
    """tif as it is fitted: for the ratio that its labels aim at, whatever its budget, rounding and whatever comes then."""
    alone = experiment.reducer.without("then", "round_to")
    return alone.replaced(keep_ratio=experiment.filter.keep_ratio)


def _fresh_views(experiment: Experiment, recipe: NetworkRecipe, source: data.Source) -> Batches:
    views = recipe.augmentation
    return training_batches(
        source,
        experiment.data,
        batch_size=recipe.batch_size,
        seed=experiment.seed,
        augmentation=views,
        repeats=views.repeats,
    )


def _remat(recipe: NetworkRecipe) -> dict[str, bool]:
    return {"remat": True} if recipe.remat else {}


def _task_loss(model: Model, recipe: NetworkRecipe) -> losses.Loss:
    """What the whole network learns from labels."""
    loss = tasks.of_model(model).loss
    return partial(loss, label_smoothing=recipe.label_smoothing) if loss is losses.classification else loss


def _finetuning_loss(experiment: Experiment, workdir: Path, model: Model) -> tuple[losses.Loss, Model | None]:
    """The loss that finetune.distillation asks for, and the teacher that it needs: by default the backbone, unreduced."""
    recipe = experiment.finetune
    base = _task_loss(model, recipe)
    given = recipe.distillation
    if not given.kind:
        return base, None
    if given.teacher:
        check_finished(given.teacher)
    teacher = load(given.teacher or finished(backbone_folder(workdir))[0], reducer="full", dtype=experiment.dtype)
    check_prepared(teacher, experiment, f"the teacher {given.teacher or backbone_folder(workdir)}")
    if given.kind == "hard":
        return partial(losses.hard_distillation, base=base, weight=given.logits_weight), teacher
    weights = dict(logits_weight=given.logits_weight, tokens_weight=given.tokens_weight)
    return partial(losses.distillation, base=base, **weights), teacher


def _begin_backbone(experiment: Experiment, workdir: Path, earlier: Path | None) -> None:
    """A backbone that is not trained by itself: imported, or random weights that fine-tuning begins with."""
    recipe, directory = experiment.backbone, backbone_folder(workdir)
    model, fields = before_backbone(experiment)
    if recipe.head:
        prepare(model, experiment, data.open_source(experiment.data, "train"))
    which = {"weights": backbone_digest(params_of(model))} if recipe.init_from else {"seed": experiment.seed}
    made = {"init_from": recipe.init_from, "model": fields, **which}
    if earlier:
        take_stage(earlier, workdir, directory, made, 0)
    records.claim(directory, made)
    state = State(jnp.int32(0), params_of(model), ())
    with opened(directory, 0) as (checkpoints, _):
        if restored := checkpoints.restore(state):
            records.check_same(directory, restored[1].get("made"), made)
        else:
            checkpoints.save(state, describe(to_json(experiment), fields, {"name": "full"}, model, of=0, made=made), {})
            checkpoints.wait()
