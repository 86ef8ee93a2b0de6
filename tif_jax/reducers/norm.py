"""A ranking without learning: the tokens with the largest embeddings stay."""

from dataclasses import dataclass

import jax.numpy as jnp

from tif_jax.reducers.full import Full
from tif_jax.tokens import check_keep_ratio, keep, split


@dataclass(frozen=True)
class Norm:
    """Keeps the round(keep_ratio * N) patches with the largest Euclidean norm before the first block; round_to as of tif."""

    keep_ratio: float = 0.5
    round_to: int = 1

    def __post_init__(self):
        check_keep_ratio(self.keep_ratio, self.round_to)

    def __call__(self, blocks, x, tokens, rngs=None):
        scores = jnp.linalg.norm(split(x, tokens.num_special)[1].astype(jnp.float32), axis=-1)
        x, tokens = keep(x, tokens, scores, self.keep_ratio, self.round_to)
        x, aux = Full()(blocks, x, tokens, rngs)
        return x, {**aux, "kept": tokens.index, "source": tokens.source}
