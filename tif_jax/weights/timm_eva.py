"""timm's names for EVA, EVA-02, DINOv3 and its ViTs with rotary positions, as those of `timm_vit`; DINOv2's own SwiGLU, too.

What names and shapes leave open, the kind of rotary positions above all, is what timm's models of that form have.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tif_jax.errors import InputError
from tif_jax.weights import timm_vit
from tif_jax.weights.layout import Tensors

logger = logging.getLogger(__name__)

_MARKS = re.compile(r"\.attn\.(q_bias|q_proj\.)|\.gamma_1$|\.mlp\.(fc1_g|w12)\.")
_SAME = {  # a parameter of a block -> the name that timm_vit has for it
    "gamma_1": "ls1.gamma",
    "gamma_2": "ls2.gamma",
    "mlp.w12.weight": "mlp.fc1.weight",
    "mlp.w12.bias": "mlp.fc1.bias",
    "mlp.w3.weight": "mlp.fc2.weight",
    "mlp.w3.bias": "mlp.fc2.bias",
}
# Several parameters of a block -> the one that timm_vit has for them, in this order.
_JOINED: dict[tuple[str, ...], str] = {
    ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"): "attn.qkv.weight",
    ("mlp.fc1_g.weight", "mlp.fc1_x.weight"): "mlp.fc1.weight",
    ("mlp.fc1_g.bias", "mlp.fc1_x.bias"): "mlp.fc1.bias",
}
# Biases of queries -> of values; keys have none.
_BIASES = {"attn.q_bias": "attn.v_bias", "attn.q_proj.bias": "attn.v_proj.bias"}
_FIRST = 16  # rows and columns of EVA-02's first training, at 224 pixels
_HEADS = {1408: 16, 4096: 32} | {
    width: width // 64 for width in (192, 384, 512, 640, 768, 1024, 1280, 1536)
}  # by width
_POST_NORM = 1792  # width of EVA-02's enormous CLIP
_LINGBOT = 1536  # width of LingBot-Vision's giant, which DINOv3 has not
_SIZES = {"dinov3": 256, "rope_vit": 224, "eva02": 256}  # pixels, of models without position embedding
FREE = (*timm_vit.FREE, "rotary", "rotary_grid", "rotary_temperature")


def is_eva(tensors: Tensors) -> bool:
    """Whether some names are of this file's families."""
    return any(_MARKS.search(name) for name in tensors)


def infer_fields(tensors: Tensors, **given: Any) -> dict[str, Any]:
    """As `timm_vit.infer_fields`, with rotary positions. image_size: of a file without position embedding by timm's model."""
    said = {key: value for key, value in given.items() if value is not None}
    known = _known(tensors)
    if "pos_embed" not in tensors and "rotary" in known:
        known["image_size"] = _SIZES[known["rotary"]]
    if known.get("rotary") == "dinov3" and "blocks.0.attn.q_bias" in tensors and "pool" not in said:
        raise InputError(
            "the file does not say whether patches are averaged (timm's DINOv3) or the class token is taken (LingBot); "
            "give pool='normed_mean' or pool='class', or a config.json beside the file that says it"
        )
    if assumed := ", ".join(f"{key} {value!r}" for key, value in known.items() if key not in said):
        logger.info("%s: what timm's models of this form have, for the file does not say it", assumed)
    return timm_vit.infer_fields(_renamed(tensors), **known | said)


def to_params(tensors: Tensors, fields: Mapping[str, Any]) -> dict[str, Any]:
    """As `timm_vit.to_params`."""
    return timm_vit.to_params(_renamed(tensors), fields)


