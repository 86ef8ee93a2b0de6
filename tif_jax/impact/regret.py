"""How much worse the patches are that a reducer keeps than those that the oracle would keep.

    regret = KL(p || p of the patches kept, alone) - KL(p || p of as many patches of the highest impact, alone)

p are the class probabilities with all tokens; alone: only these patches enter the first block of the plain model. So the
choice is judged, whatever a reducer does with the rest, and in which block. In nats. The oracle's impacts are those of single
tokens (target 'teacher', no label): a choice that heeds what tokens say together can have less than no regret.

Legend: E images, B images of a batch, N patch tokens, L classes, Y X height and width.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from tif_jax.impact.judge import Batch, alone, over_batches
from tif_jax.impact.paired import divergence
from tif_jax.impact.scoring import Scorer
from tif_jax.models import Model
from tif_jax.tokens import top_k


def chooses(model: Model) -> bool:
    """Whether its reducer says which patches stay tokens of their own, and not all do."""
    images = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    aux = nnx.eval_shape(lambda model, images: model(images)[1], model, images)
    return "kept" in aux and aux["kept"].shape[1] < model.grid[0] * model.grid[1]


def impacts(model: Model, batches: Iterable[Batch], batch_size: int, num_samples: int) -> Float[np.ndarray, "E N"]:
    """The oracle of all images that can be read: `sampled`, target 'teacher'."""
    scorer = Scorer(
        model, batch_size, estimator="sampled", target="teacher", mask=None, num_samples=num_samples, keep_ratio=0.5
    )
    found = []
    for batch in batches:
        scores = scorer(batch["image"], batch["label"])()
        found.append(scores.impact[batch["weight"] > 0])
    return np.concatenate(found)


def regrets(
    model: Model,
    reduced: Sequence[Model],
    batches: Iterable[Batch],
    mesh: Mesh,
    whole: Float[np.ndarray, "E L"],
    impact: Float[np.ndarray, "E N"],
) -> list[Float[np.ndarray, " E"]]:
    """Of each reduced model, which `chooses`. whole: the logits of `model` with all tokens."""

    def of_batch(models, images, rows):
        found, best = [], {}
        for other in models[1:]:
            kept = other(images)[1]["kept"]
            number = kept.shape[1]
            if number not in best:
                best[number] = divergence(rows["whole"], alone(models[0], images, top_k(rows["impact"], number)))
            found.append(divergence(rows["whole"], alone(models[0], images, kept)) - best[number])
        return found

    return over_batches(of_batch, [model, *reduced], batches, mesh, {"whole": whole, "impact": impact})[0]
