"""Data: images of every kind, sources, views, batches that resume, and what bad input is answered with."""

import csv
import io
import json
import math
import os
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from tif_jax.data import open_source
from tif_jax.data.folder import ImageFolder, ImageTable
from tif_jax.data.loader import evaluation_batches, training_batches
from tif_jax.data.options import read_options
from tif_jax.data.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    augmented_view,
    evaluation_view,
    preprocess,
    random_crop,
    read_image,
)
from tif_jax.data.source import Subset, UnreadableImage
from tif_jax.data.tfds import Tfds
from tif_jax.errors import InputError

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
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


@pytest.fixture
def folder(tmp_path):
    """Splits train (3 classes, 11 images) and val (2 classes, 4 images)."""
    seed = 0
    for split, counts in {"train": {"cat": 5, "ant": 4, "bee": 2}, "val": {"bee": 3, "cat": 1}}.items():
        for name, count in counts.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                seed += 1
                picture(seed).save(tmp_path / split / name / f"{i}.JPG", quality=95)
    return tmp_path


def settings(folder, **options):
    return {"name": "image_folder", "root": str(folder), "test_split": "val", "image_size": 16, **options}


# Images ---------------------------------------------------------------------------------------------------------------


def test_reads_paths_bytes_arrays_and_pil_images_alike(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    pixels = np.asarray(image)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), encode(image, "PNG"), pixels, image):
        read = read_image(given)
        assert read.mode == "RGB"
        np.testing.assert_array_equal(read, pixels)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_to_8_bits(format):
    deep = np.linspace(0, 65535, 12 * 10).astype(np.uint16).reshape(12, 10)
    read = np.asarray(read_image(encode(Image.fromarray(deep), format)))
    expected = np.asarray([[round(v / 65535 * 255) for v in row] for row in deep.tolist()])
    np.testing.assert_array_equal(read, np.repeat(expected[..., None], 3, axis=2))


def test_palette_grey_bilevel_and_cmyk_become_the_same_colours():
    image = Image.new("RGB", (16, 8), RED)
    image.paste(WHITE, (8, 0, 16, 8))
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(read_image(encode(palette, "PNG")), image)
    np.testing.assert_allclose(read_image(encode(image.convert("CMYK"), "JPEG", quality=95)), image, atol=8)
    np.testing.assert_array_equal(read_image(encode(image.convert("CMYK"), "TIFF")), image)
    grey = image.convert("L")
    np.testing.assert_array_equal(read_image(encode(grey, "PNG")), np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    bilevel = grey.point(lambda v: 255 * (v > 100)).convert("1")
    assert np.asarray(read_image(encode(bilevel, "PNG")))[0, [0, 15]].tolist() == [list(BLACK), list(WHITE)]


def test_transparency_lies_over_white():
    image = Image.new("RGBA", (4, 1))
    for x, pixel in enumerate([(*RED, 255), (*RED, 0), (*BLACK, 128), (*BLUE, 51)]):
        image.putpixel((x, 0), pixel)
    read = np.asarray(read_image(encode(image, "PNG")))[0].astype(int)
    expected = [[round(c * a + 255 * (1 - a)) for c in rgb] for rgb, a in
                [(RED, 1), (RED, 0), (BLACK, 128 / 255), (BLUE, 0.2)]]  # fmt: skip
    assert np.abs(read - expected).max() <= 1
    grey = Image.new("LA", (2, 1), (0, 0))
    assert np.asarray(read_image(encode(grey, "PNG"))).min() == 255
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 0), 1)
    read = np.asarray(read_image(encode(palette, "PNG", transparency=bytes([0, 255]))))[0]
    assert read.tolist() == [list(WHITE), list(GREEN)]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(np.asarray(read_image(data)).astype(int) - RED).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, format):
    upright = np.asarray(picture(rows=16, columns=32))
    # How the camera stores a scene that is upright after applying this orientation (EXIF 2.3, tag 0x0112).
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2),
              8: np.rot90(upright, -1)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
    np.testing.assert_allclose(read_image(data), upright, atol=6)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_file_is_an_error_that_names_it(format, share, tmp_path):
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)), format)
    path = tmp_path / "broken.img"
    path.write_bytes(data)
    read_image(path)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnreadableImage, match=r"broken\.img.*on_error") as error:
        read_image(path)
    assert one_line(error)


