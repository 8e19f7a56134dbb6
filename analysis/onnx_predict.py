import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps
model, session = json.load(open("model.json")), onnxruntime.InferenceSession("model.onnx")
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
(W, H), side, S = image.size, min(image.size), model["size"]
box = (W - side) // 2, (H - side) // 2, (W + side) // 2, (H + side) // 2
x = np.asarray(image.crop(box).resize((S, S), Image.BICUBIC), np.float32).transpose(2, 0, 1) / 255
z = session.run(None, {"images": x[None]})[0][0] / model["temperature"]
p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
for k in p.argsort()[:-4:-1]:
    print(f"{model['class_names'][k]} {100 * p[k]:.1f} %")
