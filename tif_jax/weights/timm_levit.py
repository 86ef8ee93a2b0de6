"""timm's names and layouts of LeViT weights, translated to those of `tif_jax.models.LeViT`.

Both of timm's forms are read: linear layers ('levit_128s') and 1x1 convolutions ('levit_conv_128s').
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx, traverse_util

from tif_jax.errors import InputError
from tif_jax.layers import WEIGHTS
from tif_jax.models.levit import PATCH_SIZE, LeViT
from tif_jax.models.model import height_and_width
from tif_jax.weights import conventions
from tif_jax.weights.layout import SAME, Rule, Rules, Tensors, Transform, modules, shortened, translate, translate_back
from tif_jax.weights.positions import other_size


def _read_linear(weight: np.ndarray) -> np.ndarray:
    """(out, in) or, as a convolution, (out, in, 1, 1)."""
    return weight.reshape(weight.shape[:2]).T if weight.shape[2:] in ((), (1, 1)) else weight


def _read_convolution(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight


_NORM = {
    "bn.weight": Rule("norm/scale", SAME),
    "bn.bias": Rule("norm/bias", SAME),
    "bn.running_mean": Rule("norm/mean", SAME),
    "bn.running_var": Rule("norm/var", SAME),
}
_LINEAR = _NORM | {
    "linear.weight": Rule("linear/kernel", Transform(_read_linear, np.transpose)),
    "linear.bias": Rule("linear/bias", SAME),
}
_CONVOLUTION = _NORM | {
    "linear.weight": Rule("conv/kernel", Transform(_read_convolution, lambda kernel: kernel.transpose(3, 2, 0, 1)))
}
_MLP = {"mlp.ln1": "mlp/up", "mlp.ln2": "mlp/down"}
_BLOCK = {"attn.qkv": "attention/qkv", "attn.proj.ln": "attention/out"} | _MLP
_SHRINK = {
    "attn_downsample.kv": "attention/key_value",
    "attn_downsample.q.ln": "attention/query",
    "attn_downsample.proj.ln": "attention/out",
} | _MLP
_HEADS = {"head": "head", "head_dist": "distillation_head"}

FREE = ("image_size", "activation")  # what names and shapes may leave open
_OURS = r"attn_downsample\.|\.attention_biases$"
_SAVE = "use timm's conversion of the same weights: timm.create_model('levit_128s', pretrained=True).state_dict()"
_OTHERS = {  # pattern of a parameter's name: what it belongs to
    r"^(patch_embed|blocks)\.\d+\.(\w+\.)*c\.weight$": "the layout of the authors' own code",
    r"^levit\.(patch_embeddings|encoder)": "the layout of HF transformers",
}


def is_levit(tensors: Tensors) -> bool:
    """Whether the names are those of a LeViT, in whatever layout."""
    return any(re.search(pattern, name) for name in tensors for pattern in (_OURS, *_OTHERS))


def infer_fields(tensors: Tensors, **given: Any) -> dict[str, Any]:
    """Fields of `LeViT` for a file's tensors; `given` fields override those that names and shapes cannot tell.

    These are image_size of a checkpoint that is not square, num_classes (needed without a head), activation
    (`conventions.for_levit`), drop_path.
    Raises InputError for another layout, by name, and for given fields that contradict the file.
    """
    stages = _stages(tensors)
    num_heads = [tensors[f"{stage}.blocks.0.attn.attention_biases"].shape[0] for stage in stages]
    shapes = [tensors[f"{stage}.blocks.0.attn.qkv.linear.weight"].shape for stage in stages]
    key_dims = {shape[0] / (4 * heads) for shape, heads in zip(shapes, num_heads, strict=True)}
    if len(key_dims) > 1 or not (key_dim := key_dims.pop()).is_integer():
        raise InputError("keys of one size in all heads, and values twice as wide, do not explain the attn.qkv tensors")
    fields: dict[str, Any] = dict(
        family="levit",
        widths=tuple(shape[1] for shape in shapes),
        depths=tuple(_depth(tensors, stage) for stage in stages),
        num_heads=tuple(num_heads),
        key_dim=int(key_dim),
        positions="relative",
        class_token=False,
    )
    fields["image_size"] = _image_size(tensors, given.get("image_size"))
    if "head.linear.weight" in tensors:
        fields["num_classes"] = tensors["head.linear.weight"].shape[0]
        fields["distillation_head"] = "head_dist.linear.weight" in tensors
    elif "num_classes" not in given:
        raise InputError("the weights have no head (head.linear.weight); give num_classes to start a fresh one")
    free = {"num_classes", "image_size", "distillation_head"}
    wrong = [
        f"{k}={v!r} (the file: {fields[k]!r})" for k, v in given.items() if k not in free and fields.get(k, v) != v
    ]
    if wrong:
        raise InputError(f"{', '.join(wrong)} contradicts the weights; leave it out")
    return fields | conventions.for_levit(fields | given) | given | {"image_size": fields["image_size"]}


def _image_size(tensors: Tensors, given: int | Sequence[int] | None) -> int | tuple[int, int]:
    """What the attention biases are for: the size given if they fit it, else a square. Raises InputError for another."""
    num_patches = tensors["stages.0.blocks.0.attn.attention_biases"].shape[1]
    if given is not None and math.prod(height_and_width(given)) == num_patches * PATCH_SIZE**2:
        height, width = height_and_width(given)
        return height if height == width else (height, width)
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise InputError(
            f"attention biases for {num_patches} patches, no square raster; give the image_size=(height, width) that "
            "the checkpoint was trained for"
        )
    if given is not None:
        raise other_size((side, side))
    return side * PATCH_SIZE


def to_params(tensors: Tensors, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The float32 parameters and statistics of a `LeViT` with these fields (of `infer_fields`), as a nested dict.

    The heads are left out where the file has none or ones for another num_classes. Raises InputError with all missing,
    surplus and misshapen tensors in one line.
    """
    own = {name: value for name, value in fields.items() if name != "family"}
    model = nnx.eval_shape(lambda: LeViT(**own, rngs=nnx.Rngs(0)))
    wanted = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, WEIGHTS)), sep="/")
    if "head.linear.weight" not in tensors or tensors["head.linear.weight"].shape[0] != model.num_classes:
        tensors = {name: tensor for name, tensor in tensors.items() if not re.match(r"head(_dist)?\.", name)}
        wanted = {path: shape for path, shape in wanted.items() if not re.match(r"(distillation_)?head/", path)}
    return translate(tensors, _rules(fields["depths"]), wanted)


