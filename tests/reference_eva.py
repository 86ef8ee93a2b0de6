"""A slow numpy forward pass of ViTs with rotary positions, from the papers and timm's description of them, and random weights
for one. Rotations are products of complex numbers here."""

import numpy as np
from reference import _gelu, _linear, _norm, drawing

# (grid that coordinates are for, temperature, whether columns come first, whether pairs are halves), as published
KINDS = {"eva02": (16, 10_000, False, False), "rope_vit": (None, 100, True, False), "dinov3": (None, 100, False, True)}


def random_eva_tensors(
    rng,
    kind,
    *,
    width=16,
    depth=3,
    num_heads=2,
    patch_size=4,
    grid=(3, 4),
    num_classes=5,
    larger=False,
    swiglu=False,
    bias=True,
    inner_norm=False,
):
    """Weights by timm's names. larger: EVA-02's base and large, with separate projections and a norm in the MLP."""
    tensors, draw, linear, norm = drawing(rng)

    linear("patch_embed.proj", width, 3, patch_size, patch_size)
    draw("cls_token", 1, 1, width)
    if kind == "eva02":
        draw("pos_embed", 1, 1 + grid[0] * grid[1], width)
    if kind == "dinov3":
        draw("reg_token", 1, 4, width)
    hidden = 24
    for block in (f"blocks.{i}" for i in range(depth)):
        norm(f"{block}.norm1", width)
        norm(f"{block}.norm2", width)
        if larger:
            for part in "qkv":
                linear(f"{block}.attn.{part}_proj", width, width, bias=part != "k")
        else:
            linear(f"{block}.attn.qkv", 3 * width, width, bias=kind == "rope_vit")
            for name in ("q_bias", "v_bias") * (bias and kind != "rope_vit"):
                draw(f"{block}.attn.{name}", width)
        if inner_norm:
            norm(f"{block}.attn.norm", width)
        linear(f"{block}.attn.proj", width, width)
        if larger or (swiglu and kind == "dinov3"):
            linear(f"{block}.mlp.fc1_g", hidden, width)
            linear(f"{block}.mlp.fc1_x", hidden, width)
        else:
            linear(f"{block}.mlp.fc1", hidden * (1 + swiglu), width)
        if larger:
            norm(f"{block}.mlp.norm", hidden)
        linear(f"{block}.mlp.fc2", width, hidden)
        for name in ("gamma_1", "gamma_2") * (kind != "eva02"):
            draw(f"{block}.{name}", width)
    norm("fc_norm" if kind == "eva02" and not inner_norm else "norm", width)
    linear("head", num_classes, width)
    return tensors


LAYOUTS = {  # one of each kind of network that is read: kind, how its weights are drawn, its pooling
    "eva02_small": ("eva02", dict(swiglu=True), "mean"),
    "eva02_base": ("eva02", dict(larger=True), "mean"),
    "eva02_clip": ("eva02", dict(larger=True, inner_norm=True), "class"),
    "dinov3": ("dinov3", dict(bias=False), "normed_mean"),
    "dinov3_plus_qkvb": ("dinov3", dict(swiglu=True), "normed_mean"),
    "rope_vit": ("rope_vit", {}, "class"),
}


