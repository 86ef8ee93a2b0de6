"""timm's own ViT-like models: each loads as what it is, or is refused. Needs timm and PyTorch."""

import re

import jax
import numpy as np
import pytest
from cases import write_safetensors

from tif_jax.errors import InputError
from tif_jax.models import grid_of, model_fields, with_defaults
from tif_jax.models.rotary import KINDS
from tif_jax.weights import pretrained
from tif_jax.weights.loading import load

pytestmark = pytest.mark.long
# timm's modules of networks with attention; the rest have convolutions alone.
MODULES = re.compile("vit|vision_transformer|deit|beit|eva|coat|volo|pit|tnt|swin|hiera|twins|nest|gemma|qwen|deepseek")
# Names and shapes of SigLIP's gap and of CLIPs with GELU, but more heads and another activation: what is asked for.
ASKED = {"vit_base_patch16_gap_224": "num_heads", "vit_base_patch16_clip_quickgelu_224": "gelu"}


@pytest.fixture(scope="module")
def timm():
    pytest.importorskip("torch")
    return pytest.importorskip("timm")


def truth(model):
    """What of a timm model names and shapes do not say, by our names; None for what no model of ours is."""
    kind = type(model).__name__
    if kind.startswith("Levit"):
        (activation,) = {type(module).__name__ for module in model.modules()} & {"Hardswish", "SiLU", "GELU", "ReLU"}
        return {"activation": {"Hardswish": "hard_swish", "SiLU": "silu"}.get(activation)}
    if kind == "Eva":
        return truth_of_eva(model)
    if kind not in ("VisionTransformer", "VisionTransformerDistilled"):
        return None
    parts = [
        (type(b).__name__, type(b.attn).__name__, type(b.mlp).__name__, type(b.norm1).__name__) for b in model.blocks
    ]
    if set(parts) not in ({("Block", "Attention", mlp, "LayerNorm")} for mlp in ("Mlp", "GluMlp")):
        return None
    if model.pool_include_prefix:  # test_vit3's attention pooling reads its register, too: no name says so
        return None
    block, has_fc_norm = model.blocks[0], type(model.fc_norm).__name__ == "LayerNorm"
    (activation,) = {type(b.mlp.act).__name__ + str(getattr(b.mlp.act, "approximate", "")) for b in model.blocks}
    gelu = {"GELUnone": "exact", "GELUTanh": "tanh", "GELUtanh": "tanh", "QuickGELU": "quick", "SiLU": "exact"}.get(
        activation
    )
    pool = {
        ("token", False): "class",
        ("avg", True): "mean",
        ("avg", False): "normed_mean",
        ("map", False): "attention",
    }
    return {
        "num_heads": block.attn.num_heads,
        "pool": pool.get((model.global_pool, has_fc_norm)),
        "gelu": gelu,
        "norm_eps": block.norm1.eps,
        "grid": model.patch_embed.grid_size,  # at 384 pixels patches of 14 leave a border out
    }


def truth_of_eva(model):
    """The same of timm's other class of ViTs, those with rotary positions among them."""
    kinds = {"RotaryEmbeddingCat": "eva02", "RotaryEmbeddingDinoV3": "dinov3", "NoneType": None}
    block, rotary = model.blocks[0], kinds.get(type(model.rope).__name__, "unknown")
    norms = [type(norm).__name__ for norm in (block.norm1, model.norm_pre)]
    if type(block).__name__ != "EvaBlock" or norms != ["LayerNorm", "Identity"] or rotary == "unknown":
        return None
    if rotary == "eva02" and model.rope.grid_indexing == "xy":
        rotary = "rope_vit"
    if rotary is not None:
        assert model.rope.temperature == KINDS[rotary].temperature and model.rope.rotate_half == KINDS[rotary].halves
    reference = getattr(model.rope, "ref_feat_shape", None)
    pool = {("token", False): "class", ("avg", True): "mean", ("avg", False): "normed_mean"}
    grid = {} if model.pos_embed is None else {"grid": model.patch_embed.grid_size}
    return grid | {
        "num_heads": block.attn.num_heads,
        "pool": pool.get((model.global_pool, type(model.fc_norm).__name__ == "LayerNorm")),
        "gelu": "exact",
        "norm_eps": block.norm1.eps,
        "rotary": rotary,
        "rotary_grid": reference and reference[0],
    }


