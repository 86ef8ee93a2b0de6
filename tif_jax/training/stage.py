"""One training stage: from a `Stage` to checkpoints, on all devices of all processes."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from tif_jax import checked
from tif_jax.data.loader import Batches
from tif_jax.models import Model, carried
from tif_jax.models.budget import SOLVED
from tif_jax.models.params import Params, params_of
from tif_jax.runtime import processes, records
from tif_jax.runtime.mesh import make_mesh, shard
from tif_jax.runtime.metrics_log import MetricsLog
from tif_jax.runtime.workdir import only_run
from tif_jax.training import optim, speed
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.loop import run
from tif_jax.training.losses import Loss
from tif_jax.training.recipe import NetworkRecipe, Recipe, Sharding, may_differ
from tif_jax.training.state import FSDP, State, init_state, shardings
from tif_jax.training.step import Step, make_step

logger = logging.getLogger(__name__)

# Of reducers whose learned part was fitted to other targets than classes: an adapter and a second reducer learn on.
REDUCER_RESTS = ((r"^reducer/(?!then/|adapter/)", False),)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is trained, on what, and where its checkpoints go.

    directory: gets checkpoints, metrics and the note of what was made there.
    settings: the run's whole config as plain data; written into the checkpoints.
    seed: of the order of the data and of what is drawn in training.
    sharding: how the state is divided over devices.
    peak_tflops: of one device, for the utilisation in the log; 0: what is known of some.
    recipe: the section of the config that this stage is trained by (keys: recipe.py).
    model: what the last step trains, with the weights of step 0.
    fields: what the model was built with; written into its checkpoints.
    reducer: the reducer's name and options; written into the checkpoints, too.
    loss: what is descended.
    batches: the training data, with a position that is saved with every checkpoint.
    num_examples: how many examples are an epoch.
    trainable: table (pattern of parameter paths, whether these are trained), see `optim.match`. recipe.freeze comes first.
    trainable_default: whether parameters that no pattern matches are trained.
    stochastic: whether the model draws: drop-path, random reducers.
    early: (epoch, model): until that epoch this model takes the place of `model`, with the parameters as trained so far; of
    it only the structure is used (`nnx.eval_shape`).
    teacher: the model whose outputs the loss reads; None if it reads none.
    made_from: what it begins with, such as the digests of checkpoints: a folder made from something else is refused.
    examples: which training images with which labels (`data.source.fingerprint`); None where they do not tell.
    """

    directory: Path
    settings: Mapping[str, Any]
    seed: int
    sharding: Sharding
    peak_tflops: float
    recipe: Recipe
    model: Model
    fields: Mapping[str, Any]
    reducer: Mapping[str, Any]
    loss: Loss
    batches: Batches
    num_examples: int
    trainable: optim.Table = ()
    trainable_default: bool = True
    stochastic: bool = True
    early: Sequence[tuple[float, Model]] = ()
    teacher: Model | None = None
    made_from: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    examples: str | None = None

    @property
    def steps_per_epoch(self) -> float:
        least = self.recipe.min_steps / self.recipe.num_epochs if self.recipe.num_epochs else 0.0
        return max(self.num_examples / self.recipe.batch_size, least)

    @property
    def num_steps(self) -> int:
        return max(1, round(self.recipe.num_epochs * self.steps_per_epoch))

    @property
    def phases(self) -> list[tuple[Model, int]]:
        """The models that are trained one after the other, and until which step each is."""
        ends = [min(self.num_steps, round(epoch * self.steps_per_epoch)) for epoch, _ in self.early]
        models = [*(model for _, model in self.early), self.model]
        return [*zip(models, (*ends, self.num_steps), strict=True)]

    @property
    def trains_network(self) -> bool:
        """Whether the whole network is trained, so that a step computes all of it forwards and backwards."""
        return self.trainable_default


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A stage's program on its devices; it holds no weights."""

    mesh: Mesh
    abstract: State  # shapes and shardings
    fresh: Callable[[Model], State]  # the state of step 0, with the model's weights
    step: Callable[[Model], Step]  # the compiled step of the model, or of one of `early`


