"""Costs as papers, authors' repositories and analytic formulas have them, against which ours are tested and printed.

GMAC of one image at 224 unless the name says otherwise; a multiply-add counts once. `within` is how far a count may be off.
A ViT's last block is counted whole.
"""

from typing import Any, NamedTuple

import jax
from flax import nnx

from tif_jax.models import Model, blueprint
from tif_jax.reducers.diffrate import rates


class Published(NamedTuple):
    model: str
    reducer: str
    options: dict[str, Any]
    gmac: float
    within: float
    source: str

    def network(self) -> Model:
        """The model, abstract, that computes what the figure is of."""
        whole = {} if "levit" in self.model else {"lean_last_block": False}
        build = blueprint(self.model, reducer=self.reducer, **whole, **self.options)
        return nnx.eval_shape(build, jax.random.key(0))


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


class Rates(NamedTuple):
    """A pair of lists of DiffRate's `compression_rate.json`, and its cost by their formula."""

    model: str  # with as many tokens and channels; some of the lists are for MAE's weights
    prune_kept_num: tuple[int, ...]  # tokens left in each block after dropping, the class token included
    merge_kept_num: tuple[int, ...]  # and after merging
    gmac: float
    readme: float | None = None  # as their README prints it: one patch embedded more


# fmt: off
DIFFRATE_RATES = [
    Rates(
        _deit("tiny"),
        (197, 196, 180, 157, 130, 107, 86, 73, 63, 51, 40, 3),
        (197, 187, 167, 139, 114, 90, 76, 66, 57, 45, 37, 3),
        0.6547,
    ),
    Rates(
        _deit("tiny"),
        (197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3),
        (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3),
        0.8086,
    ),
    Rates(
        _deit("small"),
        (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
        (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
        2.9050, 2.905,
    ),
    Rates(
        _deit("small"),
        (197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3),
        (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3),
        2.3269,
    ),
    Rates(
        _deit("small"),
        (197, 197, 194, 180, 160, 147, 137, 129, 115, 92, 76, 3),
        (197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3),
        3.1077,
    ),
    Rates(
        _deit("base"),
        (197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3),
        (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3),
        8.7300,
    ),
    Rates(
        _deit("base"),
        (197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
        (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3),
        11.5166, 11.517,
    ),
    Rates(
        "vit_large_patch16_224",
        (197, 197, 197, 195, 194, 193, 191, 187, 182, 180, 173, 149,
         142, 134, 125, 121, 111, 106, 91, 87, 77, 39, 38, 32),
        (197, 197, 196, 194, 193, 192, 187, 183, 181, 173, 154, 146,
         137, 127, 123, 114, 105, 98, 87, 75, 43, 45, 32, 32),
        42.2896, 42.290,
    ),
    Rates(
        "vit_huge_patch14_224",
        (257, 256, 255, 251, 245, 235, 204, 197, 194, 189, 185, 177, 169, 160, 152, 144,
         146, 139, 139, 136, 135, 133, 131, 128, 126, 126, 124, 121, 114, 96, 82, 53),
        (257, 256, 253, 247, 238, 211, 201, 195, 193, 185, 179, 171, 162, 154, 150, 145,
         141, 138, 137, 135, 134, 133, 130, 127, 125, 125, 122, 114, 101, 90, 53, 53),
        103.3363, 103.337,
    ),
]
# fmt: on
DIFFRATE = [
    Published(
        row.model, "diffrate", rates(row.prune_kept_num, row.merge_kept_num), row.gmac, 0.01 * row.gmac, "formula"
    )
    for row in DIFFRATE_RATES
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
ROWS = [*DEIT, *TIF, *EVIT, *DYNAMIC_VIT, *BAT, *EVO_VIT, *TOME, *DIFFRATE, *TOSA, *LEVIT]
