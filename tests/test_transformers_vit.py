"""Files with the names of HF transformers: the logits of a slow reference, and with -m long of transformers itself."""

import logging

import jax
import numpy as np
import pytest
from cases import write_safetensors
from reference import random_timm_tensors, vit_forward
from test_timm_vit import images, predict

from tif_jax.errors import InputError
from tif_jax.weights.loading import load
from tif_jax.weights.pretrained import read_weights

# timm's name -> that of transformers, of tensors outside the blocks and of those of a block.
VIT = {
    "cls_token": "embeddings.cls_token", "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings", "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "reg_token": "embeddings.register_tokens", "norm": "layernorm",
}  # fmt: skip
VIT_BLOCK = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.qkv": "attention.attention.{query,key,value}",
    "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
NEWEST_BLOCK = VIT_BLOCK | {
    "attn.qkv": "attention.{q_proj,k_proj,v_proj}", "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip
DINOV2_BLOCK = VIT_BLOCK | {
    "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
}  # fmt: skip
CLIP = {
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm", "norm": "post_layernorm",
    "attn_pool.latent": "head.probe", "attn_pool.q": "head.attention.in_proj_", "attn_pool.kv": "head.attention.in_proj_",
    "attn_pool.proj": "head.attention.out_proj", "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1", "attn_pool.mlp.fc2": "head.mlp.fc2",
}  # fmt: skip
CLIP_BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.{q_proj,k_proj,v_proj}",
    "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
HEAD = {"head": "classifier"}


def theirs(tensors, table, block, prefix="", layer="encoder.layer", heads=HEAD):
    """timm's tensors under these names."""
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in heads:
            found[f"{heads[module]}.{leaf}"] = tensor
            continue
        before, names, key = prefix, table, name
        if name.startswith("blocks."):
            _, number, key = name.split(".", 2)
            before, names = f"{prefix}{layer}.{number}.", block
        new = names[key] if key in names else f"{names[key.rpartition('.')[0]]}.{leaf}"
        new = new.replace("in_proj_.", "in_proj_")
        if "{" in new:
            start, rest = new.split("{")
            parts, end = rest.split("}")
            for part, third in zip(parts.split(","), np.split(tensor, 3), strict=True):
                found[f"{before}{start}{part}{end}"] = third
        elif before + new in found:
            found[before + new] = np.concatenate([found[before + new], tensor])
        else:
            found[before + new] = tensor
    for name in found.keys() & {f"{prefix}embeddings.class_embedding", f"{prefix}embeddings.position_embedding.weight"}:
        found[name] = found[name].reshape(found[name].shape[1 + name.endswith("class_embedding") :])
    return found


def tiny(**variant):
    return random_timm_tensors(np.random.default_rng(0), **{"depth": 1} | variant)


SIGLIP = dict(class_token=False, pool="attention", head=False)
DISTILLED = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
LAYOUTS = {  # tensors of timm's; how they are named; how they are computed; what is given
    "vit": (dict(depth=2), dict(table=VIT, block=VIT_BLOCK, prefix="vit."), dict(eps=1e-12), {}),
    "vit, newest": (dict(), dict(table=VIT, block=NEWEST_BLOCK, prefix="vit.", layer="layers"), dict(eps=1e-12), {}),
    "vit, no head": (dict(head=False), dict(table=VIT, block=VIT_BLOCK), dict(eps=1e-12), dict(num_classes=0)),
    "deit, distilled": (
        dict(distilled=True),
        dict(table=VIT, block=VIT_BLOCK, prefix="deit.", heads=DISTILLED),
        dict(eps=1e-12),
        {},
    ),
    "dinov2": (
        dict(layer_scale=True, pool="class_and_mean"),
        dict(table=VIT, block=DINOV2_BLOCK, prefix="dinov2."),
        dict(pool="class_and_mean"),
        {},
    ),
    "dinov2, registers, no head": (
        dict(layer_scale=True, num_registers=2, head=False),
        dict(table=VIT, block=DINOV2_BLOCK),
        {},
        dict(num_classes=0),
    ),
    "clip": (
        dict(pre_norm=True, head=False),
        dict(table=CLIP, block=CLIP_BLOCK, prefix="vision_model.", layer="encoder.layers"),
        dict(eps=1e-5, gelu="quick"),
        dict(gelu="quick", num_classes=0),
    ),
    "siglip": (
        SIGLIP,
        dict(table=CLIP, block=CLIP_BLOCK, prefix="vision_model.", layer="encoder.layers"),
        dict(gelu="tanh", pool="attention"),
        dict(num_classes=0),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_logits_as_the_reference(tmp_path, name):
    variant, names, how, given = LAYOUTS[name]
    tensors = tiny(**variant)
    expected = vit_forward(tensors, images(), num_heads=2, **how)
    path = write_safetensors(tmp_path / "model.safetensors", theirs(tensors, **names))
    np.testing.assert_allclose(predict(path, images(), num_heads=2, **given), expected, atol=1e-4)


def clip(**more):
    names = dict(table=CLIP, block=CLIP_BLOCK, prefix="vision_model.", layer="encoder.layers")
    return theirs(tiny(pre_norm=True, head=False), **names) | more


def test_a_whole_clip_is_its_vision_tower_and_projection(tmp_path):
    projection = np.random.default_rng(4).normal(size=(5, 32)).astype(np.float32)
    text = {
        name: np.ones((3, 3), np.float32) for name in ("text_model.final_layer_norm.weight", "text_projection.weight")
    }
    whole = clip(**text) | {"visual_projection.weight": projection, "logit_scale": np.ones((), np.float32)}
    path = write_safetensors(tmp_path / "model.safetensors", whole)
    features = vit_forward(tiny(pre_norm=True, head=False), images(), num_heads=2, eps=1e-5, gelu="quick")
    given = dict(num_heads=2, gelu="quick")
    np.testing.assert_allclose(predict(path, images(), **given), features @ projection.T, atol=1e-4)


def test_what_image_classifiers_do_not_read_is_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO, "tif_jax")
    pooler = {"pooler.dense.weight": np.ones((32, 32)), "pooler.dense.bias": np.ones(32)}
    path = write_safetensors(tmp_path / "w.safetensors", theirs(tiny(head=False), VIT, VIT_BLOCK) | pooler)
    assert read_weights(path, num_heads=2, num_classes=3)[0]["pool"] == "class"
    assert any("pooler.dense" in message and "left out" in message for message in caplog.messages)
    names = dict(table=CLIP, block=CLIP_BLOCK, prefix="vision_model.", layer="encoder.layers")
    classifier = {"classifier.weight": np.ones((5, 32), np.float32), "classifier.bias": np.ones(5, np.float32)}
    path = write_safetensors(tmp_path / "s.safetensors", theirs(tiny(**SIGLIP), **names) | classifier)
    assert read_weights(path, num_heads=2)[0]["pool"] == "normed_mean"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (clip(**{"classifier.weight": np.ones((5, 32))}), r"w\.safetensors: .*CLIPForImageClassification"),
        (clip(**{"vision_model.adapter.weight": np.ones(3)}), "surplus: adapter.weight"),
        (
            clip(**{"vision_model.encoder.layers.0.self_attn.q_proj.bias": np.ones(3)}),
            "in timm's layout|the weights do not fit",
        ),
    ],
)
def test_layout_that_does_not_fit(tmp_path, tensors, message):
    with pytest.raises(InputError, match=message) as error:
        read_weights(write_safetensors(tmp_path / "w.safetensors", tensors), num_heads=2, num_classes=3, gelu="exact")
    assert "\n" not in str(error.value)


