"""Handwritten digits among fragments of other digits: a data set to learn on without a download.

One real digit (scikit-learn's `load_digits`) stands whole on a canvas that is otherwise a mosaic of small squares cut
from other digits and turned at random. The clutter has the digits' mean ink and the digit may stand anywhere, so the surest
sign of a token that matters is that strokes go on in it: a ranking has to look at what is in a token.
"""

from functools import cache, lru_cache

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from tif_jax.data.source import Example
from tif_jax.errors import InputError

SPLITS = ("train", "test")
SIZES = (24, 32)  # pixels: edges of the square that a digit is drawn in
GRID = 8  # pixels: a digit's corner is a multiple of this; any position would take a small ViT minutes more to learn
THINNED = 0.6  # of the training canvases lack a random share of their clutter, without which learning hardly starts
FRAGMENT = 5  # pixels: less than a patch of 8x8, so that no patch is without a cut
NUM_TEST_DIGITS = 397  # of scikit-learn's 1,797, the same for every seed
_NUM_FRAGMENTS = 2**16
_BLOCK = 1000  # canvases per random generator: canvas i is the same whatever num_examples is


class Digits:
    """`num_examples` canvases of image_size x image_size pixels, in memory; canvas i depends on seed, split and i alone.

    The splits share no handwritten digit, in the fragments neither. Raises InputError for an unknown split, fewer than one
    canvas or a canvas smaller than a digit.
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
        self._images, self._labels = _generate(split, num_examples, image_size, seed)
        self._split = split

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        image = np.repeat(self._images[index, :, :, None], 3, axis=2)
        return {"id": f"{self._split}/{index:06d}", "image": image, "label": int(self._labels[index])}


@lru_cache(maxsize=2)  # a split each: the stages of a pipeline open the same ones again and again
def _generate(
    split: str, num_examples: int, image_size: int, seed: int
) -> tuple[UInt8[np.ndarray, "n Y X"], Int[np.ndarray, " n"]]:
    """The canvases and their labels."""
    drawn, labels = _drawn_digits(split)
    split_seed = (seed, SPLITS.index(split))
    fragments = _fragments(drawn, np.random.default_rng(split_seed))
    canvases, chosen = [], []
    for block in range(-(-num_examples // _BLOCK)):
        rng = np.random.default_rng((*split_seed, block))
        images, digits = _canvases(drawn, fragments, image_size, THINNED if split == "train" else 0.0, rng)
        canvases.append(images)
        chosen.append(digits)
    return np.concatenate(canvases)[:num_examples], labels[np.concatenate(chosen)[:num_examples]]


@cache
def _drawn_digits(split: str) -> tuple[dict[int, UInt8[np.ndarray, "D S S"]], Int[np.ndarray, " D"]]:
    """The split's digits, drawn smoothly at every size, and their labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=NUM_TEST_DIGITS, stratify=digits.target, random_state=0
    )
    indices = train if split == "train" else test
    return {size: np.stack([_draw(digits.images[i], size) for i in indices]) for size in SIZES}, digits.target[indices]


def _draw(digit: Float[np.ndarray, "8 8"], size: int) -> UInt8[np.ndarray, "S S"]:
    grey = np.asarray(Image.fromarray((digit / 16).astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))
    crisp = 0.5 + 2.5 * (grey - 0.5)  # strokes with an edge, as a pen leaves them
    return (255 * np.clip(crisp, 0, 1)).astype(np.uint8)


def _fragments(drawn: dict[int, UInt8[np.ndarray, "D S S"]], rng: np.random.Generator) -> UInt8[np.ndarray, "M F F"]:
    """Squares cut anywhere from the drawn digits, one eighth of them in each turned and mirrored position."""
    cut = []
    for size, digits in drawn.items():
        # Wrapped, so that the blank margins are cut as often as the rest: the clutter has the digits' mean ink.
        wrapped = np.pad(digits, ((0, 0), (0, FRAGMENT - 1), (0, FRAGMENT - 1)), mode="wrap")
        windows = np.lib.stride_tricks.sliding_window_view(wrapped, (FRAGMENT, FRAGMENT), axis=(1, 2))
        corners = rng.integers(size, size=(2, _NUM_FRAGMENTS // len(drawn)))
        cut.append(windows[rng.integers(len(digits), size=corners.shape[1]), *corners])
    fragments = np.concatenate(cut)
    for i in range(8):
        turned = np.rot90(fragments[i::8], i % 4, axes=(1, 2))
        fragments[i::8] = turned[:, ::-1] if i < 4 else turned
    return fragments


def _canvases(
    drawn: dict[int, UInt8[np.ndarray, "D S S"]],
    fragments: UInt8[np.ndarray, "M F F"],
    image_size: int,
    thinned: float,
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "n Y X"], Int[np.ndarray, " n"]]:
    """A block of canvases and which digit stands on each."""
    side = image_size // FRAGMENT + 2
    tiles = fragments[rng.integers(len(fragments), size=(_BLOCK, side, side))]
    clutter = np.where(rng.random(_BLOCK) < thinned, rng.random(_BLOCK), 1.0)  # share of the tiles that stays
    tiles = tiles * (rng.random(tiles.shape[:3]) < clutter[:, None, None])[..., None, None]
    mosaics = tiles.swapaxes(2, 3).reshape(_BLOCK, side * FRAGMENT, side * FRAGMENT)
    shifts = rng.integers(FRAGMENT, size=(_BLOCK, 2))
    digits = rng.integers(len(drawn[SIZES[0]]), size=_BLOCK)
    sizes = rng.choice(SIZES, size=_BLOCK)
    corners = GRID * rng.integers((image_size - sizes[:, None]) // GRID + 1, size=(_BLOCK, 2))
    canvases = np.empty((_BLOCK, image_size, image_size), np.uint8)
    for canvas, mosaic, (dy, dx), digit, size, (y, x) in zip(
        canvases, mosaics, shifts, digits, sizes, corners, strict=True
    ):
        canvas[:] = mosaic[dy : dy + image_size, dx : dx + image_size]
        canvas[y : y + size, x : x + size] = drawn[size][digit]
    return canvases, digits
