"""A ladder of models that images climb as far as they need: `Adaptive`.

Legend: I images, B images of a batch, R models but the last, Y X height and width, L classes.
"""

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float32, Int

from tif_jax import checked
from tif_jax.adaptive.routing import ALWAYS, Expected, Route, confidence, promised
from tif_jax.errors import InputError
from tif_jax.models import Model, check_images, require_head
from tif_jax.models.compiled import Forwards, filled
from tif_jax.models.cost import cost

logger = logging.getLogger(__name__)

_FEWEST = 64  # images to calibrate with
_SMALL = (1, 8)  # batch sizes of what is left over in the end


class Answers(NamedTuple):
    """What a ladder says of some images."""

    logits: Float32[np.ndarray, "I L"]  # of the model on which each image stayed
    rung: Int[np.ndarray, " I"]  # the number of that model
    gmac: Float[np.ndarray, " I"]  # 1e9 multiply-adds of all models that each image went through


class Adaptive:
    """Classifies each image with the cheapest of several models that is sure of it.

        adaptive = Adaptive(model, [small, medium], 0.95, photographs)
        answers = adaptive(images)

    model: the last rung, with whose classes the others are to agree. ladder: cheaper models of the same classes and views,
      as of `tif_jax.load(..., reducer=...)` with other amounts, in any order.
    tau: the share of other images that are to have the class that `model` gives them, in (0, 1].
    images: some hundred as those that are to come, normalised, (I, Y, X, 3); no labels. From them it is found which models
      are worth their cost, and how sure each has to be (`routing`).
    batch_size: of every model's program. An image that a model is not sure of waits until so many go to the next one.

    `models`, the cheapest first, and their `costs` in GMAC; `route` is what was found; `expected` is the agreement and mean
    GMAC to expect of other images, from cross-validation, and `error` the standard error of that agreement. Raises
    InputError for models that do not fit together and for fewer than 64 images.
    """

    models: tuple[Model, ...]
    costs: tuple[float, ...]
    route: Route
    expected: Expected | None = None  # None where the route was found before
    error: float | None = None

    def __init__(
        self,
        model: Model,
        ladder: Sequence[Model],
        tau: float,
        images: Float[np.ndarray | Array, "I Y X 3"],
        *,
        batch_size: int = 32,
    ):
        self._begin(model, ladder, batch_size)
        tau = checked.value_of(float, tau, "tau", checked.Range(above=0, most=1))
        check_images(model, images)
        if len(images) < _FEWEST:
            raise InputError(f"{len(images)} images are too few to calibrate with; give {_FEWEST} or more, better 500")
        logits = np.stack([self._logits(rung, np.asarray(images)) for rung in range(len(self.models))])
        sure, agrees = confidence(logits[:-1]), logits[:-1].argmax(axis=-1) == logits[-1].argmax(axis=-1)
        self.route, expected, error = promised(sure, agrees, self.costs, tau)
        self.expected, self.error = expected, error
        used = [self.costs[rung] for rung in self.route.rungs]
        logger.info(
            "adaptive: models of %s GMAC; agreement %.3f ± %.3f at %.4f GMAC on images left out",
            ", ".join(f"{gmac:.4f}" for gmac in used), expected.agreement, error, expected.cost,
        )  # fmt: skip

    @classmethod
    def with_route(cls, model: Model, ladder: Sequence[Model], route: Route, *, batch_size: int = 32) -> "Adaptive":
        """One whose route was found before; its rungs are numbered by cost."""
        made = cls.__new__(cls)
        made._begin(model, ladder, batch_size)
        rungs, thresholds, last = route.rungs, route.thresholds, len(made.models) - 1
        if not rungs or [*rungs] != sorted({*rungs}) or not 0 <= rungs[0] <= rungs[-1] <= last:
            raise InputError(f"the route has rungs {rungs}; they are some of 0 to {last}, ascending")
        if len(thresholds) != len(rungs) or thresholds[-1] != ALWAYS:
            raise InputError(
                f"the route has thresholds {thresholds}; there is one for each rung, and the last is {ALWAYS}"
            )
        if any(math.isnan(threshold) for threshold in thresholds):
            raise InputError(f"the route has thresholds {thresholds}; they are log-odds")
        made.route = route
        return made

    def _begin(self, model: Model, ladder: Sequence[Model], batch_size: int) -> None:
        self.batch_size = checked.value_of(int, batch_size, "batch_size", checked.Range(least=1))
        for one in (model, *ladder):
            require_head(one, "an adaptive budget")
            for name in ("num_classes", "image_size", "preprocessing"):
                if getattr(one, name) != getattr(model, name):
                    raise InputError(
                        f"{name} is {getattr(one, name)} in the ladder and {getattr(model, name)} in the last model; all "
                        "models of a ladder take the same images and know the same classes"
                    )
            if one.class_names and model.class_names and one.class_names != model.class_names:
                raise InputError("the models of a ladder have other class names, or these in another order")
        by_cost = sorted(((cost(one).gmac, i) for i, one in enumerate(ladder)))
        self.models = (*(ladder[i] for _, i in by_cost), model)
        self.costs = (*(gmac for gmac, _ in by_cost), cost(model).gmac)
        whole = Forwards(model)
        self._forwards = [*(Forwards(one, like=whole) for one in self.models[:-1]), whole]

    @property
    def sizes(self) -> list[int]:
        """Of batches, for each of which every model that is used has a program."""
        return sorted({size for size in (*_SMALL, self.batch_size) if size <= self.batch_size})

    @property
    def programs(self) -> list[Forwards]:
        """Of the models that are used, the cheapest first."""
        return [self._forwards[rung] for rung in self.route.rungs]

    def __call__(self, images: Float[np.ndarray | Array, "I Y X 3"]) -> Answers:
        """Of any number of normalised images, in their order."""
        check_images(self.models[-1], images)
        images = np.asarray(images)
        return _joined([*self.stream([images])]) if len(images) else self._empty()

    def whole(self, images: Float[np.ndarray | Array, "I Y X 3"]) -> Float32[np.ndarray, "I L"]:
        """The logits of the last model alone, for every image."""
        check_images(self.models[-1], images)
        images = np.asarray(images)
        return self._logits(len(self.models) - 1, images) if len(images) else self._empty().logits

    def stream(self, batches: Iterable[Float[np.ndarray, "B Y X 3"]]) -> Iterator[Answers]:
        """Of each batch, in order; batches of any sizes. Images that climb wait for others, and what came after them too."""
        waiting: dict[int, deque] = {rung: deque() for rung in self.route.rungs}  # (number, image) by the next rung
        found: dict[int, tuple] = {}
        sizes: deque[int] = deque()
        num_given = num_told = 0
        for batch in batches:
            # An image that is no numbers is answered as it is, and does not keep others from being answered. To make it
            # numbers takes a tenth of a cheap model's time, so only where the sum says that there is one.
            batch = np.asarray(batch)
            with np.errstate(over="ignore", invalid="ignore"):
                is_numbers = batch.dtype.kind != "f" or np.isfinite(batch.sum(dtype=np.float32))
            check_images(self.models[-1], batch if is_numbers else np.nan_to_num(batch, posinf=0.0, neginf=0.0))
            sizes.append(len(batch))
            waiting[self.route.rungs[0]].extend(enumerate(batch, num_given))
            num_given += len(batch)
            self._climb(waiting, found, least=self.batch_size)
            while sizes and all(n in found for n in range(num_told, num_told + sizes[0])):
                yield self._told(found, num_told, sizes[0])
                num_told += sizes.popleft()
        self._climb(waiting, found, least=1)
        for size in sizes:
            yield self._told(found, num_told, size)
            num_told += size

    def _climb(self, waiting: dict[int, deque], found: dict[int, tuple], least: int) -> None:
        """Runs each rung's model while `least` images wait for it. Those that it is sure of are found."""
        rungs, thresholds = self.route
        for place, (rung, threshold) in enumerate(zip(rungs, thresholds, strict=True)):
            while len(waiting[rung]) >= least:
                group = [waiting[rung].popleft() for _ in range(min(self.batch_size, len(waiting[rung])))]
                numbers, images = zip(*group, strict=True)
                logits = self._logits(rung, np.stack(images))
                # Logits that are no numbers are sure of nothing; behind the last rung there is none.
                stays = (confidence(logits) >= threshold) | (place == len(rungs) - 1)
                for number, image, row, is_sure in zip(numbers, images, logits, stays, strict=True):
                    if is_sure:
                        found[number] = row, rung
                    else:
                        waiting[rungs[place + 1]].append((number, image))

    def _told(self, found: dict[int, tuple], first: int, size: int) -> Answers:
        if not size:
            return self._empty()
        rows, rungs = zip(*(found.pop(n) for n in range(first, first + size)), strict=True)
        on = np.array(rungs)
        gmac = sum(self.costs[rung] * (on >= rung) for rung in self.route.rungs)
        return Answers(np.stack(rows), on, np.asarray(gmac, float))

    def _empty(self) -> Answers:
        return Answers(np.zeros((0, self.models[-1].num_classes), np.float32), np.zeros(0, int), np.zeros(0))

    def _logits(self, rung: int, images: Float[np.ndarray, "I Y X 3"]) -> Float32[np.ndarray, "I L"]:
        """Of one model, in full batches and a last one that is filled up."""
        found = []
        for first in range(0, len(images), self.batch_size):
            # In float32, so that there is one program of each size, whatever float images are given in.
            part = np.asarray(images[first : first + self.batch_size], np.float32)
            size = next(size for size in self.sizes if size >= len(part))
            found.append(np.asarray(self._forwards[rung](filled(part, size)), np.float32)[: len(part)])
        return np.concatenate(found)


def _joined(answers: Sequence[Answers]) -> Answers:
    return Answers(*(np.concatenate(arrays) for arrays in zip(*answers, strict=True)))
