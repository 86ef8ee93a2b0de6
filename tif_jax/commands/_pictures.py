"""The pictures of programs without a config: which, with which labels, and in batches as the model takes them."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32

from tif_jax.data.folder import table_labels
from tif_jax.data.listed import BY_FOLDER, open_listed
from tif_jax.data.loader import Batches, evaluation_batches
from tif_jax.data.options import DataOptions
from tif_jax.data.source import Source, Subset, evenly_spaced, fingerprint
from tif_jax.errors import InputError
from tif_jax.models import Model
from tif_jax.runtime.machine import num_cores
from tif_jax.runtime.progress import told

logger = logging.getLogger(__name__)

_BATCH_SIZE = 32  # of predictions


class Pictures:
    """Images with or without labels. Those that can not be read are left out once that is known."""

    def __init__(self, source: Source, ids: Sequence[str], model: Model, folders: Sequence[str], labels: str | None):
        how = vars(model.preprocessing)
        self.source, self.folders, self.labels = source, folders, labels
        self.options = DataOptions(image_size=model.image_size, on_error="skip", num_workers=num_cores(), **how)
        self.fingerprint = fingerprint(source)
        self.batch_size = -(-_BATCH_SIZE // jax.local_device_count()) * jax.local_device_count()
        self._ids, self._kept = list(ids), np.arange(len(source))

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def ids(self) -> list[str]:
        return [self._ids[i] for i in self._kept]

    def batches(self) -> Batches:
        """In order, the last one filled up."""
        records = np.stack([self._kept, np.zeros_like(self._kept)], axis=1)
        return evaluation_batches(self.source, self.options, batch_size=self.batch_size, records=records)

    def leave_out(self, unreadable: Mapping[int, str]) -> None:
        self._kept = np.array([i for i in self._kept if i not in unreadable], int)


def opened(
    folders: Sequence[str],
    labels: str | None,
    model: Model,
    class_index: Mapping[str, int] | None,
    num_images: int | None,
) -> Pictures:
    """class_index: None: the model's names of its classes, if it has any; a table's numbers are outputs then.

    Raises InputError for folders without images, and for labels that the model has no output for.
    """
    known, counts = model.class_names or (), Counter(model.class_names)
    # A name that two outputs have tells neither: of ImageNet two are called "crane".
    names = {name: i for i, name in enumerate(known) if name and counts[name] == 1}
    if labels is not None and labels != BY_FOLDER and all(label.isdecimal() for label in table_labels(labels)):
        names = {}
    whole = open_listed(folders, labels, model.num_classes, class_index or names or None)
    chosen = evenly_spaced(num_images or len(whole), len(whole))
    return Pictures(Subset(whole, chosen), [whole.ids[i] for i in chosen], model, folders, labels)


def read_all(pictures: Pictures) -> Float32[np.ndarray, "I Y X 3"]:
    """Those that can be read."""
    return np.concatenate(
        [batch["image"][batch["weight"] > 0] for batch in told(pictures.batches(), "pictures", len(pictures))]
    )


def class_index_of(text: str | None) -> dict[str, int] | None:
    """--class-index: JSON, or the path of a file with it. Raises InputError for anything else."""
    if text is None:
        return None
    said = text
    if not text.lstrip().startswith("{"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise InputError(f"--class-index is {text!r:.200}; it is JSON as in '{{\"cat\": 281}}', or a file with it")
        said = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(said)
    except ValueError as error:
        raise InputError(f"--class-index is no JSON: {error}") from None
    if not isinstance(found, dict) or not all(type(x) is int and x >= 0 for x in found.values()):
        raise InputError(
            f"--class-index is {said!r:.100}; it says which class is which output, as in '{{\"cat\": 281}}'"
        )
    return found
