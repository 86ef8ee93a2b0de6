"""Rankings of patch tokens: where they come from, how two agree, and what one knows of impact.

Legend: B images of a batch, E images in all, N patch tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from tif_jax.models.vit import ViT
from tif_jax.tokens import class_attention, image_keys, split


def filter_ranking(model: ViT, images: Float[Array, "B Y X 3"]) -> Float[Array, "B N"]:
    """The logits of the model's token filter."""
    return model(images)[1]["filter_logits"]


def untrained_rankings(
    model: ViT, images: Float[Array, "B Y X 3"], seed: int | Array
) -> dict[str, Float[Array, "B N"]]:
    """What a filter has to beat: 'random', 'token norm' and, where the class token is what is pooled, 'class attention'."""
    patches = split(model.embed(images), model.num_special)[1]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, patches.shape[1:2]))
    found = {
        "random": uniform(image_keys(seed, images)),
        "token norm": jnp.linalg.norm(patches.astype(jnp.float32), axis=-1),
    }
    if model.pool == "class":  # otherwise nothing has taught a class token where to look
        found["class attention"] = class_attention_ranking(model, images)
    return found


def class_attention_ranking(model: ViT, images: Float[Array, "B Y X 3"]) -> Float[Array, "B N"]:
    """Attention of the class token to each patch, mean over heads, summed over all layers of the unreduced model."""
    x, attention = model.embed(images), []
    tokens = model.tokens(x.shape[0])
    for block in model.blocks:
        x, qk = block(x, tokens)
        attention.append(class_attention(qk, model.num_special))
    return jnp.stack(attention).sum(axis=0)


def knowledge(
    ranking: Float[np.ndarray, "E N"], impacts: Mapping[str, Float[np.ndarray, "E N"]], labels: Bool[np.ndarray, "E N"]
) -> dict[str, Any]:
    """What a ranking knows: `roc_auc` for the labels, and `mean_spearman` with each oracle's impact."""
    return {
        "auc": roc_auc(ranking, labels),
        "spearman": {target: mean_spearman(ranking, impact) for target, impact in impacts.items()},
    }


def mean_spearman(a: Float[np.ndarray, "E N"], b: Float[np.ndarray, "E N"]) -> float:
    """Spearman's rank correlation of each image's two rankings, averaged over the images where neither is constant."""
    ranks = [rankdata(x, axis=1) for x in (a, b)]
    ranks = [x - x.mean(axis=1, keepdims=True) for x in ranks]
    norms = np.prod([np.linalg.norm(x, axis=1) for x in ranks], axis=0)
    defined = norms > 0
    return (
        float(np.mean((ranks[0] * ranks[1]).sum(axis=1)[defined] / norms[defined])) if defined.any() else float("nan")
    )


def roc_auc(scores: Float[np.ndarray, "E N"], labels: Bool[np.ndarray, "E N"]) -> float:
    """Area under the ROC curve over all tokens of all images; NaN if only one label occurs."""
    return float(roc_auc_score(labels.ravel(), scores.ravel())) if 0 < labels.mean() < 1 else float("nan")
