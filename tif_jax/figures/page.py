"""Everything that is to be seen of pictures, as one HTML page that needs nothing else: no network, no scripts."""

import base64
import html
from collections.abc import Iterable, Sequence
from functools import partial

from tif_jax.figures.colours import AFTER, BEFORE, OUTLINE, Scale, impact_scale, logit_scale
from tif_jax.figures.maps import Picture, as_jpeg, enlarged, map_over, tokens_over
from tif_jax.figures.panels import Panel, first_panels, impact_unit, way_panels
from tif_jax.figures.seen import Class, Seen, Way

MADE_BY = "tif_jax"  # in the head of what is made here

_STYLE = f"""
body {{ font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem }}
body {{ color: #1c1c1c; background: #fff }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.2rem }}
h3 {{ font-size: 1rem; margin: 1.2rem 0 .4rem }}
p, td, h2 {{ overflow-wrap: anywhere }}
section {{ border-top: 1px solid #ccc; padding-bottom: 1rem }}
.row {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; align-items: start }}
.first {{ grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)) }}
.ways {{ display: flex; flex-wrap: wrap; column-gap: 2rem }} .way {{ min-width: 0 }}
.classes {{ grid-column: span 2 }} .first .classes {{ grid-column: auto }}
figure {{ margin: 0 }} figure img {{ width: 100%; height: auto; display: block }}
figcaption {{ font-size: .85rem; margin-top: .2rem }}
.bar {{ height: .7rem; border: 1px solid #888 }} .ends {{ display: flex; justify-content: space-between }}
table {{ border-collapse: collapse; font-size: .9rem; width: 100% }}
td, th {{ text-align: left; padding: .15rem 0 0 }}
td + td, th + th {{ text-align: right; white-space: nowrap; padding-left: .6rem; font-variant-numeric: tabular-nums }}
.shares {{ padding-bottom: .3rem }} .share {{ display: block; height: .35rem; margin-top: 1px }}
.note {{ color: #555 }} .outline {{ border: 2px solid {OUTLINE}; padding: 0 .3rem }}
"""
_IMPACT = """<b>Impact</b>: how much the divergence from the model's own prediction with all tokens changes when the patch is
masked, in nats. Red patches speak for the prediction, blue ones against it; white is 0. The few largest values of a picture
share the last colour. """
_IMPACT_ON_DEPTH = """<b>Impact</b>: the mean square by which ln depth changes from what all tokens say when the patch is
masked. Red patches hold the prediction, blue ones pull away from it; white is 0. The few largest values of a
picture share the last colour. """
_TOKENS = """<b>Tokens</b>: what a reducer leaves, by the block that works with it (blocks are counted from 0). Pale
patches are no tokens there: they are gone, or pass the block by. Patches that one token holds together have its mean colour
and an <span class="outline">outline</span>. """
_CLASSES = f"""<b>Classes</b>: probabilities with all tokens (<span style="color:{BEFORE}">&#9632;</span> before) and with
those that are left (<span style="color:{AFTER}">&#9632;</span> after)."""
_DEPTH = """<b>Depth</b>: metres, of a picture on one scale. <b>Error</b>: prediction less truth, in metres; where the truth
is not known both are grey. Without a truth, <b>change</b>: how much farther a pixel is than with all tokens."""
_PIXELS = "<b>Classes</b>: the likeliest of each pixel; grey pixels have no label."


def _introduction(pictures: Sequence[Seen]) -> str:
    maps = next((seen.maps for seen in pictures if seen.maps), None)
    if maps is None:
        return f"\n<p>{_IMPACT}{_TOKENS}{_CLASSES}</p>\n"
    impact = _IMPACT if maps.num_classes else _IMPACT_ON_DEPTH
    return f"\n<p>{impact}{_TOKENS}{_PIXELS if maps.num_classes else _DEPTH}</p>\n"


def page(title: str, about: Sequence[str], pictures: Iterable[Seen]) -> str:
    """The page's text. about: what is said below the title, a paragraph each."""
    pictures = list(pictures)
    said = "".join(f"<p>{_escaped(text)}</p>\n" for text in about)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="{MADE_BY}">\n'
        f"<title>{_escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_escaped(title)}</h1>\n{said}{_introduction(pictures)}{''.join(map(_section, pictures))}</body>\n</html>\n"
    )


