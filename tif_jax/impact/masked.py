"""Forward passes with one patch token masked, for every patch token, with the work they share done once.

Exact, up to rounding. Two blocks differ from those of a plain forward pass:

First block, unless it has a norm inside its attention. Masking token i changes one key and one value, so that every masked
softmax is a rank-one update of the clean one: with A = exp(logits), U = value W_out and primes for what is in its place,

    out_i[t] = sum_h (sum_j A[t,j] U[j] - A[t,i] U[i] + A'[t,i] U'[i]) / (sum_{j != i} A[t,j] + A'[t,i])

Last block, of a classifier: see `last_block`. What dense heads read: see `dense`.

Nothing else is shared exactly: after the first block's feed-forward network every token of every masked image is another.

Legend: B images, T tokens, N patch tokens, M masks of a chunk, BM masked images, S tokens of a masked image, D width, H
heads, C channels of a head.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from tif_jax.impact.last_block import prediction_after
from tif_jax.layers import widened
from tif_jax.models.vit import ViT
from tif_jax.models.vit_blocks import Block
from tif_jax.reducers import Aux
from tif_jax.tokens import Tokens, at_rows, attention_logits, split


def masked_predictions(
    model: ViT, x: Float[Array, "B T D"], mask: str
) -> Callable[[Int[Array, " M"]], tuple[Float[Array, "BM *prediction"], Aux]]:
    """A function of patch positions: the prediction, and its aux, of every image with each of these patches masked, images
    outermost.

    x: the embedded images. mask: 'zero', 'content' or 'drop', as in `token_impact`.
    """
    stand_in, tokens = _stand_in(model, x, mask), model.tokens(x.shape[0])
    blocks = model.blocks
    if blocks[0].attention.inner_norm is None:
        masked, rest = _first_block(blocks[0], x, tokens, stand_in), blocks[1:]
    else:  # what a norm follows is no sum over tokens
        masked, rest = _masked(x, tokens.num_special, stand_in), blocks

    embedded = split(x, tokens.num_special)[1]

    def predictions(positions: Int[Array, " M"]) -> tuple[Float[Array, "BM *prediction"], Aux]:
        y = rearrange(masked(positions), "b m s d -> (b m) s d")
        left = model.tokens(y.shape[0])
        if stand_in is None:
            others = _slots_without(positions, left.index.shape[1])
            left = at_rows(left, jnp.tile(others, (x.shape[0], 1)))
        return prediction_after(model, rest, y, left, jnp.repeat(embedded, positions.size, axis=0))

    return predictions


def _masked(
    x: Float[Array, "B T D"], num_special: int, stand_in: Float[Array, "B N D"] | None
) -> Callable[[Int[Array, " M"]], Float[Array, "B M S D"]]:
    """The embedded images as a function of the patch that is masked."""

    def masked(positions: Int[Array, " M"]) -> Float[Array, "B M S D"]:
        y = jnp.broadcast_to(x[:, None], (x.shape[0], positions.size, *x.shape[1:]))
        rows = num_special + positions
        return _without(y, rows) if stand_in is None else _with(y, rows, stand_in[:, positions])

    return masked


def _stand_in(model: ViT, x: Float[Array, "B T D"], mask: str) -> Float[Array, "B N D"] | None:
    """What comes in each patch token's place; None if nothing does."""
    if mask == "drop":
        return None
    positions = model.patch_positions() * (mask == "content")
    return jnp.broadcast_to(positions, (x.shape[0], *positions.shape[1:]))


class _Projected(NamedTuple):
    """What tokens bring into the first block's attention."""

    query: Float[Array, "B T H C"]
    key: Float[Array, "B T H C"]
    out: Float[Array, "B H T D"]  # value W_out


class _Clean(NamedTuple):
    """The clean attention of all tokens t before it is normalised: what the masks of an image share."""

    weight: Float[Array, "B H T N"]  # A[t, i] of each patch token i
    out: Float[Array, "B H N D"]  # U[i]
    total: Float[Array, "B H T D"]  # sum of A[t, j] U[j] over all tokens j
    total_of_weaker: Float[Array, "B H T D"]  # the same without the j of the largest A[t, j]
    is_strongest: Bool[Array, "B H T N"]  # whether i is that j
    denominator: Float[Array, "B H T N"]  # sum of A[t, j] over all j but i


class _StandIns(NamedTuple):
    """What comes in the place of each patch token i."""

    weight: Float[Array, "B H T N"]  # A'[t, i]
    out: Float[Array, "B H N D"]  # U'[i]
    token: Float[Array, "B N D"]  # the stand-in itself after the attention


def _first_block(
    block: Block, x: Float[Array, "B T D"], tokens: Tokens, stand_in: Float[Array, "B N D"] | None
) -> Callable[[Int[Array, " M"]], Float[Array, "B M S D"]]:
    """The block as a function of the patch that is masked."""
    num_special = tokens.num_special
    old = _project(block, x, tokens)
    logits = attention_logits(old.query, old.key)
    highest = logits.max(axis=-1, keepdims=True)
    stand_ins = None
    if stand_in is not None:
        new = _project(block, stand_in, tokens._replace(num_special=0))
        new_logits = attention_logits(old.query, new.key)
        highest = jnp.maximum(highest, new_logits.max(axis=-1, keepdims=True))
        received = _received_by_stand_ins(new, old, num_special) + _bias(block)[None, None]
        token = stand_in + block.scale_attention(received.astype(x.dtype))
        stand_ins = _StandIns(jnp.exp(new_logits - highest), new.out, token)
    clean = _clean(jnp.exp(logits - highest), old.out, num_special)

    def masked(positions: Int[Array, " M"]) -> Float[Array, "B M S D"]:
        mixed = _mixed(clean, stand_ins, positions, _bias(block))
        y = x[:, None] + block.scale_attention(mixed.astype(x.dtype))
        rows = num_special + positions
        y = _without(y, rows) if stand_ins is None else _with(y, rows, stand_ins.token[:, positions])
        shape = y.shape
        return block.feed_forward(y.reshape(-1, *shape[2:])).reshape(shape)

    return masked


