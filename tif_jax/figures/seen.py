"""What there is to see of a picture: impact of its patches, tokens that reducers leave, classes with all tokens and with few.

Legend: B images, Y X height and width, R C rows and columns of the patch raster, N patches, L classes.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from tif_jax import reducers
from tif_jax.data.source import LabelMap
from tif_jax.errors import InputError, WorkError
from tif_jax.figures.maps import Picture, photograph
from tif_jax.figures.panels import Maps
from tif_jax.impact.token_impact import token_impact
from tif_jax.layers import true_float32
from tif_jax.models import Model, ViT, built_with
from tif_jax.models.model import FULL
from tif_jax.models.trace import trace
from tif_jax.reducers import Aux, Full
from tif_jax.tasks import CLASSIFICATION

OFF_THE_SHELF = ("evit", "tome", "random", "norm")  # they learn nothing, so that any weights run under them
NUM_STAGES = 4  # of a reducer that are drawn: of those where the tokens change, evenly spaced, the last one too
NO_IMPACT = "No impact: a LeViT's shrink blocks leave no token for each patch."
NO_NUMBERS = "the model's outputs for {} are no numbers (NaN); take other weights"
NO_HEAD = "No impact and no classes: this model has no head, its outputs are features."


class Stage(NamedTuple):
    """The tokens at one place in the blocks."""

    title: str
    num_tokens: int  # patch tokens
    source: Int[np.ndarray, "R C"]  # which of them holds each patch, or -1


class Class(NamedTuple):
    name: str
    before: float  # probability with all tokens
    after: float  # with those that the reducer leaves


class Way(NamedTuple):
    """A picture under one reducer."""

    label: str
    stages: tuple[Stage, ...]
    classes: tuple[Class, ...]  # the likeliest of before and of after, by the latter


class Seen(NamedTuple):
    """A picture, with all that is drawn of it."""

    name: str
    photo: Picture  # as the model sees it
    classes: tuple[Class, ...]  # with all tokens, before and after alike
    impact: Float[np.ndarray, "R C"] | None  # nats
    predicted: Float[np.ndarray, "R C"] | None  # logits of a token filter
    ways: tuple[Way, ...]
    note: str = ""
    maps: Maps | None = None  # of a dense model


def see(
    full: Model,
    ways: Mapping[str, Model],
    name: str,
    image: Float[np.ndarray, "Y X 3"],
    top: int,
    truth: LabelMap | None = None,
    **oracle: Any,
) -> Seen:
    """One picture, given as the model takes it. truth: its label map.

    full: its impacts are those of the picture, its classes those with all tokens, whatever reducer it has. ways: models with
    a reducer, by what they are called; a filter among them gives the prediction. oracle: options of `token_impact`.
    Raises WorkError where a model's outputs are no numbers.
    """
    images, full = jnp.asarray(image)[None], under(full, FULL)
    if full.task != CLASSIFICATION.name:
        return _see_pixels(full, ways, name, image, truth, **oracle)
    names = full.class_names if full.num_classes else None
    before = _probabilities(_call(full, images)[0], name)
    impact = predicted = None
    if isinstance(full, ViT) and full.num_classes:
        impact = np.asarray(token_impact(full, images, target="teacher", **oracle)).reshape(full.grid)
    drawn = []
    for label, model in ways.items():
        logits, aux, stages = _walk(model, images)
        if predicted is None and "filter_logits" in aux:
            predicted = np.asarray(aux["filter_logits"], np.float32).reshape(full.grid)
        after = _probabilities(logits, name)
        drawn.append(Way(label, stages, _classes(names, before, after, top if full.num_classes else 0)))
    return Seen(
        name,
        photograph(image, full.preprocessing),
        _classes(names, before, before, top if full.num_classes else 0),
        impact,
        predicted,
        tuple(drawn),
        (NO_IMPACT if not isinstance(full, ViT) else "") if full.num_classes else NO_HEAD,
    )


def _see_pixels(
    full: Model,
    ways: Mapping[str, Model],
    name: str,
    image: Float[np.ndarray, "Y X 3"],
    truth: LabelMap | None,
    **oracle: Any,
) -> Seen:
    images, drawn, maps = jnp.asarray(image)[None], [], {}
    impact = np.asarray(token_impact(full, images, target="teacher", **oracle)).reshape(full.grid)
    filtered = None
    for label, model in ways.items():
        found, aux, stages = _walk(model, images)
        if filtered is None and "filter_logits" in aux:
            filtered = np.asarray(aux["filter_logits"], np.float32).reshape(full.grid)
        maps[label] = _pixels(full, found, name)
        drawn.append(Way(label, stages, ()))
    before = _pixels(full, _call(full, images)[0], name)
    photo = photograph(image, full.preprocessing)
    return Seen(name, photo, (), impact, filtered, tuple(drawn), maps=Maps(before, maps, truth, full.num_classes))


def _pixels(model: Model, found: Float[Array, "1 Y X *classes"], name: str) -> Num[np.ndarray, "Y X"]:
    """Metres, or the likeliest classes."""
    one = np.asarray(found[0].astype(jnp.float32))
    if not np.isfinite(one).all():
        raise WorkError(NO_NUMBERS.format(name))
    return one.argmax(axis=-1) if model.num_classes else one


def under(model: Model, reducer: Any) -> Model:
    """The same weights under another reducer."""
    other = nnx.merge(*nnx.split(model))
    del other.reducer  # or nnx would hold on to its kind: one with parameters, or a constant
    other.reducer = reducer
    other.built = ""  # that was with another one
    return other


def ways_of(model: Any, named: Any) -> dict[str, Model]:
    """What is to be drawn beside all tokens, by label: reducers on the model's weights, or models with one of their own.

    named: names, or dicts as in dict(name="tome", num_merged=8), or models. None: the model's own reducer; of a model
    without, those of `OFF_THE_SHELF` that its kind has.
    Raises InputError for a reducer that there is not, that does not fit, or that has something to learn first.
    """
    if not isinstance(model, Model):
        raise InputError(f"the model is {model!r:.60}; it is what tif_jax.load or tif_jax.create_model returns")
    if not (named is None or (isinstance(named, Sequence) and not isinstance(named, str))):
        said = repr(named) if isinstance(named, str) else f"of type {type(named).__name__}"
        raise InputError(f"reducers is {said}; give a list, as in reducers=['evit']")
    if named is None:
        if not isinstance(model.reducer, Full):
            return {_label_of(model): model}
        named = [name for name in OFF_THE_SHELF if isinstance(model, ViT) and (name != "evit" or _has_class(model))]
    found: dict[str, Model] = {}
    for one in named:
        if isinstance(one, Model):
            if one.task != model.task:
                raise InputError(
                    f"a model among the reducers is one of {one.task}, the model that is viewed of {model.task}"
                )
            if (one.num_classes, one.image_size) != (model.num_classes, model.image_size):
                raise InputError(
                    f"a model among the reducers has {one.num_classes} classes and takes {one.image_size}, the model that is "
                    f"viewed {model.num_classes} and {model.image_size}; both have to be the same"
                )
            if one.preprocessing != model.preprocessing:
                raise InputError(
                    f"a model among the reducers takes pictures prepared by {one.preprocessing}, the model that is viewed by "
                    f"{model.preprocessing}; both have to be the same"
                )
            if one.class_names and model.class_names and one.class_names != model.class_names:
                raise InputError("a model among the reducers has other class names, or these in another order")
            label, made = _label_of(one), one
        elif not isinstance(one, str | Mapping):
            raise InputError(f"a reducer is {one!r:.60}; it is a name, a dict with one, or a model with a reducer")
        else:
            described = {"name": one} if isinstance(one, str) else dict(one)
            label = _label(str(described.get("name")), described)
            made = under(model, _built(model, described))
        number = sum(other.partition(" #")[0] == label for other in found)
        found[f"{label} #{number + 1}" if number else label] = made
    return found


def _built(model: Model, described: dict[str, Any]) -> Any:
    name = described.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"a reducer is {described!r:.60}; it is a name, or a dict with one: dict(name='evit')")
    if not isinstance(model, ViT):
        raise InputError(
            f"{name} can not be put on a {type(model).__name__}; give a model that was loaded with a reducer"
        )
    images = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    width = jax.eval_shape(lambda images: model.embed(images), images).shape[-1]
    shape = dict(width=width, num_patches=math.prod(model.grid), depth=model.depth)
    num_heads = model.blocks[0].attention.num_heads
    built = reducers.build(name, **shape, num_heads=num_heads, rngs=nnx.Rngs(0), **described)
    if jax.tree.leaves(nnx.state(built, nnx.Param) if isinstance(built, nnx.Module) else ()):
        raise InputError(
            f"{name} has something to learn first; give a model that was trained with it, as `tif run` does"
        )
    jax.eval_shape(lambda images: under(model, built)(images)[0], images)  # what does not fit is told before any work
    return built


def _has_class(model: Model) -> bool:
    return hasattr(model, "class_token")


def _label_of(model: Model) -> str:
    """Of a model's own reducer: its name and options; of one that is made by hand its class."""
    described = built_with(model)["reducer"] if model.built else {"name": type(model.reducer).__name__}
    return _label(described["name"], described)


