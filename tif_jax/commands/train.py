"""Train one stage: the backbone, the token filter on impact, or the ViT with its reducer in front."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from tif_jax import data, reducers
from tif_jax.commands import _arguments
from tif_jax.data.loader import Batches, training_batches
from tif_jax.data.preprocess import NONE
from tif_jax.errors import InputError
from tif_jax.impact import shards
from tif_jax.impact.labels import keep_labels, position_prior
from tif_jax.models import Model, blueprint, create_model
from tif_jax.models.budget import AMOUNTS, SOLVED
from tif_jax.models.cost import cost
from tif_jax.models.params import backbone_digest, params_of
from tif_jax.runtime import processes, records
from tif_jax.training import losses, optim
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.recipe import augmentation
from tif_jax.training.stage import Stage, describe, fit
from tif_jax.training.state import State
from tif_jax.weights.loading import load, load_with_fields

logger = logging.getLogger(__name__)

FROZEN_REDUCER = ((r"^reducer/(?!then/|adapter/)", False),)  # these are trained with the rest
REDUCER_ALONE = ((r"^reducer/", True),)
ADAPTER_ALONE = ((r"^reducer/adapter/", True),)


def main(argv: list[str]) -> None:
    arguments = _arguments.parse("train", __doc__, argv, stage=dict(required=True, choices=STAGES), **processes.FLAGS)
    processes.join(arguments)
    train(arguments.stage, arguments.config, arguments.workdir)


def train(stage: str, config: ConfigDict, workdir: Path) -> None:
    """DIR/backbone, DIR/filter, DIR/adapter or DIR/finetune/REDUCER-AMOUNT-SEED."""
    if stage == "backbone" and (config.backbone.init_from or not config.backbone.num_epochs):
        _begin_backbone(config, workdir / "backbone")
    else:
        fit(STAGES[stage](config, workdir))


def backbone(config: ConfigDict, workdir: Path) -> Stage:
    """The backbone, from random weights."""
    recipe = config.backbone
    fields = {**recipe.model, "drop_path": recipe.drop_path, "dtype": config.dtype, **_remat(recipe)}
    model = create_model(fields, seed=config.seed)
    source = open_source(config, "train", model)
    return Stage(
        directory=workdir / "backbone",
        config=config,
        recipe=recipe,
        model=model,
        fields=fields,
        reducer={"name": "full"},
        loss=partial(losses.classification, label_smoothing=recipe.label_smoothing),
        batches=_fresh_views(config, recipe, source),
        num_examples=len(source),
    )


def fit_reducer(config: ConfigDict, workdir: Path) -> Stage:
    """What config.reducer has to learn before fine-tuning, fitted by itself; the backbone rests."""
    name = config.reducer.name
    if name not in FITTED:
        raise InputError(f"reducer {name!r} has no stage 'filter'; it is there for {', '.join(FITTED)}")
    return FITTED[name](config, workdir)


def token_filter(config: ConfigDict, workdir: Path) -> Stage:
    """The token filter of tif, fitted to the impact in DIR/impact: for any budget and whatever comes then."""
    recipe, seed = config.filter, config.seed
    name, options = config.reducer.name, _alone(config)
    options.pop("adapter", None)  # it comes after the filter
    model, fields = load_with_fields(workdir / "backbone", reducer=name, seed=seed, dtype=config.dtype, **options)
    table = shards.read_impact(workdir, expected=expected_manifest(config, model))
    labelled = labelling(config, table.impact)
    positives = float(np.mean(keep_labels(table.impact, **labelled)))
    logger.info("%.1f%% of %d tokens are labelled worth keeping (%s)", 100 * positives, table.impact.size, labelled)
    if not 0 < positives < 1:
        raise InputError(
            f"{positives:.0%} of the tokens are worth keeping with filter.rho {recipe.rho}; choose another rho"
        )
    batches = training_batches(
        data.open_source(config.data, "train"),
        config.data,
        batch_size=recipe.batch_size,
        seed=seed,
        records=np.stack([table.index, table.view], axis=1),
        extra={"impact": table.impact.astype(np.float32)},
    )
    return Stage(
        directory=filter_directory(config, workdir),
        config=config,
        recipe=recipe,
        model=model,
        fields=fields,
        reducer={"name": name, **options},
        loss=partial(losses.impact, **labelled, positive_weight=(1 / positives - 1) if recipe.balance else 1.0),
        batches=batches,
        num_examples=len(table.index),
        trainable=REDUCER_ALONE,
        trainable_default=False,
        stochastic=False,
    )


def selectors(config: ConfigDict, workdir: Path) -> Stage:
    """The selectors of tosa, fitted to the attention of the blocks that they choose for; nothing is scored, no label read."""
    recipe, (name, options) = config.filter, reducer_options(config)
    options = {key: value for key, value in options.items() if key not in AMOUNTS}  # all the same while fitting
    model, fields = load_with_fields(
        workdir / "backbone", reducer=name, seed=config.seed, dtype=config.dtype, **options, fitting=True
    )
    source = data.open_source(config.data, "train")
    return Stage(
        directory=filter_directory(config, workdir),
        config=config,
        recipe=recipe,
        model=model,
        fields=fields,
        reducer={"name": name, **options},
        loss=losses.selector,
        batches=training_batches(source, config.data, batch_size=recipe.batch_size, seed=config.seed),
        num_examples=len(source),
        trainable=REDUCER_ALONE,
        trainable_default=False,
        stochastic=False,
    )


def adapter(config: ConfigDict, workdir: Path) -> Stage:
    """The adapter of tif, behind its fitted filter; it learns from what the backbone says of all tokens, not from labels."""
    recipe, name, options = config.get("adapter"), config.reducer.name, _alone(config)
    if not has_adapter(config) or recipe is None:
        raise InputError(
            "stage 'adapter' is for tif with reducer.adapter above 0 and a config with a section `adapter`"
        )
    model, fields = load_with_fields(
        filter_directory(config, workdir), reducer=name, seed=config.seed, dtype=config.dtype, **options
    )
    source = data.open_source(config.data, "train")
    return Stage(
        directory=adapter_directory(config, workdir),
        config=config,
        recipe=recipe,
        model=model,
        fields=fields,
        reducer={"name": name, **options},
        loss=losses.divergence,
        batches=training_batches(source, config.data, batch_size=recipe.batch_size, seed=config.seed),
        num_examples=len(source),
        trainable=ADAPTER_ALONE,
        trainable_default=False,
        stochastic=False,
        teacher=load(workdir / "backbone", reducer="full", dtype=config.dtype),
    )


def finetune(config: ConfigDict, workdir: Path) -> Stage:
    """The whole ViT with its reducer in front.

    What has a stage of its own (FITTED), or was read off the shards, rests; other parameters of reducers are trained here.
    """
    recipe, (name, options) = config.finetune, reducer_options(config)
    model, fields = before_finetuning(config, workdir, options)
    source = open_source(config, "train", model)
    loss, teacher = _finetuning_loss(config, workdir)
    rests = (is_fitted(config) or name == "prior") and "reducer" in params_of(model)
    return Stage(
        directory=finetune_directory(config, workdir),
        config=config,
        recipe=recipe,
        model=model,
        fields=fields,
        reducer={"name": name, **options},
        loss=loss,
        batches=_fresh_views(config, recipe, source),
        num_examples=len(source),
        trainable=FROZEN_REDUCER if rests else (),
        early=[(end, before_finetuning(config, workdir, changed)[0]) for end, changed in early_phases(config)],
        teacher=teacher,
    )


Maker = Callable[[ConfigDict, Path], Stage]
STAGES: dict[str, Maker] = {"backbone": backbone, "filter": fit_reducer, "adapter": adapter, "finetune": finetune}
FITTED: dict[str, Maker] = {"tif": token_filter, "tosa": selectors}


def _fresh_views(config: ConfigDict, recipe: ConfigDict, source: data.Source) -> Batches:
    views, repeats = augmentation(recipe)
    if data.read_options(config.data).augment == "none" and (repeats > 1 or views != NONE):
        raise InputError("augmentation is for views that are drawn anew, of which data.augment 'none' has none")
    return training_batches(
        source, config.data, batch_size=recipe.batch_size, seed=config.seed, augmentation=views, repeats=repeats
    )


def _remat(recipe: ConfigDict) -> dict[str, bool]:
    return {"remat": True} if recipe.remat else {}


def before_finetuning(config: ConfigDict, workdir: Path, options: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The model that fine-tuning begins with, under config.reducer with these options, and its fields."""
    name, recipe = config.reducer.name, config.finetune
    start = workdir / "backbone"
    if is_fitted(config):
        start = adapter_directory(config, workdir) if has_adapter(config) else filter_directory(config, workdir)
    given = {"seed": config.seed, "dtype": config.dtype, "drop_path": recipe.drop_path, **_remat(recipe)}
    given |= recipe.get("model", {})
    model, fields = load_with_fields(start, reducer=name, **given, **options)
    if name == "prior":  # nothing to train: its one parameter is read off the shards
        table = shards.read_impact(workdir, expected=expected_manifest(config, model))
        labels = keep_labels(table.impact, **labelling(config, table.impact))
        nnx.update(model, {"reducer": {"logits": position_prior(labels)}})
    return model, fields


