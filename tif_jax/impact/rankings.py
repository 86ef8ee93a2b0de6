"""Rankings of patch tokens: where they come from, what the frozen model makes of their best tokens, how they agree.

Legend: B images, N patch tokens, D width, L classes.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from tif_jax.models.vit import ViT
from tif_jax.reducers.full import Full
from tif_jax.tokens import class_attention, keep


def class_attention_ranking(model: ViT, images: Float[Array, "B Y X 3"]) -> Float[Array, "B N"]:
    """Attention of the class token to each patch, mean over heads, summed over all layers of the unreduced model."""
    x, attention = model.embed(images), []
    for block in model.blocks:
        x, qk = block(x)
        attention.append(class_attention(qk, model.num_special))
    return jnp.stack(attention).sum(axis=0)


def logits_of_best(
    model: ViT, images: Float[Array, "B Y X 3"], ranking: Float[Array, "B N"], keep_ratio: float
) -> Float[Array, "B L"]:
    """Logits of the frozen model when only the round(keep_ratio * N) highest-ranked patches enter its first block."""
    x, tokens, _ = keep(model.embed(images), model.tokens(images.shape[0]), ranking, keep_ratio)
    return model.predict(*Full()(model.blocks, x, tokens))[0]


def unreduced_logits(model: ViT, images: Float[Array, "B Y X 3"]) -> Float[Array, "B L"]:
    """Logits of the model when all patches go all the way, whatever its own reducer does."""
    return model.predict(*Full()(model.blocks, model.embed(images), model.tokens(images.shape[0])))[0]


def mean_spearman(a: Float[np.ndarray, "B N"], b: Float[np.ndarray, "B N"]) -> float:
    """Spearman's rank correlation of each image's two rankings, averaged over the images where neither is constant."""
    ranks = [rankdata(x, axis=1) for x in (a, b)]
    ranks = [x - x.mean(axis=1, keepdims=True) for x in ranks]
    norms = np.prod([np.linalg.norm(x, axis=1) for x in ranks], axis=0)
    defined = norms > 0
    return (
        float(np.mean((ranks[0] * ranks[1]).sum(axis=1)[defined] / norms[defined])) if defined.any() else float("nan")
    )


def roc_auc(scores: Float[np.ndarray, "B N"], labels: Bool[np.ndarray, "B N"]) -> float:
    """Area under the ROC curve over all tokens of all images; NaN if only one label occurs."""
    return float(roc_auc_score(labels.ravel(), scores.ravel())) if 0 < labels.mean() < 1 else float("nan")
