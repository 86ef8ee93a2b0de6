"""Forward passes with one patch token masked, for every patch token, with the work they share done once.

Exact, up to rounding. Two blocks differ from those of a plain forward pass:

First block. Masking token i changes one key and one value, so that every masked softmax is a rank-one update of the clean
one: with A = exp(logits), U = value W_out and primes for what stands in token i's place,

    out_i[t] = sum_h (sum_j A[t,j] U[j] - A[t,i] U[i] + A'[t,i] U'[i]) / (sum_{j != i} A[t,j] + A'[t,i])

Last block: see `last_block`.

Nothing else is shared exactly: after the first block's feed-forward network every token of every masked image is another.

Legend: B images, T tokens, N patch tokens, M masks of a chunk, BM masked images, S tokens of a masked image, D width, H
heads, C channels of a head, L classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from tif_jax.impact.last_block import logits_after
from tif_jax.layers import widened
from tif_jax.models.vit import Attention, Block, ViT


def masked_logits(
    model: ViT, x: Float[Array, "B T D"], mask: str
) -> Callable[[Int[Array, " M"]], Float[Array, "BM L"]]:
    """A function of patch positions: the logits of every image with each of these patches masked, images outermost.

    x: the embedded images. mask: 'zero', 'content' or 'drop', as in `token_impact`.
    """
    first, *rest = model.blocks
    after_first = _first_block(first, x, model.num_special, _stand_in(model, x, mask))

    def logits(positions: Int[Array, " M"]) -> Float[Array, "BM L"]:
        return logits_after(model, rest, rearrange(after_first(positions), "b m s d -> (b m) s d"))

    return logits


def _stand_in(model: ViT, x: Float[Array, "B T D"], mask: str) -> Float[Array, "B N D"] | None:
    """What comes in each patch token's place; None if nothing does."""
    if mask == "drop":
        return None
    positions = model.patch_positions() * (mask == "content")
    return jnp.broadcast_to(positions, (x.shape[0], *positions.shape[1:]))


def _first_block(
    block: Block, x: Float[Array, "B T D"], num_special: int, stand_in: Float[Array, "B N D"] | None
) -> Callable[[Int[Array, " M"]], Float[Array, "B M S D"]]:
    """The block as a function of the patch that is masked."""
    wide = widened(x.dtype)
    attention, num_tokens = block.attention, x.shape[1]
    query, key, value = attention.project(block.attention_norm(x))
    kernel = rearrange(attention.out.kernel[...], "(h c) d -> h c d", h=attention.num_heads).astype(wide)
    logits = _logits(query, key)
    out = jnp.einsum("bthc,hcd->bhtd", value, kernel, preferred_element_type=wide)
    masked_out = out[:, :, num_special:]
    highest = logits.max(axis=-1, keepdims=True)
    if stand_in is not None:
        new_query, new_key, new_value = attention.project(block.attention_norm(stand_in))
        new_logits = _logits(query, new_key)
        highest = jnp.maximum(highest, new_logits.max(axis=-1, keepdims=True))
        new_weight = jnp.exp(new_logits - highest)
        new_out = jnp.einsum("bnhc,hcd->bhnd", new_value, kernel, preferred_element_type=wide)
        own = _own_rows(new_query, key, new_key, out, new_out, num_special) + _bias(attention)[None, None]
        own = stand_in + block.scale_attention(own.astype(x.dtype))
    weight = jnp.exp(logits - highest)
    total = jnp.einsum("bhts,bhsd->bhtd", weight, out)
    # Where the masked token has nearly all the attention, the clean sum minus its term cancels. So the sum without the
    # strongest term is at hand too; and the denominators, which are cheap, are summed anew.
    strongest = weight.argmax(axis=-1)
    is_strongest = strongest[..., None] == jnp.arange(num_tokens)[None, None, None]
    total_of_weaker = jnp.einsum("bhts,bhsd->bhtd", jnp.where(is_strongest, 0, weight), out)
    others = 1 - jnp.eye(num_tokens, dtype=wide)[:, num_special:]
    denominator = jnp.einsum("bhts,sn->bhtn", weight, others)
    weight, is_strongest = weight[..., num_special:], is_strongest[..., num_special:]

    def masked(positions: Int[Array, " M"]) -> Float[Array, "B M S D"]:
        over = denominator[..., positions] + (0 if stand_in is None else new_weight[..., positions])
        mixed = _bias(attention)[None, None, None].astype(wide)
        for h in range(attention.num_heads):  # written out, so that it fuses into one loop over the result
            terms = jnp.where(
                is_strongest[:, h][..., positions].swapaxes(1, 2)[..., None],
                total_of_weaker[:, h, None],
                total[:, h, None] - _outer(weight, masked_out, h, positions),
            )
            if stand_in is not None:
                terms = terms + _outer(new_weight, new_out, h, positions)
            mixed = mixed + terms / over[:, h].swapaxes(1, 2)[..., None]
        y = x[:, None] + block.scale_attention(mixed.astype(x.dtype))
        if stand_in is not None:
            hit = num_special + positions[:, None] == jnp.arange(num_tokens)[None]
            y = jnp.where(hit[None, :, :, None], own[:, positions, None], y)
        else:
            slots = jnp.arange(num_tokens - 1)[None]
            slots = slots + (slots >= num_special + positions[:, None])  # one token fewer: the masked one is gone
            y = jnp.take_along_axis(y, slots[None, :, :, None], axis=2)
        shape = y.shape
        return block.feed_forward(y.reshape(-1, *shape[2:])).reshape(shape)

    return masked


def _outer(weight, out, h: int, positions) -> Float[Array, "B M T D"]:
    """What each masked patch gives each token in head h."""
    return weight[:, h][..., positions].swapaxes(1, 2)[..., None] * out[:, h, positions, None]


def _own_rows(
    query: Float[Array, "B N H C"],
    key: Float[Array, "B T H C"],
    new_key: Float[Array, "B N H C"],
    out: Float[Array, "B H T D"],
    new_out: Float[Array, "B H N D"],
    num_special: int,
) -> Float[Array, "B N D"]:
    """What the stand-ins themselves receive: each sees itself and, of the others, what was there before."""
    logits = _logits(query, key)
    own = jnp.einsum("bnhc,bnhc->bhn", query, new_key, preferred_element_type=logits.dtype) / query.shape[-1] ** 0.5
    here = num_special + jnp.arange(query.shape[1])[:, None] == jnp.arange(key.shape[1])[None]
    weight = jax.nn.softmax(jnp.where(here[None, None], own[..., None], logits), axis=-1)
    at_own = jnp.sum(weight * here[None, None], axis=-1)
    received = jnp.einsum("bhnt,bhtd->bnd", weight * ~here[None, None], out)
    return received + jnp.einsum("bhn,bhnd->bnd", at_own, new_out)


def _logits(query: Float[Array, "B T H C"], key: Float[Array, "B S H C"]) -> Float[Array, "B H T S"]:
    wide = widened(query.dtype)
    return jnp.einsum("bthc,bshc->bhts", query, key, preferred_element_type=wide) / query.shape[-1] ** 0.5


def _bias(attention: Attention) -> Float[Array, " D"]:
    assert attention.out.bias is not None
    return attention.out.bias[...]
