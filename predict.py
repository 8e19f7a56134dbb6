r"""Use a trained network on pictures: predictions, and files that other programs can run.

    python analyze.py predict --checkpoint runs/x pictures/*.jpg folder --topk 5 --csv predictions.csv
    python analyze.py export runs/x

With --mirror, either asks about each picture and its mirror image, and takes the mean of the logits.
The probabilities are the softmax of the prediction's logits: of a student those averaged over CLS and DIST. They are as
overconfident as the network is: `python analyze.py eval` says how much, and a deferred re-weighting moves them towards rare
classes on purpose. A network trained with --cls-loss bce never learned a softmax: read its probabilities as an order.
"""
import glob
import importlib.util
import io
import json
import os
import sys
from collections import Counter

import torch
from torch import nn

import augment
import engine
import image_files
import run_folder
import train_student


def find_images(names):
    """Files, folders (searched through) and patterns such as 'photos/*.jpg' -> paths, in natural order. UserError for none."""
    found = []
    for name in names:
        if os.path.isdir(name):
            problems = []
            found += sorted(image_files.walk(name, problems, Counter()), key=image_files.natural)
        else:
            matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True), key=image_files.natural)
            if not matches:
                raise engine.UserError(f"there is no file, folder or match for {name}")
            found += matches
    if not found:
        raise engine.UserError(f"there are no images in {', '.join(names)}")
    return found


class Predictor(nn.Module):
    """Float images (B,3,S,S) in [0,1] -> the logits (B,K) of the prediction. Normalisation is inside."""

    def __init__(self, found):
        super().__init__()
        self.net, self.student, self.size = found.net, found.kind == "student", found.net.img_size

    def forward(self, images):
        return train_student.heads(self.net, images)["avg"] if self.student else self.net(images)


def decoded_size(found):
    """Side of the squares that files are decoded to before the centre is cut out: as the network was tested.

    A run says so itself (a teacher's: the whole square); files from elsewhere are tested as usual for their size.
    """
    usual = 0.875 if found.net.img_size > 64 and not found.config else 1.0
    return round(found.net.img_size / found.config.get("eval_crop", usual))


@torch.no_grad()
def predict(found, names, rt, topk=5, batch=64):
    """Rows {"image", "class", "probability", "class 2", "probability 2", ...} of the topk classes of every image.

    found: a networks.Network on rt.device. Images that cannot be read are said on stderr and left out; UserError if none can.
    """
    model, rows = Predictor(found).eval(), []
    class_name = lambda k: found.class_names[k] if found.class_names else str(k)
    paths, size = find_images(names), decoded_size(found)
    for start in range(0, len(paths), batch):
        files = image_files.Files([os.fsencode(p) for p in paths[start:start + batch]], None, [])
        images, good, problems = image_files.read_all(files, size)
        for problem in problems:
            print(problem, file=sys.stderr)
        if not len(images):
            continue
        x = augment.center_crop(augment.to_float(images.to(rt.device)), model.size)                   # (B,3,S,S)
        with rt.autocast():
            p = model(x).float().softmax(dim=1)
        for path, values, classes in zip((p for p, g in zip(paths[start:], good) if g), *p.topk(min(topk, p.shape[1]), dim=1)):
            row = {"image": image_files.shown(path)}
            for i, (value, k) in enumerate(zip(values.tolist(), classes.tolist())):
                number = f" {i + 1}" if i else ""
                row |= {f"class{number}": class_name(k), f"probability{number}": round(value, 4)}
            rows.append(row)
    if not rows:
        raise engine.UserError("none of the images can be read")
    return rows


def export(found, stem):
    """Write stem.pt2 (torch.export) and, with the package onnx, stem.onnx; lines of text that say what was written and checked.

    Both take float images (B,3,S,S) in [0,1], any B, and give logits (B,K). Each is read again and must give the network's own
    logits on random images. Raises UserError if it does not.
    """
    model = Predictor(found).eval().cpu()
    draw = torch.Generator().manual_seed(0)
    example, other = (torch.rand(n, 3, model.size, model.size, generator=draw) for n in (2, 5))
    with torch.no_grad():
        expected = model(other)
    dynamic = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}}
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
    names = json.dumps(found.class_names or list(map(str, range(expected.shape[1]))))
    contents = io.BytesIO()
    torch.export.save(program, contents, extra_files={"class_names.json": names})
    run_folder.write_atomically(f"{stem}.pt2", lambda f: f.write(contents.getbuffer()))
    lines = [f"{stem}.pt2: {agreement(torch.export.load(f'{stem}.pt2').module()(other), expected, stem)}"]
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        return lines + [f"no {stem}.onnx: pip install {' '.join(missing)} for one"]
    import onnxruntime
    program = torch.onnx.export(model, (example,), input_names=["images"], output_names=["logits"], dynamo=True,
                                dynamic_shapes=dynamic, verbose=False)
    run_folder.write_atomically(f"{stem}.onnx", lambda f: f.write(program.model_proto.SerializeToString()))
    session = onnxruntime.InferenceSession(f"{stem}.onnx", providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(None, {"images": other.numpy()})[0])
    return lines + [f"{stem}.onnx: {agreement(logits, expected, stem)}"]


def agreement(logits, expected, what):
    """A line that says how far two sets of logits are apart; UserError if it is more than rounding."""
    apart = float((logits - expected).abs().max() / expected.abs().max())
    if not apart < 1e-3:
        raise engine.UserError(f"{what}: the exported network gives other logits ({apart:.2g} of the largest)")
    return f"logits agree to {apart:.1g} of the largest"
