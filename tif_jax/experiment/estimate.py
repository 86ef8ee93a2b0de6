"""What an experiment costs, on paper: multiply-adds of its stages, and the time that devices of a kind take for them.

The unit is the multiply-add of one prediction with all tokens, F, or with the reducer, R, as `models.cost` counts them:

    score       F (N + 1) an image with `exact`, F (1 + 2 K) with K masks of `sampled`, 2 F with `gradient`
    filter      of tif: the patch embedding, which rests, and three times the filter; of tosa F alone
    adapter     F for the goal, and 2 R: through the frozen blocks goes a gradient, but none to their weights
    finetune    3 R, and a prediction of the teacher, if there is one; R is what the reducer costs in training (dynamic_vit
                drops nothing there), in its phases what it costs then
    backbone    3 F where it is trained
    evaluate    F and 2 R (before and after fine-tuning) for each test image, R for each of validation; the oracles of those
                held out for a filter's ranking are not counted

A forward pass and one back to activations are counted as two, to weights as one more. Seconds are 2 x multiply-adds / (peak x
utilisation x devices); what share of the peak is reached, by kind of work, is said by who asks.

Legend: N patch tokens.
"""

import enum
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from tif_jax.experiment.reducer_entry import ReducerEntry, phases_of
from tif_jax.experiment.schema import Experiment
from tif_jax.models import Model, ViT, blueprint, plain_vit
from tif_jax.models.cost import cost, gmac
from tif_jax.training.recipe import Recipe

SETS = {"ImageNet-1k": 1_281_167, "ImageNet-21k": 14_197_122, "a billion images": 1_000_000_000}
BYTES_OF_AN_IMAGE = 120  # of a row of the shards beside its impacts


class Kind(enum.IntEnum):
    """Of work: for how many forward passes it counts. Devices reach a share of their peak that depends on it."""

    FORWARD = 1
    GRADIENT = 2
    TRAINED = 3


FORWARD, GRADIENT, TRAINED = Kind


class Work(NamedTuple):
    """Of a stage, or of scoring a set."""

    name: str
    images: float  # that go through the network, all epochs together
    macs: float  # multiply-adds of all of them
    dtype: str
    kind: Kind = FORWARD

    def seconds(self, peak: tuple[float, float], utilisation: Mapping[Kind, float], count: int) -> float:
        """On `count` devices of a peak (bfloat16, float32) in FLOP/s, of which each kind of work reaches a share."""
        return 2 * self.macs / (peak[self.dtype == "float32"] * utilisation[self.kind] * count)


def units(estimator: str, num_patches: int, num_samples: int) -> int:
    """Multiply-adds of scoring one image, in those of one prediction."""
    return {"exact": num_patches + 1, "sampled": 1 + GRADIENT * num_samples, "gradient": GRADIENT}[estimator]


