"""Slow numpy references, written from the papers and independent of the package."""

import numpy as np
from scipy.special import erf


def vit_forward(
    tensors,
    images,
    *,
    num_heads,
    pool="class",
    gelu="exact",
    eps=1e-6,
    dropped=(),
    zeroed=(),
    position_only=(),
    dtype=np.float64,
):
    """Class logits (B, L) of a ViT whose weights are named and laid out as timm does, for images (B, Y, X, 3).

    Three ways to take patches (raster indices) away before the first block: `dropped` ones leave the sequence, `zeroed`
    ones become zero vectors, of `position_only` ones the position embedding remains.
    """
    w = {name: np.asarray(tensor).astype(dtype) for name, tensor in tensors.items()}
    kernel = w["patch_embed.proj.weight"]  # (D, 3, P, P)
    num_images, height, width, _ = images.shape
    p = kernel.shape[-1]
    rows, columns = height // p, width // p
    patches = np.asarray(images).astype(dtype).reshape(num_images, rows, p, columns, p, 3)
    patches = np.einsum("byqxrc,dcqr->byxd", patches, kernel) + w.get("patch_embed.proj.bias", 0)
    patches = patches.reshape(num_images, rows * columns, -1)

    special = [w[name][0] for name in ("cls_token", "dist_token") if name in w]
    special = np.concatenate(special) if special else np.zeros((0, patches.shape[-1]), dtype)
    positions = w["pos_embed"][0]
    if len(positions) > rows * columns:
        special = special + positions[: len(special)]
    patch_positions = positions[len(positions) - rows * columns :]
    register_positions = positions[len(special) : len(positions) - rows * columns]  # if there are any
    patches = patches + patch_positions
    patches[:, list(position_only)] = patch_positions[list(position_only)]
    registers = w["reg_token"][0] if "reg_token" in w else special[:0]
    registers = registers + register_positions if len(register_positions) else registers
    front = np.concatenate([special, registers])
    x = np.concatenate([np.broadcast_to(front, (num_images, *front.shape)), patches], axis=1)
    x = _norm(w, "norm_pre", x, eps) if "norm_pre.weight" in w else x
    x[:, [len(front) + i for i in zeroed]] = 0
    x = np.delete(x, [len(front) + i for i in dropped], axis=1)

    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for i in range(depth):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        y = _attention(block, _norm(block, "norm1", x, eps), num_heads, eps)
        x = x + y * block.get("ls1.gamma", 1)
        y = _linear(block, "mlp.fc1", _norm(block, "norm2", x, eps))
        y = _linear(block, "mlp.fc2", _gelu(y, gelu))
        x = x + y * block.get("ls2.gamma", 1)

    head = lambda name, features: _linear(w, name, features) if f"{name}.weight" in w else features  # noqa: E731
    if pool == "mean":
        return head("head", _norm(w, "fc_norm", x[:, len(front) :].mean(axis=1), eps))
    x = _norm(w, "norm" if "norm.weight" in w else "fc_norm", x, eps)
    if pool == "attention":
        return head("head", _attention_pool(w, x[:, len(front) :], num_heads, gelu, eps))
    if pool == "normed_mean":
        return head("head", x[:, len(front) :].mean(axis=1))
    if pool == "class_and_mean":
        return head("head", np.concatenate([x[:, 0], x[:, len(front) :].mean(axis=1)], axis=1))
    logits = head("head", x[:, 0])
    return (logits + head("head_dist", x[:, 1])) / 2 if "dist_token" in w else logits


# Of the tensors below: one for each kind of checkpoint that is read.
VARIANTS = {
    "deit": dict(depth=2),
    "deit_distilled": dict(distilled=True),
    "deit3": dict(no_embed_class=True, layer_scale=True),
    "dinov2": dict(layer_scale=True, patch_size=2),
    "registers": dict(no_embed_class=True, layer_scale=True, num_registers=4),
    "registers_class_position": dict(num_registers=4),
    "qk_norm": dict(qk_norm=True),
    "no_qkv_bias": dict(qkv_bias=False),
    "mean": dict(pool="mean"),
    "mean_registers_no_class": dict(pool="mean", class_token=False, num_registers=1),
    "normed_mean_no_class": dict(pool="normed_mean", class_token=False),
    "wide_mlp_four_heads": dict(mlp_dim=80, num_heads=4),
    "clip": dict(pre_norm=True),
    "clip_no_class_position": dict(pre_norm=True, no_embed_class=True),
    "siglip": dict(pool="attention", class_token=False),
    "attention_registers_class": dict(pool="attention", num_registers=2),
    "class_and_mean_registers": dict(pool="class_and_mean", num_registers=2, no_embed_class=True, layer_scale=True),
    "headless": dict(head=False),
    "siglip_headless": dict(pool="attention", class_token=False, head=False),
    "distilled_headless": dict(distilled=True, head=False),
}
# How those are computed for which names and shapes leave the activation open, or mean another epsilon.
COMPUTED = {
    "clip": dict(gelu="quick", eps=1e-5),
    "clip_no_class_position": dict(gelu="exact"),
    "siglip": dict(gelu="tanh"),
    "siglip_headless": dict(gelu="tanh"),
}