def to_tensors(params: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `to_params`. Raises InputError for keys that have learned a bias, where timm's have none."""
    tensors = timm_vit.to_tensors(params, fields)
    apart = bool(fields.get("mlp_inner_norm"))  # EVA-02's larger ones
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        block, _, leaf = name.partition(".attn.") if ".attn." in name else name.partition(".mlp.")
        if re.search(r"\.ls[12]\.gamma$", name):
            found[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)] = tensor
        elif leaf == "qkv.bias" and fields["rotary"] != "rope_vit":
            query, key, value = np.split(tensor, 3)
            if key.any():
                raise InputError("keys of EVA-02 and DINOv3 have no bias in timm, and these have learned one")
            names = ("q_proj.bias", "v_proj.bias") if apart else ("q_bias", "v_bias")
            found |= {f"{block}.attn.{part}": of for part, of in zip(names, (query, value), strict=True)}
        elif leaf == "qkv.weight" and apart:
            parts = zip("qkv", np.split(tensor, 3), strict=True)
            found |= {f"{block}.attn.{part}_proj.weight": of for part, of in parts}
        elif leaf.startswith("fc1.") and fields.get("swiglu") and (apart or fields["rotary"] == "dinov3"):
            gate, other = np.split(tensor, 2)
            kind = leaf.removeprefix("fc1.")
            found |= {f"{block}.mlp.fc1_g.{kind}": gate, f"{block}.mlp.fc1_x.{kind}": other}
        else:
            found[name] = tensor
    return {name: np.ascontiguousarray(tensor) for name, tensor in found.items()}


def _known(tensors: Tensors) -> dict[str, Any]:
    """Fields that timm's models of this form have. Raises InputError for those of other networks."""
    width = next((t.shape[0] for name, t in tensors.items() if name == "patch_embed.proj.weight"), 0)
    heads = {"num_heads": _HEADS[width]} if width in _HEADS else {}
    if "blocks.0.norm1.weight" in tensors and "blocks.0.norm1.bias" not in tensors:
        raise InputError("blocks.0.norm1 has no bias: an RMSNorm (Sapiens 2), which is not supported")
    if "blocks.0.ls1.gamma" in tensors:  # DINOv2
        return heads
    averaged = "fc_norm.weight" in tensors
    if "blocks.0.gamma_1" not in tensors:
        if width == _POST_NORM:
            raise InputError(
                f"this width, {width}, is of EVA-02's enormous CLIP, with norms behind, which is not supported"
            )
        pool = {"pool": "mean" if averaged else "class"}
        return heads | pool | ({"rotary": "eva02", "rotary_grid": _FIRST} if _has_swiglu(tensors) else {})
    if "blocks.0.attn.qkv.bias" in tensors:
        return heads | {"rotary": "rope_vit", "pool": "mean" if averaged else "class"}
    if "cls_token" not in tensors:  # timm's own, with registers
        return heads | {"rotary": "eva02", "rotary_grid": _FIRST, "pool": "mean"}
    pool = {"pool": "class" if width == _LINGBOT else "normed_mean"}
    return heads | pool | {"rotary": "dinov3", "norm_eps": 1e-5}


def _has_swiglu(tensors: Tensors) -> bool:
    if "blocks.0.mlp.fc1_g.weight" in tensors:
        return True
    up, down = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    return up is not None and down is not None and up.shape[0] == 2 * down.shape[-1]


def _renamed(tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors by the names that timm_vit reads. What lacks a part to be joined with keeps its name, and is refused."""
    found = dict(tensors)
    for name in tensors:
        match = re.match(r"(blocks\.\d+\.)(.*)", name)
        front, leaf = (match[1], match[2]) if match else ("", name)
        parts = next((parts for parts in _JOINED if parts[0] == leaf), ())
        if match and leaf in _SAME:
            found[front + _SAME[leaf]] = found.pop(name)
        elif parts and all(front + part in tensors for part in parts):
            found[front + _JOINED[parts]] = np.concatenate([found.pop(front + part) for part in parts])
        elif match and leaf in _BIASES and front + _BIASES[leaf] in tensors:
            query, value = found.pop(name), found.pop(front + _BIASES[leaf])
            found[front + "attn.qkv.bias"] = np.concatenate([query, np.zeros_like(query), value])
    return found
