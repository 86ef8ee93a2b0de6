"""Where along the blocks a reducer works, and how much it leaves: what several methods have in common."""

from tif_jax.errors import InputError
from tif_jax.tokens import check_keep_ratio


def check_sites(sites: tuple[int, ...] | None) -> None:
    """Raises InputError unless sites are ascending block indices, or None (see `resolve_sites`)."""
    if sites is not None and (list(sites) != sorted(set(sites)) or any(site < 0 for site in sites)):
        raise InputError(f"sites is {sites}; it lists block indices, from 0, in ascending order")


def resolve_sites(sites: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The sites for this number of blocks; None is a quarter, a half and three quarters of the way: 3, 6, 9 of 12."""
    if sites is None:
        return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))
    if sites and sites[-1] >= depth:
        raise InputError(f"sites is {sites}; the model has blocks 0..{depth - 1}")
    return tuple(sites)


def check_ratios(keep_ratio: float | tuple[float, ...]) -> None:
    """Raises InputError unless every keep_ratio lies in (0, 1]."""
    for ratio in keep_ratio if isinstance(keep_ratio, tuple) else (keep_ratio,):
        check_keep_ratio(ratio)


def ratio_per_site(keep_ratio: float | tuple[float, ...], num_sites: int) -> tuple[float, ...]:
    """One ratio for each site: the one for all, or a tuple of as many as there are sites."""
    if not isinstance(keep_ratio, tuple):
        return (keep_ratio,) * num_sites
    if len(keep_ratio) != num_sites:
        raise InputError(
            f"keep_ratio has {len(keep_ratio)} entries for {num_sites} sites; give one for each, or one for all"
        )
    return keep_ratio
