"""The baseline every ranking has to beat: a random subset of the patches.

Legend: B images, N patch tokens, D width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from tif_jax.reducers.full import Full
from tif_jax.tokens import check_keep_ratio, image_keys, keep, split


@dataclass(frozen=True)
class Random:
    """Keeps round(keep_ratio * N) patches drawn uniformly; round_to as of tif.

    Without `rngs` the draw depends on draw_seed and the image alone, so that a result can be repeated; with `rngs`
    (training) it is fresh at every step.
    """

    keep_ratio: float = 0.5
    draw_seed: int = 0
    round_to: int = 1

    def __post_init__(self):
        check_keep_ratio(self.keep_ratio, self.round_to)

    def __call__(self, blocks, x, tokens, rngs=None):
        patches = split(x, tokens.num_special)[1]
        keys = draw_keys(self.draw_seed, patches, rngs)
        scores = jax.vmap(lambda key: jax.random.uniform(key, patches.shape[1:2]))(keys)
        x, tokens = keep(x, tokens, scores, self.keep_ratio, self.round_to)
        x, aux = Full()(blocks, x, tokens, rngs)
        return x, {**aux, "kept": tokens.index, "source": tokens.source}


def draw_keys(seed: int, patches: Float[Array, "B N D"], rngs: nnx.Rngs | None) -> Key[Array, " B"]:
    """A random key per image: without `rngs` from the seed and the image alone, with them a fresh one."""
    if rngs is not None:
        return jax.random.split(rngs.random_reducer(), patches.shape[0])
    # Coarse, because the last bits of an embedding depend on the batch size it was computed with.
    return image_keys(seed, patches.mean(axis=1)[:, :8].astype(jnp.bfloat16))
