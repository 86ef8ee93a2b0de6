"""For `benchmarks.models`, in a Python with torch and timm: models of timm's with random weights, and what they say.

python _timm_worker.py    for each line of input, [NAME, ARGUMENTS of create_model, FOLDER] as JSON, writes FOLDER/
model.safetensors and config.json, as timm's are on the hub, images.npy and logits.npy, and prints a line
"""

import json
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch

_AROUND_ONE = ("norm.weight", "norm1.weight", "norm2.weight", "norm_pre.weight")


def main() -> None:
    torch.set_grad_enabled(False)
    for line in sys.stdin:
        name, arguments, folder = json.loads(line)
        write(name, arguments, Path(folder))
        print("done", flush=True)


def write(name: str, arguments: dict, folder: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    for key, tensor in model.state_dict().items():
        around = 1.0 if key.endswith(_AROUND_ONE) else 0.0
        spread = np.prod(tensor.shape[1:]) ** -0.5 if tensor.ndim > 1 and "token" not in key else 0.2
        tensor.copy_(around + spread * torch.randn(tensor.shape).clip(-2, 2))
    height, width = model.patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
    if getattr(model, "dynamic_img_size", False):
        height, width = arguments.get("img_size", height), arguments.get("img_size", width)
    images = torch.randn(2, 3, height, width).clip(-3, 3)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    described = {key: model.pretrained_cfg[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    config = {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": {"num_heads": model.blocks[0].attn.num_heads},
        "pretrained_cfg": {**described, "input_size": [3, height, width]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    np.save(folder / "images.npy", images.permute(0, 2, 3, 1).contiguous().numpy())
    np.save(folder / "logits.npy", model(images).numpy())


if __name__ == "__main__":
    main()
