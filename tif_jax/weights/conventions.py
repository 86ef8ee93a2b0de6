"""What names and shapes of a file leave open, and timm's own models decide: heads, pooling, kind of activation.

timm builds a model by its name and then fills in the weights. A file without that name is read as the model of timm's that
it looks like. Where it looks like none, or like several that differ, an error asks.
"""

import logging
from collections.abc import Mapping
from typing import Any

from tif_jax.errors import InputError
from tif_jax.models.names import SIZES, TANH
from tif_jax.weights.layout import Tensors

logger = logging.getLogger(__name__)

# (width, depth) -> heads of the models that are read, but DINOv2's giant, which has 24 heads.
NUM_HEADS = {
    (64, 6): 2, (64, 8): 2, (192, 12): 3, (256, 10): 4, (256, 14): 4, (320, 14): 5, (384, 12): 6, (384, 36): 6, (512, 12): 8,
    (512, 20): 8, (640, 12): 10, (768, 12): 12, (832, 21): 13, (896, 12): 14, (896, 18): 14, (1024, 24): 16,
    (1152, 27): 16, (1280, 32): 16, (1408, 40): 16, (1536, 40): 16, (1664, 48): 16,
}  # fmt: skip
# The same by (patch size, width): files have no names.
_TANH = {(patch_size, SIZES[size]["width"]) for size, patch_size in TANH}
_LARGE, _LARGE_TANH_ROWS = (16, 1024), 32 * 32
# (widths, depths) of the LeViTs that timm builds with SiLU, and of those with Hardswish, the paper's.
_SILU = {((256, 384, 512), (4, 8, 6)), ((512, 768, 1024), (4, 4, 4)), ((512, 640, 768), (4, 8, 6))}
_HARD_SWISH = {
    ((128, 256, 384), (2, 3, 4)),
    *((widths, (4, 4, 4)) for widths in ((128, 256, 384), (192, 288, 384), (256, 384, 512), (384, 512, 768))),
}
_POOLS = "'class' (timm: token), 'mean' (avg with fc_norm) or 'normed_mean' (avg with fc_norm=False)"
_CLIP_EPS = 1e-5
# (width, depth) of the CLIPs that there are with either activation; outputs of timm's classifiers made of those with GELU.
_EITHER_GELU = {(768, 12), (1024, 24), (1280, 32), (1664, 48)}
_CLASSIFIERS = (1000, 11821, 21841)


def for_vit(tensors: Tensors, known: Mapping[str, Any]) -> dict[str, Any]:
    """num_heads, pool, gelu and norm_eps of a ViT, those that are not known. known: its fields so far, and those given.

    Raises InputError where timm has no such model, or two that differ.
    """
    found: dict[str, Any] = {}
    # SigLIP, I-JEPA and timm's first without class token.
    averaged = not known["class_token"] and "norm.weight" in tensors
    if "num_heads" not in known:
        found["num_heads"] = _num_heads(tensors, known, averaged)
    if "pool" not in known:
        found["pool"] = _pool(tensors, known["width"], averaged)
        if found["pool"] == "mean" and known["class_token"]:
            logger.warning(
                "the file has a class token and fc_norm: pool 'mean' is assumed; give pool='class' if it has that"
            )
    if "gelu" not in known and averaged:
        size, rows = (known["patch_size"], known["width"]), tensors["pos_embed"].shape[1]
        tanh = size in _TANH or (size == _LARGE and rows >= _LARGE_TANH_ROWS)
        found["gelu"] = "tanh" if tanh else "exact"
    if known["pre_norm"] and "gelu" not in known:
        found["gelu"] = _gelu_of_clip(tensors, known)
    if known["pre_norm"] and "norm_eps" not in known and known["special_positions"]:
        found["norm_eps"] = _CLIP_EPS
    if found:
        logger.info("%s: what timm's models of this form have, for the file does not say it", _listed(found))
    return found


def _pool(tensors: Tensors, width: int, averaged: bool) -> str:
    if "attn_pool.latent" in tensors:
        return "attention"
    if "head.weight" in tensors and tensors["head.weight"].shape[1] == 2 * width:
        return "class_and_mean"
    return "normed_mean" if averaged else "mean" if "fc_norm.weight" in tensors else "class"


def _gelu_of_clip(tensors: Tensors, known: Mapping[str, Any]) -> str:
    """The activation of a CLIP tower. Raises InputError where there are towers of both kinds."""
    is_classifier = "head.weight" in tensors and tensors["head.weight"].shape[0] in _CLASSIFIERS
    if known["special_positions"] and (known["width"], known["depth"]) in _EITHER_GELU and not is_classifier:
        raise InputError(
            "the file does not say whether this is a CLIP with QuickGELU (OpenAI's, DFN's, MetaCLIP's) or with GELU "
            "(LAION's, DataComp's); give gelu='quick' or gelu='exact', or a config.json beside the file that says it"
        )
    return "exact"


def for_levit(known: Mapping[str, Any]) -> dict[str, Any]:
    """The activation of a LeViT, if it is not known."""
    if "activation" in known:
        return {}
    shape = (tuple(known["widths"]), tuple(known["depths"]))
    activation = "silu" if shape in _SILU else "hard_swish"
    if shape not in _SILU | _HARD_SWISH:
        logger.warning(
            "a LeViT of widths %s and depths %s is none of timm's: activation %r, the paper's, is assumed; give activation= "
            "if it was trained with another",
            *shape,
            activation,
        )
    return {"activation": activation}


def pool_fits(pool: str, tensors: Tensors) -> None:
    """Raises InputError if the head of these tensors was not trained with this pooling."""
    norm = "fc_norm" if "fc_norm.weight" in tensors else "norm"
    if "attn_pool.latent" in tensors:
        if pool != "attention":
            raise InputError(
                f"pool {pool!r} does not go with this head, which has attention pooling before it; leave it out"
            )
    elif pool not in {"fc_norm": ("class", "mean"), "norm": ("class", "normed_mean", "class_and_mean")}[norm]:
        raise InputError(
            f"pool {pool!r} does not go with this head, which has {norm}.* before it; pool is {_POOLS}; give another "
            "num_classes to start a fresh head"
        )


def _num_heads(tensors: Tensors, known: Mapping[str, Any], averaged: bool) -> int:
    width, depth = known["width"], known["depth"]
    ask = "the file does not say the number of heads; give num_heads, or a config.json beside the file that says it"
    if width == 1536 and known["swiglu"]:
        return 24  # DINOv2's giant
    if (width, depth) not in NUM_HEADS or (width == 1536 and known["class_token"]):
        raise InputError(f"{depth} blocks of width {width} are none of timm's sizes, and {ask}")
    if width == 384 and known["class_token"] and not tensors["pos_embed"][0, 0].any():
        raise InputError(
            f"a class token without position at width 384 is MoCo v3's (12 heads) or a masked autoencoder's (6), and {ask}"
        )
    is_either = width == 768 and averaged and known["patch_size"] == 16 and "attn_pool.latent" not in tensors
    if is_either and "head.weight" in tensors:
        raise InputError(
            f"without class token and fc_norm this is SigLIP's (12 heads) or vit_base_patch16_gap's (16): {ask}"
        )
    return NUM_HEADS[width, depth]


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in fields.items())
