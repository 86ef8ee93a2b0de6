"""What every model family has: three steps, and a reducer between them.

Legend: B images, Y X height and width, T tokens, S tokens left, N patch tokens, D width in, E width out, L classes.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.reducers import Aux, Full, Reducer
from tif_jax.tokens import Tokens, row_numbers

FULL = Full()
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}  # float64: for checks, needs x64


class Model(nnx.Module):
    """A backbone in three steps: `embed`, `encode` and `predict`; calling it takes all three.

    It knows no token-reduction method: `encode` hands the blocks to `reducer`, which owns how tokens travel through them.
    A family (`ViT`, `LeViT`) has `embed` and `predict` of its own, and blocks `block_0`, `block_1`, ... of two half-steps.

    rngs, of every step: None, or the streams that training draws from. With them a model with running statistics
    normalises by those of the batch, and updates its own; without, a call is deterministic and changes nothing.
    """

    image_size: tuple[int, int]  # height and width in pixels
    grid: tuple[int, int]  # rows and columns of the patch raster before the first block
    num_special: int  # class, distillation and register tokens, in front of the patches
    depth: int  # blocks
    dtype: Any  # of the computation; parameters and logits are float32
    head: Any  # `head.out_features` is the number of classes
    reducer: Reducer

    @property
    def blocks(self) -> Sequence[Any]:
        return [getattr(self, f"block_{i}") for i in range(self.depth)]

    def embed(
        self, images: Float[Array | np.ndarray, "B Y X 3"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T D"]:
        """Tokens before the first block: the special ones, then the patches in raster order.

        Raises InputError for images of another size than the model's.
        """
        raise NotImplementedError

    def encode(self, x: Float[Array, "B T D"], rngs: nnx.Rngs | None = None) -> tuple[Float[Array, "B S E"], Aux]:
        """The tokens after the last block, as the reducer left them, and its side channel."""
        return self.reducer(self.blocks, x, self.tokens(x.shape[0]), rngs)

    def predict(
        self,
        x: Float[Array, "B S E"],
        aux: Aux,
        patch_weight: Float[Array, "B N"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B L"], Aux]:
        """Class logits, at least float32, and aux with the logits of each head (`logits/...`), if there are several.

        patch_weight: each patch token's share where patches are averaged (the oracle's gates).
        """
        raise NotImplementedError

    def __call__(
        self, images: Float[Array | np.ndarray, "B Y X 3"], rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B L"], Aux]:
        """Class logits and the reducer's side channel."""
        x, aux = self.encode(self.embed(images, rngs), rngs)
        return self.predict(x, aux, rngs=rngs)

    def tokens(self, num_images: int) -> Tokens:
        """What the rows of `embed`'s output are."""
        index = row_numbers(num_images, math.prod(self.grid))
        return Tokens(self.num_special, self.grid, index, has_class=hasattr(self, "class_token"))


def check_images(model: Model, images: Float[Array | np.ndarray, "B Y X C"]) -> None:
    """Raises InputError for images of another size than the model's."""
    if images.shape[1:] != (*model.image_size, 3):
        height, width = model.image_size
        raise InputError(f"images have shape {images.shape}; this model takes (B, {height}, {width}, 3)")


def dtype_named(name: str) -> Any:
    """The dtype to compute in. Raises InputError for one that models do not compute in."""
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; allowed: {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Of an image size, which is a square's if it is one number."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


def token_embedding(rngs: nnx.Rngs, num_tokens: int, width: int) -> nnx.Param:
    """A learned vector for each of some tokens, (1, num_tokens, width)."""
    return nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (1, num_tokens, width), jnp.float32))
