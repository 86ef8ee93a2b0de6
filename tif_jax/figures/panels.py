"""Maps of pixels as pictures: depth, its error, classes; of a photograph all maps of a quantity have one scale.

Legend: Y X height and width, L classes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from tif_jax.figures.colours import Scale, change_scale, class_colours, depth_scale, error_scale
from tif_jax.figures.maps import Picture

_UNKNOWN = 0.82  # grey, where a truth is not known


class Panel(NamedTuple):
    title: str
    picture: Picture
    scale: Scale | None = None  # whose colour bar stands below it


class Maps(NamedTuple):
    """What a dense model says of a photograph's pixels: metres, or the likeliest of num_classes classes.

    ways: under each reducer, by its label. truth: metres, 0 where it is not known; classes, -1 where they do not count.
    """

    full: Num[np.ndarray, "Y X"]
    ways: Mapping[str, Num[np.ndarray, "Y X"]]
    truth: Num[np.ndarray, "Y X"] | None
    num_classes: int  # 0: these are depths


def impact_unit(maps: Maps | None) -> str:
    """Of impact on the prediction itself: of depth it is the mean squared difference of ln depth, which has none."""
    return "nats" if maps is None or maps.num_classes else "of ln depth squared"


def first_panels(maps: Maps) -> list[Panel]:
    """Beside the photograph: the truth, what is predicted from all tokens, and how far that is from the truth."""
    if maps.num_classes:
        known = [] if maps.truth is None else [Panel("labels", _of_classes(maps.truth, maps.num_classes))]
        return [*known, Panel("classes, from all tokens", _of_classes(maps.full, maps.num_classes))]
    scale = _depths(maps)
    full = Panel("depth, from all tokens", _coloured(maps.full, scale), scale)
    if maps.truth is None:
        return [full]
    error = _error(maps.full, maps.truth)
    wrong = _errors(maps)
    return [
        Panel("true depth", _coloured(np.where(maps.truth > 0, maps.truth, np.nan), scale)),
        full,
        Panel(f"error, RMSE {_rms(error):.2f} m", _coloured(error, wrong), wrong),
    ]


def way_panels(maps: Maps, label: str) -> list[Panel]:
    """Of a reducer: what is predicted from the tokens that it leaves, and how far that is from the truth, or else from what
    all tokens say.
    """
    found = maps.ways[label]
    if maps.num_classes:
        same = float((found == maps.full).mean())
        title = f"classes, {100 * same:.1f}% as from all tokens"
        return [Panel(title, _of_classes(found, maps.num_classes))]
    depth = Panel("depth, from these tokens", _coloured(found, _depths(maps)))
    if maps.truth is not None:
        error = _error(found, maps.truth)
        return [depth, Panel(f"error, RMSE {_rms(error):.2f} m", _coloured(error, _errors(maps)))]
    change, scale = found - maps.full, change_scale(*(one - maps.full for one in maps.ways.values()))
    bar = scale if label == next(iter(maps.ways)) else None  # once is enough
    return [depth, Panel(f"change, {_rms(change):.2f} m (RMS)", _coloured(change, scale), bar)]


def _depths(maps: Maps) -> Scale:
    return depth_scale(maps.full, *maps.ways.values(), *([] if maps.truth is None else [maps.truth]))


def _errors(maps: Maps) -> Scale:
    assert maps.truth is not None
    return error_scale(*(_error(one, maps.truth) for one in (maps.full, *maps.ways.values())))


def _error(found: Num[np.ndarray, "Y X"], truth: Num[np.ndarray, "Y X"]) -> Float[np.ndarray, "Y X"]:
    """Metres too far, NaN where the truth is not known."""
    return np.where(truth > 0, found - truth, np.nan)


def _rms(values: Float[np.ndarray, "Y X"]) -> float:
    known = values[~np.isnan(values)]
    return float(np.sqrt(np.square(known).mean())) if len(known) else float("nan")


def _coloured(values: Float[np.ndarray, "Y X"], scale: Scale) -> Picture:
    colours = np.where(np.isnan(values)[..., None], _UNKNOWN, scale.colours(values))
    return np.rint(255 * colours).astype(np.uint8)


def _of_classes(classes: Num[np.ndarray, "Y X"], num_classes: int) -> Picture:
    colours = class_colours(num_classes)[classes.clip(0, num_classes - 1)]
    return np.rint(255 * np.where((classes < 0)[..., None], _UNKNOWN, colours)).astype(np.uint8)
