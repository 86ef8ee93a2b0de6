"""Train one stage: the backbone, the token filter on impact, or the ViT with its reducer in front."""

import logging
from collections.abc import Callable, Mapping, Sequence
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
from tif_jax.budget import AMOUNTS, SOLVED
from tif_jax.commands import _arguments
from tif_jax.cost import cost
from tif_jax.data.loader import Batches, training_batches
from tif_jax.errors import InputError
from tif_jax.loading import load, load_with_fields
from tif_jax.loop import init_state, make_step, run
from tif_jax.metrics_log import MetricsLog
from tif_jax.models import Model, blueprint, create_model
from tif_jax.state import Checkpoints, State, make_mesh, params_of, replicate, shard

logger = logging.getLogger(__name__)

FROZEN_REDUCER = ((r"^reducer/(?!then/)", False),)  # what follows it is trained with the rest
REDUCER_ALONE = ((r"^reducer/", True),)
_SAVE_EVERY = 1000  # steps that a killed run loses at most; shorter runs save once on the way, to have one in reserve


def main(argv: list[str]) -> None:
    stages = {"backbone": backbone, "filter": fit_reducer, "finetune": finetune}
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


def fit_reducer(config: ConfigDict, workdir: Path) -> None:
    """DIR/filter: what config.reducer has to learn before fine-tuning, fitted by itself; the backbone rests."""
    name = config.reducer.name
    if name not in FITTED:
        raise InputError(f"reducer {name!r} has no stage 'filter'; it is there for {', '.join(FITTED)}")
    FITTED[name](config, workdir)


def token_filter(config: ConfigDict, workdir: Path) -> None:
    """The token filter of tif, fitted to the impact in DIR/impact."""
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
        filter_directory(config, workdir), model, loss, REDUCER_ALONE, False, batches, len(table.index),
        recipe, config, fields, {"name": name, **options}, stochastic=False,
    )  # fmt: skip


def selectors(config: ConfigDict, workdir: Path) -> None:
    """The selectors of tosa, fitted to the attention of the blocks that they choose for; nothing is scored, no label read."""
    recipe, (name, options) = config.filter, reducer_options(config)
    options = {key: value for key, value in options.items() if key not in AMOUNTS}  # all the same while fitting
    model, fields = load_with_fields(
        workdir / "backbone", reducer=name, seed=config.seed, dtype=config.dtype, **options, fitting=True
    )
    source = data.open_source(config.data, "train")
    batches = training_batches(source, config.data, batch_size=recipe.batch_size, seed=config.seed)
    _fit(
        filter_directory(config, workdir), model, losses.selector, REDUCER_ALONE, False, batches, len(source),
        recipe, config, fields, {"name": name, **options}, stochastic=False,
    )  # fmt: skip


def finetune(config: ConfigDict, workdir: Path) -> None:
    """DIR/finetune/REDUCER-AMOUNT-SEED: the whole ViT with its reducer in front.

    What has a stage of its own (FITTED), or was read off the shards, rests; other parameters of reducers are trained here.
    """
    recipe, (name, options) = config.finetune, reducer_options(config)
    model, fields = before_finetuning(config, workdir, options)
    early = [(end, before_finetuning(config, workdir, changed)[0]) for end, changed in early_phases(config)]
    source = open_source(config, "train", model)
    batches = training_batches(source, config.data, batch_size=recipe.batch_size, seed=config.seed)
    loss, teacher = _finetuning_loss(config, workdir)
    rests = (is_fitted(config) or name == "prior") and "reducer" in params_of(model)
    _fit(
        finetune_directory(config, workdir), model, loss, FROZEN_REDUCER if rests else (), True, batches, len(source),
        recipe, config, fields, {"name": name, **options}, early=early, teacher=teacher,
    )  # fmt: skip


