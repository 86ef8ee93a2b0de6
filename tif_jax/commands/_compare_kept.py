"""What `tif compare` keeps in its folder: finished rows in compare.json, what each says of every image in per_image.npz."""

import io
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from tif_jax import checked
from tif_jax.commands._compare_rows import Asked
from tif_jax.commands._pictures import Pictures
from tif_jax.commands._weights import Weights
from tif_jax.errors import InputError
from tif_jax.impact.paired import Terms, terms
from tif_jax.models.budget import Speed, read_budget
from tif_jax.runtime import files, log_file, records
from tif_jax.runtime.machine import machine
from tif_jax.training.checkpoints import identity, newest, read_config
from tif_jax.weights.where import checkpoint_directory, located

logger = logging.getLogger(__name__)

_JSON, _ARRAYS = "compare.json", "per_image.npz"
_REMEDY = "delete it, and all rows are made again"


class Kept:
    """data: the content of compare.json. Arrays have a row per image that could be read."""

    def __init__(self, folder: Path, made_with: dict[str, Any], about: dict[str, Any]):
        self.folder, self.data = folder, {"made_with": made_with, **about, "rows": {}, "speeds": {}}
        self.arrays: dict[str, np.ndarray] = {}

    def has(self, label: str, asked: Asked) -> bool:
        return self._row(label, asked) is not None

    def reducer_of(self, label: str, asked: Asked) -> dict[str, Any] | None:
        """Name and options of a kept row's reducer, with what its budget came to."""
        row = self._row(label, asked)
        return row and row["reducer"]

    def begin(self, whole: Int[np.ndarray, " E"], labels: Int[np.ndarray, " E"], ids: list[str]) -> None:
        """Notes the classes of the unreduced model. Raises InputError if other images could be read before."""
        if "ids" in self.arrays and ids != self.arrays["ids"].tolist():
            raise InputError(
                f"{self.folder}: other images can be read than before; choose another --out, or delete that one"
            )
        self.arrays |= {"ids": np.array(ids), "whole": whole.astype(np.int32), "label": labels.astype(np.int32)}
        self.data["images"]["num_read"] = len(ids)

    def add(self, row: dict[str, Any], classes: Int[np.ndarray, " E"], kl: Float[np.ndarray, " E"]) -> None:
        self.data["rows"][row["label"]] = row
        self.arrays.pop(f"regret/{row['label']}", None)
        self.arrays |= {f"class/{row['label']}": classes.astype(np.int32), f"kl/{row['label']}": kl.astype(np.float32)}

    def terms(self, label: str) -> Terms:
        """A number per image."""
        arrays = self.arrays
        return terms(arrays[f"class/{label}"], arrays[f"kl/{label}"], arrays["whole"], arrays["label"])

    def choose_oracle(self, num_samples: int) -> None:
        """Forgets what an oracle of another number of masks said."""
        if self.data.get("oracle_num_samples") != num_samples:
            self.data["oracle_num_samples"] = num_samples
            self.arrays = {name: x for name, x in self.arrays.items() if name.split("/")[0] not in ("impact", "regret")}

    @property
    def impact(self) -> Float[np.ndarray, "E N"] | None:
        return self.arrays.get("impact")

    @impact.setter
    def impact(self, value: Float[np.ndarray, "E N"]) -> None:
        self.arrays["impact"] = value.astype(np.float32)

    def regret(self, label: str) -> Float[np.ndarray, " E"] | None:
        return self.arrays.get(f"regret/{label}")

    def add_regrets(self, found: Mapping[str, Float[np.ndarray, " E"]]) -> None:
        self.arrays |= {f"regret/{label}": values.astype(np.float32) for label, values in found.items()}

    def has_speeds(self, size: int, labels: list[str], num_rounds: int) -> bool:
        found = self.data["speeds"].get(str(size))
        return found is not None and {*labels} <= {*found["of"]} and found["rounds"] >= num_rounds

    def add_speeds(self, size: int, found: dict[str, dict[str, Any]], num_rounds: int) -> None:
        self.data["speeds"][str(size)] = {"rounds": num_rounds, "of": found}

    def write(self) -> None:
        packed = io.BytesIO()
        np.savez_compressed(packed, **self.arrays)  # type: ignore[arg-type]
        files.write(self.folder / _ARRAYS, packed.getvalue())
        records.write(self.folder / _JSON, self.data)

    def _row(self, label: str, asked: Asked) -> dict[str, Any] | None:
        row = self.data["rows"].get(label)
        return row if row and row["asked"] == asked.key and f"kl/{label}" in self.arrays else None


