"""For `benchmarks.masked` and `benchmarks.beside`, in a Python with torch, timm and captum: what these do, on all cores.

python _torch_worker.py MODEL    for each line of input does it once and prints how many images, or masked ones, that were

forward B    a forward pass of B images through timm's model, whose attention is PyTorch's scaled_dot_product_attention
step B       a training step of B images: forward and backward pass, clipped gradients, AdamW
ablate M     captum's FeatureAblation over the 196 patches of an image, M masked images at once
"""

import functools
import sys
from collections.abc import Callable

import timm
import torch
from captum.attr import FeatureAblation


def main(name: str) -> None:
    does = {"forward": forward, "step": step, "ablate": ablate}
    ready = functools.cache(lambda what, number: does[what](name, number))
    for line in sys.stdin:
        what, number = line.split()
        ready(what, int(number))()
        print(196 if what == "ablate" else number, flush=True)


def forward(name: str, batch_size: int) -> Callable[[], None]:
    model, images = timm.create_model(name).eval(), torch.randn(batch_size, 3, 224, 224)

    def run() -> None:
        with torch.inference_mode():
            model(images)

    return run


def step(name: str, batch_size: int) -> Callable[[], None]:
    model, images = timm.create_model(name).train(), torch.randn(batch_size, 3, 224, 224)
    labels = torch.randint(1000, (batch_size,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05)

    def run() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def ablate(name: str, masks: int) -> Callable[[], None]:
    image = torch.randn(1, 3, 224, 224)
    patches = torch.arange(196).reshape(1, 1, 14, 14).repeat_interleave(16, 2).repeat_interleave(16, 3)
    ablation = FeatureAblation(timm.create_model(name).eval())

    def run() -> None:
        with torch.no_grad():
            ablation.attribute(image, target=0, feature_mask=patches, perturbations_per_eval=masks)

    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