def before_finetuning(config: ConfigDict, workdir: Path, options: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The model that fine-tuning begins with, under config.reducer with these options, and its fields."""
    name, recipe = config.reducer.name, config.finetune
    start = filter_directory(config, workdir) if is_fitted(config) else workdir / "backbone"
    given = {"seed": config.seed, "dtype": config.dtype, "drop_path": recipe.drop_path, **recipe.get("model", {})}
    model, fields = load_with_fields(start, reducer=name, **given, **options)
    if name == "prior":  # nothing to train: its one parameter is read off the shards
        table = shards.read_impact(workdir, expected=expected_manifest(config, model))
        labels = losses.keep_labels(table.impact, **labelling(config, table.impact))
        nnx.update(model, {"reducer": {"logits": losses.position_prior(labels)}})
    return model, fields


def _finetuning_loss(config: ConfigDict, workdir: Path) -> tuple[losses.Loss, Model | None]:
    """The loss that finetune.distillation asks for, and the teacher that it needs: the backbone, unreduced."""
    recipe = config.finetune
    base = partial(losses.classification, label_smoothing=recipe.label_smoothing)
    check_distillation(config)
    given = recipe.get("distillation", {})
    kind = given.get("kind", "")
    if not kind:
        return base, None
    teacher = load(workdir / "backbone", reducer="full", dtype=config.dtype)
    if kind == "hard":
        return partial(losses.hard_distillation, base=base, weight=given.get("logits_weight", 0.5)), teacher
    return partial(losses.distillation, base=base, **{k: v for k, v in given.items() if k != "kind"}), teacher


def check_distillation(config: ConfigDict) -> None:
    """Raises InputError for keys of finetune.distillation that mean nothing."""
    given = config.finetune.get("distillation", {})
    if unknown := sorted(set(given) - {"kind", "logits_weight", "tokens_weight"}):
        raise InputError(f"finetune.distillation has {', '.join(unknown)}; known: kind, logits_weight, tokens_weight")
    if (kind := given.get("kind", "")) not in ("", "soft", "hard"):
        raise InputError(f"finetune.distillation.kind is {kind!r}; allowed: '', 'soft', 'hard'")


FITTED: dict[str, Callable[[ConfigDict, Path], None]] = {"tif": token_filter, "tosa": selectors}


def is_fitted(config: ConfigDict) -> bool:
    """Whether config.reducer has something to learn before fine-tuning."""
    return _is_fitted(*reducer_options(config))


def _is_fitted(name: str, options: Mapping[str, Any]) -> bool:
    return name in FITTED and options.get("selector", "learned") == "learned"


def filter_directory(config: ConfigDict, workdir: Path) -> Path:
    """DIR/filter for tif; for other reducers their name and options follow, and for further seeds the seed."""
    name, seed = config.reducer.name, config.seed
    parts = ["filter"] if name == "tif" else [f"filter-{name}{_others(config)}"]
    return workdir / "-".join(parts + [str(seed)] * (seed != 0))


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
        found.append((phase["until"], kept | changed))
    return found


def check_reducer(config: ConfigDict) -> None:
    """Raises InputError if config.reducer, or a phase of it, can not be built, whatever the model."""
    name, options = reducer_options(config)
    then = options.get("then")
    if isinstance(then, Mapping) and (then.get("name") == "prior" or _is_fitted(then.get("name", ""), then)):
        raise InputError(f"reducer {then['name']!r} needs a stage of its own and can not come `then` in a training run")
    for changed in (options, *(of_phase for _, of_phase in early_phases(config))):
        changed = {key: value for key, value in changed.items() if key != "budget"}

        def build(changed=changed) -> None:  # a reducer need not be something that jit can return
            reducers.build(name, width=2, num_patches=4, rngs=nnx.Rngs(0), **changed)

        nnx.eval_shape(build)


def check_on_backbone(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    """Raises InputError if config.reducer, or a phase of it, does not fit a backbone with these fields."""
    name, options = reducer_options(config)
    fields = {**fields, **config.finetune.get("model", {})}
    shapes = []
    for changed in (options, *(of_phase for _, of_phase in early_phases(config))):
        model = nnx.eval_shape(blueprint(fields, reducer=name, **changed), jax.random.key(0))
        cost(model)  # calls it
        shapes.append(jax.tree.map(lambda leaf: leaf.shape, params_of(model)))
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(f"finetune.phases change which parameters {name!r} has; they can not be trained through that")


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


def expected_manifest(config: ConfigDict, model: Model) -> dict[str, Any]:
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


def _solved(reducer: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The reducer's name and options with what its budget came to: later versions may count costs differently."""
    name = next((name for name in SOLVED if "budget" in reducer and hasattr(model.reducer, name)), None)
    if name is None:
        return dict(reducer)
    return {key: value for key, value in reducer.items() if key != "budget"} | {name: getattr(model.reducer, name)}


def _description(config: ConfigDict, fields: Mapping[str, Any], reducer: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself: enough to build its model again."""
    return {"model": dict(fields), "reducer": dict(reducer), "config": config_file.to_json(config)}


def _fit(
    directory: Path,
    model: Model,
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
    early: Sequence[tuple[float, Model]] = (),
    teacher: Model | None = None,
) -> None:
    """Trains, or goes on where an interrupted run of the same recipe stopped, until recipe.num_epochs are done.

    early: until which epochs the model is replaced by which other: the same parameters under another reducer.
    teacher: whose outputs the loss reads, if it does.
    """
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
    if teacher is not None:
        nnx.update(teacher, replicate(params_of(teacher), mesh))
    state = replicate(init_state(params, optimizer, mask), mesh)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        if restored := checkpoints.restore(state):
            state, position = restored
            batches.set_state(position)
        if (start := int(state.step)) < num_steps:
            logger.info(
                "%s: steps %d to %d on %d %s devices", directory, start, num_steps, mesh.size, jax.default_backend()
            )
        log = MetricsLog(directory, start)
        description = _description(config, fields, _solved(reducer, model))
        ends = [min(num_steps, round(epoch * steps_per_epoch)) for epoch, _ in early]
        for of_phase, until in zip((*(other for _, other in early), model), (*ends, num_steps), strict=True):
            if int(state.step) >= until:
                continue
            state = run(
                make_step(of_phase, loss, optimizer, mask, seed=config.seed, stochastic=stochastic, teacher=teacher),
                state,
                (shard(batch, mesh) for batch in batches),
                until=until,
                log_every=max(1, min(50, num_steps // 20)),
                save_every=min(-(-num_steps // 2), _SAVE_EVERY),
                log=log.write,
                save=lambda state: checkpoints.save(state, description, batches.get_state()),
                label=directory.name,
            )
    batches.close()
