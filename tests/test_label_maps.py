"""Label maps: pairs of files, what their numbers stand for, batches of them, and what bad input is answered with."""

import struct
import zlib

import numpy as np
import pytest
from label_maps import SIZE, classes, numbers, pairs, write_pairs
from pictures import PLAIN, one_line, picture
from PIL import Image

from tif_jax import data
from tif_jax.data import open_source
from tif_jax.data.augment import Augmentation
from tif_jax.data.joint_views import augmented_pair, evaluation_pair
from tif_jax.data.label_maps import LabelMaps
from tif_jax.data.loader import evaluation_batches, training_batches
from tif_jax.data.options import read_options
from tif_jax.data.source import UnreadableImage, fingerprint
from tif_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return write_pairs(tmp_path)


def taken(batches, count):
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def refused(match, call, kind=InputError):
    with pytest.raises(kind, match=match) as error:
        call()
    assert one_line(error) and len(str(error.value)) < 600


def few_bits():
    """A PNG file of 24 x 32 grey levels of 2 bits, which Pillow would read as 0, 85, 170 and 255."""
    header = struct.pack(">IIBBBBB", 32, 24, 2, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress((b"\0" + b"\x1b" * 8) * 24)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# Files ----------------------------------------------------------------------------------------------------------------


def test_pairs_are_sorted_and_have_depths_in_metres(folder):
    train, val = (open_source(pairs(folder), split) for split in ("train", "test"))
    assert (len(train), len(val), train.num_classes, train.class_names) == (5, 3, 0, ())
    assert [train[i]["id"] for i in range(3)] == ["train/image/0.jpg", "train/image/1.png", "train/image/2.jpg"]
    for i in range(3):
        example = val[i]
        assert example["label"] == -1 and example["image"].size == SIZE[::-1]
        assert example["label_map"].dtype == np.float32
        np.testing.assert_allclose(example["label_map"], numbers(100 + i) * 0.05, rtol=1e-6)
        assert (example["label_map"] == 0).any()


def test_files_of_16_bits(tmp_path):
    write_pairs(tmp_path, dtype=np.uint16)
    source = open_source(pairs(tmp_path, label_scale=0.001), "train")
    np.testing.assert_allclose(source[1]["label_map"], numbers(1, np.uint16) / 1000, rtol=1e-6)
    assert source[1]["label_map"].max() > 60


def test_maps_in_folders_below_and_splits_of_other_names(tmp_path):
    for name in ("image/a/x.jpg", "image/b/x.jpg", "maps/a/x.png", "maps/b/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers(len(name) + ord(name[-7]))).convert("RGB" if "image" in name else "L").save(
            tmp_path / name
        )
    source = open_source(pairs(tmp_path, train_split=".", label_folder="maps"), "train")
    assert [source[i]["id"] for i in range(2)] == ["image/a/x.jpg", "image/b/x.jpg"]
    assert (source[0]["label_map"] != source[1]["label_map"]).any()


def test_auto_finds_the_splits_and_a_part_may_be_kept_for_the_test(folder):
    options = data.with_splits(read_options(pairs(folder, train_split="auto", test_split="auto")))
    assert (options.train_split, options.test_split) == ("train", "val")
    kept = pairs(folder, test_split="train", test_fraction=0.4)
    train, test = (open_source(kept, split) for split in ("train", "test"))
    ids = [source[i]["id"] for source in (train, test) for i in range(len(source))]
    assert (len(train), len(test)) == (3, 2) and sorted(ids) == [
        f"train/image/{i}.{('jpg', 'png')[i % 2]}" for i in range(5)
    ]
    (folder / "val").rename(folder / "other")
    (folder / "train").rename(folder / "whole")
    refused(r"no split '\.', a folder with image/ in it; it has: other, whole", lambda: open_source(
        pairs(folder, train_split="auto", test_split="auto"), "train"))  # fmt: skip


def test_the_fingerprint_tells_examples_and_what_maps_mean(folder):
    first = fingerprint(open_source(pairs(folder), "train"))
    assert first == fingerprint(open_source(pairs(folder), "train"))
    others = [
        pairs(folder, label_scale=0.1),
        classes(folder),
        classes(folder, num_classes=300),
        pairs(folder, num_train=3),
    ]
    assert len({first, *(fingerprint(open_source(other, "train")) for other in others)}) == 5
    (folder / "train/image/0.jpg").rename(folder / "train/image/00.jpg")
    (folder / "train/depth/0.png").rename(folder / "train/depth/00.png")
    assert fingerprint(open_source(pairs(folder), "train")) != first


def test_pairs_that_do_not_fit(folder):
    def opened():
        return open_source(pairs(folder), "train")

    picture(0).save(folder / "train/image/7.jpg")
    refused(r"image .*train/image/7\.jpg has no label map .*train/depth/7\.png; add it", opened)
    picture(0, 10, 10).convert("L").save(folder / "train/depth/7.png")
    refused(r"label map .*7\.png has 10 x 10 pixels .* its image 24 x 32", lambda: opened()[5])
    picture(0).save(folder / "train/image/7.png")
    refused(r"images 7\.jpg and 7\.png .* same label map, 7\.png", opened)
    for name in "7.jpg", "7.png":
        (folder / "train/image" / name).unlink()
    refused(r"label map .*train/depth/7\.png has no image", opened)


def test_settings_that_do_not_fit(folder):
    for settings, match in [
        (pairs(folder, test_split="test"), r"no split 'test', a folder with image/ in it; it has: train, val"),
        (pairs(folder, label_folder="maps"), r"no folder .*val/maps with label maps: set data.label_folder; .*depth"),
        (pairs(folder, label_folder="image"), r"data.label_folder is 'image'"),
        (pairs(folder, label_scale=0.0), r"data.label_scale is 0.0; .* above 0.*0\.001 where units are millimetres"),
        (pairs(folder, label_scale=None), r"data.label_scale is not given, and .*val/depth has whole numbers"),
        (pairs(folder, label_kind="normals"), r"data.label_kind is 'normals'; allowed: 'depth', 'segmentation'"),
        (classes(folder, class_index={"wall": 0}), r"data.class_index has an entry for 'wall'"),
        (classes(folder, class_index={"3": -1}), r"data.class_index.3 is -1"),
        (classes(folder, class_index={"3": 4}, num_classes=4), r"data.class_index.3 is 4; .* from 0 to 3"),
        (pairs(folder / "nowhere"), r"nowhere is not a folder"),
    ]:
        refused(match, lambda settings=settings: open_source(settings, "test"))


@pytest.mark.parametrize("kind", ["depth", "segmentation"])
def test_files_that_are_no_label_maps(folder, kind):
    settings = classes(folder) if kind == "segmentation" else pairs(folder)
    file, source = folder / "train/depth/0.png", open_source(settings, "train")
    grey = Image.fromarray(numbers(0))
    whole = file.read_bytes()
    for save, match in [
        (lambda: file.write_bytes(whole[: len(whole) // 2]), "truncated|broken"),
        (lambda: grey.save(file, "JPEG"), "not a PNG file"),
        (lambda: grey.convert("RGB").save(file), "kind RGB.*one channel of 8 or 16 bits"),
        (lambda: grey.quantize(16).convert("L").quantize(3).save(file, bits=2), "palette" if kind == "depth" else ""),
        (lambda: file.write_bytes(few_bits()), "kind L;2; save it"),
        (lambda: file.unlink(), "No such file"),
    ]:
        save()
        if match:
            refused(f"cannot read label map .*train/depth/0.png: .*({match})", lambda: source[0], UnreadableImage)
        else:
            assert source[0]["label_map"].max() == 2


# Classes --------------------------------------------------------------------------------------------------------------


def test_classes_of_pixels(tmp_path):
    write_pairs(tmp_path, below=4)
    mask = numbers(0, below=4)
    mask[3:5] = 255
    Image.fromarray(mask).save(tmp_path / "train/depth/0.png")
    expected = np.where(mask == 255, -1, mask.astype(np.int32))
    for number, outputs in ((0, 0), (4, 4)):
        source = open_source(classes(tmp_path, num_classes=number), "train")
        found = source[0]["label_map"]
        assert source.num_classes == outputs == len(source.class_names) and found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)
    refused(
        r"label map .*train/depth/0\.png has class 3, and there are 3, from 0: set data.num_classes",
        lambda: open_source(classes(tmp_path, num_classes=3), "train")[0],
    )
    source = open_source(classes(tmp_path, class_index={"1": 0, "3": 1}), "train")
    assert source.num_classes == 2 and source.class_names == ("1", "3")
    np.testing.assert_array_equal(source[0]["label_map"], np.select([mask == 1, mask == 3], [0, 1], -1))


def test_what_is_ignored():
    maps = LabelMaps("segmentation")
    rows = [
        (np.array([[0, 255, 7]], np.uint8), [0, -1, 7]),
        (np.array([[0, 255, 65535]], np.uint16), [0, 255, -1]),
        (np.array([[0, 255, -2]], np.int32), [0, 255, -1]),
    ]
    for given, expected in rows:
        np.testing.assert_array_equal(maps.read(given, ""), [expected])
    assert (maps.without_labels((2, 3)) == np.full((2, 3), -1)).all()
    given = np.array([[1.5, 0, -1, np.nan, np.inf]], np.float16)
    np.testing.assert_array_equal(LabelMaps("depth").read(given, ""), [[1.5, 0, 0, 0, 0]])
    np.testing.assert_array_equal(LabelMaps("depth", 2.0).read(given, ""), [[3, 0, 0, 0, 0]])


# Batches --------------------------------------------------------------------------------------------------------------


def test_batches_have_the_maps_of_their_images(folder):
    settings = pairs(folder, image_size=(12, 20), crop_fraction=0.9, **PLAIN)
    source = open_source(settings, "train")
    (batch,) = taken(evaluation_batches(source, settings, batch_size=8), 1)
    assert batch["label_map"].shape == (8, 12, 20) and batch["label_map"].dtype == np.float32
    assert (batch["label"] == -1).all() and batch["weight"].tolist() == [1] * 5 + [0] * 3
    how = read_options(settings).preprocessing
    for i in range(5):
        example = source[i]
        image, label_map = evaluation_pair(example["image"], example["label_map"], (12, 20), how)
        np.testing.assert_array_equal(batch["image"][i], image)
        np.testing.assert_array_equal(batch["label_map"][i], label_map)


def test_scored_views_and_fresh_ones(folder):
    settings = classes(folder, augment="crop_flip", **PLAIN)
    source, how = open_source(settings, "train"), read_options(settings).preprocessing
    records = np.array([[i, view] for i in (3, 1) for view in (0, 1, 2)])
    (batch,) = taken(evaluation_batches(source, settings, batch_size=6, records=records), 1)
    for row, (i, view) in enumerate(records.tolist()):
        if view:
            rng = np.random.default_rng((1, i, view))
            pair = augmented_pair(source[i]["image"], source[i]["label_map"], SIZE, rng, how)
            np.testing.assert_array_equal(batch["image"][row], pair[0])
            np.testing.assert_array_equal(batch["label_map"][row], pair[1])
    assert batch["label_map"].dtype == np.int32

    def fresh(**options):
        augmentation = Augmentation(rotate=20.0, color_jitter=0.2)
        made = training_batches(source, settings | options, batch_size=5, seed=3, augmentation=augmentation)
        return taken(made, 4)

    first = fresh()
    assert any((batch["label_map"] == -1).any() for batch in first)
    assert (first[0]["label_map"] != first[1]["label_map"]).any()
    for again in fresh(), fresh(worker_processes=1, num_workers=1):
        for one, other in zip(first, again, strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("kind, nothing", [("depth", 0), ("segmentation", -1)])
def test_unreadable_pairs_may_be_left_out(folder, kind, nothing, caplog):
    settings = pairs(folder, label_kind=kind)
    (folder / "train/depth/1.png").write_bytes(b"none")
    (folder / "train/image/2.jpg").write_bytes(b"none")
    source = open_source(settings, "train")
    refused(r"depth/1\.png: it is not a PNG file; replace the file, or .*on_error='skip'", lambda: taken(
        evaluation_batches(source, settings, batch_size=5), 1))  # fmt: skip
    (batch,) = taken(evaluation_batches(source, settings | {"on_error": "skip"}, batch_size=5), 1)
    assert batch["weight"].tolist() == [1, 0, 0, 1, 1] and "Left out: cannot read label map" in caplog.text
    assert (batch["label_map"][1:3] == nothing).all() and not batch["image"][1:3].any()
    assert (batch["label_map"][[0, 3, 4]].max(axis=(1, 2)) > 0).all()
    shown = taken(training_batches(source, settings | {"on_error": "skip"}, batch_size=5, seed=0), 3)
    assert {int(i) for batch in shown for i in batch["index"]} == {0, 3, 4}


def test_augmentations_that_do_not_fit(folder):
    settings = pairs(folder, augment="crop_flip")
    for wrong, match in (("erase", 0.25), "erase is 0.25"), (("rand_augment", "m9-inc1"), "rand_augment is"):
        augmentation = Augmentation(**dict([wrong]))
        refused(match, lambda given=augmentation: training_batches(
            open_source(settings, "train"), settings, batch_size=2, seed=0, augmentation=given))  # fmt: skip
    generated = {"name": "digits", "num_train": 4, "image_size": 32, "augment": "crop_flip"}
    refused("rotate is 5, and it is for data with label maps", lambda: training_batches(
        open_source(generated, "train"), generated, batch_size=2, seed=0, augmentation=Augmentation(rotate=5.0)))  # fmt: skip


def test_rooms(data_root):
    """NYU Depth V2, as 8-bit files: at most 10 m."""
    settings = {
        "name": "image_pairs",
        "root": str(data_root / "nyu_depth"),
        "train_split": "auto",
        "test_split": "auto",
        "image_size": (192, 256),
        "label_scale": 1 / 25.5,
        "augment": "crop_flip",
    }
    train, val = (open_source(settings, split) for split in ("train", "test"))
    assert (len(train), len(val)) == (800, 100)
    augmentation = Augmentation(rotate=2.5, color_jitter=0.2)
    (fresh,) = taken(training_batches(train, settings, batch_size=8, seed=0, augmentation=augmentation), 1)
    (seen,) = taken(evaluation_batches(val, settings, batch_size=8), 1)
    for batch in fresh, seen:
        assert batch["image"].shape == (8, 192, 256, 3) and batch["label_map"].shape == (8, 192, 256)
        measured = batch["label_map"][batch["label_map"] > 0]
        assert 0.3 < measured.min() and measured.max() <= 10.0 + 1e-5 and 1.5 < measured.mean() < 5
    assert (seen["label_map"] > 0).mean() > 0.99 > 0.9 < (fresh["label_map"] > 0).mean() < 1
