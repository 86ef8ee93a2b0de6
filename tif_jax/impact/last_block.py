"""From some block to the prediction: exact, and where only special tokens are read, the last block is nearly free.

Legend: B images, T tokens, N patch tokens, D width, P patches of the raster.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from tif_jax.impact.dense import dense_prediction
from tif_jax.models.special_alone import SpecialAlone
from tif_jax.models.vit import ViT
from tif_jax.reducers import Aux
from tif_jax.tasks import CLASSIFICATION
from tif_jax.tokens import Tokens, gates_to_log_weight


def prediction_after(
    model: ViT,
    blocks: Sequence[Any],
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
    if model.pool == "class" and blocks:  # a mean reads every token
        blocks = [*blocks[:-1], SpecialAlone(blocks[-1], 1 + model.has_distillation)]
    for block in blocks:
        x, _ = block(x, tokens, log_weight)
    return model.predict(x, {}, gates)
