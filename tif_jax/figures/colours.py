"""From numbers to colours: one map for each quantity, the same in every picture and page.

Legend: Y rows, X columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

OUTLINE = "#ffb000"  # of merged patches; neither of the impact's red and blue
BEFORE, AFTER = "#9a9a9a", "#0072b2"  # of probabilities
# Told apart by most colour-blind eyes (Okabe and Ito 2008), and dark enough for lines on white.
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")

_QUANTILE = 0.98  # of magnitudes: what is beyond, a few patches of a hundred, has the last colour
_LEVELS = 256


class Scale(NamedTuple):
    """Which number has which colour: those of `table`, from `least` to `most`; beyond them the first and the last."""

    table: Float[np.ndarray, "levels 3"]
    least: float
    most: float
    label: str  # what the numbers are, with their unit
    extend: str  # matplotlib's word for which ends there are numbers beyond: 'neither', 'min', 'max', 'both'

    def colours(self, values: Float[np.ndarray, "Y X"]) -> Float[np.ndarray, "Y X 3"]:
        share = (np.nan_to_num(values, nan=self.least) - self.least) / (self.most - self.least)
        return self.table[np.clip(np.rint(share * (len(self.table) - 1)), 0, len(self.table) - 1).astype(int)]


def impact_scale(impact: Float[np.ndarray, "*shape"], unit: str = "nats") -> Scale:
    """Red where a patch helps, blue where it hurts, white at 0, as strong on both sides.

    Where nothing is negative, as with the target 'teacher' and the estimator 'exact', the scale is its red half.
    """
    bound = _bound(np.abs(impact))
    table = _table("RdBu_r")
    if impact.min(initial=0) < 0:
        return _scale(table, -bound, bound, f"impact ({unit}): red helps, blue hurts", impact)
    return _scale(table[_LEVELS // 2 :], 0.0, bound, f"impact ({unit}): 0 (white) or more here", impact)


def logit_scale(logits: Float[np.ndarray, "*shape"]) -> Scale:
    """Of a filter's logits, which have no natural 0: yellow where a patch is worth most."""
    middle = float(np.median(logits))
    bound = _bound(np.abs(logits - middle))
    return _scale(_table("viridis"), middle - bound, middle + bound, "logit: yellow is worth keeping", logits)


def depth_scale(*depths: Float[np.ndarray, "Y X"]) -> Scale:
    """One for all depth maps of a picture, metres: near is bright. Where a depth is 0, nothing is known of it."""
    known = np.concatenate([depth[depth > 0] for depth in depths])
    least, most = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    most = most if most > least else least + 0.1
    return _scale(_table("magma_r"), least, most, "depth (m)", known)


def error_scale(*errors: Float[np.ndarray, "Y X"]) -> Scale:
    """Of prediction less true depth, metres, NaN where the truth is not known: white where it is right."""
    return _of_distances(errors, "error (m): orange is too far, purple too near")


def change_scale(*changes: Float[np.ndarray, "Y X"]) -> Scale:
    """Of a depth less the one from all tokens, metres."""
    return _of_distances(changes, "change (m): orange is farther than before")


def _of_distances(distances: Sequence[Float[np.ndarray, "Y X"]], label: str) -> Scale:
    known = np.concatenate([one[~np.isnan(one)] for one in distances])
    bound = _bound(np.abs(known)) if len(known) else 1.0
    return _scale(_table("PuOr_r"), -bound, bound, label, known)


def class_colours(num_classes: int) -> Float[np.ndarray, "classes 3"]:
    """A colour for each class of a pixel, far apart in hue for neighbours."""
    import matplotlib

    hues = np.arange(num_classes) * 0.618034 % 1  # the golden section: however many there are, they spread
    lightness = 1 - 0.3 * (np.arange(num_classes) % 3) / 2
    return matplotlib.colors.hsv_to_rgb(np.stack([hues, np.full(num_classes, 0.6), lightness], axis=1))


def _scale(table: Float[np.ndarray, "levels 3"], least: float, most: float, label: str, values: np.ndarray) -> Scale:
    beyond = (bool(values.min(initial=least) < least), bool(values.max(initial=most) > most))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[beyond]
    return Scale(table, least, most, label, extend)


def _bound(magnitudes: np.ndarray) -> float:
    return float(np.quantile(magnitudes, _QUANTILE)) or float(magnitudes.max(initial=0)) or 1.0


def _table(name: str) -> Float[np.ndarray, "levels 3"]:
    import matplotlib

    return matplotlib.colormaps[name](np.linspace(0, 1, _LEVELS))[:, :3]