def _project(block: Block, x: Float[Array, "B T D"], tokens: Tokens) -> _Projected:
    attention, wide = block.attention, widened(x.dtype)
    qk, value = attention.project(block.attention_norm(x), tokens)
    kernel = rearrange(attention.out.kernel[...], "(h c) d -> h c d", h=attention.num_heads).astype(wide)
    return _Projected(qk.query, qk.key, jnp.einsum("bthc,hcd->bhtd", value, kernel, preferred_element_type=wide))


def _bias(block: Block) -> Float[Array, " D"]:
    assert block.attention.out.bias is not None
    return block.attention.out.bias[...]


def _clean(weight: Float[Array, "B H T T"], out: Float[Array, "B H T D"], num_special: int) -> _Clean:
    num_tokens = weight.shape[-1]
    # Where the masked token has nearly all the attention, the clean sum minus its term cancels. So the sum without the
    # strongest term is at hand too; and the denominators, which are cheap, are summed anew.
    is_strongest = weight.argmax(axis=-1)[..., None] == jnp.arange(num_tokens)[None, None, None]
    others = 1 - jnp.eye(num_tokens, dtype=weight.dtype)[:, num_special:]
    return _Clean(
        weight=weight[..., num_special:],
        out=out[:, :, num_special:],
        total=jnp.einsum("bhts,bhsd->bhtd", weight, out),
        total_of_weaker=jnp.einsum("bhts,bhsd->bhtd", jnp.where(is_strongest, 0, weight), out),
        is_strongest=is_strongest[..., num_special:],
        denominator=jnp.einsum("bhts,sn->bhtn", weight, others),
    )


def _received_by_stand_ins(new: _Projected, old: _Projected, num_special: int) -> Float[Array, "B N D"]:
    """What attention gives the stand-ins: each sees itself and, of the others, what was there before."""
    logits = attention_logits(new.query, old.key)
    scale = new.query.shape[-1] ** 0.5
    own = jnp.einsum("bnhc,bnhc->bhn", new.query, new.key, preferred_element_type=logits.dtype) / scale
    here = num_special + jnp.arange(logits.shape[2])[:, None] == jnp.arange(logits.shape[3])[None]
    weight = jax.nn.softmax(jnp.where(here[None, None], own[..., None], logits), axis=-1)
    at_own = jnp.sum(weight * here[None, None], axis=-1)
    received = jnp.einsum("bhnt,bhtd->bnd", weight * ~here[None, None], old.out)
    return received + jnp.einsum("bhn,bhnd->bnd", at_own, new.out)


def _mixed(
    clean: _Clean, stand_ins: _StandIns | None, positions: Int[Array, " M"], bias: Float[Array, " D"]
) -> Float[Array, "B M T D"]:
    """What attention gives all tokens while one patch is masked: the rank-one updates."""
    over = clean.denominator[..., positions] + (0 if stand_ins is None else stand_ins.weight[..., positions])
    mixed = bias[None, None, None].astype(over.dtype)
    for h in range(clean.out.shape[1]):  # written out, so that it fuses into one loop over the result
        terms = jnp.where(
            clean.is_strongest[:, h][..., positions].swapaxes(1, 2)[..., None],
            clean.total_of_weaker[:, h, None],
            clean.total[:, h, None] - _term(clean, h, positions),
        )
        if stand_ins is not None:
            terms = terms + _term(stand_ins, h, positions)
        mixed = mixed + terms / over[:, h].swapaxes(1, 2)[..., None]
    return mixed


def _term(of: _Clean | _StandIns, h: int, positions: Int[Array, " M"]) -> Float[Array, "B M T D"]:
    """What each of these patches, or what comes in its place, gives each token in head h."""
    return of.weight[:, h][..., positions].swapaxes(1, 2)[..., None] * of.out[:, h, positions, None]


def _with(y: Float[Array, "B M T D"], rows: Int[Array, " M"], token: Float[Array, "B M D"]) -> Float[Array, "B M T D"]:
    """y with token[b, m] in row rows[m] of y[b, m]."""
    hit = rows[:, None] == jnp.arange(y.shape[2])[None]
    return jnp.where(hit[None, :, :, None], token[:, :, None], y)


def _without(y: Float[Array, "B M T D"], rows: Int[Array, " M"]) -> Float[Array, "B M S D"]:
    """y without row rows[m] of y[b, m]: one token fewer."""
    return jnp.take_along_axis(y, _slots_without(rows, y.shape[2])[None, :, :, None], axis=2)


def _slots_without(rows: Int[Array, " M"], num_rows: int) -> Int[Array, "M S"]:
    """The numbers below num_rows without rows[m]."""
    slots = jnp.arange(num_rows - 1)[None]
    return slots + (slots >= rows[:, None])
