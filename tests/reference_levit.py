"""A slow numpy LeViT, written from the paper and independent of the package."""

import numpy as np


def levit_forward(tensors, images, silu=False):
    """Class logits (B, L) of a LeViT whose weights are named as timm does, linear or 1x1 convolutions, for (B, Y, X, 3).

    Evo-LeViT's variant has further tensors: `cls_token`, `pos_embed` and `stages.<s>.downsample.pos_embed`, and no biases.
    """
    w = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    w["activation"] = _silu if silu else _hard_swish
    x = np.asarray(images, np.float64)
    for i in (1, 2, 3, 4):
        x = _convolution(w[f"stem.conv{i}.linear.weight"], x if i == 1 else w["activation"](x))
        x = _norm(w, f"stem.conv{i}.bn", x)
    rows, columns = x.shape[1:3]
    x = x.reshape(len(x), rows * columns, -1)
    has_class = "cls_token" in w
    if has_class:
        x = np.concatenate([np.broadcast_to(w["cls_token"], (len(x), 1, x.shape[2])), x], axis=1)
    x = x + w.get("pos_embed", 0)
    for stage in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("stages."))):
        if stage:
            name = f"stages.{stage}.downsample"
            x, rows, columns = _shrink(w, name, x, rows, columns, has_class)
            x = x + _mlp(w, name, x)
        for i in range(1 + max(int(n.split(".")[3]) for n in w if n.startswith(f"stages.{stage}.blocks."))):
            name = f"stages.{stage}.blocks.{i}"
            x = x + _attention(w, name, x, rows, columns)
            x = x + _mlp(w, name, x)
    mean = x[:, has_class:].mean(axis=1)
    logits = [
        _norm(w, f"{head}.bn", mean) @ w[f"{head}.linear.weight"].T + w[f"{head}.linear.bias"]
        for head in ("head", "head_dist")
        if f"{head}.bn.weight" in w
    ]
    return sum(logits) / len(logits)


