"""TIF, the token impact filter (Wang et al., "Predicting Token Impact Towards Efficient Vision Transformer", 2023).

An MLP looks at the embeddings once, before the first self-attention; the patches it finds least worth keeping are gone.

Legend: B images, N patch tokens, D width.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import Linear, gelu
from tif_jax.reducers.full import Full
from tif_jax.tokens import check_keep_ratio, follow, keep, split


class TokenFilter(nnx.Module):
    """Logit that a patch token is worth keeping, from its embedding and ('local+global') the image's mean.

    The paper says "multi-layer perceptron" and no more: LayerNorm, hidden layers D and D/2, GELU and the global feature
    are our choice. The global half of the first layer is computed once per image.
    """

    def __init__(
        self, width: int, features: str = "local+global", hidden: tuple[int, ...] | None = None, *, rngs: nnx.Rngs
    ):
        if features not in ("local", "local+global"):
            raise InputError(f"features is {features!r}; allowed: 'local', 'local+global'")
        sizes = (width, width // 2) if hidden is None else tuple(hidden)
        self.norm = nnx.LayerNorm(width, use_fast_variance=False, rngs=rngs)
        self.local_in = Linear(width, sizes[0], rngs=rngs)
        if features == "local+global":
            self.global_in = Linear(width, sizes[0], use_bias=False, rngs=rngs)
        for i, (size_in, size_out) in enumerate(zip(sizes, (*sizes[1:], 1), strict=True)):
            setattr(self, f"layer_{i}", Linear(size_in, size_out, rngs=rngs))
        self.features = features
        self.depth = len(sizes)

    def __call__(self, patches: Float[Array, "B N D"]) -> Float[Array, "B N"]:
        local = self.norm(patches.astype(jnp.float32))
        y = self.local_in(local)
        if self.features == "local+global":
            y = y + self.global_in(local.mean(axis=1, keepdims=True))
        for i in range(self.depth):
            y = getattr(self, f"layer_{i}")(gelu(y, approximate=False))
        return y[..., 0]


class Tif(nnx.Module):
    """Keeps the round(keep_ratio * N) patches with the highest filter logits.

    The selection passes no gradient: the filter learns from impact (`losses.impact`), not from the task.
    then: the reducer that the patches left go through; None: all of them through every block. As an option of a model or
    in a config it is a dict, dict(name="evo_vit", keep_ratio=0.5), whose parameters are under `reducer/then/`.
    """

    def __init__(
        self,
        keep_ratio: float = 0.5,
        features: str = "local+global",
        hidden: tuple[int, ...] | None = None,
        then: Callable | None = None,
        *,
        width: int,
        rngs: nnx.Rngs,
    ):
        check_keep_ratio(keep_ratio)
        self.keep_ratio = keep_ratio
        self.then = then or Full()
        self.filter = TokenFilter(width, features, hidden, rngs=rngs)

    def __call__(self, blocks, x, tokens, rngs=None):
        logits = self.filter(split(x, tokens.num_special)[1])
        x, tokens, source = keep(x, tokens, logits, self.keep_ratio)
        x, aux = self.then(blocks, x, tokens, rngs)
        if "source" in aux:
            source = follow(source, aux["source"])
        if isinstance(self.then, Full):
            aux["kept"] = tokens.index
        return x, {**aux, "source": source, "filter_logits": logits}