def test_what_has_no_8_bit_meaning_is_refused(tmp_path):
    for pixels in np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32):
        with pytest.raises(UnreadableImage, match="no fixed range"):
            read_image(encode(Image.fromarray(pixels), "TIFF"), "deep.tif")
    with pytest.raises(UnreadableImage, match=r"no\.jpg.*No such file"):
        read_image(tmp_path / "no.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(UnreadableImage, match=r"text\.jpg: not an image"):
        read_image(tmp_path / "text.jpg")
    for pixels in np.ones((4, 4, 3), np.float32), np.ones((4, 4), np.uint8), np.ones((0, 4, 3), np.uint8):
        with pytest.raises(InputError, match="give uint8"):
            read_image(pixels)


# Views ----------------------------------------------------------------------------------------------------------------


def cubic_resize(pixels, size):
    """Antialiased bicubic interpolation (Keys, a = -1/2) of rows and columns, written from the definition."""

    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    def weights(old, new):
        step = old / new
        stretch = max(step, 1.0)
        matrix = np.array([[kernel((i + 0.5 - (o + 0.5) * step) / stretch) for i in range(old)] for o in range(new)])
        return matrix / matrix.sum(axis=1, keepdims=True)

    return np.einsum("yi,xj,ijc->yxc", weights(pixels.shape[0], size[0]), weights(pixels.shape[1], size[1]), pixels)


@pytest.mark.parametrize(
    "shape, image_size, fraction, resized",
    [
        ((60, 45), (28, 28), 0.875, (42, 32)),  # 60 * 32 / 45 = 42.67: the long side is cut, as torchvision does
        ((45, 61), (28, 28), 0.875, (32, 43)),
        ((20, 30), (28, 28), 0.875, (32, 48)),
        ((40, 40), (24, 36), 0.75, (48, 48)),
        ((30, 90), (24, 36), 1.0, (24, 72)),
    ],
)
def test_evaluation_view_is_timms(shape, image_size, fraction, resized):
    image = picture(rows=shape[0], columns=shape[1])
    view = evaluation_view(image, image_size, fraction, IMAGENET_MEAN, IMAGENET_STD)
    full = cubic_resize(np.asarray(image, np.float64), resized).clip(0, 255)
    top, left = (round((resized[i] - image_size[i]) / 2) for i in (0, 1))
    crop = full[top : top + image_size[0], left : left + image_size[1]]
    expected = (crop / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert view.dtype == np.float32
    # Pillow rounds to 8 bits after each of the two passes.
    np.testing.assert_allclose(view, expected, atol=1.6 / 255 / 0.224)


def test_evaluation_view_of_the_models_own_size_is_the_image():
    image = picture(rows=20, columns=28)
    np.testing.assert_array_equal(
        evaluation_view(image, (20, 28), 1.0, *PLAIN.values()), np.asarray(image, np.float32) / 255
    )


def test_preprocess_takes_every_kind_of_image_and_is_ready_for_a_model(tmp_path):
    image = picture(rows=40, columns=50)
    image.save(tmp_path / "a.png")
    batch = preprocess([str(tmp_path / "a.png"), np.asarray(image), image], image_size=32)
    assert isinstance(batch, jax.Array) and batch.shape == (3, 32, 32, 3)
    for view in batch:
        np.testing.assert_array_equal(view, evaluation_view(image, (32, 32)))
    assert preprocess([image], image_size=(16, 32), crop_fraction=1.0).shape == (1, 16, 32, 3)
    for wrong in "cat.jpg", []:
        with pytest.raises(InputError, match="list of at least one image"):
            preprocess(wrong)
    with pytest.raises(InputError, match=r"crop_fraction is 1.5"):
        preprocess([image], crop_fraction=1.5)


def test_random_crop_has_the_distribution_of_random_resized_crop():
    rng = np.random.default_rng(0)
    size, scale, ratio = (400, 500), (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = np.array([random_crop(size, rng, scale, ratio) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 500 and bottom.max() <= 400
    area, aspect = width * height / (400 * 500), width / height
    assert 0.079 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.34
    # Small crops always fit, so that there the proposal is seen unchanged: area uniform, aspect log-uniform.
    small = area < 0.4
    assert abs(area[small].mean() - 0.24) < 0.01
    assert (
        abs(np.log(aspect[small]).mean()) < 0.02
        and abs(np.log(aspect[small]).std() - math.log(16 / 9) / 12**0.5) < 0.01
    )
    assert abs((left[small] / (500 - width[small])).mean() - 0.5) < 0.03
    assert abs((top[small] / (400 - height[small])).mean() - 0.5) < 0.03


def test_random_crop_falls_back_to_the_centre():
    ratio = (3 / 4, 4 / 3)
    assert random_crop((300, 10), np.random.default_rng(0), (0.5, 1.0), ratio) == (0, 143, 10, 156)
    assert random_crop((10, 300), np.random.default_rng(0), (0.5, 1.0), ratio) == (143, 0, 156, 10)
    assert random_crop((10, 10), np.random.default_rng(0), (4.0, 4.0), ratio) == (0, 0, 10, 10)


def test_augmented_view_is_a_crop_mirrored_half_of_the_time():
    image = picture(rows=40, columns=60)
    whole = evaluation_view(image.resize((30, 20), Image.Resampling.BICUBIC), (20, 30), 1.0, **PLAIN)
    views = [
        augmented_view(image, (20, 30), np.random.default_rng(i), **PLAIN, scale=(1.0, 1.0), ratio=(1.5, 1.5))
        for i in range(60)
    ]
    mirrored = [np.array_equal(view, whole[:, ::-1]) for view in views]
    assert all(m or np.array_equal(view, whole) for m, view in zip(mirrored, views, strict=True))
    assert 15 < sum(mirrored) < 45
    one, same, other = (augmented_view(image, (20, 20), np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1


# Sources --------------------------------------------------------------------------------------------------------------


def test_image_folder_is_sorted_and_numbers_the_classes_of_all_splits(folder):
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    (folder / "annotations" / "boxes").mkdir(parents=True)  # no images in it: not a class
    train, val = ImageFolder(folder, "train"), ImageFolder(folder, "val")
    assert train.class_names == val.class_names == ("ant", "bee", "cat") and val.num_classes == 3
    examples = [train[i] for i in range(len(train))]
    assert [x["id"] for x in examples] == sorted(x["id"] for x in examples)
    assert examples[0]["id"] == "train/ant/0.JPG" and examples[0]["image"].size == (32, 24)
    assert [x["label"] for x in examples] == [0] * 4 + [1] * 2 + [2] * 5
    assert [val[i]["label"] for i in range(4)] == [1, 1, 1, 2]  # val has no ants, and its labels still agree


def test_image_folder_with_the_numbers_of_a_head(folder):
    class_index = ml_collections.ConfigDict({"ant": 7, "cat": 0, "bee": 3, "cow": 900})
    source = open_source(settings(folder, class_index=class_index), "train")
    assert source.num_classes == 8 and len(source.class_names) == 8
    assert (source.class_names[7], source.class_names[0], source.class_names[5]) == ("ant", "cat", "5")
    assert [source[i]["label"] for i in range(11)] == [7] * 4 + [3] * 2 + [0] * 5
    for wrong, message in {"7": "class_index.bee", None: "class_index.bee", -1: "class_index.bee"}.items():
        with pytest.raises(InputError, match=message):
            ImageFolder(folder, "train", {"ant": 7, "cat": 0, "bee": wrong})
    with pytest.raises(InputError, match="no entry for class folder 'bee'"):
        ImageFolder(folder, "train", {"ant": 7, "cat": 0})


def test_bad_folders(folder):
    with pytest.raises(InputError, match="is not a folder"):
        ImageFolder(folder / "nowhere", "train")
    with pytest.raises(InputError, match=r"no split folder 'test'; it has: train, val"):
        ImageFolder(folder, "test")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        ImageFolder(folder, "empty")
    (folder / "train" / "dog").mkdir()
    (folder / "train" / "dog" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"no images in .*train/dog"):
        ImageFolder(folder, "train")


def write_table(path, rows, header=("file", "label", "author")):
    with path.open("w", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])


def test_image_table_reads_paths_relative_to_the_csv(folder):
    write_table(folder / "all.csv", [("train/cat/1.JPG", 4, "x"), ("val/bee/0.JPG", 1, "y, z")])
    for source in (
        ImageTable(folder / "all.csv"),
        open_source({"name": "image_table", "root": str(folder), "train_split": "all.csv"}, "train"),
    ):
        assert len(source) == 2 and source.num_classes == 5 and source.class_names == ("0", "1", "2", "3", "4")
        example = source[0]
        assert (example["id"], example["label"]) == ("train/cat/1.JPG", 4)
        np.testing.assert_array_equal(example["image"], Image.open(folder / "train/cat/1.JPG"))


def test_bad_tables(folder):
    path, good = folder / "bad.csv", ("train/cat/1.JPG", 4, "")
    with pytest.raises(InputError, match=r"no such file: .*bad\.csv"):
        ImageTable(path)
    for label in "cat", "-1", "1.5", "":
        write_table(path, [good, ("train/cat/0.JPG", label, "")])
        with pytest.raises(InputError, match=rf"bad\.csv line 3: label is '{label}'"):
            ImageTable(path)
    write_table(path, [good, ("train/cat/9.JPG", 1, "")])
    with pytest.raises(InputError, match=r"bad\.csv line 3: no such image file: 'train/cat/9.JPG'"):
        ImageTable(path)
    write_table(path, [good], header=("path", "label", "author"))
    with pytest.raises(InputError, match="no column 'file'; it has: path, label, author"):
        ImageTable(path)
    for rows in [], [("train/cat/1.JPG",)]:
        write_table(path, rows)
        with pytest.raises(InputError, match=r"lists no images|line 2: label is None"):
            ImageTable(path)
    for content in "", "file\0,label\n", "file,label\n\xff\xfe":
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(InputError) as error:
            ImageTable(path)
        assert "bad.csv" in str(error.value) and one_line(error)


class Numbers:
    """Ten images in memory, each filled with ten times its label."""

    num_classes = 10
    class_names = tuple("0123456789")

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"id": f"n{index}", "image": np.full((16, 16, 3), 10 * index, np.uint8), "label": index}


def test_subset_is_evenly_spaced():
    assert [Subset(Numbers(), 4)[i]["label"] for i in range(4)] == [0, 2, 5, 7]
    assert len(Subset(Numbers(), 99)) == 10 and Subset(Numbers(), 99)[9]["label"] == 9
    with pytest.raises(IndexError):
        Subset(Numbers(), 4)[4]


def test_num_train_and_num_test_limit_the_images(folder):
    data = settings(folder, num_train=6, num_test=2)
    train, test = open_source(data, "train"), open_source(data, "test")
    assert [train[i]["label"] for i in range(6)] == [0, 0, 0, 1, 2, 2] and train.num_classes == 3
    assert [test[i]["id"] for i in range(len(test))] == ["val/bee/0.JPG", "val/bee/2.JPG"]


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


def test_tfds_round_trip(tmp_path):
    write_tfds(tmp_path)
    source = open_source({"name": "tfds", "root": str(tmp_path), "tfds_name": "tiny", "train_split": "train"}, "train")
    assert len(source) == 7 and source.num_classes == 2 and source.class_names == ("even", "odd")
    examples = [source[i] for i in range(7)]
    levels = [np.asarray(x["image"])[0, 0, 0] // 20 for x in examples]
    assert sorted(levels) == list(range(7)) and [x["label"] for x in examples] == [v % 2 for v in levels]
    assert examples[2]["id"] == "tiny-train.array_record-00000-of-00001__2" and examples[0]["image"].size == (6, 5)
    part = Tfds("tiny:1.0.0", tmp_path, "train[2:5]+test")
    assert [x["id"] for x in (part[i] for i in range(len(part)))] == [x["id"] for x in examples[2:5]] + [
        f"tiny-test.array_record-00000-of-00001__{i}" for i in range(3)
    ]


def test_tfds_without_labels(tmp_path):
    write_tfds(tmp_path, labelled=False)
    source = Tfds("", tmp_path / "tiny" / "1.0.0", "test")
    assert [source[i]["label"] for i in range(3)] == [-1, -1, -1] and source.num_classes == 0


def test_bad_tfds(tmp_path):
    for data_dir in tmp_path / "nowhere", tmp_path:
        with pytest.raises(InputError, match=r"is not a folder|no data set prepared"):
            Tfds("tiny", data_dir, "train")
    write_tfds(tmp_path)
    for split in "val", "train[7", "train[20:30]", "train[:0]":
        with pytest.raises(InputError, match=r"split 'val'; it has: train, test|no split|no examples") as error:
            Tfds("tiny", tmp_path, split)
        assert one_line(error)
    write_tfds(tmp_path, version="2.0.0")
    with pytest.raises(InputError, match=r"tiny/1\.0\.0, tiny/2\.0\.0"):
        Tfds("tiny", tmp_path, "train")
    assert len(Tfds("tiny:2.0.0", tmp_path, "train")) == 7
    folder = tmp_path / "tiny" / "2.0.0"
    (folder / "tiny-train.array_record-00000-of-00001").unlink()
    with pytest.raises(InputError, match=r"no such file: .*array_record-00000"):
        Tfds("tiny:2.0.0", tmp_path, "train")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "riegeli"}))
    with pytest.raises(InputError, match=r"2\.0\.0 is prepared as riegeli.*file_format='array_record'"):
        Tfds("tiny:2.0.0", tmp_path, "train")


# Options --------------------------------------------------------------------------------------------------------------


def test_options_come_from_a_config_dict(folder):
    data = ml_collections.ConfigDict(settings(folder, image_size=(16, 24), num_workers=0))
    assert read_options(data).size == (16, 24) and read_options(data).on_error == "raise"
    assert len(open_source(data, "train")) == 11


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": "image_foldr"}, r"unknown data.name 'image_foldr'; known: digits, image_folder, image_table, tfds"),
        ({"crop_fracton": 0.9}, r"unknown key data.crop_fracton; did you mean 'crop_fraction'\?"),
        ({"on_error": "ignore"}, r"data.on_error is 'ignore'; allowed: 'raise', 'skip'"),
        ({"augment": "flip"}, r"data.augment is 'flip'; allowed"),
        ({"num_train": -1}, r"data.num_train is -1"),
        ({"num_workers": "four"}, r"data.num_workers is 'four'; it must be of type int"),
        ({"root": ""}, r"data.root is empty"),
        ({"root": None}, r"data.root is None"),
        ({"image_size": 0}, r"image_size is 0"),
        ({"image_size": (1, 2, 3)}, r"image_size is \(1, 2, 3\)"),
        ({"crop_fraction": 0.0}, r"crop_fraction is 0.0"),
        ({"std": (1.0, 1.0, 0.0)}, r"std above 0"),
        ({"name": "image_table", "class_index": {"a": 1}}, r"data.class_index renumbers the folders"),
        ({"name": "digits"}, r"data.num_train is 0"),
        ({"name": "digits", "num_train": 9, "image_size": (32, 64)}, r"the canvas of digits is square"),
    ],
)
def test_bad_options(folder, wrong, message):
    with pytest.raises(InputError, match=message) as error:
        open_source(settings(folder) | wrong, "train")
    assert one_line(error)


def test_bad_split(folder):
    with pytest.raises(InputError, match="'train' or 'test'"):
        open_source(settings(folder), "val")


# Batches --------------------------------------------------------------------------------------------------------------

MEMORY = {"name": "digits", "image_size": 16, "crop_fraction": 1.0, **PLAIN}


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(one, other):
    assert len(one) == len(other) and one[0].keys() == other[0].keys()
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_training_batches_visit_every_image_once_an_epoch():
    batches = training_batches(Numbers(), MEMORY, batch_size=4, seed=0)
    batch = next(batches)
    kinds = {name: (x.dtype, x.shape) for name, x in batch.items()}
    assert kinds == {
        "image": (np.float32, (4, 16, 16, 3)),
        "label": (np.int32, (4,)),
        "index": (np.int64, (4,)),
        "view": (np.int32, (4,)),
    }
    batches.close()
    batches = training_batches(Numbers(), MEMORY, batch_size=4, seed=0)
    epochs = np.concatenate([b["index"] for b in take(batches, 10)]).reshape(4, 10)
    batches.close()
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    np.testing.assert_array_equal(batch["label"], batch["index"])
    np.testing.assert_allclose(batch["image"].mean(axis=(1, 2, 3)) * 25.5, batch["index"], atol=1e-4)


def test_another_seed_is_another_order():
    first = [
        next(b)["index"].tolist() for b in (training_batches(Numbers(), MEMORY, batch_size=10, seed=s) for s in (0, 1))
    ]
    assert first[0] != first[1]


def test_fresh_augmentation_differs_between_epochs_and_seeds(folder):
    data = settings(folder, augment="crop_flip")

    def views(seed):
        batches = training_batches(open_source(data, "train"), data, batch_size=11, seed=seed)
        seen = [{i: image for i, image in zip(b["index"], b["image"], strict=True)} for b in take(batches, 2)]
        assert (next(batches)["view"] == -1).all()
        batches.close()
        return seen

    (first, second), (again, _), (other, _) = views(0), views(0), views(1)
    for i in range(11):
        np.testing.assert_array_equal(first[i], again[i])
        assert np.abs(first[i] - second[i]).max() > 0.01 and np.abs(first[i] - other[i]).max() > 0.01


def test_records_are_the_same_views_in_scoring_and_in_training(folder):
    data = settings(folder, augment="crop_flip")
    source = open_source(data, "train")
    records = np.array([[i, v] for i in (3, 8, 1) for v in (0, 1, 2)])
    impact = np.arange(9 * 4, dtype=np.float32).reshape(9, 4)
    scoring = evaluation_batches(source, data, batch_size=9, records=records)
    scored = next(scoring)
    scoring.close()
    np.testing.assert_array_equal(np.stack([scored["index"], scored["view"]], axis=1), records)
    for row, (index, view) in enumerate(records.tolist()):
        if view == 0:
            np.testing.assert_array_equal(scored["image"][row], evaluation_view(source[index]["image"], (16, 16)))
    assert np.abs(scored["image"][1] - scored["image"][2]).max() > 0.01

    for seed in 0, 1:
        batches = training_batches(source, data, batch_size=3, seed=seed, records=records, extra={"impact": impact})
        for batch in take(batches, 3):
            for k in range(3):
                (row,) = np.flatnonzero((records == [batch["index"][k], batch["view"][k]]).all(axis=1))
                np.testing.assert_array_equal(batch["image"][k], scored["image"][row])
                np.testing.assert_array_equal(batch["impact"][k], impact[row])
        batches.close()


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("done", [1, 4])  # in the middle of the first and of the second epoch
def test_training_resumes_exactly(folder, num_workers, done):
    data = settings(folder, augment="crop_flip", num_workers=num_workers)
    source = open_source(data, "train")

    def start():
        return training_batches(source, data, batch_size=4, seed=5)

    batches = start()
    take(batches, done)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 5)
    batches.set_state(state)  # also back in the same iterator, with batches already prefetched
    assert_same(take(batches, 5), expected)
    batches.close()

    resumed = start()
    resumed.set_state(state)
    assert_same(take(resumed, 5), expected)
    resumed.close()


