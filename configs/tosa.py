"""ToSA (Singh et al., CVPR workshops 2024): DeiT-Ti and S on ImageNet-1k in two stages, for accelerators.

    tif run --config tosa:small --workdir runs/tosa_small    # or tiny; keep ratio 0.8
                                                                        # or --config.reducer.keep_ratio

**Nothing here is the paper's.** Neither its training nor one of its accuracies is known to us; the recipe is ours. First the
selectors alone are fitted to the attention of the frozen backbone (stage `filter`, without labels), then the whole network is
fine-tuned with the selectors at rest, by the recipe that EViT and BAT have for 30 epochs. The unreduced backbone as a
teacher is one flag away: --config.finetune.distillation.kind=soft.

Needs TFDS's imagenet2012 (array_record or TFRecord) under $TFDS_DATA_DIR (or --config.data.root), and timm's
deit_<size>_patch16_224.safetensors in $TIF_WEIGHTS (default: the current folder; or --config.backbone.init_from).
"""

import _imagenet2012
from ml_collections import ConfigDict

KNOWN = ("tiny", "small")


def get_config(arg: str = "") -> ConfigDict:
    if arg not in KNOWN:
        raise ValueError(f"unknown model {arg!r}; this file takes one of {', '.join(KNOWN)} after a colon")
    batch_size = 1024
    return ConfigDict(
        dict(
            dtype="bfloat16",
            data=_imagenet2012.data(),
            backbone=dict(
                init_from=_imagenet2012.weights(f"deit_{arg}_patch16_224"),
            ),
            reducer=dict(name="tosa", keep_ratio=0.8),
            filter=dict(num_epochs=5.0, batch_size=batch_size, learning_rate=1e-3),
            finetune=dict(
                num_epochs=30.0,
                batch_size=batch_size,
                learning_rate=2e-5 * batch_size / 512,
                final_learning_rate=2e-6,
                weight_decay=1e-6,
                label_smoothing=0.1,
                drop_path=0.1,
                augmentation=dict(rand_augment="m9-mstd0.5-inc1", erase=0.25, repeats=3),
                mixing=dict(mixup=0.8, cutmix=1.0),
            ),
            evaluate=dict(batch_size=256),
            benchmark=dict(batch_size=256, dtype="bfloat16", reducers=("tosa",)),
        )
    )
