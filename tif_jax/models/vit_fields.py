"""Which fields of a ViT go together."""

from collections.abc import Collection

from tif_jax.errors import InputError
from tif_jax.models.model import height_and_width


def checked_size(size: int | tuple[int, int], patch_size: int, width: int, num_heads: int) -> tuple[int, int]:
    """Height and width of images. Raises InputError where patches do not fit into them, or heads into the width."""
    height, columns = height_and_width(size)
    if height % patch_size or columns % patch_size:
        raise InputError(
            f"image_size {height}x{columns} is not a multiple of patch_size {patch_size} in both directions"
        )
    if width % num_heads:
        raise InputError(f"width {width} is not a multiple of num_heads {num_heads}")
    return height, columns


def chosen_blocks(given: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The blocks whose features a decoder reads."""
    if given is None and depth < 4:
        raise InputError(
            f"depth is {depth}, too few for a block of each quarter; give decoder='linear' and decoder_blocks"
        )
    chosen = tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)) if given is None else given
    if not chosen or list(chosen) != sorted({*chosen}) or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise InputError(f"decoder_blocks is {chosen}; it lists blocks of 0..{depth - 1} in ascending order")
    return chosen


def check_names(**fields: tuple[str, Collection[str]]) -> None:
    """Raises InputError for a field whose value is none of those allowed. fields: of each both."""
    for name, (value, allowed) in fields.items():
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def check_dense(task: str, num_classes: int, has_further_heads: bool) -> None:
    """Raises InputError for what a dense task does not have."""
    if has_further_heads:
        raise InputError(f"class_head and distillation_token are for classification; the task is {task!r}")
    if task == "segmentation" and num_classes < 2:
        raise InputError(f"num_classes is {num_classes}; segmentation tells two classes apart at least")
    if task == "depth" and num_classes:
        raise InputError(f"num_classes is {num_classes}; depth has none: leave it 0")


def check_heads(num_classes, pool, class_token, class_head, distillation_token) -> None:
    """Raises InputError for heads that do not fit the pooling."""
    if pool.startswith("class") and not class_token:
        raise InputError(f"pool {pool!r} needs class_token=True")
    if class_head and not (class_token and not pool.startswith("class") and num_classes):
        raise InputError(
            "class_head needs class_token=True and pool 'mean', 'normed_mean' or 'attention', and num_classes; otherwise "
            "the class token has the head"
        )
    if distillation_token and pool == "class_and_mean":
        raise InputError(
            "pool 'class_and_mean' does not go with a distillation token, whose head reads the token alone"
        )
