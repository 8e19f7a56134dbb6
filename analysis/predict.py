r"""Use a trained network on pictures: predictions, and files that other programs can run.

    python analyze.py predict --checkpoint runs/x pictures/*.jpg folder --topk 5 --csv classes.csv
    python analyze.py export runs/x

With --mirror, both average the logits over each picture and its mirror image.
The probabilities are the softmax of the prediction's logits: of a student, those averaged over CLS
and DIST. They are as overconfident as the network is (`python analyze.py eval` measures it), and
deferred re-weighting moves them towards rare classes on purpose. DeiT-III was trained by a binary
cross-entropy, without a softmax: use its probabilities only to rank classes.
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
from analysis.loading import decoded_size
from engine.checkpoints import write_atomically
from engine.evaluation import student_heads
from engine.runtime import UserError
from images import decode, files


class Predictor(nn.Module):
    """Float images (B,3,S,S) in [0,1] -> logits (B,K) of the prediction; normalises inside."""

    def __init__(self, network):
        super().__init__()
        self.net, self.size = network.net, network.net.img_size
        self.is_student = network.kind == "student"

    def forward(self, images):
        if self.is_student:
            return student_heads(self.net, images)["avg"]
        return self.net(images)


# ---- Predictions ---------------------------------------------------------------------------------

def find_images(names):
    """Files, folders (searched through) and patterns like 'photos/*.jpg' -> paths in natural order.

    Each once. Folders that cannot be read are named on stderr. Raises UserError for a name that
    matches nothing.
    """
    paths, problems = [], []
    for name in names:
        matches = [name]
        if not os.path.exists(name):
            matches = sorted(glob.glob(name, recursive=True), key=files.natural)
            if not matches:
                raise UserError(f"there is no file, folder or match for {name}")
        for match in matches:
            if os.path.isdir(match):
                paths += sorted(files.walk(match, problems, Counter()), key=files.natural)
            else:
                paths.append(match)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not paths:
        raise UserError(f"there are no images in {', '.join(names)}")
    return list(dict.fromkeys(paths))


@torch.no_grad()
def predict(network, names, rt, topk=5, batch=64):
    """Rows {"image", "class", "probability", "class 2", "probability 2", ...}, one for each image.

    network: an engine.networks.Network on rt.device. names: files, folders and patterns. Images
    that cannot be read, or of which the network says nothing finite, are named on stderr and left
    out; UserError if none is left.
    """
    model, rows = Predictor(network).eval(), []
    paths, size = find_images(names), decoded_size(network)
    for start in range(0, len(paths), batch):
        part = paths[start:start + batch]
        encoded = files.Files([os.fsencode(path) for path in part], None, [], white=network.white)
        images, readable, problems = decode.read_all(encoded, size)
        for problem in problems:
            print(problem, file=sys.stderr)
        if not len(images):
            continue
        x = augment.to_float(images.to(rt.device))
        x = augment.center_crop(x, model.size)                      # (B,3,S,S) in [0,1]
        with rt.autocast():
            logits = model(x).float()                               # (B,K)
        finite = logits.isfinite().all(dim=1).tolist()
        values, classes = logits.softmax(dim=1).topk(min(topk, logits.shape[1]), dim=1)
        read = [path for path, good in zip(part, readable) if good]
        for path, known, p, k in zip(read, finite, values.tolist(), classes.tolist()):
            if known:
                rows.append(prediction_row(path, p, k, network.class_names))
            else:
                print(f"{files.shown(path)}: what the network says of it is not finite: no class",
                      file=sys.stderr)
    if not rows:
        raise UserError("none of the images can be read, or classified")
    return rows


def prediction_row(path, probabilities, classes, class_names):
    """The row of one image; classes: numbers, most probable first. Without names they stay so."""
    row = {"image": files.shown(path)}
    for rank, (p, k) in enumerate(zip(probabilities, classes), 1):
        column = "" if rank == 1 else f" {rank}"
        row[f"class{column}"] = class_names[k] if class_names else str(k)
        row[f"probability{column}"] = round(p, 4)
    return row


def prediction_text(row):
    """A row for people: path: cat 91.0 %, dog 5.2 %."""
    path, *ranked = row.values()
    pairs = zip(ranked[::2], ranked[1::2])
    return f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in pairs)


# ---- Export --------------------------------------------------------------------------------------

def export(network, stem):
    """Write stem.pt2 (torch.export) and, with the package onnx, stem.onnx; returns lines of text.

    Both take float images (B,3,S,S) in [0,1], any B, and give logits (B,K). Each is read again and
    must give the network's own logits on random images. Raises UserError if it does not.
    """
    model = Predictor(network).eval().cpu()
    generator = torch.Generator().manual_seed(0)
    example, other = (torch.rand(n, 3, model.size, model.size, generator=generator)
                      for n in (2, 5))
    with torch.no_grad():
        expected = model(other)
    names = network.class_names or [str(k) for k in range(expected.shape[1])]
    dynamic = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}}
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic)
    contents = io.BytesIO()
    torch.export.save(program, contents, extra_files={"class_names.json": json.dumps(names)})
    write_atomically(f"{stem}.pt2", lambda file: file.write(contents.getbuffer()))
    logits = torch.export.load(f"{stem}.pt2").module()(other)
    lines = [f"{stem}.pt2: {agreement(logits, expected, stem)}"]

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime")
               if importlib.util.find_spec(name) is None]
    if missing:
        return lines + [f"no {stem}.onnx: pip install {' '.join(missing)} for one"]
    import onnxruntime
    program = torch.onnx.export(model, (example,), input_names=["images"], output_names=["logits"],
                                dynamo=True, dynamic_shapes=dynamic, verbose=False)
    contents = program.model_proto.SerializeToString()
    write_atomically(f"{stem}.onnx", lambda file: file.write(contents))
    session = onnxruntime.InferenceSession(f"{stem}.onnx", providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(None, {"images": other.numpy()})[0])
    return lines + [f"{stem}.onnx: {agreement(logits, expected, stem)}"]


def agreement(logits, expected, stem):
    """How far two sets of logits are apart, a text; UserError if it is more than rounding."""
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference < 1e-3:
        raise UserError(f"{stem}: the exported network gives other logits ({difference:.2g} of the "
                        "largest)")
    return f"logits agree to {difference:.1g} of the largest"
