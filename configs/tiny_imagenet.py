"""200 classes and a checkpoint that is not saturated: Tiny-ImageNet under a ViT-Ti/16 fine-tuned on it.

    tif run --config tiny_imagenet --workdir runs/tiny_imagenet [--config.quick=true]    # eleven methods, half of the tokens
    tif run --config tiny_imagenet:budget --workdir runs/budget    # at one budget of multiply-adds: that of tif with half
    tif run --config tiny_imagenet:budget --workdir runs/less --config.reducer.budget=0.4
    tif run --config tiny_imagenet:speed --workdir runs/speed --config.seeds=3    # all twice as fast as all tokens, here
                                                       # on a CPU add --config.finetune.accumulate=8: a fifth faster

`data.root` holds tiny_imagenet/{train,val}/<wnid>/*.JPEG, whose folders in sorted order are the outputs of the head of
vit_ti16_tiny_imagenet.safetensors; it defaults to $TIF_DATA, or ../shared/data. Images are 64 pixels wide and are enlarged.
The checkpoint has seen the training images: this is re-training with fewer tokens, no transfer.
"""

import os

from ml_collections import ConfigDict

ALONE = ("full", "random", "prior", "norm", "tif", "evit", "bat", "tome", "tosa", "evo_vit", "dynamic_vit")
# tosa leaves every other block dense, and does not come down to half of the multiply-adds.
AT_ONE_BUDGET = (
    "full", "random", "prior", dict(name="tif", adapter=0, then=None), "tif",
    "evit", "bat", "tome", "evo_vit", "dynamic_vit", "expediting", "ailurus",
)  # fmt: skip
# As many a block as `tif calibrate --reducer importance_merge --images tiny_imagenet/train --budget "2x at 32"` found on two
# cores.
CALIBRATED = dict(name="importance_merge", num_merged=(0, 60, 0, 72, 0, 0, 22, 0, 0, 0, 0, 0))
SPEED = "2x at 32"
AT_ONE_SPEED = (
    "full", "random", "prior", "tif", dict(name="tif", then=dict(name="importance_merge", num_merged=6)), "evit", "tome",
    CALIBRATED,
)  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "budget", "speed"):
        raise ValueError(f"unknown variant {arg!r}; this file takes none, or one of budget, speed after a colon")
    config = _config()
    if arg == "budget":
        then = dict(name="tome", num_merged=8)
        config.reducer = dict(name="tif", budget=0.564, adapter=48, then=then)  # GMAC, of 1.15
        config.adapter = _fitting(num_epochs=4.0)
        config.benchmark.reducers = AT_ONE_BUDGET
        config.when_quick.adapter = dict(num_epochs=2.0)
    if arg == "speed":
        config.reducer = dict(name="tif", budget=SPEED)
        config.benchmark.reducers = AT_ONE_SPEED
    return config


def _config() -> ConfigDict:
    root = os.environ.get("TIF_DATA", "../shared/data")
    return ConfigDict(
        dict(
            dtype="float32",
            data=dict(
                name="image_folder",
                root=f"{root}/tiny_imagenet",
                train_split="train",
                test_split="val",
                num_validation=400,
                image_size=224,
                mean=(0.5, 0.5, 0.5),  # as the checkpoint was trained: the file does not say it
                std=(0.5, 0.5, 0.5),
                augment="crop_flip",
                on_error="raise",
                num_workers=4,
            ),
            backbone=dict(init_from=f"{root}/vit_ti16_tiny_imagenet.safetensors", model=dict(norm_eps=1e-12)),
            score=dict(
                estimator="sampled",
                target="teacher",
                num_samples=4,
                keep_ratio=0.5,
                views=1,
                num_images=4_000,
                batch_size=32,
            ),
            reducer=dict(name="tif", keep_ratio=0.5),
            filter=dict(keep_ratio=0.5, **_fitting(num_epochs=6.0)),
            # One epoch: three seeds of a dozen methods are hours on a CPU.
            finetune=dict(
                num_epochs=1.0,
                batch_size=64,
                learning_rate=3e-5,
                final_learning_rate=1e-6,
                warmup_epochs=0.1,
                weight_decay=0.05,
                clip_norm=1.0,
                label_smoothing=0.1,
            ),
            evaluate=dict(batch_size=32, num_images=1_000, num_samples=4),
            benchmark=dict(batch_size=32, dtype="float32", reducers=ALONE),
            when_quick=dict(
                data=dict(num_train=800, num_test=400, num_validation=100),
                score=dict(num_images=300, num_samples=2),
                filter=dict(num_epochs=10.0),
                evaluate=dict(num_images=200, num_samples=2),
            ),
        )
    )


def _fitting(num_epochs: float) -> dict:
    """Of the filter and of the adapter."""
    return dict(
        num_epochs=num_epochs,
        batch_size=64,
        learning_rate=1e-3,
        final_learning_rate=1e-5,
        warmup_epochs=0.3,
        weight_decay=1e-2,
        clip_norm=1.0,
    )