def prepare(stage: Stage) -> Prepared:
    """The stage's step and state; of its model only the structure is used.

    Raises InputError where a table of its recipe does not fit its parameters.
    """
    recipe, sharding = stage.recipe, stage.sharding
    ema = recipe.ema if isinstance(recipe, NetworkRecipe) else 0.0
    trainable = (*((pattern, False) for pattern in recipe.freeze), *stage.trainable)
    mask = optim.match(trainable, params_of(stage.model), stage.trainable_default)
    optimizer = _optimizer(stage)
    mesh = make_mesh(recipe.batch_size // recipe.accumulate, sharding.fsdp)

    def init(params: Params) -> State:
        return init_state(params, optimizer, mask, ema=bool(ema))

    shapes = jax.eval_shape(init, params_of(stage.model))
    where = shardings(shapes, mesh, sharding.table or FSDP)
    abstract = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)

    def fresh(model: Model) -> State:
        # Made where it will lie, so that no device ever holds more than its share.
        return jax.jit(init, out_shardings=where)(jax.device_get(params_of(model)))

    def step(model: Model) -> Step:
        return make_step(
            model,
            stage.loss,
            optimizer,
            mask,
            seed=stage.seed,
            stochastic=stage.stochastic,
            teacher=stage.teacher,
            mixing=recipe.mixing if isinstance(recipe, NetworkRecipe) else None,
            accumulate=recipe.accumulate,
            ema=ema,
            where=where,
        )

    return Prepared(mesh, abstract, fresh, step)


def claim_of(stage: Stage) -> dict[str, Any]:
    """What the stage's folder is claimed for: all that decides on the numbers in it."""
    made = {"model": dict(stage.fields), "reducer": dict(stage.reducer), "recipe": checked.to_json(stage.recipe)}
    made |= {key: stage.settings[key] for key in ("seed", "dtype", "data")}
    return made | {"made_from": dict(stage.made_from), "examples": stage.examples}