def test_threads_do_not_change_the_batches(folder):
    data = settings(folder, augment="crop_flip")
    source = open_source(data, "train")
    runs = []
    for num_workers in 0, 4:
        batches = training_batches(source, data | {"num_workers": num_workers}, batch_size=4, seed=0)
        runs.append(take(batches, 6))
        batches.close()
    assert_same(*runs)


def test_evaluation_fills_the_last_batch_with_copies_of_weight_0():
    batches = evaluation_batches(Numbers(), MEMORY, batch_size=4)
    one, two, last = list(batches)
    batches.close()
    assert one["index"].tolist() == [0, 1, 2, 3] and two["id"].tolist() == ["n4", "n5", "n6", "n7"]
    assert one["weight"].tolist() == [1, 1, 1, 1]
    assert last["weight"].tolist() == [1, 1, 0, 0] and last["weight"].dtype == np.float32
    assert last["index"].tolist() == [8, 9, 9, 9] and last["id"].tolist() == ["n8", "n9", "n9", "n9"]
    np.testing.assert_array_equal(last["image"][3], last["image"][1])


def test_unreadable_image_ends_the_run_by_name(folder):
    path = folder / "val" / "bee" / "1.JPG"
    path.write_bytes(path.read_bytes()[:-200])
    for num_workers in 0, 2:
        data = settings(folder, num_workers=num_workers)
        for make in (
            lambda source, data: training_batches(source, data, batch_size=4, seed=0),
            lambda source, data: evaluation_batches(source, data, batch_size=4),
        ):
            batches = make(open_source(data, "test"), data)
            with pytest.raises(InputError, match=r"val/bee/1\.JPG: image file is truncated") as error:
                next(batches)
            assert one_line(error)
            batches.close()


