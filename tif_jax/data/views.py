"""The views of a record, drawn from its numbers: see `loader`.

Legend: (Y, X) the size of a view in pixels.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from tif_jax.data.augment import Augmentation
from tif_jax.data.joint_views import augmented_pair, check_joint, evaluation_pair
from tif_jax.data.options import DataOptions
from tif_jax.data.preprocess import NONE, augmented_view, evaluation_view, normalise
from tif_jax.data.source import LabelMap
from tif_jax.errors import InputError

FRESH = -1  # in place of a view: an augmentation drawn anew whenever the image comes round

AnyPixels = Image.Image | UInt8[np.ndarray, "_ _ 3"]


@dataclasses.dataclass(frozen=True)
class Views:
    """Makes views of images, and of their label maps where the data have some.

    augmentation, seed: of fresh views. InputError for augmentations that are not for such data.
    """

    options: DataOptions
    augmentation: Augmentation
    seed: int

    def __post_init__(self):
        if self.options.label_maps:
            check_joint(self.augmentation)
        elif self.augmentation.rotate:
            raise InputError(
                f"rotate is {self.augmentation.rotate:g}, and it is for data with label maps; rand_augment turns images, too"
            )

    def of_image(self, image: AnyPixels, position: int, index: int, view: int) -> Float32[np.ndarray, "Y X 3"]:
        """The view of the image at `index`, shown at a position in the stream of batches."""
        size, how = self.options.size, self.options.preprocessing
        if view == 0 and how.crop_fraction == 1 and isinstance(image, np.ndarray) and image.shape[:2] == size:
            return normalise(image, how.mean, how.std)  # is its own evaluation view
        image = _picture(image)
        if view == 0:
            return evaluation_view(image, size, **vars(how))
        of_pixels: dict[str, Any] = dict(mean=how.mean, std=how.std, interpolation=how.interpolation)
        rng = self._generator(position, index, view)
        return augmented_view(image, size, rng, augmentation=self._drawn_for(view), **of_pixels)

    def of_pair(
        self, image: AnyPixels, label_map: LabelMap, position: int, index: int, view: int
    ) -> tuple[Float32[np.ndarray, "Y X 3"], LabelMap]:
        """As `of_image`, of the image and its label map alike."""
        size, how = self.options.size, self.options.preprocessing
        if view == 0:
            return evaluation_pair(_picture(image), label_map, size, how)
        rng = self._generator(position, index, view)
        return augmented_pair(_picture(image), label_map, size, rng, how, self._drawn_for(view))

    def _drawn_for(self, view: int) -> Augmentation:
        return self.augmentation if view == FRESH else NONE

    def _generator(self, position: int, index: int, view: int) -> np.random.Generator:
        # The first number keeps the two families of streams apart. Positions count through all epochs, so that every
        # epoch has fresh augmentations of its own.
        return np.random.default_rng((0, self.seed, position) if view == FRESH else (1, index, view))


def _picture(image: AnyPixels) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)
