"""timm's (and so DeiT's and DINOv2's) names and layouts of ViT weights, translated to those of `tif_jax.models.ViT`."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx, traverse_util

from tif_jax.errors import InputError
from tif_jax.models import ViT
from tif_jax.models.model import height_and_width
from tif_jax.weights import conventions
from tif_jax.weights.layout import SAME, Rule, Rules, Tensors, Transform, modules, shortened, translate, translate_back

logger = logging.getLogger(__name__)


def _unfold(weight: np.ndarray) -> np.ndarray:
    """A convolution (D, 3, P, P) without overlap as a linear layer on patches flattened as (P, P, 3)."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]) if weight.ndim == 4 else weight


def _fold(kernel: np.ndarray) -> np.ndarray:
    """The convolution (D, 3, P, P) of a linear layer on patches."""
    side = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


_LINEAR = {"weight": Rule("kernel", Transform(np.transpose, np.transpose)), "bias": Rule("bias", SAME)}
_PATCHES = {"weight": Rule("kernel", Transform(_unfold, _fold)), "bias": Rule("bias", SAME)}
_NORM = {"weight": Rule("scale", SAME), "bias": Rule("bias", SAME)}

# timm's names -> our paths, of modules by what kind of layer they are, and of single parameters. {i} is a block's number.
_LINEARS = {
    "blocks.{i}.attn.qkv": "block_{i}/attention/qkv",
    "blocks.{i}.attn.proj": "block_{i}/attention/out",
    "blocks.{i}.mlp.fc1": "block_{i}/mlp/up",
    "blocks.{i}.mlp.fc2": "block_{i}/mlp/down",
    "attn_pool.q": "attention_pool/query",
    "attn_pool.kv": "attention_pool/key_value",
    "attn_pool.proj": "attention_pool/out",
    "attn_pool.mlp.fc1": "attention_pool/mlp/up",
    "attn_pool.mlp.fc2": "attention_pool/mlp/down",
    "head": "head",
    "head_dist": "distillation_head",
}
_NORMS = {
    "norm_pre": "pre_norm",
    "blocks.{i}.norm1": "block_{i}/attention_norm",
    "blocks.{i}.attn.q_norm": "block_{i}/attention/query_norm",
    "blocks.{i}.attn.k_norm": "block_{i}/attention/key_norm",
    "blocks.{i}.attn.norm": "block_{i}/attention/inner_norm",
    "blocks.{i}.mlp.norm": "block_{i}/mlp/inner_norm",
    "blocks.{i}.norm2": "block_{i}/feed_forward_norm",
    "norm": "norm",
    "attn_pool.norm": "attention_pool/norm",
    "fc_norm": "norm",  # instead of `norm`, with mean pooling
}
_PARAMETERS = {
    "cls_token": "class_token",
    "dist_token": "distillation_token",
    "reg_token": "register_tokens",
    "register_tokens": "register_tokens",  # in DINOv2's own files
    "pos_embed": "position_embedding",
    "attn_pool.latent": "attention_pool/latent",
    "blocks.{i}.ls1.gamma": "block_{i}/attention_scale",
    "blocks.{i}.ls2.gamma": "block_{i}/feed_forward_scale",
}
_REGISTERS = ("reg_token", "register_tokens")
_IGNORED = {"mask_token"}  # DINOv2 shows it in place of masked patches in pre-training only