def test_unreadable_image_is_counted_logged_once_and_left_out(folder, caplog):
    path = folder / "val" / "bee" / "1.JPG"
    path.write_bytes(path.read_bytes()[:-200])
    data = settings(folder, on_error="skip")
    source = open_source(data, "test")
    batches = evaluation_batches(source, data, batch_size=2)
    seen = list(batches)
    batches.close()
    assert [i for b in seen for i, w in zip(b["id"], b["weight"], strict=True) if w] == [
        "val/bee/0.JPG", "val/bee/2.JPG", "val/cat/0.JPG"]  # fmt: skip
    black = seen[0]
    assert black["index"].tolist() == [0, 1] and black["weight"].tolist() == [1, 0] and black["label"][1] == -1
    assert not black["image"][1].any() and black["id"][1] == ""
    assert list(batches.unreadable) == [1] and "val/bee/1.JPG" in batches.unreadable[1]

    caplog.clear()
    training = training_batches(source, data, batch_size=2, seed=0)
    indices = np.concatenate([b["index"] for b in take(training, 8)]).reshape(4, 4)
    state = training.get_state()
    expected = take(training, 2)
    training.set_state(state)
    assert_same(take(training, 2), expected)
    training.close()
    assert all(sorted(epoch) == [0, 2, 2, 3] for epoch in indices.tolist())  # the next in place of 1
    assert len(training.unreadable) == 1
    assert sum("val/bee/1.JPG" in record.getMessage() for record in caplog.records) == 1


