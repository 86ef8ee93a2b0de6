"""What a dense model has to beat: predictions that are the same for every picture, read off the training label maps.

They need sums over the maps alone, so that a data set streams through.

Legend: B images, Y X height and width in pixels, L classes.
"""

import numpy as np
from jaxtyping import Float, Int, Num

from tif_jax import tasks
from tif_jax.dense_losses import valid_depth
from tif_jax.errors import InputError

Sums = dict[str, Num[np.ndarray, "Y X ..."]]


def sums_of_depth(maps: Float[np.ndarray, "B Y X"], cap: float) -> Sums:
    """Per pixel `total`, metres, and `number` of the depths that were measured and are at most `cap` metres."""
    valid = np.asarray(valid_depth(maps, cap))
    return {"total": np.where(valid, maps, 0).sum(axis=0, dtype=np.float64), "number": valid.sum(axis=0)}


def sums_of_classes(maps: Int[np.ndarray, "B Y X"], num_classes: int) -> Sums:
    """Per pixel, how often it is labelled with each class: `number`, (Y, X, L)."""
    counts = [(maps == each).sum(axis=0, dtype=np.int32) for each in range(num_classes)]
    return {"number": np.stack(counts, axis=-1)}


def predictions(task: tasks.Task, sums: Sums) -> dict[str, Num[np.ndarray, "Y X ..."]]:
    """By their names, what is predicted of every picture: metres, or logits of the classes (0, and 1 for the class).

    sums: the above, added up over the training images. Raises InputError if no pixel of them has a label.
    """
    if not sums["number"].any():
        raise InputError(
            "no pixel of the training label maps counts; are data.label_folder and data.label_scale theirs?"
        )
    if task is tasks.DEPTH:
        return {"mean depth map": mean_map(**sums), "linear fit on position": linear_fit(**sums)}
    return {"most frequent class per pixel": most_frequent(**sums)}


def mean_map(total: Float[np.ndarray, "Y X"], number: Int[np.ndarray, "Y X"]) -> Float[np.ndarray, "Y X"]:
    """The mean depth of each pixel; where none was measured, that of all pixels."""
    return np.where(number > 0, total / np.maximum(number, 1), total.sum() / number.sum())


def linear_fit(total: Float[np.ndarray, "Y X"], number: Int[np.ndarray, "Y X"]) -> Float[np.ndarray, "Y X"]:
    """The least-squares fit of all depths by a row + b column + c."""
    rows, columns = (
        (np.arange(size) + 0.5) / size for size in total.shape
    )  # scaled, which changes nothing but rounding
    place = np.stack(np.broadcast_arrays(rows[:, None], columns[None], np.ones((1, 1))), axis=-1)  # (Y, X, 3)
    normal = np.einsum("yxi,yxj,yx->ij", place, place, number, optimize=True)
    moment = np.einsum("yxi,yx->i", place, total)
    return place @ np.linalg.lstsq(normal, moment, rcond=None)[0]


def most_frequent(number: Int[np.ndarray, "Y X L"]) -> Float[np.ndarray, "Y X L"]:
    """1 for the class that each pixel has most often, else 0; of an unlabelled pixel, that of all pixels."""
    overall = number.sum(axis=(0, 1)).argmax()
    chosen = np.where(number.any(axis=-1), number.argmax(axis=-1), overall)
    return np.eye(number.shape[-1], dtype=np.float32)[chosen]
