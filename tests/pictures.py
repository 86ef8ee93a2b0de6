"""Pictures, folders and sources of them for the tests of data."""

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


def settings(folder, **options):
    return {"name": "image_folder", "root": str(folder), "test_split": "val", "image_size": 16, **options}


class Numbers:
    """Ten images in memory, each filled with ten times its label."""

    num_classes = 10
    class_names = tuple("0123456789")

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"id": f"n{index}", "image": np.full((16, 16, 3), 10 * index, np.uint8), "label": index}
