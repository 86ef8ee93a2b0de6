"""Images with label maps for the tests of data: every number is known."""

import numpy as np
from pictures import picture
from PIL import Image

SIZE = (24, 32)


def numbers(seed, dtype=np.uint8, below=None, size=SIZE):
    """Whole numbers from 0, some of them 0."""
    return np.random.default_rng(seed).integers(0, below or np.iinfo(dtype).max, size).astype(dtype)


def write_pairs(folder, label_folder="depth", counts=(("train", 5), ("val", 3)), dtype=np.uint8, below=None):
    """Splits with images 0.jpg, 1.png, 2.jpg, ... and label maps, drawn by `numbers` from 100 * split + i."""
    for split, (name, count) in enumerate(counts):
        for kind in ("image", label_folder):
            (folder / name / kind).mkdir(parents=True)
        for i in range(count):
            picture(i, *SIZE).save(folder / name / "image" / f"{i}.{('jpg', 'png')[i % 2]}")
            Image.fromarray(numbers(100 * split + i, dtype, below)).save(folder / name / label_folder / f"{i}.png")
    return folder


def pairs(folder, **options):
    """Settings of `data` for what `write_pairs` has written."""
    return {
        "name": "image_pairs",
        "root": str(folder),
        "test_split": "val",
        "image_size": SIZE,
        "crop_fraction": 1.0,
        "label_scale": 0.05,
        **options,
    }


def classes(folder, **options):
    return pairs(folder, label_kind="segmentation", **options)


def write_tfds_maps(data_dir):
    """A data set `rooms` as TFDS's nyu_depth_v2 and oxford_iiit_pet are: 4 training images with maps of several kinds.

    depth: float16 metres i + 0.25, less a row of 0 and a pixel of NaN; segmentation_mask and labelled: `numbers(i, below=4)`.
    """
    import tensorflow_datasets as tfds

    class Rooms(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(*SIZE, 3)),
                "depth": tfds.features.Tensor(shape=SIZE, dtype=np.float16),
                "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
                "labelled": tfds.features.LabeledImage(labels=4, shape=(None, None, 1)),
                "small": tfds.features.Tensor(shape=(5, 5, 1), dtype=np.int32),
                "label": tfds.features.ClassLabel(names=["kitchen", "office"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "depth")
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                depth = np.full(SIZE, i + 0.25, np.float16)
                depth[0], depth[1, 0] = 0, np.nan
                yield (
                    i,
                    {
                        "image": picture(i, *SIZE),
                        "depth": depth,
                        "segmentation_mask": Image.fromarray(numbers(i, below=4)),
                        "labelled": Image.fromarray(numbers(i, below=4)),
                        "small": np.full((5, 5, 1), -i, np.int32),
                        "label": i % 2,
                    },
                )

    Rooms(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
