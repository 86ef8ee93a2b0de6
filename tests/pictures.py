"""Pictures, folders and sources of them for the tests of data."""

import csv
import io

import numpy as np
from PIL import Image

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # views stay in [0, 1]


def picture(seed=0, rows=24, columns=32):
    """A smooth colour picture: what JPEG and resizing keep."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((columns, rows), Image.Resampling.BICUBIC)


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def one_line(error):
    return "\n" not in str(error.value)


def write_folders(folder):
    """Folders of images: splits train (3 classes, 11 images) and val (2 classes, 4 images)."""
    seed = 0
    for split, counts in {"train": {"cat": 5, "ant": 4, "bee": 2}, "val": {"bee": 3, "cat": 1}}.items():
        for name, count in counts.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                seed += 1
                picture(seed).save(folder / split / name / f"{i}.JPG", quality=95)
    return folder


def write_table(path, rows, header=("file", "label", "author")):
    with path.open("w", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])


def settings(folder, **options):
    return {"name": "image_folder", "root": str(folder), "test_split": "val", "image_size": 16, **options}


def write_tfds(data_dir, version="1.0.0", labelled=True):
    """An array_record data set `tiny`: train 7 images, test 3, grey level 20 * i, label i % 2."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            features = {"image": tfds.features.Image()}
            if labelled:
                features["label"] = tfds.features.ClassLabel(names=["even", "odd"])
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label") if labelled else None,
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(7), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                label = {"label": i % 2} if labelled else {}
                yield i, {"image": Image.new("RGB", (6, 5), (20 * i,) * 3), **label}

    Tiny(data_dir=str(data_dir), file_format="array_record").download_and_prepare()


class Numbers:
    """Ten images in memory, each filled with ten times its label."""

    num_classes = 10
    class_names = tuple("0123456789")

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"id": f"n{index}", "image": np.full((16, 16, 3), 10 * index, np.uint8), "label": index}