def _finetuning_loss(config: ConfigDict, workdir: Path) -> tuple[losses.Loss, Model | None]:
    """The loss that finetune.distillation asks for, and the teacher that it needs: the backbone, unreduced."""
    recipe = config.finetune
    base = partial(losses.classification, label_smoothing=recipe.label_smoothing)
    given = recipe.distillation
    if not given.kind:
        return base, None
    teacher = load(given.teacher or workdir / "backbone", reducer="full", dtype=config.dtype)
    if given.kind == "hard":
        return partial(losses.hard_distillation, base=base, weight=given.logits_weight), teacher
    weights = dict(logits_weight=given.logits_weight, tokens_weight=given.tokens_weight)
    return partial(losses.distillation, base=base, **weights), teacher


def is_fitted(config: ConfigDict) -> bool:
    """Whether config.reducer has something to learn before fine-tuning."""
    return _is_fitted(*reducer_options(config))


def _is_fitted(name: str, options: Mapping[str, Any]) -> bool:
    return name in FITTED and options.get("selector", "learned") == "learned"


def has_adapter(config: ConfigDict) -> bool:
    """Whether config.reducer has an adapter, which is trained between its filter and fine-tuning."""
    name, options = reducer_options(config)
    return name == "tif" and options.get("adapter", 0) > 0


