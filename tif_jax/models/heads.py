"""Dense heads: from the features of some blocks, on the raster of patches, to numbers for every pixel.

Legend: B images, Y X pixels, D width of the features, C channels of the decoder, L numbers per pixel.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import Linear, at_least_float32

# DPT's reassembling: the raster of the first of the four features becomes four times as fine, that of the last half as fine.
_FINER = (4, 2, 1, 1)  # the last is halved by a convolution


class LinearDecoder(nnx.Module):
    """One linear layer on the features of all chosen blocks, then bilinear upsampling (DINOv2's linear probe)."""

    def __init__(self, width: int, num_blocks: int, num_outputs: int, *, dtype: Any, rngs: nnx.Rngs):
        self.num_outputs = num_outputs
        self.out = Linear(width * num_blocks, num_outputs, kernel_init=_NORMAL, dtype=dtype, rngs=rngs)

    def __call__(
        self, features: Sequence[Float[Array, "B rows columns D"]], size: tuple[int, int]
    ) -> Float[Array, "B Y X L"]:
        return resized(at_least_float32(self.out(jnp.concatenate(features, axis=-1))), size)


class DptDecoder(nnx.Module):
    """DPT's decoder (Ranftl et al., "Vision Transformers for Dense Prediction", 2021, section 3), with fewer channels.

    The features of four blocks, on rasters 4, 2, 1 and 1/2 times as fine as that of the patches, are fused from the coarsest
    to the finest. Departures: the prediction is made on the finest of these rasters and upsampled from there (the paper's
    are twice and four times as fine); special tokens are not read; there is no batch normalisation.
    """

    def __init__(self, width: int, channels: int, num_outputs: int, *, dtype: Any, rngs: nnx.Rngs):
        self.num_outputs = num_outputs
        linear = partial(Linear, dtype=dtype, rngs=rngs)
        conv = partial(nnx.Conv, channels, channels, (3, 3), dtype=dtype, rngs=rngs)
        for i, finer in enumerate(_FINER):
            # A transposed convolution whose kernel is as large as its stride: each patch becomes finer x finer pixels.
            setattr(self, f"reassemble_{i}", linear(width, channels * finer**2))
        self.coarser = conv(strides=2)
        for i in range(4):
            setattr(self, f"smooth_{i}", conv(use_bias=False))
            setattr(self, f"refine_{i}", ResidualUnit(channels, dtype=dtype, rngs=rngs))
        for i in range(3):
            setattr(self, f"skip_{i}", ResidualUnit(channels, dtype=dtype, rngs=rngs))
        self.last = conv()
        self.out = Linear(channels, num_outputs, kernel_init=_NORMAL, dtype=dtype, rngs=rngs)

    def __call__(
        self, features: Sequence[Float[Array, "B rows columns D"]], size: tuple[int, int]
    ) -> Float[Array, "B Y X L"]:
        levels = [_finer(self._level("reassemble", i)(features[i]), finer) for i, finer in enumerate(_FINER)]
        levels[3] = self.coarser(levels[3])
        levels = [self._level("smooth", i)(x) for i, x in enumerate(levels)]
        y = self._level("refine", 3)(levels[3])
        for i in (2, 1, 0):
            y = resized(y, levels[i].shape[1:3]) + self._level("skip", i)(levels[i])
            y = self._level("refine", i)(y)
        return resized(at_least_float32(self.out(jax.nn.relu(self.last(y)))), size)

    def _level(self, what: str, i: int) -> Any:
        return getattr(self, f"{what}_{i}")


class ResidualUnit(nnx.Module):
    """x plus two convolutions of it, each after a ReLU."""

    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, channels, channels, (3, 3), dtype=dtype, rngs=rngs)
        self.first, self.second = conv(), conv()

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return x + self.second(jax.nn.relu(self.first(jax.nn.relu(x))))


DECODERS = ("dpt", "linear")
_NORMAL = nnx.initializers.truncated_normal(0.02)


def build_decoder(
    name: str, width: int, channels: int, num_blocks: int, num_outputs: int, *, dtype: Any, rngs: nnx.Rngs
) -> DptDecoder | LinearDecoder:
    """The decoder of that name. Raises InputError for an unknown one, or a number of blocks that it does not read."""
    if name not in DECODERS:
        raise InputError(f"decoder is {name!r}; allowed: {', '.join(map(repr, DECODERS))}")
    if name == "linear":
        return LinearDecoder(width, num_blocks, num_outputs, dtype=dtype, rngs=rngs)
    if num_blocks != 4:
        raise InputError(f"decoder 'dpt' reads four blocks; decoder_blocks names {num_blocks}")
    return DptDecoder(width, channels, num_outputs, dtype=dtype, rngs=rngs)


def resized(x: Float[Array, "B _ _ L"], size: Sequence[int]) -> Float[Array, "B Y X L"]:
    """Bilinear, pixels taken for areas (half-pixel centres)."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear")


def _finer(x: Float[Array, "B rows columns _"], finer: int) -> Float[Array, "B Y X C"]:
    return rearrange(x, "b r c (y x d) -> b (r y) (c x) d", y=finer, x=finer)
