"""What the parts of `tif compare` share: weights, pictures, what is kept, and the prediction with all tokens."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from tif_jax.commands._compare_kept import Kept
from tif_jax.commands._pictures import Pictures
from tif_jax.commands._weights import Weights
from tif_jax.errors import InputError
from tif_jax.impact.judge import Batch
from tif_jax.impact.paired import unreduced_logits
from tif_jax.runtime.progress import told

AT_ONCE = 4  # rows that see a batch of images which is read once


class Work:
    """Legend: E images, L classes."""

    def __init__(self, weights: Weights, pictures: Pictures, mesh: Mesh, kept: Kept):
        self.weights, self.pictures, self.mesh, self.kept = weights, pictures, mesh, kept

    @cached_property
    def whole(self) -> Float[np.ndarray, "E L"]:
        """Logits with all tokens. Finds out which images can be read: without it nothing is to be computed of them.

        Raises InputError if none can, or others than before.
        """
        whole, labels = unreduced_logits(self.weights.full, self.read("full"), self.mesh)
        if not len(labels):
            raise InputError("none of the images can be read")
        self.kept.begin(whole.argmax(axis=1), labels, self.pictures.ids)
        return whole

    def read(self, title: str) -> Iterator[Batch]:
        """Batches of the images that can be read, told as progress."""
        batches = self.pictures.batches()
        yield from told(batches, title, len(self.pictures))
        if batches.unreadable and "whole" in vars(self):
            raise InputError(
                f"{len(batches.unreadable)} of the images can not be read any more; run the same command again when they "
                "can, or with another --out"
            )
        self.pictures.leave_out(batches.unreadable)
