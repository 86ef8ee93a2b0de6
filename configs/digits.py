"""The whole pipeline on a CPU, with nothing to download: handwritten digits among fragments of other digits.

tif run --config digits --workdir runs/digits [--config.quick=true]

Measured results, and for which recipe, are in docs/results.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seeds=3,
            dtype="float32",
            data=dict(
                name="digits",
                root="",
                image_size=64,
                num_train=30_000,
                num_test=5_000,
                num_validation=1_000,
                crop_fraction=1.0,
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
                augment="none",
                on_error="raise",
                num_workers=4,
            ),
            backbone=dict(
                init_from="",
                model=dict(
                    image_size=64,
                    patch_size=8,
                    width=96,
                    depth=2,
                    num_heads=3,
                    num_classes=10,
                    pool="mean",
                    class_token=False,
                ),
                num_epochs=3.0,
                batch_size=64,
                learning_rate=2e-3,
                final_learning_rate=1e-6,
                warmup_epochs=0.3,
                weight_decay=0.05,
                clip_norm=1.0,
                label_smoothing=0.0,
                drop_path=0.0,
            ),
            score=dict(
                estimator="sampled",
                mask="drop",
                target="label",
                num_samples=8,
                keep_ratio=0.5,
                views=1,
                num_images=4_000,
                batch_size=64,
                chunk=0,
                dtype="",
                part="",
            ),
            reducer=dict(name="tif", keep_ratio=0.25),
            filter=dict(
                num_epochs=16.0,
                batch_size=128,
                learning_rate=1e-3,
                final_learning_rate=1e-5,
                warmup_epochs=1.0,
                weight_decay=1e-4,
                clip_norm=1.0,
            ),
            finetune=dict(
                num_epochs=0.5,
                batch_size=64,
                learning_rate=1e-3,
                final_learning_rate=1e-6,
                warmup_epochs=0.05,
                weight_decay=0.05,
                clip_norm=1.0,
                label_smoothing=0.0,
                drop_path=0.0,
            ),
            evaluate=dict(batch_size=128, num_images=500, num_samples=8),
            benchmark=dict(batch_size=64, dtype="float32", reducers=("full", "random", "norm", "prior", "tif")),
            when_quick=dict(
                seeds=1,
                data=dict(num_train=12_000, num_test=1_000, num_validation=500),
                score=dict(num_images=2_000),
                evaluate=dict(num_images=200),
            ),
        )
    )
