"""The oracle for some images, from Python: `token_impact`.

Legend: B images, N patch tokens, Y X height and width in pixels.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tif_jax import checked
from tif_jax.errors import InputError
from tif_jax.impact.objective import Batch, Loss, checked_batch
from tif_jax.impact.oracle import check_options, default_chunk, num_units, shared_scores
from tif_jax.impact.scoring import in_shares, scores_on, spread
from tif_jax.models import Model, check_images, check_seed, plain_vit, require_head
from tif_jax.models.gradients import for_gradients
from tif_jax.tasks import CLASSIFICATION

_MOST = 32  # images of a program, or a few more, so that each device has as many


def token_impact(
    model: Model,
    images: Float[Array | np.ndarray, "B Y X 3"],
    labels: Any = None,
    *,
    loss: Loss | None = None,
    estimator: str = "exact",
    mask: str | None = None,
    target: str = "label",
    num_samples: int = 16,
    keep_ratio: float = 0.5,
    seed: int = 0,
    chunk: int | None = None,
) -> Float[Array, "B N"]:
    """Impact of every patch token in the unit of the loss, raster order, float32; positive: the token helps.

    labels: of a classifier numbers of classes (B,); of a dense task label maps (B, Y, X), of depth metres, 0 where not
      measured, of segmentation classes, -1 where ignored. Or a batch: a dict of arrays with a row for each image, among them
      'label' or 'label_map'.
    loss: a function of (prediction, aux, batch) that gives (B,) floats, from what the model returns and the batch of
      `labels`, to which are added 'image' and 'unmasked', the prediction with all tokens. Default: that of the model's
      task and the target. It may be called under `jax.jit`, and is compiled anew for every new function.
    estimator:
      'exact'     N masked forwards minus the clean one.
      'gradient'  -dL/dw at w = 1, one backward pass, where the gate w_i in [0, 1] multiplies exp(logit to key i) in
                  every attention layer (also of attention pooling; and the token's share in a mean; on the raster of a
                  dense head see `impact.dense`): `drop` to first order.
      'sampled'   mean of -dL/dw at w = max(m, 1e-3) over num_samples random masks m ~ Bernoulli(keep_ratio)^N: what a
                  token is worth among half-empty neighbours. The masks depend on `seed` and the image alone.
    mask (exact): 'zero' (default: the token's input to the first block becomes 0), 'content' (only its position
      embedding remains), 'drop' (the token is absent; a dense head fills its place as that of any dropped patch). The other
      estimators are 'drop' by definition.
    target: 'label' (cross-entropy with `labels`, of pixels their mean; of depth the scale-invariant log loss that it is
      trained by), 'teacher' (KL divergence from the unmasked model's own prediction, of pixels the mean; of depth the mean
      squared difference of ln depth).
    chunk: masked images (image x mask) that run at once: bounds memory. Default: 7 on a CPU, with a backward pass 4,
      else 1024, of a dense task 64; `scoring.Scorer` fits it to the device's memory.

    Runs on all devices of this process. Seeds, labels and numbers of images share one compiled program, which JAX keeps on
    disk where JAX_COMPILATION_CACHE_DIR says so.

    Raises InputError for unknown or contradictory options, for what are no normalised images or no labels of the model's
    task, and for a LeViT.
    """
    model = plain_vit(model, "impact")
    if loss is None and model.task == CLASSIFICATION.name:
        require_head(model, "impact, a difference of losses,")
    if not (loss is None or callable(loss)):
        raise InputError(f"loss is {loss!r:.60}; it is a function of (prediction, aux, batch)")
    options = check_options(estimator, mask, target, num_samples, keep_ratio) | {"loss": loss}
    seed = check_seed(seed)
    chunk = checked.value_of(int | None, chunk, "chunk", checked.Range(least=1))
    options["chunk"] = chunk or default_chunk(estimator, model.task)
    check_images(model, images)
    batch = checked_batch(model, labels, len(images), target, loss)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((nnx.state(model), images, batch))):
        # Inside of a program of the caller's, who says where it runs.
        return shared_scores(model, jnp.asarray(images), batch, seed=seed, **options).impact
    return _in_groups(model, images, batch, seed, options)


def _in_groups(
    model: Model, images: Float[Array | np.ndarray, "B Y X 3"], batch: Batch, seed: int, options: Mapping[str, Any]
) -> Float[Array, "B N"]:
    """As many images at once as fill the devices; devices that are left over take chunks of the last ones. Any number of
    images shares one program."""
    if not all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves((images, batch))):
        raise InputError("images are spread over processes; give each process those that are its own")
    devices, num_patches = jax.local_devices(), model.grid[0] * model.grid[1]
    if not len(images):
        return jnp.zeros((0, num_patches), jnp.float32)
    units = num_units(options, num_patches)
    size = len(devices) * max(1, min(options["chunk"] // units, -(-_MOST // len(devices))))
    mesh = spread(devices, size, units)
    whole, data, each = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",), ("data", "mask")))
    graphdef, params = nnx.split(for_gradients(model, devices))
    params, seed = jax.device_put((params, np.int32(seed)), whole)
    program = scores_on(graphdef, mesh, None, **options)
    started = []
    for first in range(0, len(images), size):
        numbers = np.arange(first, min(first + size, len(images)))
        rows, is_own, own_units = _divided(numbers, size // len(devices), len(devices), units)
        part = jax.tree.map(lambda x, first=first: x[first : first + size], (images, dict(batch)))
        if len(numbers) < size:
            part = jax.tree.map(lambda x, rows=rows, first=first: np.asarray(x)[rows - first], part)
        given = jax.device_put(own_units[:, None], each), *jax.device_put(part, data)
        started.append((rows, is_own, program(params, seed, *given).impact))
    found = np.zeros((len(images), num_patches), started[0][2].dtype)
    for rows, is_own, impact in started:
        np.add.at(found, rows[is_own], np.asarray(impact)[is_own, 0])
    return jnp.asarray(found)


def _divided(
    numbers: Int[np.ndarray, " R"], per_device: int, num_devices: int, num_units: int
) -> tuple[Int[np.ndarray, " S"], Bool[np.ndarray, " S"], Int[np.ndarray, "D 2"]]:
    """Of images, as many as fill the devices or fewer: which is in each row of the program, whether it is more than padding,
    and the `Units` of each device. Devices that are left over share the units of an image with others."""
    groups = -(-len(numbers) // per_device)
    places = np.arange(groups * per_device).reshape(groups, per_device)
    group, share = np.arange(num_devices) % groups, np.arange(num_devices) // groups
    num_shares = np.bincount(group).tolist()
    units = np.stack([in_shares(num_units, num_shares[g])[s] for g, s in zip(group, share, strict=True)])
    rows = numbers[np.minimum(places, len(numbers) - 1)][group]
    return rows.ravel(), (places < len(numbers))[group].ravel(), units
