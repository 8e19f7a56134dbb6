r"""Use a trained network on pictures: predictions, and files that other programs can run.

    python analyze.py predict --checkpoint runs/x pictures/*.jpg folder --topk 5 --csv classes.csv
    python analyze.py export runs/x

With --mirror, both average the logits over each picture and its mirror image. `--checkpoint
RUN,TEACHER` (or several teachers) is one network: the mean of their probabilities.
The probabilities are the softmax of the prediction's logits (of a student, those averaged over CLS
and DIST) divided by the temperature that `python analyze.py eval` has fitted (calibration.py).
Without one they are as overconfident as the network is. Deferred re-weighting and logit adjustment
move them towards rare classes on purpose.
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
from engine.evaluation import combined, images_at_a_time, student_heads, teacher_input
from engine.records import save_json
from engine.runtime import UserError
from images import decode, files
from images.operations import center_crop


ONNX = ("onnx", "onnxscript", "onnxruntime")        # packages that model.onnx needs
ONNX_CLIENT = os.path.join(os.path.dirname(__file__), "onnx_client.py")
UNSURE = "unsure"       # the answer where the largest probability is too small


class Predictor(nn.Module):
    """Float images (B,3,H,W) in [0,1] -> logits (B,K) of the prediction, as in the evaluation.

    Each network crops and resizes for itself and normalises inside. size: the side S of images
    that it does not resize (of a student with a teacher, the student's).
    """

    def __init__(self, network):
        super().__init__()
        self.net, self.teacher, self.size = network.net, network.teacher, decoded_size(network)
        self.is_student = network.kind == "student"

    def forward(self, images):
        if not self.is_student:
            return self.net(teacher_input(images, self.net.img_size))
        x = center_crop(augment.resize(images, self.size), self.net.img_size)
        logits = student_heads(self.net, x)["avg"]
        if self.teacher is None:
            return logits
        return combined(logits, self.teacher(teacher_input(images, self.teacher.img_size)))


@torch.no_grad()
def logits_of(network, images, index, rt):
    """Logits (n,K) of a Network's prediction, on the CPU: of images[index], uint8 (n,3,H,W)."""
    model, logits = Predictor(network).eval(), []
    for part in index.to(rt.device).split(images_at_a_time(images)):
        with rt.autocast():
            logits.append(model(augment.to_float(images[part])).float().cpu())
    return torch.cat(logits)


# ---- Predictions ---------------------------------------------------------------------------------

def find_images(names):
    """Files, folders (searched through) and patterns like 'photos/*.jpg' -> paths in natural order.

    Each once. Folders that cannot be read are named on stderr. Raises UserError for a name that
    matches nothing.
    """
    paths, problems, ignored = [], [], Counter()
    for name in names:
        matches = [name]
        if not os.path.exists(name):
            matches = sorted(glob.glob(name, recursive=True), key=files.natural)
            if not matches:
                raise UserError(f"there is no file, folder or match for {name}")
        for match in matches:
            if os.path.isdir(match):
                paths += sorted(files.walk(match, problems, ignored), key=files.natural)
            else:
                paths.append(match)
    for problem in [*problems, *([files.ignored_text(ignored)] if ignored else [])]:
        print(problem, file=sys.stderr)
    if not paths:
        raise UserError(f"there are no images in {', '.join(names)}")
    return list(dict.fromkeys(paths))


@torch.no_grad()
def predict(network, names, rt, topk=5, batch=64, temperature=1.0, min_probability=None):
    """Yield {"image", "class", "probability", "class 2", "probability 2", ...} for each image.

    network: an engine.networks.Network on rt.device. names: files, folders and patterns.
    How 16-bit images are read is said on stderr. temperature: of the probabilities. With
    min_probability also "answer": the class, or "unsure" if its probability is lower. Images that
    cannot be read, or of which the network says nothing finite, are named on stderr and left out;
    UserError if none is left.
    """
    model, paths, any_predicted = Predictor(network).eval(), find_images(names), False
    decode.say_levels(*decode.all_extremes([os.fsencode(path) for path in paths]), network.white,
                      lambda text: print(text, file=sys.stderr))
    for start in range(0, len(paths), batch):
        part = paths[start:start + batch]
        encoded = files.Files([os.fsencode(path) for path in part], None, [], white=network.white)
        images, readable, problems = decode.read_all(encoded, model.size)
        for problem in problems:
            print(f"{problem}; left out", file=sys.stderr)
        if not len(images):
            continue
        x = augment.to_float(images.to(rt.device))                  # (B,3,S,S) in [0,1]
        with rt.autocast():
            logits = model(x).float()                               # (B,K)
        finite = logits.isfinite().all(dim=1).tolist()
        probabilities = (logits / temperature).softmax(dim=1)
        values, classes = probabilities.topk(min(topk, logits.shape[1]), dim=1)
        read = [path for path, good in zip(part, readable) if good]
        for path, known, p, k in zip(read, finite, values.tolist(), classes.tolist()):
            if known:
                any_predicted = True
                yield prediction_row(path, p, k, network.class_names, min_probability)
            else:
                print(f"{files.shown(path)}: its logits are not finite, so no class is predicted",
                      file=sys.stderr)
    if not any_predicted:
        raise UserError("none of the images could be read and classified")


def prediction_row(path, probabilities, classes, class_names, min_probability=None):
    """The row of one image; classes: numbers, most probable first. Without names they stay so."""
    names = [class_names[k] if class_names else str(k) for k in classes]
    row = {"image": files.shown(path)}
    if min_probability is not None:
        row["answer"] = names[0] if probabilities[0] >= min_probability else UNSURE
    for rank, (p, name) in enumerate(zip(probabilities, names), 1):
        column = "" if rank == 1 else f" {rank}"
        row[f"class{column}"], row[f"probability{column}"] = name, round(p, 4)
    return row


def prediction_text(row):
    """A row for people: path: cat 91.0 %, dog 5.2 %; or path: unsure (cat 41.0 %, dog 39.2 %)."""
    path, *ranked = [value for column, value in row.items() if column != "answer"]
    pairs = zip(ranked[::2], ranked[1::2])
    text = ", ".join(f"{name} {100 * p:.1f} %" for name, p in pairs)
    return f"{path}: {UNSURE} ({text})" if row.get("answer") == UNSURE else f"{path}: {text}"


# ---- Export --------------------------------------------------------------------------------------

def export(network, stem, temperature=1.0):
    """Write stem.pt2 (torch.export), stem.json and, with the package onnx, stem.onnx.

    Beside stem.onnx also stem_predict.py, a copy of onnx_client.py, which predicts with it. Both
    networks take float images (B,3,S,S) in [0,1], any B, and give logits (B,K). Each is read
    again and must give the network's own logits on random images; UserError if it does not. What
    makes a picture such an image, and logits probabilities, is in stem.json: see `preprocessing`.
    Returns lines of text.
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
    save_json(f"{stem}.json", preprocessing(model.size, names, temperature, network.white))
    lines.append(f"{stem}.json: size, classes and temperature")

    missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
    if missing:
        return lines + [f"no {stem}.onnx: pip install {' '.join(missing)} for one"]
    import onnxruntime
    program = torch.onnx.export(model, (example,), input_names=["images"], output_names=["logits"],
                                dynamo=True, dynamic_shapes=dynamic, verbose=False)
    contents = program.model_proto.SerializeToString()
    write_atomically(f"{stem}.onnx", lambda file: file.write(contents))
    session = onnxruntime.InferenceSession(f"{stem}.onnx", providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(None, {"images": other.numpy()})[0])
    lines.append(f"{stem}.onnx: {agreement(logits, expected, stem)}")
    with open(ONNX_CLIENT, "rb") as client:
        text = client.read()
    write_atomically(f"{stem}_predict.py", lambda file: file.write(text))
    lines.append(f"{stem}_predict.py: predicts with .onnx and .json, without this project")
    return lines


def preprocessing(size, class_names, temperature, white):
    """What a program needs beside an exported network, plain values, with words for its author."""
    return {
        "size": size, "class_names": class_names, "temperature": temperature, "white": white,
        "input": "images: float32 (B, 3, size, size), RGB / 255: the picture turned as its EXIF "
                 "orientation says, on white where it is transparent; its largest central square, "
                 "resized to size x size (PIL's bicubic); JPEG files are decoded at an eighth, "
                 "quarter or half where that is at least twice the size (PIL's draft mode)",
        "output": "logits: float32 (B, classes); probabilities = softmax(logits / temperature)",
        "16 bits": "levels of gray from 0 to white become 0 to 255: the upper 8 bits",
    }


def agreement(logits, expected, stem):
    """How far two sets of logits are apart, a text; UserError if it is more than rounding."""
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference < 1e-3:
        raise UserError(f"{stem}: the exported network gives other logits ({difference:.2g} of the "
                        "largest)")
    return f"logits agree to within {difference:.1g} of the largest"