def _section(seen: Seen) -> str:
    first = [_figure(enlarged(seen.photo), f"{seen.name}, as the model sees it", "as the model sees it")]
    if seen.impact is not None:
        scale = impact_scale(seen.impact, impact_unit(seen.maps))
        first.append(_map(seen, map_over(seen.photo, seen.impact, scale), scale, "impact of each patch"))
    if seen.predicted is not None:
        scale = logit_scale(seen.predicted)
        first.append(_map(seen, map_over(seen.photo, seen.predicted, scale), scale, "what the filter predicts"))
    first += map(partial(_panel, seen), first_panels(seen.maps) if seen.maps else [])
    note = f'<p class="note">{_escaped(seen.note)}</p>\n' if seen.note else ""
    table = _table(seen.classes, only_before=True)
    return (
        f"<section>\n<h2>{_escaped(seen.name)}</h2>\n{note}"
        f'<div class="row first">\n{"".join(first)}{table}</div>\n'
        f'<div class="ways">\n{"".join(_way(seen, way) for way in seen.ways)}</div>\n</section>\n'
    )


def _way(seen: Seen, way: Way) -> str:
    figures = [
        _figure(
            tokens_over(seen.photo, stage.source),
            f"{seen.name}: {stage.num_tokens} of {stage.source.size} patch tokens in {stage.title} under {way.label}",
            f"{stage.title}: {stage.num_tokens} of {stage.source.size}",
        )
        for stage in way.stages
    ]
    panels = way_panels(seen.maps, way.label) if seen.maps else []
    none = "" if figures else '<p class="note">all tokens, in every block</p>\n'
    width = 10.5 * (max(1, len(figures)) + (len(panels) or 2))  # rem
    figures += map(partial(_panel, seen), panels)
    return (
        f'<div class="way" style="flex:0 1 {width:g}rem">\n<h3>{_escaped(way.label)}</h3>\n{none}'
        f'<div class="row">\n{"".join(figures)}{_table(way.classes, only_before=False)}</div>\n</div>\n'
    )


def _panel(seen: Seen, panel: Panel) -> str:
    legend = _legend(panel.scale) if panel.scale else ""
    return _figure(enlarged(panel.picture), f"{seen.name}: {panel.title}", panel.title, legend)


def _map(seen: Seen, picture: Picture, scale: Scale, title: str) -> str:
    least, most = _ends(scale)
    return _figure(picture, f"{seen.name}: {title}, from {least} to {most}", title, _legend(scale))


def _legend(scale: Scale) -> str:
    colours = ["#{:02x}{:02x}{:02x}".format(*(round(255 * c) for c in colour)) for colour in scale.table[::15]]
    least, most = _ends(scale)
    below, above = ("&le; " * (scale.extend in ("min", "both")), "&ge; " * (scale.extend in ("max", "both")))
    return (
        f'<div class="bar" style="background:linear-gradient(to right,{",".join(colours)})"></div>'
        f'<div class="ends"><span>{below}{least}</span><span>{above}{most}</span></div>{_escaped(scale.label)}'
    )


def _ends(scale: Scale) -> tuple[str, str]:
    least, most = (f"{value:.2g}".replace("-", "\N{MINUS SIGN}") for value in (scale.least, scale.most))
    return least, most


def _figure(picture: Picture, alt: str, caption: str, legend: str = "") -> str:
    data = base64.b64encode(as_jpeg(picture)).decode()
    height, width = picture.shape[:2]
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{_escaped(alt)}" width="{width}" height="{height}">'
        f"<figcaption>{_escaped(caption)}{legend}</figcaption></figure>\n"
    )


def _table(classes: Sequence[Class], only_before: bool) -> str:
    if not classes:
        return ""
    heads = ("class", "all tokens") if only_before else ("class", "before", "after")
    rows = ["<tr>", *(f"<th>{head}</th>" for head in heads), "</tr>\n"]
    for one in classes:
        shares = [(BEFORE, one.before)] if only_before else [(BEFORE, one.before), (AFTER, one.after)]
        bars = "".join(
            f'<span class="share" style="width:{share:.1%};background:{colour}"></span>' for colour, share in shares
        )
        numbers = "".join(f"<td>{share:.1%}</td>" for _, share in shares)
        rows.append(f"<tr><td>{_escaped(one.name)}</td>{numbers}</tr>\n")
        rows.append(f'<tr><td class="shares" colspan="{len(heads)}">{bars}</td></tr>\n')
    return f'<div class="classes"><table>\n{"".join(rows)}</table></div>\n'


def _escaped(text: str) -> str:
    return html.escape(text)
