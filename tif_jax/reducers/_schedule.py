"""Where along the blocks a reducer works, and how many tokens it leaves there: what several methods have in common.

An amount is a ratio (float) of the patch tokens that arrive at a block, or a number (int) of patch tokens.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from tif_jax.errors import InputError
from tif_jax.tokens import check_keep_ratio

Amount = float | int
Ratios = float | tuple[float, ...]


def check(
    keep_ratio: Ratios, sites: tuple[int, ...] | None, num_kept: tuple[int, ...] | None, *, name: str = "sites"
) -> None:
    """What can be said of a schedule before the number of blocks is known. Raises InputError; name: what sites are called."""
    for ratio in keep_ratio if isinstance(keep_ratio, tuple) else (keep_ratio,):
        check_keep_ratio(ratio)
    if sites is not None and (list(sites) != sorted(set(sites)) or any(site < 0 for site in sites)):
        raise InputError(f"{name} is {sites}; it lists block indices, from 0, in ascending order")
    if num_kept is not None and not all(type(number) is int and number > 0 for number in num_kept):
        raise InputError(f"num_kept is {num_kept}; it lists numbers of patch tokens, integers from 1")
    if sites is not None and num_kept is None:
        _per_site(keep_ratio, len(sites), name)


def amounts(
    keep_ratio: Ratios,
    sites: tuple[int, ...] | None,
    num_kept: tuple[int, ...] | None,
    depth: int,
    *,
    name: str = "sites",
) -> dict[int, Amount]:
    """How much to leave at which block, in ascending order of blocks.

    keep_ratio: one ratio for all sites, or one for each. sites: block indices; None is a quarter, a half and three
    quarters of the way: 3, 6, 9 of 12. num_kept: instead of ratios, integers: one for each site, or one for each block.
    """
    if num_kept is not None and is_per_block(sites, num_kept, depth):
        return dict(enumerate(num_kept))
    if sites is None:
        sites = tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))
    if sites and sites[-1] >= depth:
        raise InputError(f"{name} is {sites}; the model has blocks 0..{depth - 1}")
    given = _per_site(keep_ratio, len(sites), name) if num_kept is None else num_kept
    if len(given) != len(sites):
        raise InputError(
            f"num_kept has {len(given)} entries for {len(sites)} {name} and {depth} blocks; give one for each of either"
        )
    return dict(zip(sites, given, strict=True))


def check_site(site: int | None) -> None:
    """Raises InputError unless that many blocks may run on all patches, before their number is known."""
    if site is not None and site < 0:
        raise InputError(f"site is {site}; it is how many blocks run on all patches, from 0")


def site_of(site: int | None, depth: int) -> int:
    """How many of `depth` blocks run on all patches; None is a third. Raises InputError unless one runs on fewer."""
    site = depth // 3 if site is None else site
    if site >= depth:
        raise InputError(f"site is {site}; it leaves none of {depth} blocks to run on fewer tokens")
    return site


RAMPS = {"constant": 0, "decreasing": -1, "increasing": 1}


def ramp(number: int | float, trend: str, depth: int) -> tuple[int, ...]:
    """A number for each block, of mean `number` before rounding: the same everywhere, or in a straight line to or from 0.

    trend: one of RAMPS. Ramps are those of `parse_r` in ToMe's code, which cuts fractions off, also those that rounding
    alone makes. A constant number with a fraction is spread: blocks differ by at most one.
    """
    if trend == "constant":
        ends = [math.floor(number * i + 1e-9) for i in range(depth + 1)]
        return tuple(after - before for before, after in pairwise(ends))
    first = int(number * (1 - RAMPS[trend]))
    step = (2 * number - first - first) / max(1, depth - 1)
    return tuple(int(first + step * i) for i in range(depth))


Merged = int | float | tuple[int, ...]


def check_merged(num_merged: Merged, *, name: str = "num_merged", done: str = "merged") -> None:
    """Raises InputError unless num_merged is how many patch tokens are to merge in each block, a number or one for each.

    name: what the option is called, done: what happens to the tokens.
    """
    if isinstance(num_merged, tuple):
        fits = all(type(number) is int and number >= 0 for number in num_merged)
    else:
        fits = type(num_merged) in (int, float) and 0 <= num_merged < math.inf
    if not fits:
        raise InputError(
            f"{name} is {num_merged!r}; it is the number of patch tokens {done} per block, "
            "from 0, or a tuple of integers, one for each block"
        )


def merged_per_block(
    num_merged: Merged, depth: int, *, trend: str = "constant", first: int = 0, name: str = "num_merged"
) -> tuple[int, ...]:
    """How many patch tokens are to merge in each of `depth` blocks. Raises InputError for a tuple of another length.

    first: the first block in which one number for all blocks merges any. trend: one of RAMPS, of one number.
    """
    if not isinstance(num_merged, tuple):
        return (0,) * min(first, depth) + ramp(num_merged, trend, max(0, depth - first))
    if len(num_merged) != depth:
        raise InputError(f"{name} has {len(num_merged)} entries for {depth} blocks; give one for each")
    return num_merged


def is_per_block(sites: tuple[int, ...] | None, num_kept: tuple[int, ...] | None, depth: int | None) -> bool:
    """Whether num_kept has an entry for each block, rather than for each site."""
    return num_kept is not None and sites is None and len(num_kept) == depth


def check_dense_start(number: int, num_patches: int) -> None:
    """Raises InputError if a schedule with numbers for each block leaves fewer than all patches at block 0."""
    if number < num_patches:
        raise InputError(f"num_kept begins with {number}; block 0 is dense: give {num_patches}, all patches")


def count(amount: Amount, num_patches: int, rounding: Callable[[float], int]) -> int:
    """How many of num_patches tokens are left, from 1: a ratio's product is rounded as the method says."""
    return min(num_patches, max(1, amount if isinstance(amount, int) else rounding(amount * num_patches)))


def _per_site(keep_ratio: Ratios, num_sites: int, name: str) -> tuple[float, ...]:
    if not isinstance(keep_ratio, tuple):
        return (float(keep_ratio),) * num_sites
    if len(keep_ratio) != num_sites:
        raise InputError(
            f"keep_ratio has {len(keep_ratio)} entries for {num_sites} {name}; give one for each, or one for all"
        )
    return tuple(map(float, keep_ratio))
