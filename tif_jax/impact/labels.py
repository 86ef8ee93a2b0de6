"""From impact to what a filter learns: which tokens are worth keeping.

Legend: B images, N patch tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tif_jax.tokens import num_kept


def keep_labels(
    impact: Float[Array | np.ndarray, "B N"], rho: float | str = 0.0, keep_ratio: float = 0.5
) -> Bool[Array, "B N"]:
    """Which tokens are worth keeping: impact above rho nats, or with rho 'top' each image's keep_ratio * N highest."""
    impact = jnp.asarray(impact)
    if isinstance(rho, str):
        assert rho == "top"
        rank = jnp.argsort(jnp.argsort(-impact, axis=1), axis=1)
        return rank < num_kept(keep_ratio, impact.shape[1])
    return impact > rho


def position_prior(labels: Bool[Array, "B N"]) -> Float[Array, " N"]:
    """Logit of the mean label of each raster position over a training set: the best filter that never looks."""
    # One imaginary example of each kind keeps positions that are always, or never, worth keeping finite.
    mean = (labels.sum(axis=0) + 1.0) / (labels.shape[0] + 2.0)
    return jax.scipy.special.logit(mean)
