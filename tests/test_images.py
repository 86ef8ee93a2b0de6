"""Images of every kind become 8-bit RGB, and files that can not be read are named."""

import io
import logging
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, one_line, picture
from PIL import Image

from tif_jax.data.pictures import read_image
from tif_jax.data.source import UnreadableImage
from tif_jax.errors import InputError

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


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
    read = read_image(data)
    np.testing.assert_allclose(read, upright, atol=6)
    np.testing.assert_array_equal(read_image(read), read)  # not turned again


@pytest.mark.parametrize("exif", [b"Exif\0\0II*", b"Exif\0\0" + bytes(range(99)), b"Exif\0\0" + b"\xff" * 9])
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_that_is_damaged_is_ignored(exif, format, caplog):
    image = picture()
    data = encode(image, format, exif=exif, lossless=True)
    with pytest.raises(Exception, match=r"."):  # in Pillow
        Image.open(io.BytesIO(data)).getexif()
    with caplog.at_level(logging.DEBUG, "tif_jax"):
        np.testing.assert_array_equal(read_image(data, "a.img"), image)
    assert "EXIF of a.img is damaged and ignored" in caplog.text


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "TGA", "JPEG2000", "DDS", "SGI", "AVIF"])
def test_only_the_kinds_that_are_meant_are_opened(format, tmp_path):
    """Pillow opens them; EPS through another program."""
    path = tmp_path / "picture.png"
    path.write_bytes(encode(picture(), format))
    with pytest.raises(UnreadableImage, match=r"picture\.png: not an image of a kind that is read .JPEG, ") as error:
        read_image(path)
    assert one_line(error)


def test_more_pixels_than_honest_pictures_have(tmp_path):
    data = bytearray(encode(Image.new("L", (1, 1)), "BMP"))
    data[18:26] = struct.pack("<ii", 60_000, 3_000)  # 180 megapixels, says its header
    with pytest.raises(UnreadableImage, match=r"big\.bmp: Image size .180000000 pixels. exceeds limit") as error:
        read_image(bytes(data), "big.bmp")
    assert one_line(error)


def test_without_memory_for_it_only_a_huge_picture_is_at_fault(monkeypatch):
    def load(self):
        raise MemoryError

    image = Image.new("L", (1, 1))
    monkeypatch.setattr(Image.Image, "load", load)
    with pytest.raises(MemoryError):
        read_image(image)
    image._size = (20_000, 5_000)
    with pytest.raises(UnreadableImage, match=r"there is no memory for its 20000 x 5000 pixels"):
        read_image(image)


@pytest.mark.parametrize("first, count", [(0, 300), pytest.param(10_000, 30_000, marks=pytest.mark.long)])
def test_damaged_pictures_are_read_or_refused_in_a_line_within_2_gigabytes(first, count):
    program = Path(__file__).with_name("damaged_pictures.py")
    done = subprocess.run(
        [sys.executable, program, str(first), str(count)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read, unreadable = map(int, done.stdout.split())
    assert read + unreadable == count and min(read, unreadable) > count / 10
    assert "Traceback" not in done.stderr  # libtiff says a line of its own now and then


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_file_is_an_error_that_names_it(format, share, tmp_path):
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)), format)
    path = tmp_path / "broken.img"
    path.write_bytes(data)
    read_image(path)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnreadableImage, match=r"broken\.img: \w") as error:
        read_image(path)
    assert one_line(error)


def test_what_has_no_8_bit_meaning_is_refused(tmp_path):
    for pixels in np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32):
        with pytest.raises(UnreadableImage, match="no fixed range"):
            read_image(encode(Image.fromarray(pixels), "TIFF"), "deep.tif")
    with pytest.raises(UnreadableImage, match=r"no\.jpg.*No such file"):
        read_image(tmp_path / "no.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(UnreadableImage, match=r"text\.jpg: not an image of a kind that is read .JPEG, "):
        read_image(tmp_path / "text.jpg")
    for pixels in np.ones((4, 4, 3), np.float32), np.ones((4, 4), np.uint8), np.ones((0, 4, 3), np.uint8):
        with pytest.raises(InputError, match="give uint8"):
            read_image(pixels)
