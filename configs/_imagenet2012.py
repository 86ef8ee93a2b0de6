"""ImageNet-1k and weights for it, as several configs of this folder have them."""

import os


def data(image_size: int = 224) -> dict:
    """The section `data`: TFDS's imagenet2012, as array_record or TFRecord, under $TFDS_DATA_DIR."""
    return dict(
        name="tfds",
        tfds_name="imagenet2012",
        root=os.environ.get("TFDS_DATA_DIR", ""),
        train_split="train",
        test_split="validation",
        image_size=image_size,
        augment="crop_flip",
        num_workers=16,
    )


def weights(name: str) -> str:
    """timm's weights NAME.safetensors in $TIF_WEIGHTS, by default the current folder."""
    return os.path.join(os.environ.get("TIF_WEIGHTS", "."), f"{name}.safetensors")
