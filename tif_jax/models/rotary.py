"""Rotary position embedding in two dimensions: queries and keys of patch tokens are turned by where in the raster they lie.

    angle = coordinate * temperature^(-k / (C / 4)), k = 0, 1, ..., C/4 - 1, for the row and for the column

Each angle turns a pair of channels, so that a logit depends on how far apart two patches are (Su et al. 2021; Heo et al. 2024
in two dimensions). Special tokens are not turned.

Legend: B images, T tokens, N patch tokens, H heads, C channels of a head.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.tokens import Tokens


class _Kind(NamedTuple):
    temperature: float
    centred: bool  # coordinates are 2 pi times -1 to 1 over the raster; else numbers of patches, from 0
    columns_first: bool  # which angles come first
    halves: bool  # pairs are channels k and k + C/2; else 2k and 2k + 1


KINDS = {
    "eva02": _Kind(10_000.0, centred=False, columns_first=False, halves=False),
    "rope_vit": _Kind(100.0, centred=False, columns_first=True, halves=False),
    "dinov3": _Kind(100.0, centred=True, columns_first=False, halves=True),
}


def rotary_positions(
    kind: str | None,
    channels: int,
    grid: tuple[int, int],
    reference: int | tuple[int, int] | None,
    temperature: float | None,
) -> "Rotary | None":
    """As a model's fields say it. Raises InputError for what does not fit together."""
    if kind is None:
        if reference is not None or temperature is not None:
            raise InputError("rotary_grid and rotary_temperature need rotary, the kind of rotary positions")
        return None
    return Rotary(
        kind, channels, grid, (reference, reference) if isinstance(reference, int) else reference, temperature
    )


@dataclass(frozen=True)
class Rotary:
    """kind: one of `KINDS`. channels: of a head. grid: the model's rows and columns.

    reference: rows and columns that the raster is stretched to, if coordinates are numbers of patches: what the model was
    first trained with (EVA-02), or None. temperature: None is the kind's own.

    Raises InputError for what does not fit together.
    """

    kind: str
    channels: int
    grid: tuple[int, int]
    reference: tuple[int, int] | None = None
    temperature: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"rotary is {self.kind!r}; allowed: None, {', '.join(map(repr, KINDS))}")
        if self.channels % 4:
            raise InputError(f"heads of {self.channels} channels; rotary positions need a multiple of 4")
        if self.reference is not None and KINDS[self.kind].centred:
            raise InputError(f"rotary {self.kind!r} stretches every raster to -1 to 1; leave out rotary_grid")

    def angles(self, position: Float[Array, "B N 2"]) -> Float[Array, "B N F"]:
        """The angle of each pair of channels, F = C/2, in radians."""
        kind, quarter = KINDS[self.kind], self.channels // 4
        reference = self.reference or self.grid
        if kind.centred:
            factor = [4 * math.pi / side for side in self.grid]
            offset = [2 * math.pi * (1 / side - 1) for side in self.grid]
        else:
            factor, offset = [of / side for of, side in zip(reference, self.grid, strict=True)], [0.0, 0.0]
        dtype = position.dtype
        coordinate = position * jnp.asarray(factor, dtype)[None, None] + jnp.asarray(offset, dtype)[None, None]
        if kind.columns_first:
            coordinate = coordinate[..., ::-1]
        band = (self.temperature or kind.temperature) ** -(jnp.arange(quarter, dtype=dtype) / quarter)
        return (coordinate[..., None] * band[None, None, None]).reshape(*position.shape[:2], 2 * quarter)

    def turn(self, x: Float[Array, "B T H C"], tokens: Tokens) -> Float[Array, "B T H C"]:
        """Queries or keys, those of the patch tokens turned by where these lie."""
        special, patches = x[:, : tokens.num_special], x[:, tokens.num_special :]
        wide = patches.astype(widened(x.dtype))
        angles = self.angles(tokens.position).astype(wide.dtype)[:, :, None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if KINDS[self.kind].halves:
            first, second = jnp.split(wide, 2, axis=-1)
        else:
            first, second = wide[..., ::2], wide[..., 1::2]
        turned = first * cos - second * sin, second * cos + first * sin
        if KINDS[self.kind].halves:
            patches = jnp.concatenate(turned, axis=-1)
        else:
            patches = jnp.stack(turned, axis=-1).reshape(wide.shape)
        return jnp.concatenate([special, patches.astype(x.dtype)], axis=1)
