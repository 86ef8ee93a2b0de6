"""Depth of rooms (NYU Depth V2) from a DeiT-Ti, with fewer tokens in its blocks and a whole raster for the decoder.

    tif run --config depth --workdir runs/depth             # all methods, each at two budgets
    tif run --config depth:tosa --workdir runs/tosa         # full and tosa; also evo_vit, expediting, ailurus, ...
    tif run --config depth:tfds --workdir runs/nyu          # NYU Depth V2 as TFDS prepared it in $TFDS_DATA_DIR

`data.root` holds nyu_depth/{train,val}/{image,depth} and deit_tiny_patch16_224.safetensors; it defaults to $TIF_DATA, or
../shared/data. A depth map's unit is 1/25.5 m there. The stage `backbone` trains the whole network with all tokens and a
fresh decoder; every method is fine-tuned from it by the same recipe. Budgets are GMAC, decoder included, of 1.47.
Measured, one seed, RMSE in m: full 0.705; at 0.9 GMAC tome 0.706, expediting 0.726, tif 0.768, random 0.802, evo_vit 0.859.
"""

import os

from ml_collections import ConfigDict

ONE = 1.16  # of tosa that selects half of the tokens in every other block
BUDGETS = (ONE, 0.9)
METHODS = {
    "full": (dict(name="full"),),
    # The least it can do with half of its blocks dense is 1.0.
    "tosa": (dict(name="tosa", keep_ratio=0.8), dict(name="tosa", layers=(1, 3, 5, 7, 9, 11), keep_ratio=0.5)),
    **{
        name: tuple(dict(name=name, budget=budget) for budget in BUDGETS)
        for name in ("evo_vit", "expediting", "ailurus", "tome", "tif", "random")
    },
}


def get_config(arg: str = "") -> ConfigDict:
    if arg and arg not in (*METHODS, "tfds"):
        raise ValueError(
            f"unknown variant {arg!r}; this file takes none, or one of {', '.join(METHODS)}, tfds after a colon"
        )
    config = _config()
    if arg in METHODS:
        config.reducer = METHODS[arg][0]
        config.benchmark.reducers = METHODS["full"] if arg == "full" else (*METHODS["full"], *METHODS[arg])
        if arg != "tif":
            del config["score"]
        if arg not in ("tif", "tosa"):
            del config["filter"]
    if arg == "tfds":
        config.data.update(name="tfds", tfds_name="nyu_depth_v2", root=os.environ.get("TFDS_DATA_DIR", ""))
        config.data.update(label_map="depth", test_split="validation", image_size=(384, 512))
        config.backbone.num_epochs, config.finetune.num_epochs = 10.0, 5.0
        del config.data["label_scale"]
    return config


def _config() -> ConfigDict:
    root = os.environ.get("TIF_DATA", "../shared/data")
    recipe = dict(
        batch_size=16,
        final_learning_rate=1e-6,
        warmup_epochs=0.5,
        weight_decay=0.05,
        clip_norm=1.0,
        augmentation=dict(rotate=2.5, color_jitter=0.2),
    )
    return ConfigDict(
        dict(
            dtype="float32",
            data=dict(
                name="image_pairs",
                root=f"{root}/nyu_depth",
                train_split="train",
                test_split="val",
                label_scale=1 / 25.5,
                image_size=(192, 256),
                crop_fraction=1.0,
                mean=(0.485, 0.456, 0.406),  # of ImageNet, as DeiT was trained: the file does not say it
                std=(0.229, 0.224, 0.225),
                augment="crop_flip",
                num_workers=4,
            ),
            backbone=dict(
                init_from=f"{root}/deit_tiny_patch16_224.safetensors",
                head="fresh",
                model=dict(task="depth", decoder="dpt", decoder_width=32, max_depth=10.0),
                num_epochs=6.0,
                learning_rate=2e-4,
                rate_factors=(("^decoder/", 5.0),),
                **recipe,
            ),
            score=dict(estimator="sampled", target="teacher", num_samples=4, keep_ratio=0.5, views=1, batch_size=16),
            reducer=dict(name="tif", budget=ONE),
            filter=dict(
                keep_ratio=0.5,
                num_epochs=4.0,
                batch_size=64,
                learning_rate=1e-3,
                final_learning_rate=1e-5,
                warmup_epochs=0.5,
                weight_decay=1e-2,
                clip_norm=1.0,
            ),
            finetune=dict(num_epochs=1.0, learning_rate=1e-4, **recipe),
            evaluate=dict(batch_size=20, num_images=0, num_samples=4, eigen_crop=True),
            benchmark=dict(
                batch_size=16, dtype="float32", reducers=tuple(entry for method in METHODS.values() for entry in method)
            ),
            when_quick=dict(
                data=dict(num_train=80, num_test=20),
                backbone=dict(num_epochs=2.0),
                score=dict(num_samples=2),
                evaluate=dict(num_images=20, num_samples=2),
                finetune=dict(num_epochs=0.5),
            ),
        )
    )