def fit(stage: Stage) -> None:
    """Trains, or goes on where an interrupted run of the same recipe stopped, until recipe.num_epochs are done.

    Raises Preempted, after saving, where SIGTERM has come; WorkError where the loss is not finite or a disk is full.
    """
    weights, stage = stage.model, dataclasses.replace(stage, model=structure_of(stage.model))
    directory, batches, num_steps = stage.directory, stage.batches, stage.num_steps
    prepared = prepare(stage)  # before a mistake in the recipe can be noted as what is made here
    made = claim_of(stage)
    ignored = may_differ(stage.examples)
    records.claim(directory, made, ignored=ignored)
    _tell_of_moved(directory, made)
    processes.wait_for_all(f"{directory.name} claimed")
    with processes.stop_asked() as stop, closing(batches), opened(directory, num_steps) as (checkpoints, lock):
        if restored := checkpoints.restore(prepared.abstract):
            state, stored = restored
            records.check_same(directory, stored.get("made"), made, ignored=ignored)
            batches.set_state(stored["position"])
        else:
            state = prepared.fresh(weights)
        del weights, restored  # the state has its own, and a step takes it
        if (start := int(jax.device_get(state.step))) < num_steps:
            lock()
            logger.info(
                "%s: steps %d to %d on %d %s devices%s", directory, start, num_steps, prepared.mesh.size,
                jax.default_backend(), f" of {jax.process_count()} processes" if jax.process_count() > 1 else "",
            )  # fmt: skip
        reducer = _solved(stage.reducer, stage.model)
        description = describe(stage.settings, stage.fields, reducer, stage.model, of=num_steps, made=made)
        metrics_log = MetricsLog(directory, start) if processes.is_first() and start < num_steps else None

        def save(state: State) -> None:
            checkpoints.save(state, description, batches.get_state())

        for model, until in stage.phases:
            if int(jax.device_get(state.step)) >= until:
                continue
            meter = speed.meter(model if stage.trains_network else None, prepared.mesh, stage.peak_tflops)

            def log(step: int, metrics: dict[str, float], meter=meter) -> None:
                if metrics_log is not None:
                    metrics_log.write(step, metrics | meter(metrics["images_per_second"]))

            state = run(
                prepared.step(model),
                state,
                (shard(batch, prepared.mesh) for batch in batches),
                until=until,
                log_every=max(1, min(50, num_steps // 20)),
                save_every=min(-(-num_steps // 2), stage.recipe.save_every),
                log=log,
                save=save,
                stop=stop,
                title=directory.name,
                of=num_steps,
            )


def _tell_of_moved(directory: Path, made: Mapping[str, Any]) -> None:
    """What is in the images is not known, only what they are called."""
    was, root = (
        (record.get("data") or {}).get("root") for record in (records.read(directory / "config.json") or {}, made)
    )
    if was != root:
        logger.info("%s: data.root is %s now, and was %s; images and labels have the same names", directory, root, was)


@contextmanager
def opened(directory: Path, num_steps: int) -> Iterator[tuple[Checkpoints, Callable[[], None]]]:
    """The checkpoints of a stage of so many steps, and what locks its folder until they are closed.

    Several workdirs may have a link to it. Where there are steps to go it is locked before `Checkpoints` removes what others
    may still be writing; to look at a finished stage takes no lock.
    """
    there = directory / "checkpoints"
    with ExitStack() as held:
        is_locked = False

        def lock() -> None:
            nonlocal is_locked
            if not is_locked:
                held.enter_context(only_run(directory.resolve()))
            is_locked = True

        steps = [int(path.name) for path in there.iterdir() if path.name.isdigit()] if there.is_dir() else []
        if processes.first_says(max(steps, default=-1) < num_steps):
            lock()
        with Checkpoints(there) as checkpoints:
            yield checkpoints, lock


def describe(
    settings: Mapping[str, Any],
    fields: Mapping[str, Any],
    reducer: Mapping[str, Any],
    model: Model,
    *,
    of: int,
    made: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint says of itself: enough to build its model again and to use it, and the config that it came from.

    of: the number of steps of its stage. made: what its folder is claimed for.
    """
    described = {"model": dict(fields), "reducer": dict(reducer), "config": dict(settings), **carried(model)}
    return {**described, "of": of, "made": dict(made)}


def structure_of(model: Model) -> Model:
    """The model without its weights: shapes stand in their place."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state))


def _optimizer(stage: Stage) -> optax.GradientTransformation:
    recipe, steps_per_epoch, num_steps = stage.recipe, stage.steps_per_epoch, stage.num_steps
    factors = []
    for pattern, factor, *epoch in recipe.rate_factors:
        factors.append((pattern, (factor, round(epoch[0] * steps_per_epoch) if epoch else 0)))
    return optim.adamw(
        num_steps,
        learning_rate=recipe.learning_rate,
        final_learning_rate=recipe.final_learning_rate,
        warmup_steps=min(num_steps - 1, round(recipe.warmup_epochs * steps_per_epoch)),
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
        adaptive_clip=recipe.adaptive_clip,
        layer_decay=recipe.layer_decay,
        rate_factors=tuple(factors),
        decay_factors=tuple(recipe.decay_factors),
    )


def _solved(reducer: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The reducer's name and options with what its budget came to: later versions may count costs differently."""
    name = next((name for name in SOLVED if "budget" in reducer and hasattr(model.reducer, name)), None)
    if name is None:
        return dict(reducer)
    return {key: value for key, value in reducer.items() if key != "budget"} | {name: getattr(model.reducer, name)}
