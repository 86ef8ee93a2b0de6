"""Images per second from real JPEG files to float32 batches, by source, view and number of threads; where the time goes.

    python -m benchmarks.data
    python -m benchmarks.data 500x375

Photographs: Imagenette's validation images under $TIF_DATA or ../shared/data, as they are (shorter side 224) or enlarged to
COLUMNSxROWS, ImageNet's mean being 500x375. `per core` is images per second of CPU time with one thread, which other
programs on the machine hardly change; the other columns are medians over rounds in random order, then the range.
"""

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
from PIL import Image

from benchmarks._common import data_root, median_and_range
from benchmarks.tfds_folder import write_tfds_folder
from tif_jax.data.folder import ImageFolder
from tif_jax.data.loader import evaluation_batches
from tif_jax.data.pictures import read_image
from tif_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalise, random_crop
from tif_jax.data.tfds import Tfds
from tif_jax.runtime.timing import in_rounds

THREADS = (1, 2, 4, 8, 16)
ROUNDS = 3
SIZE = (224, 224)
VIEWS = {"evaluation": 0, "crop_flip": 1}
NUM_IMAGES = 600
BICUBIC = Image.Resampling.BICUBIC


def main(enlarged: str = "") -> None:
    data = data_root() / "imagenette" / "val"
    files = sorted(data.glob("*/*.JPEG"))[:NUM_IMAGES]
    size = tuple(map(int, enlarged.split("x"))) if enlarged else None
    with tempfile.TemporaryDirectory() as folder:
        sources = prepare(Path(folder), files, size)
        jpegs = [path.read_bytes() for path in sorted(Path(folder).glob("photos/val/*/*"))]
        print(f"{len(jpegs)} photographs of {statistics.mean(map(len, jpegs)) / 1000:.0f} kB on average\n")
        print_throughput(sources)
        print_stages(jpegs, sources)


