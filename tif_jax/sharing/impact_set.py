"""The impacts of a run as a data set: Parquet files that datasets, pandas, polars and DuckDB read, and a card for them."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tif_jax.impact.manifest import read_manifest
from tif_jax.impact.shards import iter_impact
from tif_jax.runtime import records
from tif_jax.runtime.version import __version__
from tif_jax.sharing.card import front_matter

_COLUMNS = {
    "index": "int64. Position of the image in the split, from 0",
    "view": "int32. 0: the evaluation view; above: augmented views, drawn from index and view alone",
    "id": "string. The image's path in the data set, or its TFDS id",
    "label": "int32. Its class, as an output of the network's head; -1: not known",
    "prediction": "int32. The class that the network predicts with all tokens",
    "loss": "float32, nats. Cross-entropy with the label, all tokens present; NaN where there is no label",
    "impact": "list of float32 or float16, nats. By how much the loss rises without the token, one number per patch token",
}
_OF_MAPS = {  # where the network says something of every pixel
    "label": "int32. -1: there is a label map, which is not included",
    "prediction": "int32. -1",
    "loss": "float32. That of the label map, all tokens present; NaN where it has no pixel that counts",
    "impact": "list of float32 or float16. By how much the loss rises without the token, one number per patch token",
}
_TARGETS = {
    "label": "cross-entropy with the true class",
    "teacher": "Kullback-Leibler divergence from the network's own prediction with all tokens; no label is read",
}


def contents_of(source: Path, license: str = "", name: str = "hf:OWNER/NAME") -> dict[str, bytes | Path]:
    """The files of the data set by name: bytes, or the file to copy. source: a workdir or its impact folder.

    Every part is read and verified. Raises InputError for parts that are missing or damaged.
    """
    directory = source / "impact" if (source / "impact").is_dir() else source
    manifest = read_manifest(directory)
    rows = sum(len(part.index) for part in iter_impact(directory))
    found: dict[str, bytes | Path] = {f"data/{part.name}": part for part in sorted(directory.glob("part-*.parquet"))}
    said = {key: value for key, value in manifest.items() if key != "format_version"}
    found["manifest.json"] = records.text(manifest)
    found["README.md"] = _card(said, rows, license, name.removeprefix("hf:")).encode()
    return found


def _card(manifest: Mapping[str, Any], rows: int, license: str, name: str) -> str:
    data, estimator = manifest["data"], dict(manifest["estimator"])
    options = ", ".join(f"{key} {value}" for key, value in estimator.items() if key != "name")
    size, how = manifest["image_size"], manifest["preprocessing"]
    grid = " x ".join(map(str, _grid(size, manifest["num_tokens"])))
    images = data.get("tfds_name") or data["name"]
    is_dense = "loss" in manifest
    unit = "that of the loss" if is_dense else "nats"
    loss = manifest["loss"] if is_dense else _TARGETS[manifest["target"]]
    lines = [
        *_front_matter(data.get("split", "train"), license),
        "# Impact of patch tokens",
        "",
        f"How much each of {manifest['num_tokens']} patch tokens ({grid}, row by row from the top left) matters to a Vision "
        f"Transformer: for {manifest['num_images']} images of `{images}`, split `{data.get('split')}`, in "
        f"{manifest['views']} view(s) each. {rows} rows, by tif_jax {__version__}.",
        "",
        f"**Sign**: positive means that the token helps, for without it the loss is higher. **Unit**: {unit}.",
        "",
        "| column | what |",
        "|---|---|",
        *(f"| `{column}` | {what} |" for column, what in (_COLUMNS | (_OF_MAPS if is_dense else {})).items()),
        "",
        "## How it was measured",
        "",
        f"* Loss: {loss}.",
        f"* Estimator: `{estimator['name']}` ({options}); a masked token is treated as `{manifest['mask']}`.",
        f"* Network: the backbone whose parameters have the sha256 `{manifest['backbone']}`; its images are "
        f"{size[0]} x {size[1]} pixels, mean {how.get('mean')}, standard deviation {how.get('std')}.",
        f"* Images: {_fingerprint(data)}. **They are not included** and have a licence of their own.",
        f"* Licence of the numbers: {license or 'not stated here'}.",
        "",
        "All of this, for programs: `manifest.json`. What impact is: Wang et al., [arXiv 2305.14840](https://arxiv.org/abs/2305.14840).",
        "",
        "## Read",
        "",
        "```python",
        "import pandas",
        "",
        'table = pandas.read_parquet("data")  # in this folder; one row per image and view',
        f'# datasets.load_dataset("{name}"), or duckdb.sql("FROM \'data/*.parquet\'")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(split: str, license: str) -> list[str]:
    named = split if re.fullmatch(r"\w+", split) else "train"
    said: dict[str, Any] = {
        "tags": ["tif_jax", "vision-transformer", "token-impact"],
        "pretty_name": "Impact of patch tokens",
    }
    said |= {"license": license} if license else {}
    said["configs"] = [{"config_name": "default", "data_files": [{"split": named, "path": "data/part-*.parquet"}]}]
    return front_matter(said)


def _grid(size: list[int], num_tokens: int) -> tuple[int, int]:
    """Rows and columns of the patches, which are squares."""
    side = math.sqrt(size[0] * size[1] / num_tokens)
    return round(size[0] / side), round(size[1] / side)


def _fingerprint(data: Mapping[str, Any]) -> str:
    if data.get("examples"):
        return f"names, order and labels have the sha256 `{data['examples']}`"
    return "their names are in `id`"
