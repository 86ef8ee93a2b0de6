"""What `tif compare` says: tables, a page in Markdown with where it comes from, and the figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tif_jax.commands._compare_kept import Kept
from tif_jax.commands._compare_rows import Asked
from tif_jax.commands._tables import Column, aligned, fixed, markdown
from tif_jax.errors import InputError
from tif_jax.figures.tradeoff import Axis, tradeoff
from tif_jax.impact.paired import Estimate, difference, estimate, front
from tif_jax.runtime import files

MARKDOWN, FIGURE = "compare.md", "compare.png"
_TIME, _GMAC = "ms_per_image", "gmac"
_MERITS = {
    "agreement": Axis("agreement", "agreement with all tokens (%)", 100.0),
    "top1": Axis("top1", "top-1 (%)", 100.0),
}
_HOW = """\
Agreement: how often the likeliest class is that of the same weights with all tokens (`full`). KL: KL(full || row) of
the class probabilities, nats an image. ± is the standard error over images; of a difference that of the images' own
differences. GMAC: 10⁹ multiply-adds an image, counted. Images/s: median of interleaved rounds (least to most); x
full: times `full` in the same round, beside what the multiply-adds promise (x GMAC). Peak memory: as the compiler
planned it. On the front: no other row is at most as costly and at least as good, standard errors aside."""
_REGRET = """\
Regret: the patches that a row keeps, alone from the first block on, are by so many nats (KL) further from `full` than as
many of the highest impact, which is measured with all tokens and without labels; of rows that keep some patches."""


def reference_of(rows: Mapping[str, Asked], reference: str | None) -> dict[str, str]:
    """By label, the row to compare with: the reference under the same budget, or as it is if it says its amount itself.

    Raises InputError if no row is of that reducer.
    """
    if reference is None:
        return {}
    named = [label for label, asked in rows.items() if reference in (asked.given, label)]
    of_it = {rows[label].budget: label for label in named}
    if not named:
        raise InputError(f"--reference is {reference!r}, which is no row; there are {', '.join(rows)}")
    if len(of_it) < len(named):
        raise InputError(f"--reference is {reference!r}, which is several rows: {', '.join(named)}; name one of them")
    only = next(iter(of_it.values())) if len(of_it) == 1 and "" in of_it else None
    found = {label: of_it.get(asked.budget, only) for label, asked in rows.items() if label != "full"}
    return {label: other for label, other in found.items() if other is not None and other != label}


def finish(
    folder: Path, kept: Kept, asked: Mapping[str, Asked], sizes: Sequence[int], reference: str | None
) -> dict[str, Any]:
    """Writes compare.json with what the rows come to, compare.md and compare.png; returns the first."""
    of_full, references = kept.terms("full"), reference_of(asked, reference)
    for label, row in kept.data["rows"].items():
        own = kept.terms(label)
        row |= {name: estimate(values) for name, values in own.items()}
        row["to_full"] = {name: difference(values, of_full[name]) for name, values in own.items()}
        row.pop("to_reference", None)
        regret = kept.regret(label)
        row["regret"] = None if regret is None else estimate(regret)
        if other := references.get(label):
            beside = kept.terms(other)
            row["to_reference"] = {"label": other} | {name: difference(own[name], beside[name]) for name in own}
        row["speed"] = {size: of["of"][label] for size, of in kept.data["speeds"].items() if label in of["of"]}
        row["learned_with_labels"] = bool(kept.data["weights"].get("fine_tuned")) or row["has_learned_part"]
    rows = [kept.data["rows"][label] for label in asked]
    largest = str(max(sizes)) if sizes else None
    for row in rows:
        row["mac_ratio"] = rows[0]["gmac"] / row["gmac"]
        row[_TIME] = 1000 / row["speed"][largest]["images_per_second"] if largest else None
    _mark_fronts(rows, [_GMAC, *([_TIME] if largest else [])])
    kept.write()
    found = {**kept.data, "rows": rows, "sizes": [str(size) for size in sizes]}
    files.write(folder / MARKDOWN, ("\n".join(_page(found)) + "\n").encode("utf-8", "replace"))
    costs = [Axis(_GMAC, "GMAC per image"), *([Axis(_TIME, f"ms per image, batch {largest}")] if largest else [])]
    drawn = [row | {"reducer": _short(row), "fronts": {tuple(pair) for pair in row["fronts"]}} for row in rows]
    tradeoff(drawn, costs, [axis for name, axis in _MERITS.items() if name in rows[0]], folder / FIGURE)
    return found


def _short(row: Mapping[str, Any]) -> str:
    """What a reducer is called in the figure: as it was given, but no path and no dict."""
    given = row["given"]
    if given.startswith("{"):
        return f"{row['reducer']['name']}, {row[_GMAC]:.2f} GMAC"
    return Path(given).stem if given.endswith(".json") else Path(given).name


def text(found: Mapping[str, Any]) -> list[str]:
    """Both tables for a terminal."""
    rows = found["rows"]
    return [*aligned(_of_predictions(found), rows), "", *aligned(_of_cost(found), rows)]


def _mark_fronts(rows: Sequence[dict[str, Any]], costs: Sequence[str]) -> None:
    """row["fronts"]: pairs of a merit and a cost on whose front the row is."""
    for row in rows:
        row["fronts"] = []
    for merit in (name for name in _MERITS if name in rows[0]):
        for cost in costs:
            on = front([row[cost] for row in rows], [row[merit].mean for row in rows])
            for row in (row for row, is_on in zip(rows, on, strict=True) if is_on):
                row["fronts"].append([merit, cost])


def _page(found: Mapping[str, Any]) -> list[str]:
    rows, weights, images = found["rows"], found["weights"], found["images"]
    facts = {
        "weights": f"`{weights['source']}`, sha256 of the parameters {weights['digest'][:16]}",
        "images": f"{images['num_read']} of {images['num_images']} in {', '.join(f'`{x}`' for x in images['folders'])}, "
        f"fingerprint {images['fingerprint'][:16]}; labels: {images['labels'] or 'none'}",
        "command": f"`{found['command']}`",
        "date": found["date"],
        "device": f"{found['device']}, {found['machine']['processor']}, {found['machine']['cores']} cores, {found['dtype']}",
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    }
    learned = [row["label"] for row in rows if row["learned_with_labels"]]
    return [
        "# Comparison of reducers",
        "",
        *markdown([Column("", ("what",)), Column("", ("is",))], [{"what": k, "is": v} for k, v in facts.items()]),
        "",
        *markdown(_of_predictions(found), rows),
        "",
        *[f"{label} is left out: {why}.\n" for label, why in found.get("left_out", {}).items()],
        *([f"Trained for its tokens, perhaps with labels: {', '.join(learned)}.", ""] if learned else []),
        *markdown(_of_cost(found), rows),
        "",
        f"![what is left against what it costs]({FIGURE})",
        "",
        *_HOW.split("\n"),
        *(_REGRET.split("\n") if _have_regret(rows) else []),
    ]


def _have_regret(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row["regret"] for row in rows)


def _of_predictions(found: Mapping[str, Any]) -> list[Column]:
    rows = found["rows"]
    labelled, compared = "top1" in rows[0], any("to_reference" in row for row in rows)
    columns = [Column("reducer", ("label",)), Column("GMAC", (_GMAC,), fixed(4))]
    columns += [Column("agreement %", ("agreement",), _of(1, 100.0)), Column("KL nats", ("kl",), _of(4))]
    if labelled:
        columns += [
            Column("top-1 %", ("top1",), _of(1, 100.0)),
            Column("less full", ("to_full", "top1"), _of(1, 100.0, "+")),
        ]
    if _have_regret(rows):
        columns.append(Column("regret nats", (), lambda row: _of(4)(row["regret"]) if row["regret"] else "-"))
    if compared:
        columns += [
            Column("agreement to reference", (), lambda row: _of_reference(row, "agreement", 1, 100.0)),
            Column("KL", (), lambda row: _of_reference(row, "kl", 4)),
            *([Column("top-1", (), lambda row: _of_reference(row, "top1", 1, 100.0))] if labelled else []),
        ]
    return [*columns, Column("on the front", ("fronts",), _fronts)]


def _of_cost(found: Mapping[str, Any]) -> list[Column]:
    columns = [
        Column("reducer", ("label",)),
        Column("amount", ("reducer",), _options),
        Column("params M", ("parameters",), fixed(3, 1e-6)),
        Column("x GMAC", ("mac_ratio",), fixed(2)),
    ]
    for size in found["sizes"]:
        columns.append(Column(f"images/s at {size}", ("speed", size), _rates))
        columns.append(Column("x full", ("speed", size, "speed_up"), fixed(2)))
    if found["sizes"]:
        columns.append(Column("peak MiB", ("speed", found["sizes"][-1], "peak_memory_bytes"), fixed(0, 2**-20)))
    return columns


def _of(digits: int, factor: float = 1.0, sign: str = "") -> Any:
    """As in '95.2 ± 0.9'."""

    def shown(value: Estimate) -> str:
        mean = f"{factor * value[0]:{sign}.{digits}f}"
        return mean if value[1] is None else f"{mean} ± {factor * value[1]:.{digits}f}"

    return shown


def _of_reference(row: Mapping[str, Any], name: str, digits: int, factor: float = 1.0) -> str:
    return _of(digits, factor, "+")(row["to_reference"][name]) if "to_reference" in row else "-"


def _rates(speed: Mapping[str, Any]) -> str:
    low, high = speed["images_per_second_range"]
    return f"{speed['images_per_second']:.1f} ({low:.1f}-{high:.1f})"


def _options(reducer: Mapping[str, Any]) -> str:
    values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in reducer.items()}
    shown = ", ".join(f"{key} {value}" for key, value in values.items() if key != "name") or "-"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _fronts(pairs: Sequence[Sequence[str]]) -> str:
    """As in 'agreement: GMAC, time'."""
    shown = {_GMAC: "GMAC", _TIME: "time"}
    merits = dict.fromkeys(merit for merit, _ in pairs)
    of = {merit: ", ".join(shown[cost] for own, cost in pairs if own == merit) for merit in merits}
    return "; ".join(f"{merit}: {costs}" for merit, costs in of.items()) or "-"
