"""ToSA, token selective attention (Singh et al., "ToSA: Token Selective Attention for Efficient Vision Transformers", 2024).

Blocks come in pairs. From the attention logits of the first, which is dense, a selector predicts the attention maps of
the second; the tokens that get the most attention there go through the second, the others skip it and stay as they are.

Legend: B images, T tokens, N patch tokens, K selected patch tokens, S those and the special tokens, D width, H heads.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tif_jax.errors import InputError
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers.random import draw_keys
from tif_jax.tokens import (
    QueryKey,
    Tokens,
    attention_logits,
    class_attention,
    put,
    require_class,
    set_aside,
    split,
    take,
    top_k,
)

_FEW_HEADS = 8  # up to which sums are faster on a CPU than a product of matrices
_SELECTORS = ("learned", "copy", "oracle", "class", "random")


class HeadMix(nnx.Module):
    """Attention maps, each a weighted sum of the given ones: a convolution of kernel 1 with the heads as channels."""

    def __init__(self, num_heads: int, *, kernel_init: nnx.Initializer, use_bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (num_heads, num_heads), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((num_heads,), jnp.float32)) if use_bias else None

    def __call__(self, maps: Float[Array, "B H T T"]) -> Float[Array, "B H T T"]:
        kernel = self.kernel[...].astype(maps.dtype)
        if kernel.shape[0] > _FEW_HEADS:
            y = _product(kernel, maps)
        else:
            y = jax.lax.platform_dependent(kernel, maps, cpu=_sums, default=_product)
        return y if self.bias is None else y + self.bias[...].astype(maps.dtype)[None, :, None, None]


def _product(kernel: Float[Array, "H H"], maps: Float[Array, "B H T T"]) -> Float[Array, "B H T T"]:
    return jnp.einsum("eg,beqk->bgqk", kernel, maps)


def _sums(kernel: Float[Array, "H H"], maps: Float[Array, "B H T T"]) -> Float[Array, "B H T T"]:
    """The same without a matrix product, which on a CPU would neither be fused with its surroundings nor use its caches.

    With 3 heads a whole selector and the softmax after it took 8 ms instead of 18, with 6 heads 27 instead of 80.
    """
    heads = range(kernel.shape[0])
    return jnp.stack([sum(kernel[e, g] * maps[:, e] for e in heads) for g in heads], axis=1)


class Selector(nnx.Module):
    """The next block's attention logits from those of a block: two mixtures of the heads with a ReLU between, as residual.

    The paper's are two convolutions; everything else about them is our choice, and nothing else was measured. At first
    the residual is 0: the next block's logits are then taken to be this one's.
    """

    def __init__(self, num_heads: int, *, rngs: nnx.Rngs):
        init, zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()
        self.first = HeadMix(num_heads, kernel_init=init, use_bias=True, rngs=rngs)
        # A bias would be the same for all keys of a query: the softmax over keys does not see it.
        self.second = HeadMix(num_heads, kernel_init=zeros, use_bias=False, rngs=rngs)

    def __call__(self, logits: Float[Array, "B H T T"]) -> Float[Array, "B H T T"]:
        logits = jax.lax.stop_gradient(logits)
        return logits + self.second(jax.nn.relu(self.first(logits)))


class Tosa(nnx.Module):
    """In every selective block floor(keep_ratio * N) patches, and the special tokens, attend to each other; the rest skip.

    layers: the selective blocks, counted from 0, at least 1, no two in a row; None is every odd block from a quarter of
        the way: 3, 5, 7, 9 and 11 of 12. All other blocks are dense.
    keep_ratio, num_kept: ratios or numbers of selected patches, one for each layer (a ratio: or one for all). With
        numbers for each block instead, N for block 0, those with fewer are selective.
    selector: whose attention maps are summed over heads and queries to rank the patches: 'learned', the prediction;
        'copy', the dense block's own; 'oracle', those that the next block would have if it were dense. Instead of
        maps, 'class' ranks by the dense block's class attention and 'random' by chance, drawn like `Random`'s.
    fitting: every block runs dense and nothing is selected; aux['loss/selector'] is, per image and in nats, the mean
        over layers, heads and queries of KL(attention of the selective block || its prediction). Its gradient reaches
        the selectors alone.

    The selection passes no gradient: selectors learn from `losses.selector`, not from the task.
    """

    def __init__(
        self,
        keep_ratio: float | tuple[float, ...] = 0.8,
        layers: tuple[int, ...] | None = None,
        num_kept: tuple[int, ...] | None = None,
        selector: str = "learned",
        fitting: bool = False,
        draw_seed: int = 0,
        *,
        num_heads: int | None,
        depth: int | None,
        rngs: nnx.Rngs,
    ):
        schedule.check(keep_ratio, layers, num_kept, name="layers")
        if selector not in _SELECTORS:
            raise InputError(f"selector is {selector!r}; allowed: {', '.join(map(repr, _SELECTORS))}")
        if not isinstance(fitting, bool):
            raise InputError(f"fitting is {fitting!r}; allowed: True, False")
        self.num_dense: int | None = None
        if num_kept is not None and schedule.is_per_block(layers, num_kept, depth):
            self.num_dense = num_kept[0]  # block 0 is dense: this must be all patches, which we do not know yet
            layers = tuple(i for i, number in enumerate(num_kept) if number < num_kept[0])
            num_kept = tuple(num_kept[i] for i in layers)
        elif layers is None:
            layers = tuple(i for i in range(1, depth or 0, 2) if 4 * i >= (depth or 0))
        if any(i == 0 or i - 1 in layers for i in layers):
            raise InputError(
                f"blocks {layers} select tokens; each needs a dense block before it: not 0, no two in a row"
            )
        if fitting and (selector != "learned" or not (layers or depth is None)):
            raise InputError(
                f"fitting needs a learned selector; there is none with selector {selector!r}, layers {layers}"
            )
        self.keep_ratio, self.layers, self.num_kept = keep_ratio, layers, num_kept
        self.selector, self.fitting, self.draw_seed = selector, fitting, draw_seed
        if selector == "learned" and num_heads is not None:  # None: a check of the options
            for i in layers:
                setattr(self, f"selector_{i}", Selector(num_heads, rngs=rngs))

    def __call__(self, blocks, x, tokens, rngs=None):
        num_special, num_patches = tokens.num_special, tokens.index.shape[1]
        if self.selector == "class":
            require_class(tokens, "tosa with selector 'class'")
        if self.num_dense is not None:
            schedule.check_dense_start(self.num_dense, num_patches)
        amounts = schedule.amounts(self.keep_ratio, self.layers, self.num_kept, len(blocks), name="layers")
        if self.fitting:
            return self._fit(blocks, x, tokens, rngs)
        embedded, kept = split(x, num_special)[1], tokens.index
        qk: Any = None  # of the block before
        for i, block in enumerate(blocks):
            num_kept = schedule.count(amounts.get(i, 1.0), num_patches, math.floor)
            if num_kept == num_patches:
                x, qk = block(x, tokens, rngs=rngs)
                continue
            if self.selector == "random":
                scores = _draw(self.draw_seed, i, embedded, rngs)
            elif self.selector == "class":
                scores = class_attention(qk, num_special)
            else:
                scores = self._attention_received(i, block, x, tokens, qk)
            selected = top_k(scores, num_kept)
            rows = _with_special(selected, num_special)
            y, _ = block(take(x, rows), set_aside(tokens, selected, split(x, num_special)[1]), rngs=rngs)
            x, kept = put(x, rows, y), take(tokens.index, selected)
        return x, {"kept": kept, "source": tokens.source}

    def _attention_received(
        self, i: int, block, x: Float[Array, "B T D"], tokens: Tokens, qk: QueryKey
    ) -> Float[Array, "B N"]:
        """How much attention each patch is taken to get in block i, which gets x; qk: of the block before."""
        logits = _logits(block.attend(x, tokens)[1] if self.selector == "oracle" else qk)
        if self.selector == "learned":
            logits = self._selector(i)(logits)
        return _column_sums(logits)[:, tokens.num_special :]

    def _selector(self, i: int) -> Selector:
        """What predicts the attention logits of block i from those of the block before."""
        return getattr(self, f"selector_{i}")

    def _fit(self, blocks, x, tokens, rngs):
        qk: Any = None  # of the block before
        divergences = []
        for i, block in enumerate(blocks):
            predicted = self._selector(i)(_logits(qk)) if i in self.layers else None
            x, qk = block(x, tokens, rngs=rngs)
            if predicted is not None:
                divergences.append(_divergence(_logits(qk), predicted))
        loss = sum(divergences) / len(divergences)
        return x, {"kept": tokens.index, "source": tokens.source, "loss/selector": loss}


def _logits(qk: QueryKey) -> Float[Array, "B H T T"]:
    return attention_logits(qk.query, qk.key)


def _column_sums(logits: Float[Array, "B H T T"]) -> Float[Array, "B T"]:
    """How much attention each token gets from all queries, special tokens' included, summed over heads."""
    return jax.nn.softmax(logits, axis=-1).sum(axis=(1, 2))


def _divergence(target: Float[Array, "B H T T"], predicted: Float[Array, "B H T T"]) -> Float[Array, " B"]:
    """KL(softmax(target) || softmax(predicted)) in nats, mean over heads and queries; no gradient to the target."""
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(target), axis=-1)
    log_q = jax.nn.log_softmax(predicted, axis=-1)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean(axis=(1, 2))


def _with_special(selected: Int[Array, "B K"], num_special: int) -> Int[Array, "B S"]:
    """Rows among all tokens: the special ones, then the selected patches."""
    special = jnp.broadcast_to(jnp.arange(num_special, dtype=jnp.int32)[None], (selected.shape[0], num_special))
    return jnp.concatenate([special, num_special + selected], axis=1)


def _draw(seed: int, i: int, patches: Float[Array, "B N D"], rngs: nnx.Rngs | None) -> Float[Array, "B N"]:
    """Uniform scores for block i, from the patch embeddings of an image or, in training, from `rngs`."""
    draw = lambda key: jax.random.uniform(jax.random.fold_in(key, i), patches.shape[1:2])  # noqa: E731
    return jax.vmap(draw)(draw_keys(seed, patches, rngs))