def random_levit_tensors(
    rng,
    *,
    grid=(3, 3),
    widths=(16, 24),
    depths=(1, 2),
    num_heads=(2, 3),
    key_dim=8,
    num_classes=5,
    distilled=True,
    convolutional=False,
    evo=False,
):
    """Random float32 weights by timm's names; every kind of parameter matters to the logits."""
    tensors = _Tensors(rng, convolutional)
    stem = (3, widths[0] // 8, widths[0] // 4, widths[0] // 2, widths[0])
    for i in (1, 2, 3, 4):
        tensors.draw(f"stem.conv{i}.linear.weight", stem[i], stem[i - 1], 3, 3, scale=(9 * stem[i - 1]) ** -0.5)
        tensors.norm(f"stem.conv{i}.bn", stem[i])
    if evo:
        tensors.draw("cls_token", 1, 1, widths[0])
        tensors.draw("pos_embed", 1, 1 + grid[0] * grid[1], widths[0])
    for stage, width in enumerate(widths):
        if stage:
            before, heads = widths[stage - 1], widths[stage - 1] // key_dim
            name = f"stages.{stage}.downsample.attn_downsample"
            if evo:
                tensors.draw(f"stages.{stage}.downsample.pos_embed", 1, 1 + grid[0] * grid[1], before)
            else:
                tensors.draw(f"{name}.attention_biases", heads, grid[0] * grid[1])
            tensors.linear_norm(f"{name}.kv", 5 * key_dim * heads, before)
            tensors.linear_norm(f"{name}.q.ln", key_dim * heads, before)
            tensors.linear_norm(f"{name}.proj.ln", width, 4 * key_dim * heads)
            tensors.mlp(f"stages.{stage}.downsample", width)
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        for i in range(depths[stage]):
            name = f"stages.{stage}.blocks.{i}"
            if not evo:
                tensors.draw(f"{name}.attn.attention_biases", num_heads[stage], grid[0] * grid[1])
            tensors.linear_norm(f"{name}.attn.qkv", 4 * key_dim * num_heads[stage], width)
            tensors.linear_norm(f"{name}.attn.proj.ln", width, 2 * key_dim * num_heads[stage])
            tensors.mlp(name, width)
    for head in ("head", "head_dist")[: 1 + distilled]:
        tensors.norm(f"{head}.bn", widths[-1])
        tensors.draw(f"{head}.linear.weight", num_classes, widths[-1], scale=widths[-1] ** -0.5)
        tensors.draw(f"{head}.linear.bias", num_classes)
    return dict(tensors)


class _Tensors(dict):
    """Tensors drawn by name."""

    def __init__(self, rng, convolutional):
        super().__init__()
        self.rng, self.convolutional = rng, convolutional

    def draw(self, name, *shape, scale=0.5, around=0.0):
        self[name] = (around + scale * self.rng.normal(size=shape)).astype(np.float32)

    def norm(self, name, width):
        self.draw(f"{name}.weight", width, around=1.0)
        self.draw(f"{name}.bias", width)
        self.draw(f"{name}.running_mean", width)
        self[f"{name}.running_var"] = self.rng.uniform(0.5, 2.0, width).astype(np.float32)
        self[f"{name}.num_batches_tracked"] = np.asarray(7)

    def linear_norm(self, name, outputs, inputs):
        self.draw(f"{name}.linear.weight", outputs, inputs, *(1, 1) * self.convolutional, scale=inputs**-0.5)
        self.norm(f"{name}.bn", outputs)

    def mlp(self, name, width):
        self.linear_norm(f"{name}.mlp.ln1", 2 * width, width)
        self.linear_norm(f"{name}.mlp.ln2", width, 2 * width)


def _attention(w, name, x, rows, columns):
    biases = w.get(f"{name}.attn.attention_biases")
    where = [divmod(i, columns) for i in range(rows * columns)]
    qkv = _linear_norm(w, f"{name}.attn.qkv", x)
    num_heads = len(biases) if biases is not None else HEADS[x.shape[2]]
    mixed = []
    for head, part in enumerate(np.split(qkv, num_heads, axis=2)):
        channels = part.shape[2] // 4  # of a head: one part queries, one keys, two values
        query, key, value = part[..., :channels], part[..., channels : 2 * channels], part[..., 2 * channels :]
        mixed.append(_mix(query, key, value, None if biases is None else biases[head], where, where, columns))
    return _linear_norm(w, f"{name}.attn.proj.ln", w["activation"](np.concatenate(mixed, axis=2)))


def _shrink(w, name, x, rows, columns, has_class):
    x = x + w.get(f"{name}.pos_embed", 0)
    name = f"{name}.attn_downsample"
    biases = w.get(f"{name}.attention_biases")
    where = [divmod(i, columns) for i in range(rows * columns)]
    asking = [(r, c) for r, c in where if r % 2 == c % 2 == 0]
    picked = [0] * has_class + [has_class + where.index(at) for at in asking]
    queries = _linear_norm(w, f"{name}.q.ln", x[:, picked])
    key_values = _linear_norm(w, f"{name}.kv", x)
    num_heads = len(biases) if biases is not None else HEADS_OF_SHRINK[x.shape[2]]
    mixed = []
    for head in range(num_heads):
        query, part = (np.split(y, num_heads, axis=2)[head] for y in (queries, key_values))
        key, value = part[..., : query.shape[2]], part[..., query.shape[2] :]
        mixed.append(_mix(query, key, value, None if biases is None else biases[head], asking, where, columns))
    x = _linear_norm(w, f"{name}.proj.ln", w["activation"](np.concatenate(mixed, axis=2)))
    return x, (rows + 1) // 2, (columns + 1) // 2


HEADS = {16: 2, 24: 3}  # without biases the number of heads is not in the tensors: those of random_levit_tensors
HEADS_OF_SHRINK = {16: 2}


def _mix(query, key, value, biases, asking, where, columns):
    """One head's attention; biases: by distance of rows and of columns, without sign, flattened."""
    mixed = np.zeros((*query.shape[:2], value.shape[2]))
    for image in range(len(query)):
        for i in range(query.shape[1]):
            logits = key[image] @ query[image, i] / np.sqrt(query.shape[2])
            if biases is not None:
                (row, column) = asking[i]
                logits = logits + [biases[abs(row - r) * columns + abs(column - c)] for r, c in where]
            weights = np.exp(logits - logits.max())
            mixed[image, i] = weights / weights.sum() @ value[image]
    return mixed


def _mlp(w, name, x):
    return _linear_norm(w, f"{name}.mlp.ln2", w["activation"](_linear_norm(w, f"{name}.mlp.ln1", x)))


def _linear_norm(w, name, x):
    weight = w[f"{name}.linear.weight"]
    return _norm(w, f"{name}.bn", x @ weight.reshape(weight.shape[:2]).T)


def _norm(w, name, x):
    y = (x - w[f"{name}.running_mean"]) / np.sqrt(w[f"{name}.running_var"] + 1e-5)
    return y * w[f"{name}.weight"] + w[f"{name}.bias"]


def _silu(x):
    return x / (1 + np.exp(-x))


def _hard_swish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def _convolution(kernel, x):
    """3x3, stride 2, one pixel of zeros around. kernel: (out, in, 3, 3)."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((len(x), (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2, len(kernel)))
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            out[:, row, column] = np.einsum("byxc,ocyx->bo", window, kernel)
    return out
