"""Everything that is to be seen of a picture, on a figure."""

import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib import cm, colors
from matplotlib.figure import Figure

from tif_jax.figures.colours import AFTER, BEFORE, Scale, impact_scale, logit_scale
from tif_jax.figures.maps import Picture, enlarged, map_over, tokens_over
from tif_jax.figures.page import MADE_BY
from tif_jax.figures.panels import Panel, first_panels, impact_unit, way_panels
from tif_jax.figures.seen import Class, Seen, Way

_COLUMNS = 5  # of pictures and of classes
_OF_MAPS = 6  # of pictures of a dense model
_INCHES = 2.6  # of a picture
_LONGEST = 38  # letters beside each other: a class and its probabilities
_SMALL = 9  # points


class Sheet(Figure):
    """A figure that notebooks show, without pyplot: no display is needed, and nothing is kept beside it."""

    def _repr_png_(self) -> bytes:
        return as_png(self)


def sheet(pictures: Sequence[Seen]) -> Sheet:
    """A figure of all pictures, one below the other."""
    rows = [_packed(seen) for seen in pictures]
    most = max((_columns(seen) for seen in pictures), default=_COLUMNS)
    heights = [
        _INCHES * seen.photo.shape[0] / seen.photo.shape[1] * (1 + len(packed)) + 0.3 * len(packed) + 1.2
        for seen, packed in zip(pictures, rows, strict=True)
    ]
    figure = Sheet(figsize=(_INCHES * most + 0.6, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(pictures), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, seen, packed in zip(parts, pictures, rows, strict=True):
        _draw(part, seen, packed)
    return figure


def as_png(figure: Figure, dpi: int = 110) -> bytes:
    """The file's bytes."""
    image = io.BytesIO()
    with warnings.catch_warnings():  # of letters of a name that no font here has: they become boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(image, dpi=dpi, format="png", facecolor="white", metadata={"Software": MADE_BY})
    return image.getvalue()


def colour_bar(figure: Any, axes: Any, scale: Scale) -> None:
    """The legend of a map, below it."""
    mappable = cm.ScalarMappable(colors.Normalize(scale.least, scale.most), colors.ListedColormap(scale.table))
    bar = figure.colorbar(mappable, ax=axes, location="bottom", extend=scale.extend, fraction=0.06, pad=0.02, aspect=25)
    bar.ax.tick_params(labelsize=_SMALL)
    bar.ax.locator_params(nbins=3)  # more numbers overlap under a narrow map
    bar.set_label("\n".join(textwrap.wrap(scale.label, 24)), fontsize=_SMALL)


def show(axes: Any, picture: Picture, title: str) -> None:
    """A picture without ticks; its row's name can stand as the label of the y axis."""
    axes.imshow(picture, interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10, parse_math=False)


def _columns(seen: Seen) -> int:
    return _OF_MAPS if seen.maps else _COLUMNS


def _packed(seen: Seen) -> list[list[Way]]:
    """Rows of reducers, each of which takes a column for every picture, and one for its classes or some for its maps."""
    rows: list[list[Way]] = []
    room = 0
    for way in seen.ways:
        beside = len(way_panels(seen.maps, way.label)) if seen.maps else 1
        if (needed := max(1, len(way.stages)) + beside) > room:
            rows.append([])
            room = _columns(seen)
        rows[-1].append(way)
        room -= needed
    return rows


def _draw(part: Any, seen: Seen, packed: Sequence[Sequence[Way]]) -> None:
    grid = part.subplots(1 + len(packed), _columns(seen), squeeze=False)
    part.suptitle(textwrap.shorten(seen.name, 110), fontsize=12, parse_math=False)
    for axes in grid.flat:
        axes.set_axis_off()
    first = iter(grid[0])
    _put(next(first), seen.photo, "as the model sees it")
    if seen.impact is not None:
        scale, axes = impact_scale(seen.impact, impact_unit(seen.maps)), next(first)
        _put(axes, map_over(seen.photo, seen.impact, scale), "impact of each patch")
        colour_bar(part, axes, scale)
    elif seen.note:
        next(first).text(0, 0.5, "\n".join(textwrap.wrap(seen.note, 30)), fontsize=_SMALL, va="center")
    if seen.predicted is not None:
        scale, axes = logit_scale(seen.predicted), next(first)
        _put(axes, map_over(seen.photo, seen.predicted, scale), "what the filter predicts")
        colour_bar(part, axes, scale)
    _draw_panels(part, first, first_panels(seen.maps) if seen.maps else [])
    if seen.classes:
        _bars(next(first), seen.classes, "with all tokens", only_before=True)
    for row, ways in zip(grid[1:], packed, strict=True):
        left = iter(row)
        for way in ways:
            _draw_way(left, seen.photo, way)
            _draw_panels(part, left, way_panels(seen.maps, way.label) if seen.maps else [])


def _draw_panels(part: Any, left: Iterator[Any], panels: Sequence[Panel]) -> None:
    for panel in panels:
        axes = next(left)
        _put(axes, panel.picture, panel.title)
        if panel.scale:
            colour_bar(part, axes, panel.scale)


def _draw_way(left: Iterator[Any], photo: Picture, way: Way) -> None:
    axes = named = next(left)
    for i, stage in enumerate(way.stages):
        axes = next(left) if i else axes
        title = f"{stage.title}: {stage.num_tokens} of {stage.source.size} tokens"
        _put(axes, tokens_over(photo, stage.source), title)
    if not way.stages:
        _put(axes, photo, "all tokens")
    named.set_ylabel("\n".join(textwrap.wrap(way.label, 26, break_on_hyphens=False)), fontsize=11, parse_math=False)
    if way.classes:
        _bars(next(left), way.classes, "all tokens (grey), those left (blue)")


def _put(axes: Any, picture: Picture, title: str) -> None:
    axes.set_axis_on()
    show(axes, enlarged(picture), title)


def _bars(axes: Any, classes: Sequence[Class], title: str, only_before: bool = False) -> None:
    """Probabilities: grey with all tokens, blue with those that are left."""
    axes.set_axis_on()
    axes.set(xlim=(0, 1), ylim=(max(3, len(classes)) - 0.4, -0.75), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)
    for i, one in enumerate(classes):
        text = f"{one.before:.1%}" if only_before else f"{one.before:.1%} \N{RIGHTWARDS ARROW} {one.after:.1%}"
        longest = _LONGEST - len(text)
        name = one.name if len(one.name) <= longest else one.name[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"
        axes.text(0, i - 0.22, name, fontsize=_SMALL, parse_math=False)
        axes.text(1, i - 0.22, text, fontsize=_SMALL, ha="right")
        axes.barh(i - 0.05, one.before, 0.18, color=BEFORE)
        if not only_before:
            axes.barh(i + 0.15, one.after, 0.18, color=AFTER)
