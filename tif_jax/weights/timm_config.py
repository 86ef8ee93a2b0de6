"""config.json as timm writes and reads it: of which model the weights are, and how images are prepared for it."""

from collections.abc import Mapping
from typing import Any

from tif_jax import checked
from tif_jax.data.preprocess import Preprocessing
from tif_jax.models import with_defaults
from tif_jax.models.build import RUNNING_FIELDS
from tif_jax.models.model import height_and_width
from tif_jax.models.names import LEVIT_SIZES, SIZES

POOLS = {"class": "token", "mean": "avg", "normed_mean": "avg", "attention": "map"}
GELUS = {"exact": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}
_EPS, _CLIP_EPS = 1e-6, 1e-5  # timm's, which no argument in JSON changes, but its names of CLIPs do
# Fields of a ViT that arguments of timm's say, or that are of no account once it is trained.
_SAID = {
    "image_size", "patch_size", "width", "depth", "num_heads", "mlp_dim", "num_classes", "pool", "class_token",
    "distillation_token", "num_registers", "special_positions", "qkv_bias", "qk_norm", "layer_scale", "gelu", "pre_norm",
    "norm_eps",
}  # fmt: skip
_OF_NO_ACCOUNT = RUNNING_FIELDS | {"family", "class_head"}


def config_of(fields: Mapping[str, Any], how: Preprocessing, class_names: tuple[str, ...] | None) -> dict[str, Any]:
    """The content of config.json. `architecture` and `model_args` are in it where timm has a model of this kind."""
    fields = with_defaults(fields)
    height, columns = height_and_width(fields["image_size"])
    architecture, arguments = architecture_of(fields) or ("", {})
    levit = fields["family"] == "levit"
    width = fields["widths"][-1] if levit else fields["width"]
    weights = {
        "input_size": [3, height, columns],
        "fixed_input_size": True,
        "interpolation": how.interpolation,
        "crop_pct": how.crop_fraction,
        "crop_mode": "center",
        "mean": list(how.mean),
        "std": list(how.std),
        "num_classes": fields["num_classes"],
        "first_conv": "stem.conv1.linear" if levit else "patch_embed.proj",
        "classifier": _classifier(fields),
    }
    named = {"architecture": architecture} if architecture else {}
    config = named | {"num_classes": fields["num_classes"], "num_features": width}
    pool = "avg" if levit else POOLS.get(fields["pool"])
    config |= {"global_pool": pool} if pool else {}
    config |= {"model_args": arguments} if arguments else {}
    config |= {"pretrained_cfg": weights}
    return config | ({"label_names": list(class_names)} if class_names else {})


def architecture_of(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """timm's name and arguments for a model with these fields (`with_defaults`); None where timm has none."""
    return _levit(fields) if fields["family"] == "levit" else _vit(fields)


def _vit(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    default = with_defaults({"family": "vit"})
    if any(fields[name] != default[name] for name in fields.keys() - _SAID - _OF_NO_ACCOUNT):
        return None
    distilled, width = fields["distillation_token"], fields["width"]
    mlp_dim = fields["mlp_dim"] or 4 * width
    if fields["num_registers"] and fields["special_positions"]:  # timm gives registers positions then
        return None
    if distilled and not (fields["pool"] == "class" and fields["special_positions"]):
        return None
    clip = fields["pre_norm"] and fields["norm_eps"] == _CLIP_EPS
    if (
        not (clip or fields["norm_eps"] == _EPS)
        or int(width * (mlp_dim / width)) != mlp_dim
        or fields["pool"] not in POOLS
    ):
        return None
    shape = {name: fields[name] for name in ("width", "depth", "num_heads")}
    size = next((size for size in ("tiny", "small", "base", "large") if SIZES[size] == shape), "base")
    arguments = {
        "img_size": fields["image_size"],
        "patch_size": fields["patch_size"],
        "embed_dim": width,
        "depth": fields["depth"],
        "num_heads": fields["num_heads"],
        "mlp_ratio": mlp_dim / width,
        "class_token": fields["class_token"],
        "no_embed_class": not fields["special_positions"],
        "reg_tokens": fields["num_registers"],
        "qkv_bias": fields["qkv_bias"],
        "qk_norm": fields["qk_norm"],
        "global_pool": POOLS[fields["pool"]],
        "fc_norm": fields["pool"] == "mean",
        "act_layer": GELUS[fields["gelu"]],
        "pre_norm": fields["pre_norm"],
    }
    arguments |= {} if fields["layer_scale"] is None else {"init_values": fields["layer_scale"]}
    if clip:
        return "vit_base_patch16_clip_224", arguments
    return "deit_base_distilled_patch16_224" if distilled else f"vit_{size}_patch16_224", arguments


def _levit(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    shape = {name: checked.plain(fields[name]) for name in ("widths", "depths", "num_heads", "key_dim")}
    plain = fields["positions"] == "relative" and not fields["class_token"] and fields["activation"] == "hard_swish"
    for name, of_size in LEVIT_SIZES.items():
        if plain and shape == {key: of_size[key] for key in shape}:
            return f"levit_{name}", {"img_size": fields["image_size"], "distilled": fields["distillation_head"]}
    return None


def _classifier(fields: Mapping[str, Any]) -> str | list[str]:
    if fields["family"] == "levit":
        return ["head.linear", "head_dist.linear"] if fields["distillation_head"] else "head.linear"
    return ["head", "head_dist"] if fields["distillation_token"] else "head"
