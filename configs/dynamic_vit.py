"""DynamicViT (Rao et al., NeurIPS 2021): DeiT-S and B on ImageNet-1k fine-tuned for 30 epochs, for accelerators.

    tif run --config dynamic_vit:small --workdir runs/dynamic_vit_small    # or base; keep ratio 0.7
                                                                                      # or --config.reducer.keep_ratio

Published (the authors' table) at 0.7: small 79.32, base 81.43 % top-1.
From the authors' repository, in its newest state: 30 epochs at 1e-3 for the predictors and a hundredth of that for the
backbone, which rests for the first 5 epochs; class token and position embedding rest throughout; the unreduced backbone is
the teacher; no repeated augmentation. (The state before had repeated augmentation, batch 768, and a backbone rate that
stays at its peak until the predictors' has come down to it.) They keep a moving average of the weights (0.9999) and evaluate
both: which one was published is unknown, and the weights themselves are used here.

Needs TFDS's imagenet2012 (array_record or TFRecord) under $TFDS_DATA_DIR (or --config.data.root), and timm's
deit_<size>_patch16_224.safetensors in $TIF_WEIGHTS (default: the current folder; or --config.backbone.init_from).
"""

import _imagenet2012
from ml_collections import ConfigDict

ROWS = {
    "small": dict(ratio_weight=2.0, drop_path=0.0),
    "base": dict(ratio_weight=5.0, drop_path=0.2),
}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ROWS:
        raise ValueError(f"unknown model {arg!r}; this file takes one of {', '.join(ROWS)} after a colon")
    row = ROWS[arg]
    return ConfigDict(
        dict(
            dtype="bfloat16",
            data=_imagenet2012.data(),
            backbone=dict(
                init_from=_imagenet2012.weights(f"deit_{arg}_patch16_224"),
            ),
            reducer=dict(name="dynamic_vit", keep_ratio=0.7, ratio_weight=row["ratio_weight"]),
            finetune=dict(
                num_epochs=30.0,
                batch_size=1024,
                learning_rate=1e-3,  # does not scale with the batch
                final_learning_rate=1e-6,
                warmup_epochs=5.0,
                weight_decay=0.05,
                rate_factors=((r"^(?!reducer/)", 0.01, 5),),
                freeze=(r"^class_token$", r"^position_embedding$"),
                label_smoothing=0.1,
                drop_path=row["drop_path"],
                augmentation=dict(rand_augment="m9-mstd0.5-inc1", erase=0.25),
                mixing=dict(mixup=0.8, cutmix=1.0),
                distillation=dict(kind="soft", logits_weight=0.5, tokens_weight=0.5),
            ),
            evaluate=dict(batch_size=256),
            benchmark=dict(batch_size=256, dtype="bfloat16", reducers=("dynamic_vit",)),
        )
    )
