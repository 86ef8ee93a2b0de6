"""python predict.py IMAGE... - what the model in this folder predicts; python predict.py --out DIR IMAGE... - its maps, too.

Of a classifier: names and probabilities of the likeliest classes. Of a depth model: the nearest, middle and farthest metres.
Of a segmentation model: how much of the picture each class has. Of the last two --out writes what is predicted for every
pixel of the view: DIR/IMAGE.depth.png (16 bits, millimetres) or DIR/IMAGE.classes.png (numbers of classes).
It needs numpy, Pillow and what the model's format needs (manifest.json): jax, onnxruntime, or timm.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FOLDER = Path(__file__).parent


def prepared(path, image_size, crop_fraction, mean, std, interpolation):
    """The picture as the model takes it: resized to cover the view, its centre cut out, normalised; (Y, X, 3)."""
    image = ImageOps.exif_transpose(Image.open(path))
    pixels = np.asarray(image)
    if image.mode == "F" or (image.mode.startswith("I") and not 0 <= pixels.min() <= pixels.max() <= 65535):
        raise ValueError("its pixels have no fixed range; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        image = Image.fromarray(np.round(pixels / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image, (rows, columns) = image.convert("RGB"), image_size
    width, height, down, across = *image.size, int(rows / crop_fraction), int(columns / crop_fraction)
    tall = height * across <= width * down
    size = (width * down // height, down) if tall else (across, height * across // width)
    left, top = round((size[0] - columns) / 2), round((size[1] - rows) / 2)
    image = image.resize(size, Image.Resampling[interpolation.upper()]).crop((left, top, left + columns, top + rows))
    return ((np.asarray(image, np.float32) / 255 - np.float32(mean)) / np.float32(std)).astype(np.float32)


def loaded(manifest, folder=FOLDER):
    """A function from images (B, Y, X, 3) to the main output: (B, classes), (B, Y, X) metres or (B, Y, X, classes)."""
    if "ladder" in manifest:
        return climbing(manifest["ladder"], folder)
    file, name = folder / manifest["model"], manifest["outputs"][0]["name"]
    if manifest["format"] == "stablehlo":
        from jax import export

        call = export.deserialize(bytearray(file.read_bytes())).call
        return lambda images: np.asarray(call(images)[name])
    if manifest["format"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda images: session.run([name], {"images": images})[0]
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def by_torch(images):
        with torch.inference_mode():
            return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    return by_torch


def climbing(ladder, folder):
    """The same of several models, the cheapest first: an image goes on to the next until one is as sure as it has to be."""
    folders = [folder / rung["folder"] for rung in ladder]
    calls = [loaded(json.loads((one / "manifest.json").read_text(encoding="utf-8")), one) for one in folders]

    def call(images):
        logits = np.array(calls[0](images))
        left = np.arange(len(images))
        for rung, following in zip(ladder[:-1], calls[1:], strict=True):
            left = left[~(log_odds(logits[left]) >= rung["least_log_odds"])]
            if len(left):  # filled up to a power of two: StableHLO is compiled anew for every number of images
                rows = np.resize(left, 1 << (len(left) - 1).bit_length())
                logits[left] = following(images[rows])[: len(left)]
        return logits

    return call


def log_odds(logits):
    """Of the likeliest class, log p / (1 - p); not a number where a logit is none, which is sure of nothing."""
    ordered = np.sort(logits.astype(np.float64), axis=-1)
    others = np.exp(ordered[..., :-1] - ordered[..., -1:])
    return -np.log(others.sum(axis=-1))


def classes(logits, names):
    """What is printed of a picture, and no map."""
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    likeliest = np.argsort(-shares, kind="stable")[:5]
    return [f"{100 * shares[output]:5.1f} %  {names[output] if names else output}" for output in likeliest], None


def metres(depth, names):
    """What is printed of a picture, and its map in millimetres."""
    least, middle, most = np.quantile(depth, [0, 0.5, 1])
    millimetres = np.round(1000 * depth).clip(0, 65535).astype(np.uint16)
    return [f"{least:.2f} m nearest, {middle:.2f} m median, {most:.2f} m farthest"], millimetres


def areas(logits, names):
    """What is printed of a picture, and its map of classes."""
    found = logits.argmax(axis=-1)
    shares = np.bincount(found.reshape(-1), minlength=logits.shape[-1]) / found.size
    largest = [output for output in np.argsort(-shares, kind="stable") if shares[output]]
    kind = np.uint8 if logits.shape[-1] <= 256 else np.uint16
    return [f"{100 * shares[one]:5.1f} %  {names[one] if names else one}" for one in largest], found.astype(kind)


TASKS = {"classification": (classes, ""), "depth": (metres, "depth"), "segmentation": (areas, "classes")}


def main(words):
    at = words.index("--out") if "--out" in words[:-1] else len(words)
    out, paths = Path(words[at + 1]) if at < len(words) else None, words[:at] + words[at + 2 :]
    if not paths or any(path.startswith("--") for path in paths):
        sys.exit(__doc__)
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    if manifest["outputs"][0]["name"] == "features":
        sys.exit("this model has no classes; import `prepared` and `loaded` from here for its features")
    told, kind = TASKS[manifest["task"]]
    if out and not kind:
        sys.exit("--out is for depth and segmentation, which say something of every pixel")
    call, names = loaded(manifest), manifest["class_names"]
    failed = 0
    for path in paths:
        try:
            image = prepared(path, **manifest["preprocessing"])
        except Exception as error:  # Pillow raises every kind; the other pictures go on
            failed += 1
            print(f"cannot read image {path}: {error}", file=sys.stderr)
            continue
        lines, found = told(call(image[None])[0].astype(np.float64), names)
        print(path, *lines, sep="\n  ")
        if out and not written(out / f"{Path(path).name}.{kind}.png", found):
            failed += 1
    sys.exit(1 if failed else 0)


def written(path, found):
    """Whether the map is at the path now; what was there before stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            Image.fromarray(found).save(file, "PNG")
        return True
    except OSError as error:
        print(f"{path} is not written: {error.strerror or error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