def fields_of(tensors, **given):
    """What is read off tensors of these names and shapes, whatever their values."""
    layout = pretrained._layout_of(tensors)
    headless = not {"head.weight", "head.linear.weight"} & tensors.keys()
    fields = layout.infer_fields(tensors, **given, **{"num_classes": 7} if headless else {})
    layout.to_params(tensors, fields)
    return with_defaults(fields)


def test_every_model_is_read_as_what_it_is_or_refused(timm):
    import torch

    modules = timm.models._registry._model_to_module
    names = [name for name in timm.list_models() if MODULES.search(modules[name])]
    loaded, refused, wrong, asked = [], [], {}, {}
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        kinds = {torch.int64: np.int64, torch.bool: np.bool_}
        tensors = {
            key: np.broadcast_to(np.ones((), kinds.get(tensor.dtype, np.float32)), tuple(tensor.shape))
            for key, tensor in model.state_dict().items()
            if not key.endswith(pretrained._NO_WEIGHTS)
        }
        try:
            try:
                fields = fields_of(tensors)
            except InputError as error:
                key = re.search(r"; give (num_heads|gelu|pool)\b", str(error))
                if not key or not (expected := truth(model)):
                    raise
                asked[name] = key[1]
                fields = fields_of(tensors, **{key[1]: expected[key[1]]})
        except InputError as error:
            assert "\n" not in str(error)
            refused.append(name)
            continue
        expected = truth(model)
        found = fields | {"grid": grid_of(fields)}
        loaded.append(name)
        if expected is None or {key: found[key] for key in expected} != expected:
            wrong[name] = expected and {
                key: (found[key], value) for key, value in expected.items() if found[key] != value
            }
    print(f"{len(names)} models: {len(loaded)} load, {len(asked)} of them are asked about, {len(refused)} are refused")
    assert not wrong
    assert len(names) > 500 and len(loaded) >= 159 and ASKED.items() <= asked.items()


