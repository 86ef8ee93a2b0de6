"""Models by timm's names."""

import re
from typing import Any

from tif_jax.errors import InputError

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(width=192, depth=12, num_heads=3),
    "small": dict(width=384, depth=12, num_heads=6),
    "base": dict(width=768, depth=12, num_heads=12),
    "large": dict(width=1024, depth=24, num_heads=16),
}
_NAME = re.compile(
    r"(?P<family>deit3|deit|vit)_(?P<size>tiny|small|base|large)(?P<distilled>_distilled)?_patch(?P<patch>\d+)_(?P<image>\d+)"
)

LEVIT_SIZES: dict[str, dict[str, Any]] = {
    "128s": dict(widths=(128, 256, 384), depths=(2, 3, 4), num_heads=(4, 6, 8), key_dim=16),
    "128": dict(widths=(128, 256, 384), depths=(4, 4, 4), num_heads=(4, 8, 12), key_dim=16),
    "192": dict(widths=(192, 288, 384), depths=(4, 4, 4), num_heads=(3, 5, 6), key_dim=32),
    "256": dict(widths=(256, 384, 512), depths=(4, 4, 4), num_heads=(4, 6, 8), key_dim=32),
    "384": dict(widths=(384, 512, 768), depths=(4, 4, 4), num_heads=(6, 9, 12), key_dim=32, drop_path=0.1),
}
_LEVIT_NAME = re.compile(rf"(?P<evo>evo_)?levit_(?P<size>{'|'.join(LEVIT_SIZES)})")


def model_fields(name: str) -> dict[str, Any]:
    """Fields for a timm name such as 'deit_small_patch16_224' or 'levit_128s'. Raises InputError for other families.

    'evo_levit_128s' is Evo-LeViT's variant of it: a class token, absolute positions; the reducer is a choice of its own.
    """
    if match := _LEVIT_NAME.fullmatch(name):
        evo = dict(positions="absolute", class_token=True) if match["evo"] else {}
        return dict(family="levit", **LEVIT_SIZES[match["size"]], **evo)
    match = _NAME.fullmatch(name)
    if not match or (match["family"] == "deit3" and match["distilled"]):
        raise InputError(
            f"Unknown model {name!r}. Known: {{deit,deit3,vit}}_{{{','.join(SIZES)}}}_patch<P>_<image size>, "
            f"deit_<size>_distilled_patch<P>_<image size>, {{levit,evo_levit}}_{{{','.join(LEVIT_SIZES)}}}"
        )
    fields: dict[str, Any] = dict(SIZES[match["size"]], patch_size=int(match["patch"]), image_size=int(match["image"]))
    if match["family"] == "deit3":
        fields |= dict(layer_scale=1e-6, special_positions=False)
    if match["distilled"]:
        fields |= dict(distillation_token=True)
    return fields
