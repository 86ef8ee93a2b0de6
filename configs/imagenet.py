"""TIF and its baselines: the DeiT family on ImageNet-1k, for accelerators.

    tif run --config imagenet:deit_small --workdir runs/imagenet_small    # or deit_tiny, deit_base
    tif run --config imagenet:deit_small_plain --workdir runs/plain_small    # the filter alone

Impact is scored, the token filter fitted, and every reducer fine-tuned for 30 epochs by the same recipe, at the cost of
keeping half of the patches. The recipe is ours: nothing is known of the paper's, and no accuracy. Learning rates and
augmentation (DeiT's, with repeated augmentation) are those that EViT and BAT have for 30 epochs.

Adapter and merging behind the filter are what was best on ten classes with DeiT-Ti (docs/results.md); here they are untried.

Needs TFDS's imagenet2012, as array_record or TFRecord, under $TFDS_DATA_DIR (or --config.data.root), and timm's weights
<name>_patch16_224.safetensors in $TIF_WEIGHTS (default: the current folder; or --config.backbone.init_from).
"""

import _imagenet2012
from ml_collections import ConfigDict

# GMAC, of 1.15, 4.22 and 16.1: as papers count 0.61, 2.29 and 8.88, half of the patches with nothing behind the filter; and a
# quarter of the width, with which an adapter costs 0.9 %.
MODELS = {"deit_tiny": (0.582, 48), "deit_small": (2.18, 96), "deit_base": (8.47, 192)}
KNOWN = (*MODELS, *(f"{name}_plain" for name in MODELS))


def get_config(arg: str = "") -> ConfigDict:
    if arg not in KNOWN:
        raise ValueError(f"unknown model {arg!r}; this file takes one of {', '.join(KNOWN)} after a colon")
    name = arg.removesuffix("_plain")
    config = _config(name, *MODELS[name])
    if arg.endswith("_plain"):
        config.score.target = "label"
        del config.adapter
        config.reducer = dict(name="tif", keep_ratio=0.5)
    return config


def _config(name: str, budget: float, adapter: int) -> ConfigDict:
    batch_size = 1024
    return ConfigDict(
        dict(
            dtype="bfloat16",
            data=dict(_imagenet2012.data(), num_validation=10_000),
            backbone=dict(
                init_from=_imagenet2012.weights(f"{name}_patch16_224"),
            ),
            score=dict(
                estimator="sampled", mask="drop", target="teacher", num_samples=16, keep_ratio=0.5, views=1,
                num_images=0, batch_size=256, chunk=0, dtype="", part="",
            ),
            reducer=dict(
                name="tif",
                budget=budget,
                adapter=adapter,
                then=dict(name="tome", num_merged=8),
            ),
            filter=dict(
                keep_ratio=0.5,  # of the labels: the budget says how many tokens tif keeps
                num_epochs=5.0,
                batch_size=batch_size,
                learning_rate=1e-3,
                final_learning_rate=1e-5,
                warmup_epochs=0.5,
                weight_decay=1e-2,
                clip_norm=1.0,
            ),
            adapter=dict(
                num_epochs=1.0,
                batch_size=batch_size,
                learning_rate=1e-3,
                final_learning_rate=1e-5,
                warmup_epochs=0.1,
                weight_decay=1e-2,
                clip_norm=1.0,
            ),
            finetune=dict(
                num_epochs=30.0,
                batch_size=batch_size,
                learning_rate=2e-5 * batch_size / 512,
                final_learning_rate=2e-6,
                warmup_epochs=1.0,
                weight_decay=0.05,
                clip_norm=1.0,
                label_smoothing=0.1,
                drop_path=0.1,
                augmentation=dict(rand_augment="m9-mstd0.5-inc1", erase=0.25, repeats=3),
                mixing=dict(mixup=0.8, cutmix=1.0),
            ),
            evaluate=dict(batch_size=256, num_images=10_000, num_samples=16),
            benchmark=dict(batch_size=256, dtype="bfloat16", reducers=("full", "random", "prior", "evit", "tome", "tif")),
            when_quick=dict(
                data=dict(num_train=10_000, num_test=2_000, num_validation=1_000),
                score=dict(num_samples=4),
                evaluate=dict(num_images=500, num_samples=4),
                finetune=dict(num_epochs=1.0, warmup_epochs=0.2),
            ),
        )
    )  # fmt: skip
