"""Predict pictures with an exported network: needs only onnxruntime, NumPy and Pillow.

    python model_predict.py new/*.jpg

`python analyze.py export` copies this file beside model.onnx and model.json, which it reads.
"""
import json
import os
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

ORIENTATION, PHOTOMETRIC, SAMPLE_FORMAT = 274, 262, 339     # tags of EXIF and TIFF


def read(path, size, white):
    """A picture's central square, turned as EXIF says, on white -> float32 (3,size,size) in [0,1].

    white: the level of 16-bit gray that is white, where the file does not say it. ValueError for
    floating-point or signed 8-bit pixels.
    """
    image = Image.open(path)
    image.filename = ""         # else PIL maps TIFF files into memory, and some are turned wrongly
    tags = image.tag_v2 if image.format == "TIFF" else {}
    signed = 2 in tags.get(SAMPLE_FORMAT, ())
    if image.mode == "F" or signed and image.mode == "L":
        raise ValueError("it holds floating-point or signed pixels; save it with 8 or 16 bits")
    decoder_args = image.tile[0][3] if image.format == "PPM" else None
    if isinstance(decoder_args, tuple) and decoder_args[-1] != 65535:
        white = 65535                           # PIL has scaled the file's own white level to it
    whole = None
    if image.format in ("JPEG", "MPO"):         # decoded smaller, at no less than twice the size
        on_its_side = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        whole = image.size[::-1] if on_its_side else image.size
        scale = 2 * size / min(whole)
        image.draft(image.mode, [max(1, int(side * scale)) for side in image.size])
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                          # 16 or 32 bits of gray: the upper 8
        deep = np.asarray(image)
        if tags and image.mode == "I" and not signed:
            deep = deep.view(np.uint32)                     # which PIL reads as signed
        levels = deep.astype(np.int64).clip(0, white)
        levels = white - levels if tags.get(PHOTOMETRIC) == 0 else levels    # its 0 is white
        levels = levels * 256 // (white + 1)
        if "transparency" in image.info:                    # a level of PNG files
            levels[deep == image.info["transparency"]] = 255
        image = Image.fromarray(levels.astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    (W, H), (w, h) = whole or image.size, image.size
    left, top, side = (W - min(W, H)) // 2, (H - min(W, H)) // 2, min(W, H)
    x, y = w / W, h / H                         # 1, or a file's that was decoded smaller
    box = round(x * left), round(y * top), round(x * (left + side)), round(y * (top + side))
    image = image.crop(box).resize((size, size), Image.BICUBIC)
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 255


def main():
    stem = os.path.abspath(__file__).removesuffix("_predict.py")
    with open(f"{stem}.json", encoding="utf-8") as file:
        model = json.load(file)
    session = onnxruntime.InferenceSession(f"{stem}.onnx")
    if len(sys.argv) == 1:
        sys.exit(f"{sys.argv[0]} PICTURE ...")
    sys.stdout.reconfigure(errors="backslashreplace")       # names that its encoding lacks
    for path in sys.argv[1:]:
        try:
            x = read(path, model["size"], model["white"])
        except (OSError, ValueError) as error:              # no picture, or none that can be read
            print(f"{path}: {error}", file=sys.stderr)
            continue
        logits = session.run(None, {"images": x[None]})[0][0] / model["temperature"]    # (K,)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        best = p.argsort()[:-4:-1]
        print(f"{path}:", ", ".join(f"{model['class_names'][k]} {100 * p[k]:.1f} %" for k in best))


if __name__ == "__main__":
    main()
