"""python predict.py IMAGE... - names and probabilities of the likeliest classes, by the model in this folder.

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


def loaded(manifest):
    """A function from images (B, Y, X, 3) to the main output, (B, classes)."""
    file, name = FOLDER / manifest["model"], manifest["outputs"][0]["name"]
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

    model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
    with torch.inference_mode():
        return lambda images: model(torch.from_numpy(images).permute(0, 3, 1, 2)).detach().numpy()


def main(paths):
    if not paths:
        sys.exit(__doc__)
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    if manifest["outputs"][0]["name"] != "logits":
        sys.exit("this model has no classes; import `prepared` and `loaded` from here for its features")
    call, names = loaded(manifest), manifest["class_names"]
    unread = 0
    for path in paths:
        try:
            image = prepared(path, **manifest["preprocessing"])
        except Exception as error:  # Pillow raises every kind; the other pictures go on
            unread += 1
            print(f"cannot read image {path}: {error}", file=sys.stderr)
            continue
        logits = call(image[None])[0].astype(np.float64)
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        print(path)
        for output in np.argsort(-shares, kind="stable")[:5]:
            print(f"  {100 * shares[output]:5.1f} %  {names[output] if names else output}")
    sys.exit(1 if unread else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
