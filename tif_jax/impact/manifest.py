"""The manifest of a folder of impact shards: what was scored and how. It makes the parts of the folder belong together."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, get_origin, get_type_hints

from tif_jax.errors import InputError
from tif_jax.runtime import files, records

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # 1 had no sha256

_NAME = "manifest.json"
_BEGUN = ".part-*.begun"  # rows so far of parts (`shards.write_begun`)
_MAX_EXAMPLES, _MAX_TOKENS = 10**10, 10**6  # examples: and views of them. Both are far above what there is
_RESTART = "choose another --workdir, or delete that folder and run `tif score`"


class Manifest(TypedDict):
    """What makes the parts of one folder belong together. Plain JSON data."""

    num_examples: int
    num_images: int  # how many of the examples are scored, evenly spaced
    num_tokens: int  # patch tokens of an image
    views: int  # views of each example; view 0 is the evaluation view
    num_parts: int
    estimator: dict[str, Any]  # {"name": ..., and its options}
    mask: str
    target: str
    data: dict[str, Any]  # which images, by what decides on their order; "split" of them
    image_size: list[int]
    preprocessing: dict[str, Any]
    backbone: str  # `models.params.backbone_digest`
    versions: dict[str, str]
    model: NotRequired[dict[str, Any]]  # the backbone's fields; folders from before 2026-12 do not have them
    task: NotRequired[str]  # of the backbone, if it is no classifier
    loss: NotRequired[str]  # then: what impact is the change of (`objective.described`)


def is_claimed(directory: str | os.PathLike[str]) -> bool:
    """Whether a job has begun in the directory."""
    return (Path(directory) / _NAME).exists()


def as_known_there(manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """What is expected of a manifest, without what those of its time did not say."""
    return {key: value for key, value in expected.items() if key != "model" or key in manifest}


def open_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> None:
    """Claims `directory` for the job that `manifest` describes, or verifies that it is this job's already.

    Of several starters one writes the manifest and the others verify it. Raises InputError if the folder belongs to
    another job; other versions of the software are only warned about.
    """
    directory = Path(directory)
    ours = {"format_version": FORMAT_VERSION, **manifest}
    # Looked for before the manifest, which is older than its parts and the rows of a part that was begun.
    has_parts, begun = any(directory.glob("part-*")), [*directory.glob(_BEGUN)]
    if not is_claimed(directory):
        if has_parts:
            raise InputError(f"{directory} holds parts of unknown origin: it has no {_NAME}; {_RESTART}")
        for rows in begun:  # of another job, whose manifest was deleted
            rows.unlink(missing_ok=True)
        files.write(directory / _NAME, records.text(ours), once=True)
    there = read_manifest(directory)
    different = records.differences(there, as_known_there(there, ours))
    versions = {key: values for key, values in different.items() if key.startswith("versions.")}
    if len(different) > len(versions):
        raise InputError(f"{directory} holds other impacts: {_listed(different)}; {_RESTART}")
    if versions:
        logger.warning("%s was begun with other versions: %s", directory, _listed(versions))


def read_manifest(directory: Path, expected: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The folder's manifest. Raises InputError if there is none, if it is damaged, or if it lacks the `expected` entries."""
    path = directory / _NAME
    if not path.is_file():
        raise InputError(f"{directory} holds no impact shards: it has no {_NAME}; run `tif score` first")
    text = files.read(path)
    try:
        manifest = records.opened(json.loads(text))
        known = manifest["format_version"] == FORMAT_VERSION and _is_sound(manifest)
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise InputError(f"{path} is damaged or not of format_version {FORMAT_VERSION}; {_RESTART}")
    different = records.differences(manifest, as_known_there(manifest, expected or {}))
    if different := {key: (there, here) for key, (there, here) in different.items() if here is not None}:
        raise InputError(f"impact in {directory} does not match: {_listed(different)}; {_RESTART}")
    return manifest


def _is_sound(manifest: Mapping[str, Any]) -> bool:
    """Whether every entry is of its type, and the numbers fit each other: what is read by them must not be without end."""
    for name, kind in get_type_hints(Manifest).items():
        if name in Manifest.__optional_keys__ and name not in manifest:
            continue
        kind = get_origin(kind) or kind
        if type(manifest[name]) is not kind or (kind is int and manifest[name] < 1):
            return False
    num_images, num_rows = manifest["num_images"], manifest["num_images"] * manifest["views"]
    return (
        num_images <= manifest["num_examples"] <= _MAX_EXAMPLES
        and manifest["num_parts"] <= num_rows <= _MAX_EXAMPLES
        and manifest["num_tokens"] <= _MAX_TOKENS
    )


def _listed(different: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} is {there!r} there, {here!r} here" for key, (there, here) in sorted(different.items()))