def test_nothing_readable_at_all(folder):
    for path in (folder / "val").rglob("*.JPG"):
        path.write_bytes(b"")
    data = settings(folder, on_error="skip")
    source = open_source(data, "test")
    batches = training_batches(source, data, batch_size=2, seed=0)
    with pytest.raises(InputError, match="none of the 4 images can be read"):
        next(batches)
    batches.close()
    assert [batch["weight"].tolist() for batch in evaluation_batches(source, data, batch_size=2)] == [[0, 0], [0, 0]]


def test_batches_end_when_closed(folder):
    data = settings(folder, num_workers=2)
    batches = training_batches(open_source(data, "train"), data, batch_size=2, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError):
        next(batches)


def test_bad_requests():
    def start(records=None, batch_size=2, seed=0):
        return training_batches(Numbers(), MEMORY, batch_size=batch_size, seed=seed, records=records)

    with pytest.raises(InputError, match="batch_size is 0"):
        start(batch_size=0)
    with pytest.raises(InputError, match="seed is -1"):
        start(seed=-1)
    for records in np.array([[0, 0], [10, 0]]), np.array([[0, 0], [-1, 0]]):
        with pytest.raises(InputError, match="does not exist: the source has 10 images"):
            start(records)
    with pytest.raises(InputError, match=r"records have view 1; with data.augment 'none'"):
        start(np.array([[0, 1]]))
    with pytest.raises(InputError, match="no records"):
        start(np.zeros((0, 2), np.int64))