_SAVE = "use a checkpoint of timm's ViT, DeiT, DINOv2, CLIP or SigLIP families, its state_dict() saved as .safetensors"
_FROM_TIMM = "use timm's conversion of the same weights: timm.create_model(..., pretrained=True).state_dict()"
_UNSUPPORTED = {  # pattern of a parameter's name: what it belongs to, the remedy
    r"(^|/)Transformer/encoderblock": ("the Flax layout (AugReg, big_vision)", _FROM_TIMM),
    r"(^|\.)encoder\.layers?\.|^embeddings\.": (
        "a layout of torchvision, or one of HF transformers that is not known",
        _FROM_TIMM,
    ),
    r"^visual\.|resblocks\.": ("the layout of CLIP", _FROM_TIMM),
    r"^(teacher|student|backbone|encoder|decoder)\w*\.": ("a whole training setup", "save its backbone alone"),
    r"^decoder": ("a masked autoencoder with its decoder", "save the encoder alone"),
    r"^blocks\.\d+\.\d+\.": ("DINOv2 in chunks of blocks", "save it with block_chunks=0"),
    r"\.(attn|mlp)\.inner_norm\.|lambda_": ("norms inside attention or feed-forward network", _SAVE),
    r"rope|freqs_cis": ("rotary positions with learned frequencies (rope_mixed)", _SAVE),
    r"relative_position|rel_pos": ("relative position bias (Swin, BEiT)", _SAVE),
    r"\.[qv]_bias$|\.[qkv]_proj\.|\.gamma_[12]$": ("the block of BEiT or CaiT", _SAVE),
    r"\.in_proj\.": ("attention and feed-forward network in parallel (ViT-22B)", _SAVE),
    r"running_mean|^stages\.|^layers?\.?\d|^features\.|^stem|^conv": ("a convolutional or Swin network", _SAVE),
    r"^patch_embed\.(?!proj\.(weight|bias)$)": ("a patch embedding of several layers (hybrid ViT)", _SAVE),
    r"^embeds\.": ("NaFlexViT", _SAVE),
    r"^pre_logits\.|^head\.\w+\.": ("a head of several layers", "remove it and give num_classes for a fresh one"),
}
_NEEDED = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "pos_embed")
_RANKS = dict(zip(_NEEDED, (4, 2, 2, 3), strict=True)) | {
    "blocks.0.attn.q_norm.weight": 1,
    "reg_token": 3,
    "register_tokens": 3,
    "head.weight": 2,
    "attn_pool.latent": 3,
}
# Fields that names and shapes may leave open.
FREE = ("image_size", "num_heads", "pool", "gelu", "norm_eps", "lean_last_block")
_LAYER_SCALE = 1e-5  # any number: the file's values replace it


def infer_fields(tensors: Tensors, **given: Any) -> dict[str, Any]:
    """Fields of `ViT` for a file's tensors; `given` fields override those that names and shapes cannot tell.

    These are image_size (what the position embedding was trained for: the one given if its raster fits, else a square;
    needed where neither fits), num_classes (needed without a head; 0 leaves it out), num_heads, pool, gelu and norm_eps
    (`conventions.for_vit`), drop_path. image_size is the file's in the result, whatever was given.
    Raises InputError for another architecture, by name, and for given fields that contradict the file.
    """
    _refuse_unsupported(tensors, _NEEDED[:-1] if given.get("rotary") else _NEEDED)
    width, patch_size = tensors["patch_embed.proj.weight"].shape[0], tensors["patch_embed.proj.weight"].shape[2]
    num_special, grid = _positions(tensors, given.get("image_size"), given.get("special_positions"))
    has_class, has_distillation = "cls_token" in tensors, "dist_token" in tensors
    qk_norm, mlp_dim = "blocks.0.attn.q_norm.weight" in tensors, tensors["blocks.0.mlp.fc2.weight"].shape[1]
    fields: dict[str, Any] = dict(
        patch_size=patch_size,
        width=width,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        mlp_dim=mlp_dim,
        swiglu=tensors["blocks.0.mlp.fc1.weight"].shape[0] == 2 * mlp_dim,
        attention_inner_norm="blocks.0.attn.norm.weight" in tensors,
        mlp_inner_norm="blocks.0.mlp.norm.weight" in tensors,
        absolute_positions="pos_embed" in tensors,
        class_token=has_class,
        distillation_token=has_distillation,
        num_registers=_num_registers(tensors),
        special_positions=num_special > 0 or not has_class,
        pre_norm="norm_pre.weight" in tensors,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        qk_norm=qk_norm,
        layer_scale=_LAYER_SCALE if "blocks.0.ls1.gamma" in tensors else None,
    )
    if qk_norm:
        fields["num_heads"] = width // tensors["blocks.0.attn.q_norm.weight"].shape[0]
    if contradicted := [f"{k}={v!r} (the file: {fields[k]!r})" for k, v in given.items() if _differs(k, v, fields)]:
        raise InputError(f"{', '.join(contradicted)} contradicts the weights; leave it out")
    fields |= conventions.for_vit(tensors, fields | given)
    if "head.weight" in tensors:
        fields["num_classes"] = tensors["head.weight"].shape[0]
    elif "num_classes" not in given:
        raise InputError(
            "the weights have no head (head.weight); give num_classes to start a fresh one, or num_classes=0 for a model "
            "that returns its features (a config.json beside the file may say it)"
        )
    side = grid[0] * patch_size
    own_size = side if grid[0] == grid[1] else (side, grid[1] * patch_size)
    return fields | given | {"image_size": own_size}


