"""From some block to the prediction; and what is left of the last block where only special tokens are read: exact, and
nearly free.

Only the tokens that are read ask, are projected and go through the feed-forward network; keys and values fold into the
queries' side: logits = (W_key^T q) . y, out = W_value (sum_t softmax_t y_t), with y = LayerNorm(x).

Legend: B images, T tokens, R special tokens read, N patch tokens, D width, P patches of the raster, H heads, C channels of a
head.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from tif_jax.impact.dense import dense_prediction
from tif_jax.layers import widened
from tif_jax.models.vit import ViT
from tif_jax.models.vit_blocks import Block
from tif_jax.reducers import Aux
from tif_jax.tasks import CLASSIFICATION
from tif_jax.tokens import Tokens, attention_logits, gates_to_log_weight


def prediction_after(
    model: ViT,
    blocks: Sequence[Block],
    x: Float[Array, "B T D"],
    tokens: Tokens,
    embedded: Float[Array, "B P D"],
    gates: Float[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B *prediction"], Aux]:
    """The prediction and its aux when x goes through `blocks`, the last of which is the model's last.

    embedded: all patches before the first block, which some dense heads ask. gates: of `token_impact`.
    """
    if model.task != CLASSIFICATION.name:
        return dense_prediction(model, blocks, x, tokens, embedded, gates)
    log_weight = None if gates is None else gates_to_log_weight(gates, model.num_special)
    # Mean pooling reads every token. Otherwise the class token and the distillation token are in front.
    shortened = model.pool == "class" and bool(blocks)
    for block in blocks[:-1] if shortened else blocks:
        x, _ = block(x, tokens, log_weight)
    if shortened:
        x = _last_block(blocks[-1], x, tokens, 1 + model.has_distillation, log_weight)
    return model.predict(x, {}, gates)


def _last_block(
    block: Block, x: Float[Array, "B T D"], tokens: Tokens, num_read: int, key_log_weight: Float[Array, "B T"] | None
) -> Float[Array, "B R D"]:
    """The first num_read tokens after the block."""
    attention = block.attention
    y = block.attention_norm(x)
    wide = widened(y.dtype)
    kernel = rearrange(attention.qkv.kernel[...], "d (three h c) -> three d h c", three=3, h=attention.num_heads)
    query, key, value = kernel.astype(y.dtype)
    bias = 0 if attention.qkv.bias is None else attention.qkv.bias[...]
    bias = jnp.broadcast_to(bias, attention.qkv.kernel.shape[1:]).astype(y.dtype)
    bias = rearrange(bias, "(three h c) -> three 1 1 h c", three=3, h=attention.num_heads)
    asked = jnp.einsum("brd,dhc->brhc", y[:, :num_read], query) + bias[0]
    if attention.qk_norm or attention.rotary is not None:  # keys that differ by more than a matrix
        keys = jnp.einsum("btd,dhc->bthc", y, key) + bias[1]
        if attention.qk_norm:
            asked, keys = attention.query_norm(asked), attention.key_norm(keys)
        if attention.rotary is not None:  # who asks is a special token, which is not turned
            keys = attention.rotary.turn(keys, tokens)
        logits = attention_logits(asked, keys)
    else:  # the bias of the keys shifts all logits of a query alike
        folded = jnp.einsum("brhc,dhc->bhrd", asked, key)
        logits = jnp.einsum("bhrd,btd->bhrt", folded, y, preferred_element_type=wide) / asked.shape[-1] ** 0.5
    if key_log_weight is not None:
        logits = logits + key_log_weight[:, None, None].astype(logits.dtype)
    pooled = jnp.einsum("bhrt,btd->bhrd", jax.nn.softmax(logits, axis=-1).astype(y.dtype), y)
    mixed = jnp.einsum("bhrd,dhc->brhc", pooled, value) + bias[2]
    out = attention.project_out(rearrange(mixed, "b r h c -> b r (h c)"))
    return block.feed_forward(x[:, :num_read] + block.scale_attention(out))
