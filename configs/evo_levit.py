"""Evo-LeViT (Xu et al., AAAI 2022) on ImageNet-1k, from scratch with a teacher, for accelerators.

    tif run --config evo_levit:256 --workdir runs/evo_levit_256    # or 128s, 128, 192, 384; 256_384, 384_384

Published (the authors' table): 128s 73.0, 128 74.4, 192 76.8, 256 78.8, 384 80.7 % top-1; at 384 pixels 256 81.1, 384 82.2 %.
From the authors' repository: slow tokens are selected before every block until epoch 200, with theta at rest, and then once
a stage; float32; every parameter's gradient is clipped relative to its weights.
**The teacher differs.** Theirs is a RegNetY-160 (82.9 %), which can not be loaded here; the default is timm's
deit_base_distilled (83.4 %), which learnt from that RegNetY. Any checkpoint or weight file that tif_jax can load will do:
--config.finetune.distillation.teacher=FILE. It sees the student's images, so it has to take their size.

Needs TFDS's imagenet2012 (array_record or TFRecord) under $TFDS_DATA_DIR (or --config.data.root), and the teacher,
deit_base_distilled_patch16_<image size>.safetensors, in $TIF_WEIGHTS (default: the current folder). Warm-up is from 0
(theirs: 1e-6). Their moving average of the weights (0.99996) is left out: they evaluate without it, and here it would be
evaluated in place of the weights.
"""

import _imagenet2012
from ml_collections import ConfigDict

from tif_jax.models.names import LEVIT_SIZES, model_fields

KNOWN = (*LEVIT_SIZES, "256_384", "384_384")


def get_config(arg: str = "") -> ConfigDict:
    if arg not in KNOWN:
        raise ValueError(f"unknown model {arg!r}; this file takes one of {', '.join(KNOWN)} after a colon")
    size, _, pixels = arg.partition("_")
    image_size, batch_size = (int(pixels), 1024) if pixels else (224, 2048)
    fields = model_fields(f"evo_levit_{size}")
    drop_path = fields.pop("drop_path", 0.0)  # of fine-tuning, not of the model
    teacher = f"deit_base_distilled_patch16_{image_size}"
    return ConfigDict(
        dict(
            dtype="float32",
            data=_imagenet2012.data(image_size),
            backbone=dict(
                init_from="",
                model=dict(fields, image_size=image_size, num_classes=1000, class_head=True),
                num_epochs=0.0,  # random weights
            ),
            reducer=dict(name="evo_levit", keep_ratio=0.5),
            finetune=dict(
                num_epochs=300.0,
                batch_size=batch_size,
                learning_rate=5e-4 * batch_size / 512,
                final_learning_rate=1e-5,
                warmup_epochs=5.0,
                weight_decay=0.025,
                adaptive_clip=0.01,
                rate_factors=((r"^reducer/theta$", 1.0, 200),),
                label_smoothing=0.1,
                drop_path=drop_path,
                phases=(dict(until=200, layer_wise=True),),
                augmentation=dict(rand_augment="m9-mstd0.5-inc1", erase=0.25, repeats=3),
                mixing=dict(mixup=0.8, cutmix=1.0),
                distillation=dict(kind="hard", teacher=_imagenet2012.weights(teacher)),
            ),
            evaluate=dict(batch_size=256),
            benchmark=dict(batch_size=256, dtype="float32", reducers=("evo_levit",)),
        )
    )