def _label(name: str, options: Mapping[str, Any]) -> str:
    said = ", ".join(f"{key}={value}" for key, value in options.items() if key != "name")
    return f"{name} ({said})" if said else name


def _walk(
    model: Model, images: Float[Array, "1 Y X 3"]
) -> tuple[Float[Array, "1 *prediction"], Aux, tuple[Stage, ...]]:
    if not isinstance(model, ViT):
        logits, aux = _call(model, images)
        return logits, aux, _of_pyramid(aux, model.grid)
    found = trace(model, images)
    num_patches = model.grid[0] * model.grid[1]
    stages, last = [], np.arange(num_patches)
    for i, (held, count) in enumerate(zip(found.sources, found.counts, strict=True)):
        source = np.asarray(held[0])
        if not np.array_equal(source, last):
            stages.append(Stage(f"block {i}", count, source.reshape(model.grid)))
        last = source
    chosen = [stages[(i + 1) * len(stages) // NUM_STAGES - 1] for i in range(NUM_STAGES)]
    return found.prediction, found.aux, tuple(stages if len(stages) <= NUM_STAGES else chosen)


def _of_pyramid(aux: Aux, grid: tuple[int, int]) -> tuple[Stage, ...]:
    """Of a pyramid only the end is known: which cells of its last raster are tokens that go through the last blocks."""
    if not {"kept", "source"} <= aux.keys():
        return ()
    cell, kept = np.asarray(aux["source"][0]), np.asarray(aux["kept"][0])
    corner = np.array([np.flatnonzero(cell == row)[0] for row in range(cell.max() + 1)])  # what a cell is called
    left = np.isin(corner, kept)
    return (Stage("last stage", int(left.sum()), np.where(left[cell], cell, -1).reshape(grid)),)


def _call(model: Model, images: Float[Array, "B Y X 3"]) -> tuple[Float[Array, "B *prediction"], Aux]:
    return _jitted(*nnx.split(model), images)


@partial(jax.jit, static_argnums=0)
def _jitted(graphdef: Any, state: Any, images: Float[Array, "B Y X 3"]) -> tuple[Float[Array, "B *prediction"], Aux]:
    model = nnx.merge(graphdef, state)
    with true_float32(model.dtype):
        return model(images)


def _probabilities(logits: Float[Array, "1 L"], name: str) -> Float[np.ndarray, " L"]:
    found = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)), np.float64)[0]
    if not np.isfinite(found).all():
        raise WorkError(NO_NUMBERS.format(name))
    return found


def _classes(
    names: Sequence[str] | None, before: Float[np.ndarray, " L"], after: Float[np.ndarray, " L"], top: int
) -> tuple[Class, ...]:
    """The `top` likeliest after, and the likeliest before where it is none of them."""
    chosen = np.argsort(-after, kind="stable")[:top].tolist()
    if top and (best := int(before.argmax())) not in chosen:
        chosen.append(best)
    return tuple(Class(_named(names, i), float(before[i]), float(after[i])) for i in chosen)


def _named(names: Sequence[str] | None, output: int) -> str:
    return (names[output] if names else "") or f"class {output}"
