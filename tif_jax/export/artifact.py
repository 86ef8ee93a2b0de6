"""What every format has in common: what is exported, the reload check, the folder with manifest and loader.

A folder has the model's file, manifest.json and predict.py, which runs it without this package.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tif_jax.errors import InputError, WorkError
from tif_jax.layers import true_float32
from tif_jax.models import Model, built_with, where_patches_are
from tif_jax.models.cost import cost
from tif_jax.models.model import carried
from tif_jax.runtime import files, records
from tif_jax.tasks import DEPTH, SEGMENTATION

logger = logging.getLogger(__name__)

Call = Callable[[np.ndarray], Mapping[str, np.ndarray]]

MANIFEST, LOADER = "manifest.json", "predict.py"
MEANING = {
    "logits": "of the classes, before the softmax",
    "features": "pooled; the model has no head",
    "depth": "of each pixel, metres",
    "kept": "raster positions of the patches that stay tokens of their own, ascending",
    "source": "for each patch the row, among the patch tokens that come out, in which it lives; -1: it is gone",
}
_OF_PIXELS = "of each pixel's classes, before the softmax"
# Of logits or metres, times the largest of them, if that is above 1: sums in another order. Where two patches are all but
# equally worth keeping, that may decide between them, and what follows is another computation: such images are not compared.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float64": 1e-3}
_SMALL = 0.1  # outputs below it are compared as if they were so large
_NUM_IMAGES = 4  # of the check: one alone, then the others as a batch


def forward(model: Model) -> Callable[[Float[Array, "B Y X 3"]], dict[str, Array]]:
    """From images to what is exported, by name (`MEANING`): the prediction, and which tokens were kept where that is said."""

    def call(images):
        with true_float32(model.dtype):
            prediction, aux = model(images)
        return {main_output(model): prediction, **where_patches_are(aux)}

    return call


def main_output(model: Model) -> str:
    """What the first output is called."""
    if model.task == DEPTH.name:
        return "depth"
    return "logits" if model.num_classes else "features"


def _meaning(model: Model, name: str) -> str:
    return _OF_PIXELS if name == "logits" and model.task == SEGMENTATION.name else MEANING[name]


def check(model: Any, folder: str | Path) -> None:
    """Raises InputError for what is no model, for forms of reducers that training alone has, and if the folder exists."""
    if not isinstance(model, Model):
        raise InputError(f"the model is {model!r:.60}; it is what tif_jax.load or tif_jax.create_model returns")
    files.check_new(folder)
    aux = jax.eval_shape(lambda images: model(images)[1], jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32))
    if told := sorted(name for name in aux if name == "mask" or name.startswith("loss/")):
        name = built_with(model)["reducer"]["name"]
        raise InputError(
            f"reducer {name!r} is in a form for training alone (it computes {', '.join(told)}); load the model without that "
            "option"
        )


def write(
    model: Model,
    folder: str | Path,
    form: str,
    contents: Mapping[str, bytes],
    reloaded: Callable[[Path], Call],
    by: str,
    left_out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Makes the folder, and returns its manifest. The first of `contents` is the model's file.

    reloaded: what the model's file, read again, computes; by: whose work that is. left_out: a reducer that is not in it.
    InputError if there is such a folder already, WorkError where the file computes something else. Then nothing is left.
    """
    folder = Path(folder).expanduser()
    with files.appearing(folder) as partial:
        contents = {**contents, LOADER: Path(__file__).with_name(LOADER).read_bytes()}
        for name, data in contents.items():
            files.write(partial / name, data)
        main = next(iter(contents))
        found = {"by": by, **compared(model, reloaded(partial / main))}
        manifest = _manifest(model, form, main, contents, found, left_out)
        files.write(partial / MANIFEST, (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode())
    logger.info("%s is written; largest difference of %s %.1e", folder, main_output(model), found["max_difference"])
    return manifest


def compared(model: Model, call: Call) -> dict[str, Any]:
    """How far the outputs of `call` are from the model's. Raises WorkError where they are others."""
    main = main_output(model)
    images = np.random.default_rng(0).standard_normal((_NUM_IMAGES, *model.image_size, 3), np.float32)
    wanted = {name: np.asarray(value) for name, value in jax.jit(forward(model))(images).items()}
    found = [{name: np.asarray(value) for name, value in call(batch).items()} for batch in (images[:1], images[1:])]
    shapes = [{name: (1, *value.shape[1:]) for name, value in one.items()} for one in (wanted, *found)]
    if shapes[0] != shapes[1] or [one[main].shape[0] for one in found] != [1, _NUM_IMAGES - 1]:
        raise WorkError(f"the exported model gives {shapes[1]} for one image, the model {shapes[0]}; please report it")
    joined = {name: np.concatenate([one[name] for one in found]) for name in wanted}
    tokens = [(joined[name] == wanted[name]).all(axis=1) for name in wanted if name != main]
    same_tokens = tokens[0] if tokens else np.ones(_NUM_IMAGES, bool)
    ours, theirs = (np.asarray(one[main], np.float32) for one in (wanted, joined))
    worst = float(np.abs(ours - theirs).max(initial=0, where=same_tokens.reshape(-1, *[1] * (ours.ndim - 1))))
    largest = float(np.abs(ours).max())
    tolerance = _TOLERANCE[jnp.dtype(model.dtype).name] * max(_SMALL, largest)
    if not np.isfinite(ours).all():
        raise WorkError(f"the model's own {main} are no numbers (NaN) for random pixels; take other weights")
    if not worst <= tolerance or 2 * same_tokens.sum() < _NUM_IMAGES:
        raise WorkError(
            f"the exported model, read again, differs from the model: {main} by {worst:.2g}, the same tokens for "
            f"{same_tokens.sum()} of {_NUM_IMAGES} images; please report it"
        )
    return {
        "images": f"{_NUM_IMAGES} of random pixels",
        "max_difference": worst,
        "largest_output": largest,
        **_same_class(model, ours, theirs),
        "same_tokens": int(same_tokens.sum()),
    }


def _same_class(model: Model, ours: Float[np.ndarray, "B *_"], theirs: Float[np.ndarray, "B *_"]) -> dict[str, Any]:
    """How often the likeliest class is the same: of images, or of all pixels their share."""
    if not model.num_classes:
        return {}
    same = ours.argmax(axis=-1) == theirs.argmax(axis=-1)
    return {"same_class": int(same.sum()) if same.ndim == 1 else float(same.mean())}


def _manifest(
    model: Model,
    form: str,
    main: str,
    contents: Mapping[str, bytes],
    found: Mapping[str, Any],
    left_out: Mapping[str, Any] | None,
) -> dict[str, Any]:
    height, width = model.image_size
    batch = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    outputs = jax.eval_shape(forward(model), batch)
    own = carried(model)
    counted = cost(model)
    return {
        "format": form,
        "model": main,
        "task": model.task,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        "preprocessing": {"image_size": [height, width], **own["preprocessing"]},
        "class_names": own["class_names"],
        "inputs": [{"name": "images", "shape": ["batch", height, width, 3], "dtype": "float32"}],
        "outputs": [
            {"name": name, "shape": ["batch", *outputs[name].shape[1:]], "meaning": _meaning(model, name)}
            for name in MEANING
            if name in outputs
        ],
        "reducer": built_with(model)["reducer"],
        "left_out": left_out,
        "cost": {"gmac": counted.gmac, "parameters": counted.parameters, "tokens": list(counted.tokens)},
        "dtype": jnp.dtype(model.dtype).name,
        "check": dict(found),
        "versions": records.versions(),
    }
