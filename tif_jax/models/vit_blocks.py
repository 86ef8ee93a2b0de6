"""The blocks of a Vision Transformer, each of two half-steps.

Legend: B images, T tokens, R tokens that ask, D width, H heads, C channels of a head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.layers import Linear, drop_path, gelu, quick_gelu, widened
from tif_jax.models.rotary import Rotary
from tif_jax.tokens import QueryKey, Tokens, attention_logits, check_rows

_SMOOTHING = 1e-6  # of the softmax with masked keys, DynamicViT's
GELUS: dict[str, Callable[[Array], Array]] = {
    "exact": partial(gelu, approximate=False),  # erf: timm, DeiT
    "tanh": partial(gelu, approximate=True),  # big_vision, SigLIP
    "quick": quick_gelu,  # OpenAI's CLIP
}


class Attention(nnx.Module):
    """Multi-head self-attention.

    qk_norm normalises queries and keys per head (Dehghani et al. 2023); inner_norm the values mixed, before the output layer
    (EVA-02's CLIP). rotary turns queries and keys.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qkv_bias: bool,
        qk_norm: bool,
        inner_norm: bool,
        rotary: Rotary | None,
        norm_eps: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.rotary = num_heads, rotary
        linear = partial(Linear, kernel_init=nnx.initializers.truncated_normal(0.02), dtype=dtype, rngs=rngs)
        self.qkv = linear(width, 3 * width, use_bias=qkv_bias)
        self.out = linear(width, width)
        norm = partial(nnx.LayerNorm, epsilon=norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs)
        if qk_norm:
            self.query_norm, self.key_norm = norm(width // num_heads), norm(width // num_heads)
        self.inner_norm = norm(width) if inner_norm else None
        self.qk_norm = qk_norm

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        key_log_weight: Float[Array, "B T"] | None = None,
        key_weight: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], QueryKey]:
        qk, value = self.project(x, tokens)
        mixed = _attend(qk.query, qk.key, value, key_log_weight, key_weight)
        return self.project_out(rearrange(mixed, "b h t c -> b t (h c)")), qk._replace(head_output=mixed)

    def project(self, x: Float[Array, "B T D"], tokens: Tokens) -> tuple[QueryKey, Float[Array, "B T H C"]]:
        """What is compared, and the values."""
        query, key, value = self._of_heads(self.qkv(x), 3)
        return self._compared(query, key, tokens), value

    def _compared(self, query: Float[Array, "B T H C"], key: Float[Array, "B T H C"], tokens: Tokens) -> QueryKey:
        """Of queries and keys as they are projected."""
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is None:
            return QueryKey(query, key)
        return QueryKey(self.rotary.turn(query, tokens), self.rotary.turn(key, tokens), key)

    def maps(
        self, x: Float[Array, "B T D"], tokens: Tokens, key_log_weight: Float[Array, "B T"] | None = None
    ) -> Float[Array, "B H T T"]:
        """The weights alone with which each query would mix the values: heads, queries, keys."""
        query, key = self._of_heads(self.qkv.outputs(x, slice(2 * x.shape[-1])), 2)
        qk = self._compared(query, key, tokens)
        return jax.nn.softmax(attention_logits(qk.query, qk.key, key_log_weight), axis=-1)

    def by_maps(self, x: Float[Array, "B T D"], maps: Float[Array, "B H T T"]) -> Float[Array, "B T D"]:
        """The values alone, mixed with these weights."""
        (value,) = self._of_heads(self.qkv.outputs(x, slice(2 * x.shape[-1], None)), 1)
        return self.project_out(rearrange(_mixed(maps, value), "b h t c -> b t (h c)"))

    def _of_heads(self, x: Float[Array, "B T E"], number: int) -> Float[Array, "{number} B T H C"]:
        return rearrange(x, "b t (n h c) -> n b t h c", n=number, h=self.num_heads)

    def project_out(self, mixed: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The output layer, of the mixed values of all heads."""
        return self.out(mixed if self.inner_norm is None else self.inner_norm(mixed))

    def of_first(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        number: int,
        key_log_weight: Float[Array, "B T"] | None = None,
        key_weight: Float[Array, "B T"] | None = None,
    ) -> Float[Array, "B R D"]:
        """The first rows of what a call gives; `number` of them, which are special tokens.

        Only they ask. Keys and values fold into their side, exact but for rounding: logits = (W_key^T q) . x, and
        out = W_value (sum_t softmax_t x_t). So x is projected nowhere but in these rows.
        """
        kernel = rearrange(self.qkv.kernel[...], "d (three h c) -> three d h c", three=3, h=self.num_heads)
        query, key, value = kernel.astype(x.dtype)
        bias = 0 if self.qkv.bias is None else self.qkv.bias[...]
        bias = jnp.broadcast_to(bias, self.qkv.kernel.shape[1:]).astype(x.dtype)
        bias = rearrange(bias, "(three h c) -> three 1 1 h c", three=3, h=self.num_heads)
        asked = jnp.einsum("brd,dhc->brhc", x[:, :number], query) + bias[0]
        if self.qk_norm or self.rotary is not None:  # keys that differ by more than a matrix
            keys = jnp.einsum("btd,dhc->bthc", x, key) + bias[1]
            if self.qk_norm:
                asked, keys = self.query_norm(asked), self.key_norm(keys)
            if self.rotary is not None:  # who asks is a special token, which is not turned
                keys = self.rotary.turn(keys, tokens)
            logits = attention_logits(asked, keys, key_log_weight)
        else:  # the bias of the keys shifts all logits of a query alike
            folded, wide = jnp.einsum("brhc,dhc->bhrd", asked, key), widened(x.dtype)
            logits = jnp.einsum("bhrd,btd->bhrt", folded, x, preferred_element_type=wide) / asked.shape[-1] ** 0.5
            if key_log_weight is not None:
                logits = logits + key_log_weight[:, None, None].astype(logits.dtype)
        pooled = jnp.einsum("bhrt,btd->bhrd", _softmax(logits, key_weight).astype(x.dtype), x)
        mixed = jnp.einsum("bhrd,dhc->brhc", pooled, value) + bias[2]
        return self.project_out(rearrange(mixed, "b r h c -> b r (h c)"))


def _attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T H C"],
    value: Float[Array, "B T H C"],
    key_log_weight: Float[Array, "B T"] | None,
    key_weight: Float[Array, "B T"] | None,
) -> Float[Array, "B H T C"]:
    """softmax(query key^T / sqrt(C) + key_log_weight) value.

    Heads are made a batch axis first: on a CPU 1.5 times as fast as jax.nn.dot_product_attention, which keeps them third.
    """
    logits = attention_logits(query, key, key_log_weight)
    return _mixed(_softmax(logits, key_weight), value)


def _mixed(weights: Float[Array, "B H T S"], value: Float[Array, "B S H C"]) -> Float[Array, "B H T C"]:
    return jnp.einsum("bhts,bhsc->bhtc", weights.astype(value.dtype), rearrange(value, "b s h c -> b h s c"))


def _softmax(logits: Float[Array, "B H R T"], key_weight: Float[Array, "B T"] | None) -> Float[Array, "B H R T"]:
    """Over the keys, of the first R queries, in float32 for bfloat16 too."""
    return jax.nn.softmax(logits, axis=-1) if key_weight is None else _masked_softmax(logits, key_weight)


def _masked_softmax(logits: Float[Array, "B H R T"], key_weight: Float[Array, "B T"]) -> Float[Array, "B H R T"]:
    """Softmax over the keys in which exp(logit) counts key_weight times, a token's own always once; rows sum to 1.

    The smoothing bounds the gradient where all keys of weight 1 have exponentials that underflow.
    """
    num_asking, num_tokens = logits.shape[-2:]
    own = jnp.eye(num_asking, num_tokens, dtype=logits.dtype)[None, None]
    weight = key_weight[:, None, None].astype(logits.dtype) * (1 - own) + own
    exponential = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))) * weight
    return (exponential + _SMOOTHING / num_tokens) / (exponential.sum(axis=-1, keepdims=True) + _SMOOTHING)


class FeedForward(nnx.Module):
    """Two linear layers with a GELU between, one of `GELUS`.

    swiglu: instead, SiLU of the first half of the outputs of `up` times the second half (Shazeer 2020). inner_norm: a norm
    before the second layer.
    """

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        gelu: str,
        swiglu: bool = False,
        inner_norm: bool = False,
        norm_eps: float = 1e-6,
        dtype,
        rngs: nnx.Rngs,
    ):
        linear = partial(Linear, kernel_init=nnx.initializers.truncated_normal(0.02), dtype=dtype, rngs=rngs)
        self.up, self.down = linear(width, mlp_dim * (1 + swiglu)), linear(mlp_dim, width)
        norm = partial(nnx.LayerNorm, epsilon=norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs)
        self.inner_norm = norm(mlp_dim) if inner_norm else None
        self.gelu, self.swiglu = gelu, swiglu

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = self.up(x)
        if self.swiglu:
            gate, y = jnp.split(y, 2, axis=-1)
            y = jax.nn.silu(gate) * y
        else:
            y = GELUS[self.gelu](y)
        return self.down(y if self.inner_norm is None else self.inner_norm(y))


class Block(nnx.Module):
    """A pre-norm Transformer block as two half-steps, so that a reducer can act between them."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        qkv_bias: bool,
        qk_norm: bool,
        layer_scale: float | None,
        drop_path: float,
        gelu: str,
        swiglu: bool,
        inner_norms: tuple[bool, bool],
        rotary: Rotary | None,
        norm_eps: float,
        remat: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        norm = partial(nnx.LayerNorm, width, epsilon=norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs)
        self.attention_norm = norm()
        common: dict[str, Any] = dict(norm_eps=norm_eps, dtype=dtype, rngs=rngs)
        of_attention, of_mlp = inner_norms
        self.attention = Attention(
            width, num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, inner_norm=of_attention, rotary=rotary, **common
        )
        self.feed_forward_norm = norm()
        self.mlp = FeedForward(width, mlp_dim, gelu=gelu, swiglu=swiglu, inner_norm=of_mlp, **common)
        if layer_scale is not None:
            self.attention_scale = nnx.Param(jnp.full((width,), layer_scale))
            self.feed_forward_scale = nnx.Param(jnp.full((width,), layer_scale))
        self.layer_scale = layer_scale
        self.drop_path = drop_path
        self.remat = remat
        self.keeps_products = False  # of what remat does not leave out: see `gradients.for_gradients`

    def attend(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        key_log_weight: Float[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
        key_weight: Float[Array, "B T"] | None = None,
        maps: Float[Array, "B H T T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], QueryKey | None]:
        """x plus attention. key_log_weight is added to the logits of each key before the softmax.

        tokens: what the rows of x are. Raises InputError if it has another number of rows.

        key_weight, in [0, 1], is a soft mask: it multiplies each key's exponential for every query but the key's own, so
        that a masked token still attends to itself. Unlike a logarithm, it has a gradient where it is 0.

        maps: attention is given, as made of `look`; then nothing is compared, and there are no queries and keys.
        """

        check_rows(x, tokens)
        if maps is not None:
            given = self._kept(
                lambda x, maps: self.scale_attention(self.attention.by_maps(self.attention_norm(x), maps))
            )
            return x + drop_path(given(x, maps), self.drop_path, rngs), None

        def branch(x, position, key_log_weight, key_weight):
            at = tokens._replace(position=position)
            y, qk = self.attention(self.attention_norm(x), at, key_log_weight, key_weight)
            return self.scale_attention(y), qk

        y, qk = self._kept(branch)(x, tokens.position, key_log_weight, key_weight)
        return x + drop_path(y, self.drop_path, rngs), qk

    def look(
        self, x: Float[Array, "B T D"], tokens: Tokens, key_log_weight: Float[Array, "B T"] | None = None
    ) -> Float[Array, "B H T T"]:
        """The attention maps alone that `attend` would mix values with: heads, queries, keys."""
        return self.attention.maps(self.attention_norm(x), tokens, key_log_weight)

    def attend_first(
        self,
        number: int,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        key_log_weight: Float[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
        key_weight: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B R D"], QueryKey]:
        """`attend` for the first `number` rows alone, which are special tokens; what attention compared, of all.

        Where nobody asks for that, the compiler deletes it.
        """
        check_rows(x, tokens)

        def branch(x, position, key_log_weight, key_weight):
            at = tokens._replace(position=position)
            y = self.attention.of_first(self.attention_norm(x), at, number, key_log_weight, key_weight)
            return self.scale_attention(y)

        def compared(x, position, key_log_weight, key_weight):
            at = tokens._replace(position=position)
            return self.attention(self.attention_norm(x), at, key_log_weight, key_weight)[1]

        given = x, tokens.position, key_log_weight, key_weight
        return x[:, :number] + drop_path(self._kept(branch)(*given), self.drop_path, rngs), self._kept(compared)(*given)

    def _kept(self, branch):
        """The branch, of whose inside a gradient keeps nothing if `remat`, and perhaps matrix products alone."""
        if self.remat:
            return jax.checkpoint(branch)
        if self.keeps_products:
            return jax.checkpoint(branch, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
        return branch

    def scale_attention(self, y: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """LayerScale of the attention branch, where there is one."""
        return y if self.layer_scale is None else _scale(y, self.attention_scale[...])

    def feed_forward(self, x: Float[Array, "B T D"], rngs: nnx.Rngs | None = None) -> Float[Array, "B T D"]:
        """x plus the feed-forward network."""

        def branch(x):
            y = self.mlp(self.feed_forward_norm(x))
            return y if self.layer_scale is None else _scale(y, self.feed_forward_scale[...])

        return x + drop_path(self._kept(branch)(x), self.drop_path, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        key_log_weight: Float[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T D"], QueryKey]:
        x, qk = self.attend(x, tokens, key_log_weight, rngs)
        return self.feed_forward(x, rngs), qk  # type: ignore[return-value]  # nothing is given: there are some


def _scale(y: Float[Array, "... D"], scale: Float[Array, " D"]) -> Float[Array, "... D"]:
    return y * scale.astype(y.dtype).reshape(*(1,) * (y.ndim - 1), -1)
