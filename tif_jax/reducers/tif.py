"""TIF, the token impact filter (Wang et al., "Predicting Token Impact Towards Efficient Vision Transformer", 2023).

An MLP looks at the embeddings once, before the first self-attention; the patches it finds least worth keeping are gone.

Legend: B images, T tokens left, N patch tokens, K kept ones, D width, H hidden width of the adapter.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Int

from tif_jax.errors import InputError
from tif_jax.layers import Linear, gelu
from tif_jax.reducers._steps import walk_fronted
from tif_jax.reducers.full import Full
from tif_jax.tokens import Tokens, check_keep_ratio, join, keep_rows, split, take, top_k

_HEADS = 4  # of the adapter


class TokenFilter(nnx.Module):
    """Logit that a patch token is worth keeping, from its embedding and the image's mean.

    The paper says "multi-layer perceptron" and no more: LayerNorm, hidden layers D and D/2, GELU and the image's mean are
    our choice. The mean's half of the first layer is computed once per image.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, use_fast_variance=False, rngs=rngs)
        self.local_in = Linear(width, width, rngs=rngs)
        self.global_in = Linear(width, width, use_bias=False, rngs=rngs)
        self.layer_0 = Linear(width, width // 2, rngs=rngs)
        self.layer_1 = Linear(width // 2, 1, rngs=rngs)

    def __call__(self, patches: Float[Array, "B N D"]) -> Float[Array, "B N"]:
        local = self.norm(patches.astype(jnp.float32))
        y = self.local_in(local) + self.global_in(local.mean(axis=1, keepdims=True))
        y = self.layer_0(gelu(y, approximate=False))
        return self.layer_1(gelu(y, approximate=False))[..., 0]


class Adapter(nnx.Module):
    """What each token is to know of the others before some of them go: H hidden channels, and a residual from these.

    One narrow attention layer and a feed-forward network over all patches; ours. The residuals of a fresh one are zero.
    """

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        if hidden % _HEADS or hidden < _HEADS:
            raise InputError(f"adapter is {hidden}; it is a width, a multiple of {_HEADS}, or 0 for none")
        self.norm = nnx.LayerNorm(width, use_fast_variance=False, rngs=rngs)
        self.narrow = Linear(width, hidden, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(hidden, use_fast_variance=False, rngs=rngs)
        self.feed_forward_norm = nnx.LayerNorm(hidden, use_fast_variance=False, rngs=rngs)
        self.hidden_norm = nnx.LayerNorm(hidden, use_fast_variance=False, rngs=rngs)
        self.qkv = Linear(hidden, 3 * hidden, rngs=rngs)
        self.out = Linear(hidden, hidden, rngs=rngs)
        self.up = Linear(hidden, 2 * hidden, rngs=rngs)
        self.down = Linear(2 * hidden, hidden, rngs=rngs)
        zero = nnx.initializers.zeros
        self.to_special = Linear(hidden, width, use_bias=False, kernel_init=zero, rngs=rngs)
        self.to_patches = Linear(hidden, width, use_bias=False, kernel_init=zero, rngs=rngs)

    def hidden(self, patches: Float[Array, "B N D"]) -> Float[Array, "B N H"]:
        x = self.narrow(self.norm(patches.astype(jnp.float32)))
        qkv = rearrange(self.qkv(self.attention_norm(x)), "b n (three h c) -> three b h n c", three=3, h=_HEADS)
        query, key, value = qkv[0], qkv[1], qkv[2]
        logits = jnp.einsum("bhnc,bhmc->bhnm", query, key) / query.shape[-1] ** 0.5
        mixed = jnp.einsum("bhnm,bhmc->bhnc", jax.nn.softmax(logits, axis=-1), value)
        x = x + self.out(rearrange(mixed, "b h n c -> b n (h c)"))
        x = x + self.down(gelu(self.up(self.feed_forward_norm(x)), approximate=False))
        return self.hidden_norm(x)

    def __call__(
        self, patches: Float[Array, "B N D"], kept: Int[Array, "B K"], num_special: int
    ) -> Float[Array, "B T D"]:
        """The residuals of the special tokens, who know the mean, and of the patches in the rows `kept`."""
        hidden = self.hidden(patches)
        mean = repeat(hidden.mean(axis=1), "b h -> b s h", s=num_special)
        # Rounded as the tokens are that they are added to.
        special, left = (h.astype(patches.dtype).astype(hidden.dtype) for h in (mean, take(hidden, kept)))
        return join(self.to_special(special), self.to_patches(left)).astype(patches.dtype)


class Tif(nnx.Module):
    """Keeps the round(keep_ratio * N) patches with the highest filter logits.

    The selection passes no gradient: the filter learns from impact (`losses.impact`), not from the task.
    adapter: hidden width of an `Adapter`, whose residual is added to the tokens that stay, unless all do; 0: none. It learns
    to make the frozen network say with these tokens what it says with all (`losses.divergence`), before fine-tuning.
    round_to: a few more are kept, so that with the special tokens they are a multiple of it (or all): devices whose arrays
    have rows in such multiples compute these rows anyway (`cost.Cost.padding`).
    then: the reducer that the patches left go through, as in dict(name="evo_vit", keep_ratio=0.5); None: all of them go
    through every block. Its parameters are under `reducer/then/`.
    """

    def __init__(
        self,
        keep_ratio: float = 0.5,
        then: dict | None = None,
        adapter: int = 0,
        round_to: int = 1,
        *,
        width: int,
        build: Callable[..., Any],
        rngs: nnx.Rngs,
    ):
        check_keep_ratio(keep_ratio, round_to)
        self.keep_ratio, self.round_to = keep_ratio, round_to
        self.then = Full() if then is None else build(**then)
        self.filter = TokenFilter(width, rngs=rngs)
        self.adapter = Adapter(width, adapter, rngs=rngs) if adapter else None

    def before_blocks(self, x: Float[Array, "B T D"], tokens: Tokens, number: int) -> tuple[Array, Tokens, Array]:
        """x and tokens as `number` patches go into the first block, and the filter's logits (B, N)."""
        patches = split(x, tokens.num_special)[1]
        logits = self.filter(patches)
        if number < patches.shape[1]:  # else nothing has to be ranked or told, and nobody pays for filter and adapter
            kept = top_k(logits, number)
            x, tokens = keep_rows(x, tokens, kept)
            if self.adapter is not None:
                x = x + self.adapter(patches, kept, tokens.num_special)
        return x, tokens, logits

    def __call__(self, blocks, x, tokens, rngs=None):
        x, aux, logits = walk_fronted(self, blocks, x, tokens, rngs)
        return x, {**aux, "filter_logits": logits}