def stages(
    experiment: Experiment,
    fields: Mapping[str, Any],
    num_images: int,
    num_test: int,
    teacher: Mapping[str, Any] | None = None,
) -> list[Work]:
    """The stages of one run of an experiment with the one reducer `reducer`, in their order.

    fields: of the backbone. num_images, num_test: of its data, for training and for the test. teacher: fields of that which
    finetune.distillation.teacher names; None: it is the backbone.
    """
    full = abstract(fields, ReducerEntry("full", {}))
    tuned = {**fields, **experiment.finetune.model}
    whole, own = 1e9 * cost(full).gmac, _macs(tuned, experiment.reducer)
    scored = _scored(experiment, num_images)
    entry, dtype, found = experiment.reducer, experiment.dtype, []
    if experiment.backbone.is_trained:
        images = _shown(experiment.backbone, num_images)
        found.append(Work("backbone", images, images * TRAINED * whole, dtype, TRAINED))
    if entry.name in ("tif", "prior"):
        recipe = experiment.score
        work = scoring("score", full, scored, recipe.estimator, recipe.num_samples)
        found.append(work._replace(dtype=recipe.dtype or work.dtype))
    if entry.name == "tif":
        images = _shown(experiment.filter, scored)
        plain = plain_vit(full, "a token filter")
        embedding, filter_ = _embedding(plain), _filter(plain)
        found.append(Work("filter", images, images * (embedding + TRAINED * filter_), dtype))
    elif entry.is_fitted_first:  # selectors, to the attention of blocks that rest
        images = _shown(experiment.filter, num_images)
        found.append(Work("filter", images, images * whole, dtype))
    if entry.has_adapter:
        images = _shown(experiment.adapter, num_images)
        found.append(Work("adapter", images, images * (whole + GRADIENT * own), dtype, GRADIENT))
    images = _shown(experiment.finetune, num_images)
    of_teacher = whole if teacher is None else 1e9 * cost(abstract(teacher, ReducerEntry("full", {}))).gmac
    taught = of_teacher if experiment.finetune.distillation.kind else 0
    trained = TRAINED * _mean_over_phases(experiment, tuned)
    found.append(Work("finetune", images, images * (trained + taught), dtype, TRAINED))
    judged = num_test * (whole + 2 * own) + experiment.data.num_validation * own
    found.append(Work("evaluate", num_test, judged, dtype))
    return found


def scoring(
    name: str, model: Model, num_images: int, estimator: str, num_samples: int, dtype: str = "bfloat16"
) -> Work:
    """Of so many images. `exact` is computed in float32, as where `score.dtype` is '': differences of losses are small."""
    passes = units(estimator, math.prod(model.grid), num_samples)
    macs = 1e9 * cost(model).gmac * passes * num_images
    if estimator == "exact":
        return Work(name, num_images, macs, "float32")
    return Work(name, num_images, macs, dtype, GRADIENT)


def shard_bytes(model: Model, num_images: int) -> int:
    """Of the impacts of so many images on disk."""
    return num_images * (4 * math.prod(model.grid) + BYTES_OF_AN_IMAGE)


def abstract(fields: Mapping[str, Any], entry: ReducerEntry) -> Model:
    """The model without its weights."""
    return nnx.eval_shape(blueprint(dict(fields), reducer=entry.name, **entry.arguments), jax.random.key(0))


def _macs(fields: Mapping[str, Any], entry: ReducerEntry, *, training: bool = False) -> float:
    return 1e9 * gmac(abstract(fields, entry), training=training)


def _shown(recipe: Recipe, num_images: int) -> float:
    """Images that a stage trains on, all epochs together."""
    least = recipe.min_steps * recipe.batch_size if recipe.num_epochs else 0
    return float(max(recipe.num_epochs * num_images, least))


def _mean_over_phases(experiment: Experiment, fields: Mapping[str, Any]) -> float:
    """Multiply-adds of an image in fine-tuning, where the reducer leaves more tokens in the first epochs."""
    recipe, begun, total = experiment.finetune, 0.0, 0.0
    for until, entry in phases_of(experiment.reducer, recipe.phases):
        ends = min(until, recipe.num_epochs)
        total += (ends - begun) * _macs(fields, entry, training=True)
        begun = ends
    left = (recipe.num_epochs - begun) * _macs(fields, experiment.reducer, training=True)
    return (total + left) / recipe.num_epochs if recipe.num_epochs else 0.0


def _scored(experiment: Experiment, num_images: int) -> int:
    """Views that are scored."""
    recipe = experiment.score
    return min(recipe.num_images or num_images, num_images) * recipe.views


def _embedding(model: ViT) -> int:
    return math.prod(model.grid) * 3 * model.patch_size**2 * model.norm.num_features


def _filter(model: ViT) -> int:
    """Of its four layers (`reducers.tif.TokenFilter`)."""
    num_patches, width = math.prod(model.grid), model.norm.num_features
    return num_patches * (width * width + width * (width // 2) + width // 2) + width * width