def test_real_photographs():
    root = Path(os.environ.get("TIF_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (root / "imagenette").is_dir():
        pytest.skip("no ../shared/data/imagenette and no TIF_DATA: real photographs are not at hand")
    data = {"name": "image_folder", "root": str(root / "imagenette"), "test_split": "val", "num_test": 20}
    source = open_source(data, "test")
    assert source.num_classes == 10 and [source[i]["label"] for i in range(0, 20, 2)] == list(range(10))
    batches = evaluation_batches(source, data, batch_size=20)
    (batch,) = batches
    batches.close()
    assert abs(batch["image"].mean()) < 0.6 and 0.7 < batch["image"].std() < 1.5  # photographs, normalised


GENERATED = {"name": "digits", "image_size": 32, "crop_fraction": 1.0, "num_train": 100, "num_workers": 2}


def test_worker_processes_give_the_same_batches():
    def first(**options):
        batches = training_batches(open_source(GENERATED, "train"), GENERATED | options, batch_size=64, seed=0)
        batches.set_state({"next_batch": 1})
        found = [next(batches) for _ in range(3)]
        batches.close()
        return found

    for ours, theirs in zip(first(), first(worker_processes=2), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_repeats_draw_views_anew_of_fewer_images():
    data = GENERATED | {"augment": "crop_flip"}
    batches = training_batches(open_source(data, "train"), data, batch_size=10, seed=0, repeats=3)
    first, again = ([next(batches) for _ in range(10)] for _ in range(2))  # two epochs of 100
    for epoch in (first, again):
        index = np.concatenate([batch["index"] for batch in epoch])
        assert (index[0:99:3] == index[2:99:3]).all() and len(set(index)) == 34  # 100 rows of 34 images
        images = np.concatenate([batch["image"] for batch in epoch])
        assert not (images[0] == images[1]).all() and not (images[1] == images[2]).all()
    assert set(np.concatenate([b["index"] for b in first])) != set(np.concatenate([b["index"] for b in again]))
    with pytest.raises(InputError, match=r"augmentation\.repeats is 0"):
        training_batches(open_source(data, "train"), data, batch_size=10, seed=0, repeats=0)