def kept_in(folder: Path, weights: Weights, pictures: Pictures) -> Kept:
    """What is there of these weights and images. Raises InputError if the folder has a comparison of others."""
    made_with = {
        "weights": weights.digest,
        "images": pictures.fingerprint,
        "dtype": weights.dtype,
        "image_size": list(weights.full.image_size),
        "preprocessing": checked.to_json(vars(weights.full.preprocessing)),
    }
    there = records.read(folder / _JSON, _REMEDY)
    kept = Kept(folder, made_with, _about(weights, pictures))
    if there is None:
        return kept
    for key, (was, here) in records.differences(there["made_with"], made_with).items():
        what = "other " + key if key in ("weights", "images") else f"{key} {was!r}, not {here!r}"
        raise InputError(f"{folder} has a comparison with {what}; choose another --out, or delete that folder")
    same_place = {key: there.get(key) == kept.data[key] for key in ("device", "machine", "versions")}
    kept.data["images"]["num_read"] = there["images"].get("num_read")
    kept.data["oracle_num_samples"] = there.get("oracle_num_samples")
    kept.data["speeds"] = there["speeds"] if all(same_place.values()) else {}
    kept.arrays = _arrays(folder / _ARRAYS)
    rows = {label: row for label, row in there["rows"].items() if f"kl/{label}" in kept.arrays}
    forgotten = []
    if not all(same_place.values()):
        forgotten = sorted(label for label, row in rows.items() if not same_place["versions"] or _of_speed(row))
    if forgotten:
        logger.warning("of another machine, or by other versions; made again where asked for: %s", ", ".join(forgotten))
    kept.data["rows"] = {label: row for label, row in rows.items() if label not in forgotten}
    return kept


def _of_speed(row: dict[str, Any]) -> bool:
    """Whether its amount was found by time, on the device that there was."""
    return bool(row["budget"]) and isinstance(read_budget(row["budget"]), Speed)


def _about(weights: Weights, pictures: Pictures) -> dict[str, Any]:
    return {
        "command": log_file.command,
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "weights": {"source": weights.source, "digest": weights.digest, **_training(weights.read_from)},
        "images": {
            "folders": list(pictures.folders),
            "labels": pictures.labels,
            "fingerprint": pictures.fingerprint,
            "num_images": len(pictures),
        },
        "dtype": weights.dtype,
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        "machine": machine(),
        "versions": records.versions(),
    }


def _training(source: str) -> dict[str, Any]:
    """Of a checkpoint of ours: which step, and whether it was fine-tuned with labels."""
    path = located(source)
    if not path.is_dir():
        return {}
    stored = read_config(newest(checkpoint_directory(path)))
    made_from = (stored.get("made") or {}).get("made_from") or {}
    return {"checkpoint": identity(stored), "fine_tuned": "start" in made_from}


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """By name; none if there is no such file. Raises InputError if it is damaged."""
    if not path.exists():
        return {}
    try:
        with np.load(io.BytesIO(files.read(path)), allow_pickle=False) as found:
            return dict(found)
    except Exception as error:  # zip files have many ways to be damaged
        raise InputError(f"{path} is damaged ({type(error).__name__}); {_REMEDY}") from None
