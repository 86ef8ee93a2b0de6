"""README.md of a model: what it is, from what it was made, what was measured, how it is loaded."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from tif_jax.models import Model
from tif_jax.models.cost import cost
from tif_jax.runtime.version import __version__
from tif_jax.sharing.facts import Facts
from tif_jax.tasks import CLASSIFICATION, DEPTH, SEGMENTATION, Task, of_name
from tif_jax.weights.folders import REDUCER, WEIGHTS

_TAGS = ("tif_jax", "jax", "flax", "{task}", "vision-transformer", "token-reduction")
_LOAD = """\
```python
import tif_jax

model = tif_jax.load("NAME")  # or this folder's path
USE
```
"""
_USE = {
    CLASSIFICATION.name: 'print(model.predict_images(["cat.jpg"], top=3))',
    DEPTH.name: 'metres, _ = model(model.preprocess(["room.jpg"]))  # (1, height, width)',
    SEGMENTATION.name: 'logits, _ = model(model.preprocess(["room.jpg"]))  # (1, height, width, classes)',
}
_PLAIN = """\
With Flax and safetensors, without `tif_jax.load`, in this folder:

```python
import json
import safetensors.flax
import tif_jax
from flax import nnx, traverse_util

told, where = (json.load(open(name)) for name in ("config.json", "parameters.json"))
options = dict(told["tif_jax"]["reducer"])
model = tif_jax.create_model(told["tif_jax"]["model"], reducer=options.pop("name"), **options)
tensors = safetensors.flax.load_file("model.safetensors")
params = {path: tensors[name].transpose(axes).reshape(shape) for path, (name, axes, shape) in where.items()}
"""
_REDUCER = 'params |= safetensors.flax.load_file("reducer.safetensors")\n'
_UPDATE = 'nnx.update(model, traverse_util.unflatten_dict(params, sep="/"))\n```\n'
_TIMM = """\
timm reads the backbone, without the reducer:

```python
import timm

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)  # or "hf-hub:NAME"
```
"""


def model_card(model: Model, facts: Facts, config: Mapping[str, Any], beside: Collection[str], name: str) -> str:
    """The text of README.md.

    config: the content of config.json; beside: the other files of the folder; name: what to load, hf:OWNER/NAME.
    """
    reducer, has_learned = config["tif_jax"]["reducer"], REDUCER in beside
    task = of_name(model.task)
    plain = _PLAIN + (_REDUCER if has_learned else "") + _UPDATE if "parameters.json" in beside else ""
    options = ", ".join(f"{name} {value!r}" for name, value in reducer.items() if name != "name")
    how = model.preprocessing
    lines = [
        *_front_matter(facts, task),
        f"# {_title(model, reducer)}",
        "",
        f"Written by tif_jax {__version__}. {_sentence(model, reducer, options, task)}",
        "",
        "## Made from",
        "",
        f"* Weights: {_weights(facts)}",
        f"* Images: {_data(facts.data)}",
        f"* Licence: {facts.license or 'not stated here; the weights and images that it was made from have their own'}",
        "",
        "## Measured",
        "",
        *_measured(facts),
        "",
        "## Load",
        "",
        _LOAD.replace("USE", _USE[task.name]).replace("NAME", name),
        plain,
        _TIMM.replace("NAME", name.removeprefix("hf:"))
        if "architecture" in config
        else "timm has no model of this kind.\n",
        "## Images",
        "",
        f"Resized and cut from the centre to {' x '.join(map(str, model.image_size))} pixels ({how.crop_fraction:g} of the "
        f"shorter side, {how.interpolation}); mean {list(how.mean)}, standard deviation {list(how.std)}.",
        "",
        "## Files",
        "",
        f"`{WEIGHTS}` holds the backbone under timm's names"
        + (f", `{REDUCER}` what the reducer has learned." if has_learned else "."),
        "",
    ]
    return "\n".join(lines)


def _front_matter(facts: Facts, task: Task) -> list[str]:
    tags = [tag.format(task=task.hub_tag) for tag in _TAGS]
    said: dict[str, Any] = {"library_name": "tif_jax", "tags": tags, "pipeline_tag": task.hub_tag}
    if facts.license:
        said["license"] = facts.license
    if facts.base_model.startswith("hf:"):
        said["base_model"] = facts.base_model.removeprefix("hf:").partition("@")[0]
    return front_matter(said)


def front_matter(said: Mapping[str, Any]) -> list[str]:
    """Lines that hubs read at the head of a card. Values are JSON, which is YAML, too."""
    return ["---", *(f"{name}: {json.dumps(value)}" for name, value in said.items()), "---", ""]


def _title(model: Model, reducer: Mapping[str, Any]) -> str:
    return (
        f"{type(model).__name__} with the reducer `{reducer['name']}`"
        if reducer["name"] != "full"
        else type(model).__name__
    )


def _sentence(model: Model, reducer: Mapping[str, Any], options: str, task: Task) -> str:
    count = cost(model)
    kept = (
        f"Its reducer is `{reducer['name']}`{f' ({options})' if options else ''}. " if reducer["name"] != "full" else ""
    )
    classes = "" if task is DEPTH else f" and {model.num_classes} classes"
    most = getattr(model, "max_depth", None)  # metres
    depths = f" It says how far each pixel is, up to {most:g} m." if task is DEPTH else ""
    return (
        f"{kept}It has {count.parameters / 1e6:.3g} million parameters{classes}, and takes "
        f"{count.gmac:.3g} GMAC (10⁹ multiply-adds) an image.{depths}"
    )


def _weights(facts: Facts) -> str:
    if not facts.base_model:
        return "random ones, or not known"
    name, _, revision = facts.base_model.removeprefix("hf:").partition("@")
    return f"`{name}`" + (f", commit `{revision}`" if revision else "")


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return "not known"
    named = data.get("tfds_name") or data.get("root") or data["name"]
    train, test, kept = (data.get(key) for key in ("train_split", "test_split", "test_fraction"))
    splits = f"trained on `{train}`, tested on `{test}`"
    if train == test:
        splits = f"{kept:.0%} of each class kept for the test, the rest trained on" if kept else "trained and tested on"
    return f"`{named}` ({data['name']}), {splits}. They are not part of this folder."


def _measured(facts: Facts) -> list[str]:
    if not facts.measured:
        return ["Nothing is known: no run's figures belong to these weights."]
    by = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    table = ["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in facts.measured)]
    return table + (["", f"With {by}."] if by else [])