def eva_forward(tensors, images, kind, *, pool, num_heads=2, alive=None, skip=False, zeroed=(), around=None):
    """Class logits (B, L). alive: for each block (B, N), which patches are keys there; skip: the others stay as they are.

    zeroed: patches that are vectors of zeros before the first block. around: (B, N, 2), instead of the patches' own raster
    positions.
    """
    w = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    kernel = w["patch_embed.proj.weight"]
    p, eps = kernel.shape[-1], 1e-5 if kind == "dinov3" else 1e-6
    num, height, width, _ = images.shape
    grid = height // p, width // p
    patches = np.asarray(images, np.float64).reshape(num, grid[0], p, grid[1], p, 3)
    patches = np.einsum("byqxrc,dcqr->byxd", patches, kernel) + w["patch_embed.proj.bias"]
    patches = patches.reshape(num, grid[0] * grid[1], -1)
    front = w["cls_token"][0]
    if "pos_embed" in w:
        front, patches = front + w["pos_embed"][0, :1], patches + w["pos_embed"][0, 1:]
    patches[:, list(zeroed)] = 0
    if "reg_token" in w:
        front = np.concatenate([front, w["reg_token"][0]])
    x = np.concatenate([np.broadcast_to(front, (num, *front.shape)), patches], axis=1)
    turn = _rotations(kind, grid, patches.shape[2] // num_heads, around)
    turn = np.concatenate([np.ones((len(turn), len(front), turn.shape[2])), turn], axis=1)
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for i in range(depth):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        keys = np.ones(x.shape[:2], bool)
        if alive is not None:
            keys[:, len(front) :] = alive[i]
        y = x + block.get("gamma_1", 1) * _attention(
            block, _norm(block, "norm1", x, eps), num_heads, turn, keys, kind, eps
        )
        y = y + block.get("gamma_2", 1) * _mlp(block, _norm(block, "norm2", y, eps), eps)
        x = np.where(keys[..., None], y, x) if skip else y
    kept = np.ones(x.shape[:2], bool)[:, len(front) :] if alive is None or skip else alive[-1]
    mean = lambda x: (x[:, len(front) :] * kept[..., None]).sum(axis=1) / kept.sum(axis=1, keepdims=True)  # noqa: E731
    if pool == "mean":
        return _linear(w, "head", _norm(w, "fc_norm", mean(x), eps))
    x = _norm(w, "norm", x, eps)
    return _linear(w, "head", x[:, 0] if pool == "class" else mean(x))


def _rotations(kind, grid, channels, around):
    """(B or 1, N, C/2) complex numbers of length 1."""
    reference, temperature, columns_first, _ = KINDS[kind]
    place = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(1, -1, 2).astype(float)
    place = place if around is None else around
    if kind == "dinov3":
        place = 2 * np.pi * (2 * (place + 0.5) / np.array(grid) - 1)
    elif reference:
        place = place * reference / np.array(grid)
    place = place[..., ::-1] if columns_first else place
    bands = 1 / temperature ** (np.arange(channels // 4) / (channels // 4))
    return np.exp(1j * np.concatenate([place[..., :1] * bands, place[..., 1:] * bands], axis=-1))


def _turned(x, turn, kind):
    """(B, T, C) with each pair of channels as a complex number."""
    half = x.shape[-1] // 2
    if KINDS[kind][3]:
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)
    z = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def _attention(block, x, num_heads, turn, keys, kind, eps):
    if "attn.q_proj.weight" in block:
        query, key, value = (_linear(block, f"attn.{part}_proj", x) for part in "qkv")
    else:
        query, key, value = np.split(_linear(block, "attn.qkv", x), 3, axis=-1)
        query, value = query + block.get("attn.q_bias", 0), value + block.get("attn.v_bias", 0)
    mixed = []
    for q, k, v in zip(*(np.split(part, num_heads, axis=-1) for part in (query, key, value)), strict=True):
        logits = _turned(q, turn, kind) @ _turned(k, turn, kind).swapaxes(1, 2) / np.sqrt(q.shape[-1])
        logits = np.where(keys[:, None], logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        mixed.append(weights / weights.sum(axis=-1, keepdims=True) @ v)
    mixed = np.concatenate(mixed, axis=-1)
    return _linear(block, "attn.proj", _norm(block, "attn.norm", mixed, eps) if "attn.norm.weight" in block else mixed)


def _mlp(block, x, eps):
    if "mlp.fc1_g.weight" in block:
        gate, y = _linear(block, "mlp.fc1_g", x), _linear(block, "mlp.fc1_x", x)
    else:
        y = _linear(block, "mlp.fc1", x)
        if y.shape[-1] == block["mlp.fc2.weight"].shape[1]:
            return _linear(block, "mlp.fc2", _gelu(y, "exact"))
        gate, y = np.split(y, 2, axis=-1)
    y = gate / (1 + np.exp(-gate)) * y
    return _linear(block, "mlp.fc2", _norm(block, "mlp.norm", y, eps) if "mlp.norm.weight" in block else y)
