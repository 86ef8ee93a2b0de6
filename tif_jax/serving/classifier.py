"""What a server says of pictures: a model, or a ladder of models, in batches of a few sizes.

Legend: B images, Y X height and width, L classes, K patches kept.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int
from scipy.special import softmax

from tif_jax.adaptive.adaptive import Adaptive
from tif_jax.data.pictures import AnyImage, read_image
from tif_jax.data.preprocess import evaluation_view
from tif_jax.models import Model, require_head, where_patches_are
from tif_jax.models.compiled import Forwards, filled, random_images
from tif_jax.models.cost import cost

_ROUNDS = 3
_MOST_PIXELS = 2**26  # of a picture: a small file can say that it has many more


class Answer(NamedTuple):
    """Of one picture."""

    probabilities: Float32[np.ndarray, " L"]
    gmac: float  # 1e9 multiply-adds that it took, if its batch was full
    tokens: dict[str, Int[np.ndarray, " K"]]  # `kept` or `source`, as of an export; empty where the model tells neither


class Classifier:
    """Answers views of pictures. `sizes`: of batches that are compiled, the largest last; a ladder has its own."""

    def __init__(self, model: Model | Adaptive, sizes: Sequence[int]):
        self.model = model.models[-1] if isinstance(model, Adaptive) else model
        require_head(self.model, "a server")
        self._ladder = model if isinstance(model, Adaptive) else None
        self.sizes = sorted(sizes) if self._ladder is None else self._ladder.sizes
        self._forwards = Forwards(self.model, _read)
        self.tells_tokens = self._ladder is None
        self._gmac = cost(self.model).gmac

    def view(self, picture: AnyImage) -> Float32[np.ndarray, "Y X 3"]:
        """The picture as the model takes it. Raises UnreadableImage."""
        image = read_image(picture, "of this request", most_pixels=_MOST_PIXELS)
        return evaluation_view(image, self.model.image_size, **vars(self.model.preprocessing))

    def __call__(self, views: Sequence[Float32[np.ndarray, "Y X 3"]]) -> list[Answer]:
        """At most as many as the largest size."""
        images = np.stack(views)
        if self._ladder is not None:
            found = self._ladder(images)
            return [Answer(*row, {}) for row in zip(softmax(found.logits, axis=-1), found.gmac, strict=True)]
        size = next(size for size in self.sizes if size >= len(images))
        probabilities, tokens = self._forwards(filled(images, size))
        return [
            Answer(row, self._gmac, {name: rows[i] for name, rows in tokens.items()})
            for i, row in enumerate(probabilities[: len(images)])
        ]

    def seconds(self) -> dict[int, float]:
        """How long a batch of each size takes, measured; of a ladder, if all climb to its end. Compiles all programs."""
        programs = [self._forwards] if self._ladder is None else self._ladder.programs
        return {
            size: sum(_seconds(program, random_images(self.model, size)) for program in programs) for size in self.sizes
        }


def _seconds(program: Forwards, images: Float32[np.ndarray, "B Y X 3"]) -> float:
    program(images)
    turns = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        program(images)
        turns.append(time.perf_counter() - began)
    return min(turns)


def _read(logits: Array, aux: dict) -> tuple[Float32[Array, "B L"], dict[str, Int[Array, "B K"]]]:
    return jax.nn.softmax(logits.astype(jnp.float32)), where_patches_are(aux)
