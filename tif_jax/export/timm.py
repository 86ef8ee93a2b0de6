"""The network for timm, without its reducer, which PyTorch's models have no place for."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tif_jax.errors import InputError
from tif_jax.export import artifact
from tif_jax.models import Model, blueprint, built_with
from tif_jax.models.params import params_of
from tif_jax.sharing.facts import Facts
from tif_jax.sharing.model_folder import contents_of
from tif_jax.tasks import CLASSIFICATION
from tif_jax.weights.folders import WEIGHTS
from tif_jax.weights.loading import load
from tif_jax.weights.timm_config import architecture_of

logger = logging.getLogger(__name__)

CONFIG = "config.json"


def to_timm(model: Model, folder: str | Path) -> dict[str, Any]:
    """Makes a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads, a manifest and a loader.

    All tokens go through the network there: a warning says what of the reducer is left out. It is checked by timm, where that
    is installed, else by `tif_jax.load`. Returns the manifest. Raises InputError for a model that timm has none of, and if
    there is such a folder already or it can not be written; WorkError where the folder computes something else.
    """
    artifact.check(model, folder)
    if model.task != CLASSIFICATION.name:
        raise InputError(f"timm has no models of {model.task}; StableHLO and ONNX take any")
    built = built_with(model)
    if architecture_of(built["model"]) is None:
        raise InputError("timm has no model of this kind; StableHLO and ONNX take any")
    plain = nnx.eval_shape(blueprint(built["model"] | {"dtype": "float32"}, reducer="full"), jax.random.key(0))
    nnx.update(plain, {name: value for name, value in params_of(model).items() if name != "reducer"})
    plain.preprocessing, plain.class_names = model.preprocessing, model.class_names
    left_out = None if built["reducer"]["name"] == "full" else built["reducer"]
    if left_out:
        logger.warning("timm runs the network with all tokens: reducer %r is left out", left_out["name"])
    made = contents_of(plain, Facts(), "")
    contents = {name: made[name] for name in (WEIGHTS, CONFIG)}
    has_timm = all(importlib.util.find_spec(name) for name in ("timm", "torch"))
    return artifact.write(
        plain, folder, "timm", contents, _by_timm if has_timm else _by_us, "timm" if has_timm else "tif_jax", left_out
    )


def _by_timm(path: Path) -> artifact.Call:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{path.parent}", pretrained=True).eval()
    name = "logits" if model.num_classes else "features"

    def call(images):
        with torch.inference_mode():
            return {name: model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()}

    return call


def _by_us(path: Path) -> artifact.Call:
    model = load(path.parent)
    return lambda images: {artifact.main_output(model): np.asarray(model(images)[0])}
