"""BAT (Long et al., CVPR 2023): DeiT-S on ImageNet-1k, for accelerators.

    tif run --config bat:300 --workdir runs/bat_300    # keep ratio 0.7, 300 epochs from scratch
    tif run --config bat:30 --workdir runs/bat_30      # DeiT-S fine-tuned for 30 epochs, keep ratio 0.5
                                                                  # or --config.reducer.keep_ratio=0.6 ... 0.2

Published (the authors' logs): 79.58 % top-1 with `300`; 79.30, 79.02, 78.65, 77.82, 76.39 % with `30` at 0.6, 0.5 ... 0.2.
From these logs: epochs, batch, learning rates, keep ratio at rest in `30`. Inferred, from the code of EViT that they built
on: weight decay, drop-path, augmentation, that `30` begins with DeiT-S, and the ramp of `300`: all tokens for 10 epochs,
then a cosine over 100. The ramp goes down in six equal steps here, each where the cosine is half-way between two, because
every keep ratio compiles once.

Needs TFDS's imagenet2012 (array_record or TFRecord) under $TFDS_DATA_DIR (or --config.data.root); `30` needs timm's
deit_small_patch16_224.safetensors in $TIF_WEIGHTS (default: the current folder; or --config.backbone.init_from). Warm-up is
from 0 (theirs: 1e-6), bfloat16 stands for their float16. Their moving average of the weights (0.99996) is left out: they
evaluate without it, and here it would be evaluated in place of the weights.
"""

import _imagenet2012
from ml_collections import ConfigDict

RAMP = (28.6, 43.3, 54.7, 65.3, 76.7, 91.4)  # epochs
ROWS = {
    "300": dict(
        backbone=dict(
            init_from="",
            model=dict(image_size=224, patch_size=16, width=384, depth=12, num_heads=6, num_classes=1000),
            num_epochs=0.0,  # random weights
        ),
        keep_ratio=0.7,
        finetune=dict(
            num_epochs=300.0,
            batch_size=2048,
            learning_rate=5e-4 * 2048 / 512,
            final_learning_rate=1e-5,
            warmup_epochs=5.0,
            weight_decay=0.05,
            phases=tuple(dict(until=epoch, keep_ratio=round(1 - i * 0.3 / 6, 4)) for i, epoch in enumerate(RAMP)),
        ),
    ),
    "30": dict(
        backbone=dict(
            init_from=_imagenet2012.weights("deit_small_patch16_224"),
        ),
        keep_ratio=0.5,
        finetune=dict(
            num_epochs=30.0,
            batch_size=1024,
            learning_rate=2e-5 * 1024 / 512,
            final_learning_rate=2e-6,
            weight_decay=1e-6,
        ),
    ),
}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ROWS:
        raise ValueError(f"unknown recipe {arg!r}; this file takes one of {', '.join(ROWS)} after a colon")
    row = ROWS[arg]
    return ConfigDict(
        dict(
            dtype="bfloat16",
            data=_imagenet2012.data(),
            backbone=row["backbone"],
            reducer=dict(name="bat", keep_ratio=row["keep_ratio"]),
            finetune=dict(
                row["finetune"],
                label_smoothing=0.1,
                drop_path=0.1,
                augmentation=dict(rand_augment="m9-mstd0.5-inc1", erase=0.25, repeats=3),
                mixing=dict(mixup=0.8, cutmix=1.0),
            ),
            evaluate=dict(batch_size=256),
            benchmark=dict(batch_size=256, dtype="bfloat16", reducers=("bat",)),
        )
    )