def drawing(rng):
    """A dict of weights by timm's names, and what draws into it: a tensor, a linear layer or convolution, a norm."""
    tensors = {}

    def draw(name, *shape, scale=0.5, around=0.0):
        tensors[name] = (around + scale * rng.normal(size=shape)).astype(np.float32)

    def linear(name, outputs, *inputs, bias=True):
        draw(f"{name}.weight", outputs, *inputs, scale=np.prod(inputs) ** -0.5)
        if bias:
            draw(f"{name}.bias", outputs)

    def norm(name, size):
        draw(f"{name}.weight", size, around=1.0)
        draw(f"{name}.bias", size)

    return tensors, draw, linear, norm


def random_timm_tensors(
    rng,
    *,
    width=32,
    depth=2,
    num_heads=2,
    mlp_dim=48,
    patch_size=4,
    grid=(3, 3),
    num_classes=5,
    class_token=True,
    distilled=False,
    num_registers=0,
    no_embed_class=False,
    layer_scale=False,
    qk_norm=False,
    qkv_bias=True,
    pool="class",
    head=True,
    pre_norm=False,
):
    """Random float32 weights of a ViT by timm's names; every kind of parameter matters to the logits."""
    tensors, draw, linear, norm = drawing(rng)
    num_positioned = (class_token + distilled) * (not no_embed_class)
    linear("patch_embed.proj", width, 3, patch_size, patch_size, bias=not pre_norm)
    draw("pos_embed", 1, grid[0] * grid[1] + num_positioned, width)
    for name, number in {"cls_token": class_token, "dist_token": distilled, "reg_token": num_registers}.items():
        if number:
            draw(name, 1, int(number), width)
    for name in ["norm_pre"] * pre_norm:
        norm(name, width)
    for block in (f"blocks.{i}" for i in range(depth)):
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width, bias=qkv_bias)
        for name in ("q_norm", "k_norm") * qk_norm:
            norm(f"{block}.attn.{name}", width // num_heads)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", mlp_dim, width)
        linear(f"{block}.mlp.fc2", width, mlp_dim)
        for name in ("ls1", "ls2") * layer_scale:
            draw(f"{block}.{name}.gamma", width)
    norm("fc_norm" if pool == "mean" else "norm", width)
    if pool == "attention":
        draw("attn_pool.latent", 1, 1, width)
        for name, outputs in {"q": width, "kv": 2 * width, "proj": width, "mlp.fc1": mlp_dim}.items():
            linear(f"attn_pool.{name}", outputs, width)
        linear("attn_pool.mlp.fc2", width, mlp_dim)
        norm("attn_pool.norm", width)
    for name in ("head", *["head_dist"] * distilled) * head:
        linear(name, num_classes, width * (1 + (pool == "class_and_mean")))
    return tensors


def _linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def _norm(w, name, x, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def _gelu(x, kind):
    if kind == "quick":
        return x / (1 + np.exp(-1.702 * x))
    if kind == "exact":
        return x * (1 + erf(x / np.sqrt(2))) / 2
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def _attention(block, x, num_heads, eps):
    width = x.shape[-1]
    qkv = _linear(block, "attn.qkv", x)
    mixed = []
    for head in range(num_heads):
        channels = np.arange(width).reshape(num_heads, -1)[head]
        query, key, value = (qkv[..., part * width + channels] for part in range(3))
        if "attn.q_norm.weight" in block:
            query, key = _norm(block, "attn.q_norm", query, eps), _norm(block, "attn.k_norm", key, eps)
        logits = query @ key.swapaxes(1, 2) / np.sqrt(len(channels))
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        mixed.append(weights / weights.sum(axis=-1, keepdims=True) @ value)
    return _linear(block, "attn.proj", np.concatenate(mixed, axis=-1))


def _attention_pool(w, patches, num_heads, gelu, eps):
    """timm's AttentionPoolLatent: one query, a row of numbers that does not depend on the image."""
    pool = {name.removeprefix("attn_pool."): tensor for name, tensor in w.items() if name.startswith("attn_pool.")}
    query = _linear(pool, "q", pool["latent"][0, 0])
    key, value = np.split(_linear(pool, "kv", patches), 2, axis=-1)
    mixed = []
    for channels in np.arange(len(query)).reshape(num_heads, -1):
        logits = key[..., channels] @ query[channels] / np.sqrt(len(channels))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        mixed.append(np.einsum("bn,bnc->bc", weights / weights.sum(axis=1, keepdims=True), value[..., channels]))
    y = _linear(pool, "proj", np.concatenate(mixed, axis=-1))
    return y + _linear(pool, "mlp.fc2", _gelu(_linear(pool, "mlp.fc1", _norm(pool, "norm", y, eps)), gelu))
