"""Ladders of models as `tif ladder` writes them: which reducers, in which order, and how sure each has to be."""

import json
from pathlib import Path
from typing import Any

from tif_jax import checked
from tif_jax.adaptive.adaptive import Adaptive
from tif_jax.adaptive.routing import Route
from tif_jax.errors import InputError
from tif_jax.models import Model
from tif_jax.models.model import dtype_name
from tif_jax.models.params import backbone_digest, params_of, share
from tif_jax.runtime.digests import digest
from tif_jax.weights.loading import load_with_fields


def described(adaptive: Adaptive, reducers: list[dict[str, Any]]) -> dict[str, Any]:
    """A ladder as data. reducers: of the models but the last, in their order: name and options."""
    used = sorted(adaptive.route.rungs)
    kept = {rung: i for i, rung in enumerate(used)}  # what no image tries is left out
    route = Route(tuple(kept[rung] for rung in adaptive.route.rungs), adaptive.route.thresholds)
    last = len(adaptive.models) - 1
    return {
        "ladder": [reducers[rung] for rung in used if rung != last],
        "route": checked.to_json(route._asdict()),
        "backbone": backbone_digest(params_of(adaptive.models[-1])),
        "learned": [_learned(adaptive.models[rung]) for rung in used if rung != last],
    }


def _learned(model: Model) -> str:
    """Digest of what the reducer has learned; empty where that is nothing."""
    own = params_of(model).get("reducer")
    return digest(own) if own else ""


def load_ladder(
    source: str | Path, path: str | Path, *, dtype: Any = "float32", batch_size: int = 32, **options: Any
) -> Adaptive:
    """The models of a ladder that `tif ladder` wrote, with the weights that it was found for.

    source, dtype, options: as of `load`, less image_size: thresholds are of one size. Raises InputError for what is no ladder
    and for other weights.
    """
    if "image_size" in options:
        raise InputError("image_size is given, and a ladder is for the size that its thresholds were found at")
    try:
        found = json.loads(Path(path).expanduser().read_bytes())
        ladder, backbone, learned = [dict(rung) for rung in found["ladder"]], found["backbone"], found["learned"]
        rungs, thresholds = (tuple(found["route"][name]) for name in Route._fields)
        route = Route(tuple(map(int, rungs)), tuple(map(float, thresholds)))
        names = [rung.pop("name") for rung in ladder]
    except OSError as error:
        raise InputError(f"the ladder {path} can not be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path} is no ladder as `tif ladder` writes it: {error!r}") from None
    options |= dict(dtype=dtype_name(dtype), fresh_told_at=None)
    model, _ = load_with_fields(source, reducer="full", **options)
    if backbone_digest(params_of(model)) != backbone:
        raise InputError(
            f"the ladder {path} was found for other weights than {source}; `tif ladder` makes one for these"
        )
    options |= dict(preprocessing=model.preprocessing)
    models = [
        load_with_fields(source, reducer=name, **rung, **options)[0] for name, rung in zip(names, ladder, strict=True)
    ]
    if [_learned(one) for one in models] != learned:
        raise InputError(f"the ladder {path} was found for reducers that learned something else than those of {source}")
    for one in models:
        share(one, model)
    return Adaptive.with_route(model, models, route, batch_size=batch_size)
