"""For `benchmarks.masked`, in a Python with torch, timm and captum: FeatureAblation over the patches of one image.

python _captum_worker.py MODEL PERTURBATIONS_PER_EVAL    for each line of input ablates 196 patches and prints how many
"""

import sys

import timm
import torch
from captum.attr import FeatureAblation


def main(name: str, perturbations: str) -> None:
    image = torch.randn(1, 3, 224, 224)
    patches = torch.arange(196).reshape(1, 1, 14, 14).repeat_interleave(16, 2).repeat_interleave(16, 3)
    ablation = FeatureAblation(timm.create_model(name).eval())
    for _ in sys.stdin:
        with torch.no_grad():
            ablation.attribute(image, target=0, feature_mask=patches, perturbations_per_eval=int(perturbations))
        print(196, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
