"""Handwritten digits among fragments of other digits: a data set to learn on without a download.

One real digit (scikit-learn's `load_digits`) stands whole on a canvas that is otherwise a mosaic of small squares cut from other
digits and turned at random. Ink, blankness and contrast are those of digits everywhere and every position is equally likely, so
which tokens matter shows only in whether strokes go on: a ranking has to look at what is in a token.
"""

from functools import cache

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from tif_jax.data.source import Example
from tif_jax.errors import InputError

SPLITS = ("train", "test")
SIZES = (24, 26, 28)  # pixels: edges of the square a digit is drawn in; it touches about 16 patches of 8x8
FRAGMENT = 5  # pixels: less than a patch of 8x8, so that no patch is without a cut
NUM_TEST_DIGITS = 397  # of scikit-learn's 1,797, the same for every seed
_NUM_FRAGMENTS = 2**16
_BLOCK = 1000  # canvases per random generator: canvas i is the same whatever num_examples is


class Digits:
    """`num_examples` canvases of image_size x image_size pixels, in memory; canvas i depends on seed, split and i alone.

    The splits share no handwritten digit, in the fragments neither. Raises InputError for an unknown split, fewer than one canvas
    or a canvas smaller than a digit.
    """

    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(self, split: str, num_examples: int, image_size: int = 64, seed: int = 0):
        if split not in SPLITS:
            raise InputError(f"Digits has no split {split!r}. Known: {', '.join(SPLITS)}")
        if num_examples < 1:
            raise InputError(f"num_examples is {num_examples}; digits needs at least 1 canvas")
        if image_size < max(SIZES):
            raise InputError(f"image_size is {image_size}; digits need a canvas of at least {max(SIZES)} pixels")
        drawn, labels = _drawn_digits(split)
        split_seed = (seed, SPLITS.index(split))
        fragments = _fragments(drawn, np.random.default_rng(split_seed))
        canvases, chosen = [], []
        for block in range(-(-num_examples // _BLOCK)):
            rng = np.random.default_rng((*split_seed, block))
            images, digits = _canvases(drawn, fragments, image_size, rng)
            canvases.append(images)
            chosen.append(digits)
        self._images = np.concatenate(canvases)[:num_examples]
        self._labels = labels[np.concatenate(chosen)[:num_examples]]
        self._split = split

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        image = np.repeat(self._images[index, :, :, None], 3, axis=2)
        return {"id": f"{self._split}/{index:06d}", "image": image, "label": int(self._labels[index])}
