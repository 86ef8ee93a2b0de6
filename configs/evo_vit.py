"""Evo-ViT (Xu et al., AAAI 2022): DeiT-Ti, S and B on ImageNet-1k, from scratch, for accelerators.

    tif run --config evo_vit:small --workdir runs/evo_vit_small    # or tiny, base, small_384, base_384

Published (the authors' table): tiny 72.0, small 79.4, base 81.3, base_384 82.0 % top-1; none of small_384.
Everything is from the authors' repository: slow tokens are selected before every block from block 4 until epoch 200 and
then once a stage; the prediction is made of the mean of all patches, and a second head on the class token is trained beside.
Their code for DeiT has no representative token, and neither has this recipe; the paper describes one
(--config.reducer.representative=true). Their base became NaN and went on from a checkpoint of 9 warm-up epochs; here it is
trained like the others.

Needs TFDS's imagenet2012 (array_record or TFRecord) under $TFDS_DATA_DIR (or --config.data.root). Warm-up is from 0 (theirs:
1e-6), bfloat16 stands for their float16. Their moving average of the weights (0.99996) is left out: they evaluate without
it, and here it would be evaluated in place of the weights.
"""

import _imagenet2012
from ml_collections import ConfigDict

ROWS = {
    "tiny": dict(width=192, num_heads=3, image_size=224, batch_size=2048, drop_path=0.0),
    "small": dict(width=384, num_heads=6, image_size=224, batch_size=1024, drop_path=0.1),
    "base": dict(width=768, num_heads=12, image_size=224, batch_size=1024, drop_path=0.1),
    "small_384": dict(width=384, num_heads=6, image_size=384, batch_size=1024, drop_path=0.1),
    "base_384": dict(width=768, num_heads=12, image_size=384, batch_size=1024, drop_path=0.1),
}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ROWS:
        raise ValueError(f"unknown model {arg!r}; this file takes one of {', '.join(ROWS)} after a colon")
    row = ROWS[arg]
    return ConfigDict(
        dict(
            dtype="bfloat16",
            data=_imagenet2012.data(row["image_size"]),
            backbone=dict(
                init_from="",
                model=dict(
                    image_size=row["image_size"],
                    patch_size=16,
                    width=row["width"],
                    depth=12,
                    num_heads=row["num_heads"],
                    num_classes=1000,
                    pool="mean",
                    class_head=True,
                ),
                num_epochs=0.0,  # random weights
            ),
            reducer=dict(name="evo_vit", keep_ratio=0.5, representative=False),
            finetune=dict(
                num_epochs=300.0,
                batch_size=row["batch_size"],
                learning_rate=5e-4 * row["batch_size"] / 512,
                final_learning_rate=1e-5,
                warmup_epochs=5.0,
                weight_decay=0.05,
                label_smoothing=0.1,
                drop_path=row["drop_path"],
                phases=(dict(until=200, stages=(4, 5, 6, 7, 8, 9, 10, 11)),),
                augmentation=dict(rand_augment="m9-mstd0.5-inc1", erase=0.25, repeats=3),
                mixing=dict(mixup=0.8, cutmix=1.0),
            ),
            evaluate=dict(batch_size=256),
            benchmark=dict(batch_size=256, dtype="bfloat16", reducers=("evo_vit",)),
        )
    )