def prepare(folder: Path, files: list[Path], size: tuple[int, int] | None) -> dict:
    """The same photographs as an image folder and as TFDS folders in both formats."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=sorted({path.parent.name for path in files})),
            "file_name": tfds.features.Text(),
        }
    )
    examples = []
    for path in files:
        data = path.read_bytes()
        if size:
            buffer = io.BytesIO()
            Image.open(path).convert("RGB").resize(size, BICUBIC).save(buffer, "JPEG", quality=92)
            data = buffer.getvalue()
        copy = folder / "photos" / "val" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)
        examples.append({"image": data, "label": path.parent.name, "file_name": path.name})
    shards = {"val": [examples[i::8] for i in range(8)]}
    for kind in ("tfrecord", "array_record"):
        write_tfds_folder(folder / kind, kind, shards, features, crc=google_crc32c.value)
    return {
        "array_record": Tfds("", folder / "array_record", "val"),
        "TFRecord": Tfds("", folder / "tfrecord", "val"),
        "image_folder": ImageFolder(folder / "photos", "val"),
    }


def print_throughput(sources: dict) -> None:
    turns = {
        (name, view, threads): partial(_images_per_second, source, view, threads)
        for name, source in sources.items()
        for view in VIEWS
        for threads in THREADS
    }
    found = in_rounds(turns, ROUNDS)
    heads = ["source", "view", "per core", *(f"{n} thread{'s' * (n > 1)}" for n in THREADS)]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in sources:
        for view in VIEWS:
            elapsed = [[rates[0] for rates in found[name, view, n]] for n in THREADS]
            of_a_core = [rates[1] for rates in found[name, view, 1]]
            cells = [median_and_range(rates, 0) for rates in (of_a_core, *elapsed)]
            print(f"| {name} | {view} | {' | '.join(cells)} |")


def _images_per_second(source, view: str, threads: int) -> tuple[float, float]:
    """By the clock, and by the CPU time of all threads."""
    records = np.array([(i, VIEWS[view]) for i in range(len(source))])
    settings = {"name": "tfds", "image_size": SIZE[0], "augment": "crop_flip", "num_workers": threads}
    began, spent = time.perf_counter(), time.process_time()
    batches = evaluation_batches(source, settings, batch_size=64, records=records)
    for _ in batches:
        pass
    batches.close()
    return len(records) / (time.perf_counter() - began), len(records) / (time.process_time() - spent)


def print_stages(jpegs: list[bytes], sources: dict) -> None:
    """Milliseconds of one thread's CPU time per image, medians over rounds; and what could be cheaper."""
    jpegs = jpegs[:200]
    pictures = [read_image(data) for data in jpegs]
    resized = [_resized(picture) for picture in pictures]
    boxes = [random_crop((p.height, p.width), np.random.default_rng(i), (0.08, 1), (3 / 4, 4 / 3))
             for i, p in enumerate(pictures)]  # fmt: skip
    tfrecord, array_record, photos = sources["TFRecord"], sources["array_record"], sources["image_folder"]
    examples = [tfrecord._records[i] for i in range(len(jpegs))]
    task = np.zeros((32, *SIZE, 3), np.float32)
    view = normalise(resized[0], IMAGENET_MEAN, IMAGENET_STD)

    def into_a_batch(i):
        """Rows of a task are allocated and filled, and two tasks make a batch."""
        task = np.zeros((32, *SIZE, 3), np.float32) if i % 32 == 0 else tasks[0]
        task[i % 32] = view
        tasks[0] = task
        if i % 64 == 0:
            np.concatenate([task, task])

    tasks = [task]
    steps = {
        "read from array_record": lambda i: array_record._records[i],
        "read from TFRecord, with checksum": lambda i: tfrecord._records[i],
        "read a file of a folder": lambda i: (photos.root / photos._files[i]).read_bytes(),
        "parse TFDS's example": lambda i: tfrecord._features.deserialize_example_np(
            examples[i], decoders=tfrecord._decoders
        ),
        "decode": lambda i: read_image(jpegs[i]),
        "evaluation: resize, then crop": lambda i: _resized(pictures[i]),
        "(evaluation: resize the crop alone)": lambda i: _resized_box(pictures[i]),
        "crop_flip: crop, then resize": lambda i: pictures[i].crop(boxes[i]).resize(SIZE[::-1], BICUBIC),
        "(crop_flip: resize with box)": lambda i: pictures[i].resize(SIZE[::-1], BICUBIC, box=boxes[i]),
        "normalise in float32": lambda i: normalise(resized[i], IMAGENET_MEAN, IMAGENET_STD),
        "into a batch": into_a_batch,
        "(decode at reduced scale)": lambda i: _drafted(jpegs[i]),
    }
    turns = {name: partial(_milliseconds, step, len(jpegs)) for name, step in steps.items()}
    print("\n| step (in brackets: not what is done) | ms per image |\n|---|---|")
    for name, values in in_rounds(turns, 2 * ROUNDS + 1).items():
        print(f"| {name} | {median_and_range(values, 2)} |")
    changes = [np.abs(np.asarray(_resized_box(p), np.int16) - np.asarray(_resized(p))) for p in pictures]
    largest, share = max(x.max() for x in changes), np.mean([(x > 0).mean() for x in changes])
    print(f"\nresizing the evaluation's crop alone changes {share:.2%} of the values, by at most {largest} of 255")


def _milliseconds(step: Callable[[int], object], num_images: int) -> float:
    """CPU time of this thread per image."""
    began = time.thread_time()
    for i in range(num_images):
        step(i)
    return 1000 * (time.thread_time() - began) / num_images


def _resized(picture: Image.Image) -> Image.Image:
    """The evaluation view's pixels."""
    width, height, left, top = _geometry(picture)
    return picture.resize((width, height), BICUBIC).crop((left, top, left + SIZE[1], top + SIZE[0]))


def _resized_box(picture: Image.Image) -> Image.Image:
    """The same without computing what is then cut away."""
    width, height, left, top = _geometry(picture)
    x, y = picture.width / width, picture.height / height
    box = (left * x, top * y, (left + SIZE[1]) * x, (top + SIZE[0]) * y)
    return picture.resize(SIZE[::-1], BICUBIC, box=box)


def _drafted(data: bytes) -> Image.Image:
    """Decoded at 1/2, 1/4 or 1/8 of the scale where that still covers what evaluation resizes to."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", tuple(int(x / 0.875) for x in SIZE))
    image.load()
    return image


def _geometry(picture: Image.Image) -> tuple[int, int, int, int]:
    """Width and height of the resized picture, left and top of the crop, as in `evaluation_view`."""
    side = int(SIZE[0] / 0.875)
    width, height = picture.size
    if height <= width:
        width, height = width * side // height, side
    else:
        width, height = side, height * side // width
    return width, height, round((width - SIZE[1]) / 2), round((height - SIZE[0]) / 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