def _alone(config: ConfigDict) -> dict[str, Any]:
    """Options of tif while it is fitted: for its keep_ratio, whatever budget it gets and whatever comes then."""
    known = reducers.options(config.reducer.name)
    return {key: value for key, value in config.reducer.to_dict().items() if key in known and key != "then"}


def adapter_directory(config: ConfigDict, workdir: Path) -> Path:
    return workdir / _of_seed("adapter", config)


def filter_directory(config: ConfigDict, workdir: Path) -> Path:
    """DIR/filter for tif; for other reducers their name and options follow, and for further seeds the seed."""
    name = config.reducer.name
    return workdir / _of_seed("filter" if name == "tif" else f"filter-{name}{_others(config)}", config)


def _of_seed(name: str, config: ConfigDict) -> str:
    return f"{name}-{config.seed}" if config.seed else name


def finetune_directory(config: ConfigDict, workdir: Path) -> Path:
    return workdir / "finetune" / f"{label(config)}-{config.seed}"


def label(config: ConfigDict) -> str:
    """REDUCER-AMOUNT, as in 'tif-0.5', and the options that differ from the reducer's defaults: 'evit-0.5,fuse=False'."""
    name, options = reducer_options(config)
    defaults = _defaults(name)
    solved = next((key for key in SOLVED if key in defaults), None)
    if options.get("budget"):
        amount = f"{options['budget']:g}GMAC"
    else:
        amount = _short(options.get("num_kept") or (options.get(solved, defaults[solved]) if solved else 1))
    return f"{name}-{amount}{_others(config)}"


def _others(config: ConfigDict) -> str:
    """The options but the amount that differ from the reducer's defaults."""
    name, options = reducer_options(config)
    defaults = _defaults(name)
    differing = {key: v for key, v in options.items() if key not in AMOUNTS and v != defaults[key]}
    return "".join(f",{key}={_short(value)}" for key, value in differing.items())


def _defaults(name: str) -> dict[str, Any]:
    return {key: parameter.default for key, parameter in reducers.options(name).items()}


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        others = [f"{key}={_short(v)}" for key, v in value.items() if key != "name"]
        return "+".join([str(value.get("name")), *others])
    if isinstance(value, tuple | list):
        return "+".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def reducer_options(config: ConfigDict) -> tuple[str, dict[str, Any]]:
    """Name and options of config.reducer: those that this reducer knows, and a budget instead of an amount."""
    name, given = config.reducer.name, config.reducer.to_dict()
    known = reducers.options(name)
    options = {key: value for key, value in given.items() if key in known}
    if given.get("budget") and any(key in known for key in SOLVED):
        options = {key: value for key, value in options.items() if key not in AMOUNTS} | {"budget": given["budget"]}
    return name, options


