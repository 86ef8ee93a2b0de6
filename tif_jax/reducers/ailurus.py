"""AiluRus (Li et al., "AiluRus: A Scalable ViT Framework for Dense Prediction", NeurIPS 2023).

After an early block some tokens become anchors, the peaks of density among the tokens around them; every other token merges
into the anchor most like it. The other blocks run on the anchors, and behind them every patch gets a copy of its anchor.

Legend: B images, N patch tokens, M anchors, D width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._density_peaks import cluster, merge, shares
from tif_jax.reducers.full import Full
from tif_jax.tokens import check_keep_ratio, gates_to_log_weight, join, merged, num_kept, split, take


@dataclass(frozen=True)
class Ailurus:
    """From block `site` on, keep_ratio of the patch tokens as anchors; all of them again behind the last block.

    site: how many blocks run on all patches; None is a third of them: 4 of 12. num_neighbors: of a token's density, itself
    included. window: the rows and columns of patches that a token, in their middle, knows of. proportional: attention in
    proportion to how many patches an anchor stands for.
    """

    keep_ratio: float = 0.5
    site: int | None = None
    num_neighbors: int = 5
    window: int = 7
    proportional: bool = True

    def __post_init__(self):
        check_keep_ratio(self.keep_ratio)
        schedule.check_site(self.site)
        if self.num_neighbors < 1:
            raise InputError(f"num_neighbors is {self.num_neighbors}; it is a number of tokens, from 1")
        if self.window < 1 or self.window % 2 == 0:
            raise InputError(f"window is {self.window}; it is an odd number of patches, from 1")

    def __call__(self, blocks, x, tokens, rngs=None):
        site = schedule.site_of(self.site, len(blocks))
        num_patches = tokens.position.shape[1]
        num_anchors = num_kept(self.keep_ratio, num_patches)
        source, num_special = tokens.source, tokens.num_special
        if num_anchors == num_patches:
            return Full()(blocks, x, tokens, rngs)[0], {"kept": tokens.index, "source": source}

        x, _ = Full()(blocks[:site], x, tokens, rngs)
        special, patches = split(x, num_special)
        near = within(tokens.position, self.window)
        joined = cluster(jax.lax.stop_gradient(patches), num_anchors, self.num_neighbors, near)
        share = shares(jnp.ones(joined.shape, widened(x.dtype)), joined)
        anchors, left, row = merge(patches, share, joined, num_anchors)
        position, _, _ = merge(tokens.position, share, joined, num_anchors)
        index = take(tokens.index, left)
        tokens = merged(tokens, row, position)._replace(index=index)
        log_size = gates_to_log_weight(1 / take(share, left), num_special) if self.proportional else None
        x = join(special, anchors)
        for block in blocks[site:]:
            x, _ = block(x, tokens, log_size, rngs)
        special, anchors = split(x, num_special)
        return join(special, take(anchors, row)), {"kept": index, "source": source}


def within(position: Float[Array, "B N 2"], window: int) -> Bool[Array, "B N N"]:
    """Which tokens lie in the square of window x window patches around each."""
    apart = jnp.abs(position[:, :, None] - position[:, None])
    return (apart <= window // 2).all(axis=3)
