"""Density-peak clustering of tokens, and the merging of those that one token is to stand for.

Legend: B images, N tokens, M tokens left, D width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tif_jax.layers import widened
from tif_jax.tokens import take, top_k


def cluster(
    x: Float[Array, "B N D"], num_clusters: int, neighbours: int, near: Bool[Array, "B N N"] | None = None
) -> Int[Array, "B N"]:
    """The cluster centre that each token belongs to, by simplified density peak clustering; centres belong to themselves.

    Centres have the largest density * distance to the next denser token, density = exp(-mean of the squared distances
    to the nearest neighbours, self included); distances are divided by sqrt(D). Of equally dense tokens the first is
    the denser one. In logarithms, because densities underflow where tokens are large.

    near: which tokens know of each other, symmetric; None is all. To all others a token is as far as can be: they are no
    neighbours and not denser, and it belongs to one of them only if no centre is near.
    """
    num = x.shape[1]
    itself = jnp.eye(num, dtype=bool)[None]
    inner = products(x, x)
    square = jnp.square(x.astype(inner.dtype)).sum(axis=-1)
    distance = jnp.maximum(square[:, None] + square[:, :, None] - 2 * inner, 0) / x.shape[-1]
    distance = jnp.where(itself, 0, distance)  # squared, here and below
    furthest = distance.max(axis=(1, 2), keepdims=True)
    known = distance if near is None else jnp.where(near, distance, furthest)
    density = jax.lax.top_k(-known, min(neighbours, num))[0].mean(axis=-1)
    earlier = ~jnp.tri(num, dtype=bool)[None]
    own, other = density[:, None], density[:, :, None]  # reduced over the first: on a CPU faster than over the last
    denser = (other > own) | ((other == own) & earlier)
    peak = jnp.where(denser, known, furthest).min(axis=1)
    centres = top_k(density + 0.5 * jnp.log(peak), num_clusters)
    known = distance if near is None else jnp.where(near, distance, distance + furthest)
    to_centre = jnp.where(take(jnp.broadcast_to(itself, distance.shape), centres), -1, take(known, centres))
    return take(centres, to_centre.argmin(axis=1).astype(jnp.int32))


def shares(weights: Float[Array, "B N"], joined: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """Each token's share in the weight of all tokens that join the same one. Exactly 1 for a token on its own."""
    together = joined[:, :, None] == joined[:, None]
    return weights / jnp.where(together, weights[:, None], 0).sum(axis=-1)


def merge(
    x: Float[Array, "B N D"], share: Float[Array, "B N"], joined: Int[Array, "B N"], num_left: int
) -> tuple[Float[Array, "B M D"], Int[Array, "B M"], Int[Array, "B N"]]:
    """Sums of share * x over the tokens that join the same one; the positions of those joined; the row of every token.

    joined: for each token the position of the one that it joins, itself for the num_left that are left.
    """
    is_left = joined == jnp.arange(joined.shape[1], dtype=jnp.int32)[None]
    order = jnp.argsort(~is_left, axis=1, stable=True).astype(jnp.int32)
    left, gone = order[:, :num_left], order[:, num_left:]
    row = take(jnp.cumsum(is_left, axis=1, dtype=jnp.int32) - 1, joined)
    wide = widened(x.dtype)
    share = share.astype(wide)
    # Tokens that nothing joins are copied as they are; a product with all of `share` would cost several times as much.
    joins = take(row, gone)[:, None] == jnp.arange(num_left, dtype=jnp.int32)[None, :, None]
    gone_share = jnp.where(joins, take(share, gone)[:, None], 0)
    merged = take(share, left)[..., None] * take(x, left).astype(wide) + jnp.einsum(
        "bmn,bnd->bmd", gone_share, take(x, gone).astype(wide), precision="highest"
    )
    return merged.astype(x.dtype), left, row


def products(x: Float[Array, "B N D"], y: Float[Array, "B P D"]) -> Float[Array, "B N P"]:
    """All inner products, exact enough to rank by: full float32, also where devices would round the factors."""
    wide = widened(x.dtype)
    return jnp.einsum("bnd,bpd->bnp", x, y, precision="highest", preferred_element_type=wide)