def _differs(key: str, given: Any, fields: Mapping[str, Any]) -> bool:
    """Whether what is given contradicts what the file says."""
    if key == "layer_scale":  # whose initial value no file says
        return (given is None) != (fields[key] is None)
    return key in fields and given != fields[key]


def to_params(tensors: Tensors, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The float32 parameters of a `ViT` with these fields (of `infer_fields`), as a nested dict.

    The heads are left out where the file has none or one for another num_classes. Raises InputError with all missing,
    surplus and misshapen tensors in one line.
    """
    _refuse_unsupported(tensors, _NEEDED if fields.get("absolute_positions", True) else _NEEDED[:-1])
    # One block stands for all, because tracing a deep model takes seconds.
    model = nnx.eval_shape(lambda: ViT(**{**fields, "depth": 1}, rngs=nnx.Rngs(0)))
    wanted = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep="/")
    block = {path.removeprefix("block_0/"): shape for path, shape in wanted.items() if path.startswith("block_0/")}
    wanted |= {f"block_{i}/{path}": shape for i in range(fields["depth"]) for path, shape in block.items()}
    heads = [path for path in wanted if re.match(r"(distillation_)?head/", path)]
    if "head.weight" not in tensors or tensors["head.weight"].shape[0] != model.num_classes:
        tensors = {name: tensor for name, tensor in tensors.items() if not re.match(r"head(_dist)?\.", name)}
        wanted = {path: shape for path, shape in wanted.items() if path not in heads}
    else:
        conventions.pool_fits(model.pool, tensors)
    tensors = _without_register_positions(tensors, model.num_positioned + math.prod(model.grid))
    return translate(tensors, _rules(fields["depth"]), wanted, _IGNORED)


def to_tensors(params: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: the parameters of a `ViT` with these fields under timm's names.

    Raises InputError for parameters that timm's ViTs do not have.
    """
    other_norm = "norm." if fields.get("pool", "class") == "mean" else "fc_norm."
    rules = {
        name: rule
        for name, rule in _rules(sum(name.startswith("block_") for name in params)).items()
        if not name.startswith(other_norm) and name != "register_tokens"
    }
    return translate_back(params, rules)


def _rules(depth: int) -> Rules:
    templates = modules({"patch_embed.proj": "patch_embedding"}, _PATCHES)
    templates |= modules(_LINEARS, _LINEAR) | modules(_NORMS, _NORM)
    templates |= {name: Rule(path, SAME) for name, path in _PARAMETERS.items()}
    return {
        name.format(i=i): Rule(rule.path.format(i=i), rule.transform)
        for name, rule in templates.items()
        for i in (range(depth) if "{i}" in name else [0])
    }


def _positions(
    tensors: Tensors, image_size: int | Sequence[int] | None, special_positions: bool | None
) -> tuple[int, tuple[int, int]]:
    """How many rows of the position embedding belong to special tokens, and the patch raster of the rest.

    The raster of image_size, if it fits, else a square.
    """
    patch_size = tensors["patch_embed.proj.weight"].shape[2]
    if "pos_embed" not in tensors:
        assert image_size is not None
        height, columns = height_and_width(image_size)
        return 0, (height // patch_size, columns // patch_size)
    rows = tensors["pos_embed"].shape[1]
    num_class = ("cls_token" in tensors) + ("dist_token" in tensors)
    candidates = [num_class * special for special in (True, False) if special_positions in (None, special)]
    if registers := _num_registers(tensors):
        candidates.append(num_class + registers)
    if image_size is not None:
        grid = tuple(side // patch_size for side in height_and_width(image_size))
        for num_special in candidates:
            if math.prod(grid) == rows - num_special:
                return num_special, grid
    for num_special in candidates:
        if side := _side(rows - num_special):
            # DeiT III and DINOv2 with registers, all with LayerScale, have no position for the class token.
            if num_special < num_class and special_positions is None and "blocks.0.ls1.gamma" not in tensors:
                logger.warning(
                    "pos_embed has %d rows: read as %dx%d patches, with no position for the class token (as FlexiViT); if it "
                    "has one, the patches are no square: give image_size=(height, width)", rows, side, side
                )  # fmt: skip
            return num_special, (side, side)
    numbers = " or ".join(map(str, dict.fromkeys(candidates)))
    raise InputError(
        f"pos_embed has {rows} rows: no square raster of patches with {numbers} special tokens in front; "
        "give the image_size=(height, width) of a checkpoint that is not square"
    )


def _num_registers(tensors: Tensors) -> int:
    return next((tensors[name].shape[1] for name in _REGISTERS if name in tensors), 0)


def _without_register_positions(tensors: Tensors, num_rows: int) -> Tensors:
    """The tensors with the positions of register tokens, constants like these, added to them, where there are any.

    num_rows: of the position embedding without them.
    """
    name = next((name for name in _REGISTERS if name in tensors), None)
    if "pos_embed" not in tensors:
        return tensors
    first = ("cls_token" in tensors) + ("dist_token" in tensors)
    last = first + _num_registers(tensors)
    before, of_registers, after = np.split(tensors["pos_embed"], (first, last), axis=1)
    kept = np.concatenate([before, after], axis=1)
    if name is None or kept.shape[1] != num_rows or of_registers.shape != tensors[name].shape:
        return tensors
    return {**tensors, name: tensors[name] + of_registers, "pos_embed": kept}


def tell_of_a_square(tensors: Tensors, fields: Mapping[str, Any]) -> None:
    """Warns if the raster of these fields, which was asked for, is no square, and the position embedding fits one too."""
    height, width = (side // fields["patch_size"] for side in height_and_width(fields["image_size"]))
    rows = tensors["pos_embed"].shape[1]
    side = _side(rows - fields["class_token"] - fields["distillation_token"]) or _side(rows)
    if height != width and side:
        logger.warning(
            "pos_embed is taken for the %dx%d patches of image_size, and nothing is resized; it would fit %dx%d as well: if "
            "that is what it was trained for, say so by input_size in a config.json beside the file",
            height, width, side, side,
        )  # fmt: skip


def _side(num_patches: int) -> int:
    """The patches on a side of their square; 0 if they are none."""
    side = math.isqrt(max(0, num_patches))
    return side if side * side == num_patches else 0


def _refuse_unsupported(tensors: Tensors, needed: Sequence[str]) -> None:
    """Raises InputError for another architecture, by name. needed: names of `_NEEDED` that have to be there."""
    for pattern, (layout, remedy) in _UNSUPPORTED.items():
        if name := next((name for name in tensors if re.search(pattern, name)), None):
            raise InputError(f"{name!r} belongs to {layout}, which is not supported; {remedy}")
    if missing := [name for name in needed if name not in tensors]:
        raise InputError(
            f"not a ViT in timm's layout: no {', '.join(missing)}, but {shortened(list(tensors))}; {_SAVE}"
        )
    shapes = {name: tensors[name].shape for name in _RANKS if name in tensors}
    if wrong := [f"{name} {shape}" for name, shape in shapes.items() if len(shape) != _RANKS[name] or 0 in shape]:
        raise InputError(f"not a ViT in timm's layout: the shape of {', '.join(wrong)} is impossible")
    _, channels, rows, columns = shapes["patch_embed.proj.weight"]
    if channels != 3 or rows != columns:
        raise InputError(
            f"patches of {rows}x{columns} pixels with {channels} channels; supported: square ones with 3 (RGB)"
        )
    if {"norm_pre.weight", "attn_pool.latent"} <= tensors.keys():  # rotary positions leave no name of their own
        raise InputError(
            f"norm_pre and attn_pool are a Perception Encoder's, whose rotary positions are not supported; {_SAVE}"
        )
    lacking = {"cls_token", "reg_token", "blocks.0.attn.qkv.bias", "blocks.0.ls1.gamma"}
    if "fc_norm.weight" in tensors and not lacking & tensors.keys():
        # Its names and shapes are those of an ordinary ViT; that it lacks all of these is its only mark.
        raise InputError(f"without cls_token and blocks.0.attn.qkv.bias this is timm's post-norm ViT (rpn); {_SAVE}")
