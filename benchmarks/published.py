"""Costs as papers, authors' repositories and analytic formulas have them, against which ours are tested and printed.

GMAC of one image at 224 unless the name says otherwise; a multiply-add counts once. `within` is how far a count may be off.
"""

from typing import Any, NamedTuple


class Published(NamedTuple):
    model: str
    reducer: str
    options: dict[str, Any]
    gmac: float
    within: float
    source: str


def _deit(size: str) -> str:
    return f"deit_{size}_patch16_224"


def _rows(model, reducer, option, values, within, source, **options):
    """One row for each value of an option. within: how far a count may be off, as a function of the figure."""
    return [
        Published(model, reducer, {option: value, **options}, gmac, round(within(gmac), 6), source)
        for value, gmac in values.items()
    ]


def _rounded(gmac: float) -> float:
    return 0.05


def _percent(number: float):
    return lambda gmac: number / 100 * gmac


DEIT = [
    Published(_deit(size), "full", {}, gmac, 0.005, "formula")
    for size, gmac in {"tiny": 1.254, "small": 4.599, "base": 17.56}.items()
]
EVIT = _rows(
    _deit("small"), "evit", "keep_ratio", {0.9: 4.0, 0.8: 3.5, 0.7: 3.0, 0.6: 2.6, 0.5: 2.3}, _rounded, "authors"
)
DYNAMIC_VIT = [  # theirs are cut after the first decimal, not rounded
    Published(_deit("small"), "dynamic_vit", {"keep_ratio": 0.7}, 2.9, 0.1, "authors"),
    Published(_deit("base"), "dynamic_vit", {"keep_ratio": 0.7}, 11.4, 0.1, "authors"),
]
BAT = _rows(
    _deit("small"), "bat", "keep_ratio",
    {0.7: 3.005, 0.6: 2.583, 0.5: 2.344, 0.4: 2.083, 0.3: 1.823, 0.2: 1.645}, _percent(3), "authors' logs",
)  # fmt: skip
EVO_VIT = [
    Published(_deit(size), "evo_vit", {"representative": representative}, gmac, 0.01 * gmac, "formula")
    for size, both in {"tiny": (0.818, 0.822), "small": (3.033, 3.049), "base": (11.658, 11.717)}.items()
    for representative, gmac in zip((False, True), both, strict=True)
]
TOME = [
    Published(_deit(size), "tome", {"num_merged": number}, gmac, 0.01 * gmac, "formula")
    for size, per_number in {
        "tiny": {8: 0.924, 13: 0.731, 16: 0.622},
        "small": {8: 3.416, 13: 2.703, 16: 2.291},
        "base": {8: 13.10, 13: 10.37, 16: 8.77},
    }.items()
    for number, gmac in per_number.items()
]
TIF = [
    *_rows(_deit("small"), "tif", "keep_ratio", {0.7: 3.207, 0.5: 2.294}, _percent(1), "formula"),
    *_rows(_deit("tiny"), "tif", "keep_ratio", {0.7: 0.860, 0.5: 0.611}, _percent(1), "formula"),
]
_PAIRS, _LATER = (1, 3, 5, 7, 9, 11), (3, 5, 7, 9, 11)
TOSA = [
    row
    for size, layers, values in [
        ("tiny", _PAIRS, {0.8: 1.119, 0.7: 1.056, 0.5: 0.931, 0.25: 0.784}),
        ("tiny", _LATER, {0.8: 1.142, 0.7: 1.089, 0.5: 0.985, 0.25: 0.863}),
        ("small", _PAIRS, {0.8: 4.126, 0.7: 3.898, 0.5: 3.442, 0.25: 2.888}),
        ("small", _LATER, {0.8: 4.205, 0.7: 4.015, 0.5: 3.634, 0.25: 3.173}),
        ("base", _PAIRS, {0.8: 15.80, 0.7: 14.94, 0.5: 13.20, 0.25: 11.05}),
    ]
    for row in _rows(_deit(size), "tosa", "keep_ratio", values, _percent(1), "formula", layers=layers)
]
_LEVIT = {
    "128s": (0.305, 0.256),
    "128": (0.405, 0.305),
    "192": (0.657, 0.510),
    "256": (1.127, 0.880),
    "384": (2.352, 1.849),
}
LEVIT = [
    Published(f"{prefix}levit_{size}", reducer, {}, gmac, 0.01 * gmac, "formula")
    for size, both in _LEVIT.items()
    for prefix, reducer, gmac in zip(("", "evo_"), ("full", "evo_levit"), both, strict=True)
]
ROWS = [*DEIT, *TIF, *EVIT, *DYNAMIC_VIT, *BAT, *EVO_VIT, *TOME, *TOSA, *LEVIT]
