"""Models by timm's names."""

import re
from typing import Any

from tif_jax.errors import InputError

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(width=192, depth=12, num_heads=3),
    "xsmall": dict(width=256, depth=10, num_heads=4),
    "small": dict(width=384, depth=12, num_heads=6),
    "medium": dict(width=512, depth=12, num_heads=8),
    "betwixt": dict(width=640, depth=12, num_heads=10),
    "base": dict(width=768, depth=12, num_heads=12),
    "base_plus": dict(width=896, depth=12, num_heads=14),
    "large": dict(width=1024, depth=24, num_heads=16),
    "so400m": dict(width=1152, depth=27, num_heads=16, mlp_dim=4304),
    "huge": dict(width=1280, depth=32, num_heads=16),
    "giant": dict(width=1408, depth=40, num_heads=16, mlp_dim=6144),
    "giantopt": dict(width=1536, depth=40, num_heads=16),
    "gigantic": dict(width=1664, depth=48, num_heads=16, mlp_dim=8192),
}
_SIZE = "(?P<size>" + "|".join(sorted((size for size in SIZES if "_" not in size), key=len, reverse=True)) + ")"
_PATCH, _IMAGE = r"_patch(?P<patch>\d+)", r"_(?P<image>\d+)"
_PLAIN = re.compile(rf"(?P<family>deit3|deit|vit)_{_SIZE}(?P<distilled>_distilled)?{_PATCH}{_IMAGE}")
_CLIP = re.compile(rf"vit_{_SIZE}{_PATCH}(?P<plus>_plus)?_clip(?P<quick>_quickgelu)?{_IMAGE}")
_SIGLIP = re.compile(rf"vit_{_SIZE}{_PATCH}_siglip(?P<gap>_gap)?{_IMAGE}")
_DINOV2 = re.compile(r"vit_(?P<size>small|base|large)_patch14(?P<registers>_reg4)?_dinov2")
_EVA02 = re.compile(rf"eva02_(?P<size>tiny|small|base|large)_patch14{_IMAGE}")
_DINOV3 = re.compile(r"vit_(?P<size>small|base|large)_patch16_dinov3")
# (size, patch size) of the SigLIPs to which timm gives the tanh approximation; the large one has it at 512 pixels.
TANH = {("base", 32), ("so400m", 16), ("giantopt", 16)}

LEVIT_SIZES: dict[str, dict[str, Any]] = {
    "128s": dict(widths=(128, 256, 384), depths=(2, 3, 4), num_heads=(4, 6, 8), key_dim=16),
    "128": dict(widths=(128, 256, 384), depths=(4, 4, 4), num_heads=(4, 8, 12), key_dim=16),
    "192": dict(widths=(192, 288, 384), depths=(4, 4, 4), num_heads=(3, 5, 6), key_dim=32),
    "256": dict(widths=(256, 384, 512), depths=(4, 4, 4), num_heads=(4, 6, 8), key_dim=32),
    "384": dict(widths=(384, 512, 768), depths=(4, 4, 4), num_heads=(6, 9, 12), key_dim=32, drop_path=0.1),
}
_LEVIT_NAME = re.compile(rf"(?P<evo>evo_)?levit_(?P<size>{'|'.join(LEVIT_SIZES)})")


def model_fields(name: str) -> dict[str, Any]:
    """Fields for a timm name such as 'deit_small_patch16_224', 'vit_base_patch16_siglip_224' or 'levit_128s'.

    num_classes is not among them: a name says the backbone, whatever head its weights were published with.
    'evo_levit_128s' is Evo-LeViT's variant of it: a class token, absolute positions; the reducer is a choice of its own.
    Raises InputError for other families.
    """
    if match := _LEVIT_NAME.fullmatch(name):
        evo = dict(positions="absolute", class_token=True) if match["evo"] else {}
        return dict(family="levit", **LEVIT_SIZES[match["size"]], **evo)
    forms = (
        (_PLAIN, _plain),
        (_CLIP, _clip),
        (_SIGLIP, _siglip),
        (_DINOV2, _dinov2),
        (_EVA02, _eva02),
        (_DINOV3, _dinov3),
    )
    for pattern, fields_of in forms:
        if (match := pattern.fullmatch(name)) and not name.startswith("deit3") * bool(
            match.groupdict().get("distilled")
        ):
            return fields_of(match)
    raise InputError(
        f"Unknown model {name!r}. Known: {{deit,deit3,vit}}_<size>_patch<P>_<image size>, "
        "deit_<size>_distilled_patch<P>_<image size>, vit_<size>_patch<P>{_clip,_clip_quickgelu,_siglip,_siglip_gap}_"
        "<image size>, vit_{small,base,large}_patch14{,_reg4}_dinov2, vit_{small,base,large}_patch16_dinov3, "
        "eva02_{tiny,small,base,large}_patch14_<image size>, "
        f"{{levit,evo_levit}}_{{{','.join(LEVIT_SIZES)}}}; sizes: {', '.join(size for size in SIZES if '_' not in size)}"
    )


def _sized(size: str, patch: int | str, image: int | str) -> dict[str, Any]:
    """What all have. An image size that patches do not divide leaves a border out, as timm does."""
    return dict(SIZES[size], patch_size=int(patch), image_size=int(image) // int(patch) * int(patch))


def _plain(match: re.Match[str]) -> dict[str, Any]:
    fields = dict(SIZES[match["size"]], patch_size=int(match["patch"]), image_size=int(match["image"]))
    if match["family"] == "deit3":
        fields |= dict(layer_scale=1e-6, special_positions=False)
    if match["distilled"]:
        fields |= dict(distillation_token=True)
    return fields


def _clip(match: re.Match[str]) -> dict[str, Any]:
    size = match["size"] + (match["plus"] or "")
    if size not in SIZES:
        raise InputError(f"Unknown model {match.string!r}: of CLIP's sizes base alone has a plus")
    return _sized(size, match["patch"], match["image"]) | dict(
        pre_norm=True, norm_eps=1e-5, gelu="quick" if match["quick"] else "exact"
    )


def _siglip(match: re.Match[str]) -> dict[str, Any]:
    tanh = (match["size"], int(match["patch"])) in TANH or (match["size"], match["image"]) == ("large", "512")
    return _sized(match["size"], match["patch"], match["image"]) | dict(
        class_token=False, pool="normed_mean" if match["gap"] else "attention", gelu="tanh" if tanh else "exact"
    )


def _dinov2(match: re.Match[str]) -> dict[str, Any]:
    registers = dict(num_registers=4, special_positions=False) if match["registers"] else {}
    return _sized(match["size"], 14, 518) | dict(layer_scale=1e-5, **registers)


def _eva02(match: re.Match[str]) -> dict[str, Any]:
    fields = _sized(match["size"], 14, match["image"])
    return fields | dict(
        pool="mean",
        mlp_dim=fields["width"] * 8 // 3,
        swiglu=True,
        mlp_inner_norm=match["size"] in ("base", "large"),
        rotary="eva02",
        rotary_grid=16,
    )


def _dinov3(match: re.Match[str]) -> dict[str, Any]:
    return _sized(match["size"], 16, 256) | dict(
        pool="normed_mean",
        num_registers=4,
        special_positions=False,
        absolute_positions=False,
        rotary="dinov3",
        qkv_bias=False,
        layer_scale=1e-5,
        norm_eps=1e-5,
    )
