"""Your own pictures: a folder of photographs, whose sub-folders are the classes, and a pretrained ViT.

    tif run --config folder --config.data.root=PHOTOS --config.backbone.init_from=WEIGHTS --workdir runs/mine

PHOTOS holds CLASS/*.jpg, or train/CLASS/*.jpg with val/CLASS/*.jpg or test/CLASS/*.jpg. Without val/ or test/ a fifth of
each class is kept for the test, always the same pictures, and runs/mine/split.json says which. WEIGHTS is what
tif_jax.load reads, such as hf:timm/deit_tiny_patch16_224.fb_in1k or a file deit_tiny_patch16_224.safetensors; its head is
replaced by one for the classes of PHOTOS.

Epochs are for thousands of photographs. `min_steps` is for few: with 150 for training the backbone sees each of them eight
times, and with 8,000 five times.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            dtype="float32",
            data=dict(
                name="image_folder",
                root="",
                train_split="auto",
                test_split="auto",
                test_fraction=0.2,
                image_size=224,
                augment="crop_flip",
                on_error="skip",  # a photograph that can not be read is named and left out
                num_workers=4,
            ),
            # The network learns the classes before anything else: impact is measured on it, and others learn from it.
            backbone=dict(
                init_from="",
                head="fresh",
                num_epochs=5.0,
                min_steps=40,
                batch_size=32,
                learning_rate=1e-4,
                final_learning_rate=1e-6,
                warmup_epochs=0.5,
                weight_decay=0.05,
                clip_norm=1.0,
                label_smoothing=0.1,
            ),
            # `exact` would take 196 forward passes for each view, this about ten.
            score=dict(
                estimator="sampled",
                target="teacher",
                num_samples=4,
                keep_ratio=0.5,
                views=2,
                num_images=2_000,  # at most; a filter for 196 patches has learned from these
                batch_size=32,
            ),
            reducer=dict(name="tif", keep_ratio=0.5),
            filter=dict(
                num_epochs=6.0,
                min_steps=200,
                batch_size=64,
                learning_rate=1e-3,
                final_learning_rate=1e-5,
                warmup_epochs=0.5,
                weight_decay=1e-2,
                clip_norm=1.0,
            ),
            finetune=dict(
                num_epochs=3.0,
                min_steps=20,
                batch_size=32,
                learning_rate=5e-5,
                final_learning_rate=1e-6,
                warmup_epochs=0.3,
                weight_decay=0.05,
                clip_norm=1.0,
                label_smoothing=0.1,
            ),
            evaluate=dict(batch_size=32, num_images=100, num_samples=4),
            benchmark=dict(batch_size=32, dtype="float32", reducers=("full", "tif")),
            when_quick=dict(
                backbone=dict(min_steps=20),
                score=dict(num_images=100, num_samples=2, views=1),
                filter=dict(min_steps=40),
                finetune=dict(min_steps=6),
                evaluate=dict(num_images=30, num_samples=2),
            ),
        )
    )