def to_tensors(params: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `to_params`, with linear layers, as 'levit_128s' has them.

    Raises InputError for parameters that timm's LeViTs do not have.
    """
    return translate_back(params, _rules(fields["depths"]))


def _stages(tensors: Tensors) -> list[str]:
    """The names of the stages. Raises InputError for what is no LeViT of timm's."""
    for pattern, layout in _OTHERS.items():
        if name := next((name for name in tensors if re.search(pattern, name)), None):
            raise InputError(f"{name!r} belongs to {layout}, which is not supported; {_SAVE}")
    numbers = {int(match[1]) for name in tensors if (match := re.match(r"stages\.(\d{1,3})\.", name))}
    stages = [f"stages.{i}" for i in range(max(1, len(numbers)))]
    ranks: dict[str, tuple[int, ...]] = {"stem.conv1.linear.weight": (4,), "stem.conv4.linear.weight": (4,)}
    for stage in stages:
        ranks |= {f"{stage}.blocks.0.attn.attention_biases": (2,), f"{stage}.blocks.0.attn.qkv.linear.weight": (2, 4)}
    if missing := [name for name in ranks if name not in tensors]:
        if missing == ["stem.conv4.linear.weight"]:
            raise InputError(f"a LeViT with a stem of stride 8 (no {missing[0]}) is not supported; {_SAVE}")
        raise InputError(f"not a LeViT in timm's layout: no {shortened(missing)}; {_SAVE}")
    shapes = {name: tensors[name].shape for name in ranks}
    if wrong := [f"{name} {shape}" for name, shape in shapes.items() if len(shape) not in ranks[name] or 0 in shape]:
        raise InputError(f"not a LeViT in timm's layout: the shape of {', '.join(wrong)} is impossible")
    return stages


def _depth(tensors: Tensors, stage: str) -> int:
    return len({name.split(".")[3] for name in tensors if name.startswith(f"{stage}.blocks.")})


def _rules(depths: Sequence[int]) -> Rules:
    linears, biases = dict(_HEADS), {}
    number = 0
    for stage, depth in enumerate(depths):
        shrinks = [(f"stages.{stage}.downsample", "attn_downsample", _SHRINK)] * (stage > 0)
        blocks = [(f"stages.{stage}.blocks.{i}", "attn", _BLOCK) for i in range(depth)]
        for name, attention, parts in shrinks + blocks:
            biases[f"{name}.{attention}.attention_biases"] = Rule(f"block_{number}/attention/biases", SAME)
            linears |= {f"{name}.{theirs}": f"block_{number}/{ours}" for theirs, ours in parts.items()}
            number += 1
    stem = {f"stem.conv{i + 1}": f"stem/layer_{i}" for i in range(4)}
    return biases | modules(stem, _CONVOLUTION) | modules(linears, _LINEAR)
