"""EViT (Liang et al., ICLR 2022): DeiT-S on ImageNet-1k, for accelerators.

    tif run --config evit:300 --workdir runs/evit_300  # keep ratio 0.7, 300 epochs from scratch
                                                                  # or 300_0.9, 300_0.8, 300_0.6, 300_0.5
    tif run --config evit:30 --workdir runs/evit_30    # DeiT-S fine-tuned for 30 epochs, keep ratio 0.7
                                                                  # or another --config.reducer.keep_ratio

Published (the authors' table), from scratch at 0.9, 0.8 ... 0.5: 79.8, 79.8, 79.5, 78.9, 78.5 % top-1, and with
--config.reducer.fuse=false 79.9, 79.7, 79.4, 79.1, 78.4 %. No figure of theirs is known to us for 30 epochs.
Everything is from the authors' scripts. Their ramp of the keep ratio, 1 for 10 epochs and then a cosine over 100, goes down
in six equal steps here, each where the cosine is half-way between two, because every keep ratio compiles once.

Needs TFDS's imagenet2012 (array_record or TFRecord) under $TFDS_DATA_DIR (or --config.data.root); `30` needs timm's
deit_small_patch16_224.safetensors in $TIF_WEIGHTS (default: the current folder; or --config.backbone.init_from). Warm-up is
from 0 (theirs: 1e-6), bfloat16 stands for their float16. Their moving average of the weights (0.99996) is left out: they
evaluate without it, and here it would be evaluated in place of the weights.
"""

import _imagenet2012
from ml_collections import ConfigDict

KEEP_RATIOS = {"300": 0.7, "300_0.9": 0.9, "300_0.8": 0.8, "300_0.6": 0.6, "300_0.5": 0.5, "30": 0.7}
RAMP = (28.6, 43.3, 54.7, 65.3, 76.7, 91.4)  # epochs


def get_config(arg: str = "") -> ConfigDict:
    if arg not in KEEP_RATIOS:
        raise ValueError(f"unknown recipe {arg!r}; this file takes one of {', '.join(KEEP_RATIOS)} after a colon")
    keep_ratio, batch_size = KEEP_RATIOS[arg], 2048
    if arg == "30":
        backbone = dict(
            init_from=_imagenet2012.weights("deit_small_patch16_224"),
        )
        schedule = dict(
            num_epochs=30.0,
            learning_rate=2e-5 * batch_size / 512,
            final_learning_rate=2e-6,
            weight_decay=1e-6,
        )
    else:
        model = dict(image_size=224, patch_size=16, width=384, depth=12, num_heads=6, num_classes=1000)
        backbone = dict(init_from="", model=model, num_epochs=0.0)  # random weights
        schedule = dict(
            num_epochs=300.0,
            learning_rate=5e-4 * batch_size / 512,
            final_learning_rate=1e-5,
            warmup_epochs=5.0,
            weight_decay=0.05,
            phases=tuple(
                dict(until=epoch, keep_ratio=round(1 - i * (1 - keep_ratio) / 6, 4)) for i, epoch in enumerate(RAMP)
            ),
        )
    return ConfigDict(
        dict(
            dtype="bfloat16",
            data=_imagenet2012.data(),
            backbone=backbone,
            reducer=dict(name="evit", keep_ratio=keep_ratio, fuse=True),
            finetune=dict(
                schedule,
                batch_size=batch_size,
                label_smoothing=0.1,
                drop_path=0.1,
                augmentation=dict(rand_augment="m9-mstd0.5-inc1", erase=0.25, repeats=3),
                mixing=dict(mixup=0.8, cutmix=1.0),
            ),
            evaluate=dict(batch_size=256),
            benchmark=dict(batch_size=256, dtype="bfloat16", reducers=("evit",)),
        )
    )
