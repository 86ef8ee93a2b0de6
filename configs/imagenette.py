"""Real photographs and a real DeiT-Ti: ten ImageNet classes (Imagenette) under the checkpoint's 1000-way head.

    tif run --config imagenette --workdir runs/imagenette [--config.quick=true]
    tif run --config imagenette:plain --workdir runs/plain    # the filter alone, from the labels' loss
    tif run --config imagenette:peers --workdir runs/peers    # all methods at one budget of multiply-adds
    python -m benchmarks.filters --judge "all classes: configs/imagenette.py:photographs" ...    # read there
    tif run --config imagenette:scratch --workdir runs/scratch              # no checkpoint: a small ViT, on a CPU
    tif run --config imagenette:scratch_deit_tiny --workdir runs/scratch    # the size of DeiT-Ti, on a GPU

`data.root` holds imagenette/{train,val}/<wnid>/*.JPEG and deit_tiny_patch16_224.safetensors; it defaults to $TIF_DATA, or
../shared/data. The classes were in the checkpoint's pre-training set: this is re-training with fewer tokens, no transfer.
From scratch the head has ten classes, images are 128 pixels wide, and the recipes are ours.
"""

import os

from ml_collections import ConfigDict

FOLDERS = dict(
    n01440764=0, n02102040=217, n02979186=482, n03000684=491, n03028079=497,
    n03394916=566, n03417042=569, n03425413=571, n03445777=574, n03888257=701,
)  # fmt: skip

PEERS = (
    "full", "random", "prior", "tif", dict(name="tif", then=dict(name="tome", num_merged=5)),
    "evit", "tome", "bat", "tosa", "evo_vit", "dynamic_vit",
)  # fmt: skip

# Model and recipe; images are 128 pixels wide.
SCRATCH = {
    "scratch": (
        dict(patch_size=16, width=128, depth=6, num_heads=4),
        dict(num_epochs=30.0, learning_rate=1e-3, warmup_epochs=3.0),
    ),
    "scratch_deit_tiny": (
        dict(patch_size=8, width=192, depth=12, num_heads=3),
        dict(
            num_epochs=100.0, learning_rate=5e-4, warmup_epochs=5.0, drop_path=0.1,
            augmentation=dict(rand_augment="m9-mstd0.5-inc1", erase=0.25),
            mixing=dict(mixup=0.8, cutmix=1.0),
        ),
    ),
}  # fmt: skip
KNOWN = ("plain", "peers", "photographs", *SCRATCH)


def get_config(arg: str = "") -> ConfigDict:
    if arg and arg not in KNOWN:
        raise ValueError(f"unknown variant {arg!r}; this file takes none, or one of {', '.join(KNOWN)} after a colon")
    config = _config()
    if arg in SCRATCH:
        return _from_scratch(config, *SCRATCH[arg])
    if arg == "plain":
        config.score.update(target="label", num_samples=16, views=1)
        config.filter.num_epochs = 20.0
        del config.adapter
        config.reducer = dict(name="tif", keep_ratio=0.5)
        config.benchmark.reducers = ("full", "random", "prior", "tif")
    if arg == "photographs":
        del config.data.class_index
        config.data.update(name="image_table", root=os.path.join(os.path.dirname(config.data.root), "imagenet_ccby"))
        config.data.update(train_split="labels.csv", test_split="labels.csv")
    if arg == "peers":
        del config.adapter
        config.reducer, config.filter.keep_ratio = dict(name="tif", budget=0.8), 0.65
        config.benchmark.reducers = PEERS
    return config


def _config() -> ConfigDict:
    root = os.environ.get("TIF_DATA", "../shared/data")
    return ConfigDict(
        dict(
            dtype="float32",
            data=dict(
                name="image_folder",
                root=f"{root}/imagenette",
                train_split="train",
                test_split="val",
                num_validation=300,
                image_size=224,
                mean=(0.485, 0.456, 0.406),  # of ImageNet, as DeiT was trained: the file does not say it
                std=(0.229, 0.224, 0.225),
                class_index=FOLDERS,
                augment="crop_flip",
                on_error="raise",
                num_workers=8,
            ),
            backbone=dict(init_from=f"{root}/deit_tiny_patch16_224.safetensors"),
            score=dict(
                estimator="sampled",
                mask="drop",
                target="teacher",
                num_samples=4,
                keep_ratio=0.5,
                views=2,
                num_images=0,
                batch_size=32,
                chunk=0,
                dtype="",
                part="",
            ),
            reducer=dict(
                name="tif",
                budget=0.582,  # GMAC of 1.15; as papers count, 0.61 of 1.25: three quarters of the patches, then fewer
                adapter=48,
                then=dict(name="tome", num_merged=8),
            ),
            filter=dict(
                keep_ratio=0.5,  # of the labels: the budget says how many tokens tif keeps
                num_epochs=6.0,
                batch_size=64,
                learning_rate=1e-3,
                final_learning_rate=1e-5,
                warmup_epochs=0.5,
                weight_decay=1e-2,
                clip_norm=1.0,
            ),
            adapter=dict(
                num_epochs=4.0,
                batch_size=64,
                learning_rate=1e-3,
                final_learning_rate=1e-5,
                warmup_epochs=0.3,
                weight_decay=1e-2,
                clip_norm=1.0,
            ),
            finetune=dict(
                num_epochs=10.0,
                batch_size=64,
                learning_rate=5e-5,
                final_learning_rate=1e-6,
                warmup_epochs=0.5,
                weight_decay=0.05,
                clip_norm=1.0,
                label_smoothing=0.1,
                drop_path=0.0,
            ),
            evaluate=dict(batch_size=32, num_images=0, num_samples=16),
            benchmark=dict(batch_size=32, dtype="float32", reducers=("full", "random", "prior", "evit", "tome", "tif")),
            when_quick=dict(
                data=dict(num_train=500, num_test=500, num_validation=100),
                score=dict(num_samples=4),
                evaluate=dict(num_images=200, num_samples=4),
                filter=dict(num_epochs=10.0),
                finetune=dict(num_epochs=2.0),
            ),
        )
    )


def _from_scratch(config: ConfigDict, model: dict, recipe: dict) -> ConfigDict:
    """Random weights, which the stage that fine-tunes trains, unreduced: nothing is scored and no filter fitted."""
    for unused in ("score", "filter", "adapter", "when_quick"):
        del config[unused]
    del config.data.class_index
    config.data.image_size = 128
    config.backbone = dict(init_from="", model=dict(model, image_size=128, num_classes=10, pool="mean"), num_epochs=0.0)
    config.reducer = dict(name="full")
    config.finetune = dict(
        recipe, batch_size=64, final_learning_rate=1e-5, weight_decay=0.05, clip_norm=1.0, label_smoothing=0.1
    )
    config.benchmark.reducers = ("full",)
    return config