NAMED = (
    "vit_base_patch16_clip_224", "vit_base_patch32_clip_quickgelu_224", "vit_huge_patch14_clip_378",
    "vit_giant_patch14_clip_224", "vit_base_patch16_plus_clip_240", "vit_base_patch16_siglip_224",
    "vit_base_patch32_siglip_256", "vit_large_patch16_siglip_384", "vit_large_patch16_siglip_512",
    "vit_so400m_patch14_siglip_384", "vit_so400m_patch16_siglip_256", "vit_giantopt_patch16_siglip_256",
    "vit_base_patch16_siglip_gap_224", "vit_small_patch14_dinov2", "vit_large_patch14_reg4_dinov2",
    "deit3_medium_patch16_224", "deit3_huge_patch14_224", "vit_giant_patch14_224", "vit_gigantic_patch14_224",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_our_names_are_timms(timm, name):
    """The fields of a name are those that its model's weights are read with, and what timm says of it."""
    import torch

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    tensors = {key: np.broadcast_to(np.float32(1), tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
    named = with_defaults(model_fields(name) | {"num_classes": 5})
    expected = truth(model) | {"norm_eps": model.norm.eps}
    assert {key: (named | {"grid": grid_of(named)})[key] for key in expected} == expected
    read = fields_of(tensors, num_heads=named["num_heads"], gelu=named["gelu"])
    for fields in (named, read):
        fields["mlp_dim"] = fields["mlp_dim"] or 4 * fields["width"]
        fields["layer_scale"] = fields["layer_scale"] is not None
    assert read == named


MODELS = {  # what timm is told, and `load`
    "deit_tiny_patch16_224": ({}, {}),
    "deit_tiny_patch16_224, rectangular": (dict(img_size=(224, 256)), dict(image_size=(224, 256))),
    "deit_tiny_distilled_patch16_224": ({}, {}),
    "deit3_small_patch16_224": ({}, {}),
    "vit_small_patch14_dinov2": (dict(img_size=224, num_classes=5), {}),
    "vit_small_patch14_reg4_dinov2": (dict(img_size=224, num_classes=5), {}),
    "test_vit": ({}, {}),
    "test_vit2": ({}, {}),  # with a position for its register
    "flexivit_small": ({}, {}),
    "vit_wee_patch16_reg1_gap_256": ({}, {}),
    "vit_medium_patch16_gap_240": ({}, {}),
    "vit_base_patch16_siglip_gap_224": (dict(num_classes=5), dict(num_heads=12)),
    "vit_base_patch32_siglip_gap_256": (dict(num_classes=5), {}),
    "vit_base_patch16_siglip_224": (dict(num_classes=0), dict(num_classes=0)),
    "vit_base_patch32_siglip_256": (dict(num_classes=5), {}),
    "vit_small_patch14_dinov2, features": (dict(img_size=224, num_classes=0), dict(num_classes=0)),
    "vit_xsmall_patch16_clip_224": ({}, {}),
    "vit_giant_patch14_dinov2": (dict(depth=1, img_size=56, num_classes=5), {}),
    "eva02_tiny_patch14_224": (dict(num_classes=5), {}),
    "eva02_tiny_patch14_336": (dict(num_classes=5, img_size=(112, 168)), dict(image_size=(112, 168))),
    "eva02_base_patch16_clip_224": (dict(depth=2), {}),
    "eva02_base_patch14_224": (dict(depth=2, num_classes=5), {}),
    "eva_giant_patch14_224": (dict(depth=1), {}),
    "vit_small_patch16_dinov3": (dict(num_classes=5), dict(image_size=224)),
    "vit_small_plus_patch16_dinov3_qkvb": (dict(num_classes=5), dict(image_size=(224, 256), pool="normed_mean")),
    "vit_medium_patch16_rope_reg1_gap_256": (dict(depth=2), {}),
    "vit_small_patch16_rope_224": ({}, {}),
    "vit_small_patch16_rope_ape_224": ({}, {}),
    "vit_base_patch32_clip_quickgelu_224": ({}, dict(gelu="quick")),
    "vit_base_patch16_gap_224": (dict(num_classes=5), dict(num_heads=16)),
    "deit_tiny_patch16_224, token pooling with fc_norm": (dict(fc_norm=True), dict(pool="class")),
    "deit_tiny_patch16_224, mean pooling without fc_norm": (
        dict(global_pool="avg", fc_norm=False),
        dict(pool="normed_mean"),
    ),
    "deit_tiny_patch16_224, mean pooling": (dict(global_pool="avg"), {}),
    "deit_tiny_patch16_224, tanh": (dict(act_layer="gelu_tanh"), dict(gelu="tanh")),
    "deit_tiny_patch16_224, twelve heads": (dict(num_heads=12), dict(num_heads=12)),
    "levit_128s": ({}, {}),
    "levit_256d": ({}, {}),
    "levit_conv_512": ({}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_timms(timm, tmp_path, name):
    import torch

    torch.manual_seed(0)
    told, given = MODELS[name]
    theirs = timm.create_model(name.split(",")[0], **told).eval()
    with torch.no_grad():
        for key, tensor in theirs.state_dict().items():
            if tensor.dtype == torch.float32:
                around = (
                    1.0 if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "bn.weight", "var")) else 0.0
                )
                spread = np.prod(tensor.shape[1:]) ** -0.5 if tensor.ndim > 1 and "token" not in key else 0.2
                tensor.copy_(around + spread * torch.randn(tensor.shape).clip(-2, 2))
    tensors = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    model = load(write_safetensors(tmp_path / "w.safetensors", tensors), **given)
    x = np.random.default_rng(0).standard_normal((2, *model.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    logits = jax.jit(lambda x: model(x)[0])(x)
    print(
        f"{name}: logits to {np.abs(expected).max():.1f}, the largest difference {np.abs(logits - expected).max():.1e}"
    )
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