SIZE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
CLASSES = {  # of transformers: the class and its config, more of its config, what `load` is given, what is compared
    "ViTForImageClassification": ("ViT", {}, {}, "logits"),
    "ViTModel": ("ViT", {}, dict(num_classes=0), "last_hidden_state"),
    "DeiTForImageClassificationWithTeacher": ("DeiT", {}, {}, "logits"),
    "DeiTForImageClassification": ("DeiT", {}, {}, "logits"),
    "Dinov2ForImageClassification": ("Dinov2", {}, {}, "logits"),
    "Dinov2Model": ("Dinov2", {}, dict(num_classes=0), "pooler_output"),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegisters", {}, {}, "logits"),
    "CLIPVisionModel": ("CLIPVision", {}, dict(num_classes=0, gelu="quick"), "pooler_output"),
    "CLIPVisionModelWithProjection": ("CLIPVision", {}, dict(gelu="quick"), "image_embeds"),
    "SiglipVisionModel": ("SiglipVision", {}, dict(num_classes=0), "pooler_output"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_are_those_of_transformers(tmp_path, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind, more, given, output = CLASSES[name]
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**SIZE, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()  # the tensors alone
    ours = load(tmp_path / "model.safetensors", num_heads=4, **given)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = getattr(model(pixel_values=torch.from_numpy(x.transpose(0, 3, 1, 2).copy())), output).numpy()
    expected = expected[:, 0] if expected.ndim == 3 else expected
    logits = jax.jit(lambda x: ours(x)[0])(x)
    print(f"{name}: up to {np.abs(expected).max():.1f}, the largest difference {np.abs(logits - expected).max():.1e}")
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
