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

PHOTOMETRIC_INTERPRETATION = 262            # a TIFF tag; 0: its lowest level is white


def read(path, size, white):
    """A picture's central square, turned as EXIF says, on white -> float32 (3,size,size) in [0,1].

    white: the level of 16-bit gray that is white. A file of floating-point pixels ends the program.
    """
    image = Image.open(path)
    image.filename = ""         # else PIL maps TIFF files into memory, and some are turned wrongly
    zero_is_white = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        sys.exit(f"{path} holds floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):                          # 16 bits of gray: the upper 8
        levels = np.asarray(image).astype(np.int64).clip(0, white)
        levels = white - levels if zero_is_white else levels
        image = Image.fromarray((levels * 256 // (white + 1)).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    (W, H), side = image.size, min(image.size)
    box = (W - side) // 2, (H - side) // 2, (W + side) // 2, (H + side) // 2
    image = image.crop(box).resize((size, size), Image.BICUBIC)
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 255


def main():
    stem = os.path.abspath(__file__).removesuffix("_predict.py")
    with open(f"{stem}.json", encoding="utf-8") as file:
        model = json.load(file)
    session = onnxruntime.InferenceSession(f"{stem}.onnx")
    for path in sys.argv[1:]:
        x = read(path, model["size"], model["white"])
        logits = session.run(None, {"images": x[None]})[0][0] / model["temperature"]    # (K,)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        best = p.argsort()[:-4:-1]
        print(f"{path}:", ", ".join(f"{model['class_names'][k]} {100 * p[k]:.1f} %" for k in best))


if __name__ == "__main__":
    main()