def early_phases(config: ConfigDict) -> list[tuple[float, dict[str, Any]]]:
    """What finetune.phases say: until which epoch the reducer has which options. After the last come its own.

    A phase is dict(until=EPOCH, OPTION=...); a baseline takes those of its options that it knows.
    """
    name, options = reducer_options(config)
    phases, last = config.finetune.get("phases", ()), config.finetune.num_epochs
    if not isinstance(phases, tuple | list) or not all(isinstance(phase, Mapping) for phase in phases):
        raise InputError(
            f"finetune.phases is {phases!r}; it is a tuple of dicts, as in (dict(until=2, keep_ratio=0.9),)"
        )
    ends = [phase.get("until") for phase in phases]
    if not all(isinstance(end, int | float) and 0 < end < last for end in ends) or ends != sorted(ends):
        raise InputError(
            f"finetune.phases last until the epochs {ends}; give each an `until`, ascending, below num_epochs, {last:g}"
        )
    known = reducers.options(name)
    found = []
    for phase in phases:
        changed = {key: value for key, value in phase.items() if key in known}
        other_amount = any(key in AMOUNTS for key in changed)
        kept = {key: value for key, value in options.items() if not (other_amount and key in AMOUNTS)}
        found.append((float(phase["until"]), kept | changed))
    return found


def check_reducer(config: ConfigDict) -> None:
    """Raises InputError if config.reducer, or a phase of it, can not be built, whatever the model."""
    name, options = reducer_options(config)
    if _is_fitted(name, options) and "filter" not in config:
        raise InputError(f"reducer {name!r} is fitted before fine-tuning; the config has no section `filter` for that")
    if has_adapter(config) and "adapter" not in config:
        raise InputError("reducer.adapter is trained before fine-tuning; the config has no section `adapter` for that")
    then = options.get("then")
    if isinstance(then, Mapping) and (then.get("name") == "prior" or _is_fitted(then.get("name", ""), then)):
        raise InputError(f"reducer {then['name']!r} needs a stage of its own and can not come `then` in a training run")
    for changed in (options, *(of_phase for _, of_phase in early_phases(config))):
        changed = {key: value for key, value in changed.items() if key != "budget"}

        def build(changed=changed) -> None:  # a reducer need not be something that jit can return
            reducers.build(name, width=2, num_patches=4, rngs=nnx.Rngs(0), **changed)

        nnx.eval_shape(build)


def check_on_backbone(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    """Raises InputError if config.reducer, a phase of it or a table of finetune does not fit a backbone of these fields."""
    name, options = reducer_options(config)
    fields = {**fields, **config.finetune.get("model", {})}
    shapes = []
    for changed in (options, *(of_phase for _, of_phase in early_phases(config))):
        model = nnx.eval_shape(blueprint(fields, reducer=name, **changed), jax.random.key(0))
        cost(model)  # calls it
        recipe = config.finetune
        for table in (recipe.rate_factors, recipe.decay_factors, [(pattern, False) for pattern in recipe.freeze]):
            optim.match(tuple(entry[:2] for entry in table), params_of(model), None)
        shapes.append(jax.tree.map(lambda leaf: leaf.shape, params_of(model)))
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(f"finetune.phases change which parameters {name!r} has; they can not be trained through that")


def labelling(config: ConfigDict, impact: np.ndarray) -> dict[str, Any]:
    """Arguments of `keep_labels` for config.filter: 'top', 'above' rho nats, or above the data set's quantile rho."""
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


def expected_manifest(config: ConfigDict, model: Model) -> dict[str, Any]:
    """What the manifest of impact shards must say to fit this backbone and these views."""
    options = data.read_options(config.data)
    return {
        "backbone": backbone_digest(params_of(model)),
        "num_tokens": model.grid[0] * model.grid[1],
        "image_size": list(options.size),
        "preprocessing": {
            "crop_fraction": options.crop_fraction, "mean": options.mean, "std": options.std, "augment": options.augment
        },
    }  # fmt: skip


def open_source(config: ConfigDict, split: str, model: Model) -> data.Source:
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


def _begin_backbone(config: ConfigDict, directory: Path) -> None:
    """A backbone that is not trained by itself: imported, or random weights that fine-tuning begins with."""
    recipe = config.backbone
    if recipe.init_from:
        given = {key: recipe[key] for key in ("num_heads",) if recipe.get(key)}
        given["image_size"] = config.data.image_size
        model, fields = load_with_fields(recipe.init_from, seed=config.seed, **given)
    else:
        fields = {**recipe.model, "dtype": config.dtype}
        model = create_model(fields, seed=config.seed)
    records.claim(directory, {"init_from": str(recipe.init_from), "model": fields})
    with Checkpoints(directory / "checkpoints") as checkpoints:
        if not checkpoints.steps():
            state = State(jnp.int32(0), params_of(model), ())
            checkpoints.save(state, describe(config, fields, {"name": "full"}), {})
            checkpoints.wait()
