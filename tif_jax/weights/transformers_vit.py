"""The names of HF transformers for ViT, DeiT, DINOv2, CLIP's and SigLIP's vision towers, translated to timm's.

Of what timm has no name for, it does what the class of transformers does: see `to_timm`.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tif_jax.errors import InputError
from tif_jax.weights.layout import Tensors, shortened

logger = logging.getLogger(__name__)

_PATCHES = re.compile(r"(?P<tower>(.+\.)?)embeddings\.patch_embeddings?(\.projection)?\.weight")
_IN_BLOCK = re.compile(r"(encoder\.)?layers?\.(?P<number>\d+)\.(?P<module>.+)")
# Names in the tower, and timm's. Versions of transformers differ in names: those of a line mean one thing.
_MODULES = {
    "cls_token": "embeddings.cls_token embeddings.class_embedding",
    "dist_token": "embeddings.distillation_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embeddings.projection embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "norm": "layernorm post_layernorm",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}
_BLOCKS = {
    "norm1": "layernorm_before layer_norm1 norm1",
    "norm2": "layernorm_after layer_norm2 norm2",
    "attn.q": "attention.attention.query attention.q_proj self_attn.q_proj",
    "attn.k": "attention.attention.key attention.k_proj self_attn.k_proj",
    "attn.v": "attention.attention.value attention.v_proj self_attn.v_proj",
    "attn.proj": "attention.output.dense attention.o_proj self_attn.out_proj",
    "mlp.fc1": "intermediate.dense mlp.fc1",
    "mlp.fc2": "output.dense mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_HEADS = {
    "head": "classifier cls_classifier visual_projection",
    "head_dist": "distillation_classifier",
}
_TEXT = re.compile(r"(text_model\.|text_projection\.|logit_(scale|bias)$)")  # the other half of a CLIP or SigLIP


def _by_theirs(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: timms for timms, names in table.items() for theirs in names.split()}


_TOWER, _BLOCK, _HEAD = _by_theirs(_MODULES), _by_theirs(_BLOCKS), _by_theirs(_HEADS)


def is_transformers(tensors: Tensors) -> bool:
    return any(_PATCHES.fullmatch(name) for name in tensors)


def to_timm(tensors: Tensors) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The vision tower's tensors by timm's names, and fields that transformers has for them unless a config says otherwise.

    The pooler of ViT and DeiT is left out, as their image classifiers do. Distillation tokens without a head of their own
    are registers: they are attended to and not read. CLIP's visual projection is a head without bias; SigLIP's image
    classifier reads the mean of the tokens and leaves the attention pooling out. Of a whole CLIP the text tower is left out.
    Raises InputError for a layout that no model here computes.
    """
    prefix = next(match["tower"] for name in tensors if (match := _PATCHES.fullmatch(name)))
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if not _TEXT.match(name):
            found[_timms(name, prefix)] = tensor
    if "norm_pre.weight" in found and "classifier.weight" in tensors:
        raise InputError(
            "'classifier.weight' is CLIPForImageClassification's, which reads tokens before the last norm and is not "
            "supported; save the CLIPVisionModelWithProjection"
        )
    _reshape(found)
    _fuse(found)
    if pooler := [name for name in found if name.startswith("pooler.")]:
        logger.info("%s: left out, as image classifiers of transformers do", shortened(pooler))
    left_out = ["pooler."]
    if "head.weight" in found and "attn_pool.latent" in found:
        left_out.append("attn_pool.")
    if "dist_token" in found and "head_dist.weight" not in found:
        found["reg_token"] = found.pop("dist_token")
    found = {name: tensor for name, tensor in found.items() if not name.startswith(tuple(left_out))}
    return found, _defaults(tensors, found)


def _timms(name: str, prefix: str) -> str:
    """timm's name, or the name itself where there is none: what reads the tensors says that it has no place."""
    module, _, leaf = name.rpartition(".")
    if module in _HEAD:
        return f"{_HEAD[module]}.{leaf}"
    inside = name.removeprefix(prefix)
    table, before = _TOWER, ""
    if match := _IN_BLOCK.fullmatch(inside):
        table, before, inside = _BLOCK, f"blocks.{match['number']}.", match["module"]
    module, _, leaf = inside.rpartition(".")
    if inside in table:
        return before + table[inside]
    return f"{before}{table[module]}.{leaf}" if module in table else name.removeprefix(prefix)


def _reshape(found: dict[str, np.ndarray]) -> None:
    """Axes that timm has and transformers has not."""
    for name, rank in (("cls_token", 3), ("pos_embed", 3)):
        if name in found and 0 < found[name].ndim < rank:
            found[name] = found[name].reshape((1,) * (rank - found[name].ndim) + found[name].shape)
    if "head.weight" in found and "head.bias" not in found and found["head.weight"].ndim == 2:
        found["head.bias"] = np.zeros(len(found["head.weight"]), np.float32)


def _fuse(found: dict[str, np.ndarray]) -> None:
    """Queries, keys and values of blocks become one layer; those of the attention pooling, which are one, become two."""
    for name in [name for name in found if re.fullmatch(r"blocks\.\d+\.attn\.q\.(weight|bias)", name)]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in found and found[part].shape == found[name].shape for part in parts):
            found[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate([found.pop(part) for part in parts])
    for leaf in ("weight", "bias"):
        fused = found.pop(f"head.attention.in_proj_{leaf}", None)
        if fused is not None:
            width = len(fused) // 3
            found[f"attn_pool.q.{leaf}"], found[f"attn_pool.kv.{leaf}"] = fused[:width], fused[width:]


def _defaults(tensors: Tensors, found: Tensors) -> dict[str, Any]:
    """What the class of transformers has unless its config says otherwise. CLIPs with either activation are common."""
    if "norm_pre.weight" in found:
        return {"norm_eps": 1e-5}
    if "cls_token" not in found:
        # timm has another model with as many heads of another size where there is no attention pooling.
        return {"gelu": "tanh", "norm_eps": 1e-6} | ({"num_heads": 12} if found["pos_embed"].shape[-1] == 768 else {})
    dinov2 = any(name.endswith("layer_scale1.lambda1") for name in tensors)
    return {"gelu": "exact", "norm_eps": 1e-6 if dinov2 else 1e-12}
