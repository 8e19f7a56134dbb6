"""What export writes, used without this project: the lines that README shows equal predict."""
import csv
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
from analysis import loading, predict
from conftest import ROOT, script
from engine import runtime
from engine.networks import Network, build_student
from finished_runs import RT, runs  # noqa: F401: a fixture
from images import decode

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime")


def example():
    """The lines that README shows."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    shown = [block for block in blocks if "onnxruntime" in block]
    return shown[0]


def save_pictures(folder):
    """One picture in each way that photographs come in; returns their files."""
    rng = np.random.RandomState(0)

    def picture(width, height):
        small = Image.fromarray(rng.randint(0, 256, (6, 6, 3)).astype(np.uint8))
        return small.resize((width, height), Image.BICUBIC)
    exif = Image.Exif()
    exif[274] = 6                                                       # turned by 270 degrees
    transparent = picture(61, 44)
    transparent.putalpha(Image.linear_gradient("L").resize((61, 44)))
    palette = picture(40, 71).quantize(16)
    palette.info["transparency"] = 3
    pictures = {
        "same.png": picture(32, 32), "tiny.png": picture(7, 5), "wide.png": picture(150, 41),
        "odd.png": picture(33, 64), "gray.png": picture(50, 60).convert("L"),
        "one_bit.png": picture(50, 60).convert("1"), "cmyk.tif": picture(45, 40).convert("CMYK"),
        "transparent.png": transparent, "palette.png": palette}
    for name, image in pictures.items():
        image.save(folder / name)
    picture(60, 45).save(folder / "turned.jpg", exif=exif, quality=95)
    return [*pictures, "turned.jpg"]


def test_what_a_program_needs_is_beside_the_network(runs, tmp_path, monkeypatch):
    """A size before the crop, classes in another order, a temperature of another network."""
    monkeypatch.setattr(predict, "ONNX", ("no_such_package",))
    script(analyze, monkeypatch, "eval", runs["deit-lt"], "--out", tmp_path / "x.csv")
    script(analyze, monkeypatch, "export", runs["deit-lt"], "--out", tmp_path / "m")
    model = json.loads((tmp_path / "m.json").read_text())
    kept = json.loads((runs["deit-lt"] / "calibration.json").read_text())
    assert model["temperature"] in [entry["temperature"] for entry in kept.values()]
    assert model["size"] == 37                                          # 32 / 0.875
    assert model["class_names"] == [f"class{k}" for k in range(10)] and model["white"] == 65535


def test_ten_lines_of_pillow_make_the_same_images(runs, tmp_path, monkeypatch):
    """Another resize, crop, ground or turn in README's lines than in this project's reading, which
    differ by 2 of 255 where torch and PIL round otherwise; onnxruntime need not be installed."""
    model = predict.Predictor(loading.load_alone(str(runs["vit"]), RT))
    lines = example().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("image = "))
    last = next(i for i, line in enumerate(lines) if line.startswith("x = "))
    names = save_pictures(tmp_path)
    rows = predict.predict(loading.load_alone(str(runs["vit"]), RT),
                           [str(tmp_path / name) for name in names], RT, topk=1)
    for name, row in zip(names, rows, strict=True):
        monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / name)])
        scope = {"model": {"size": model.size}}
        exec("import sys, numpy as np\nfrom PIL import Image, ImageOps", scope)
        exec("\n".join(lines[first:last + 1]), scope)
        x = torch.from_numpy(scope["x"])
        ours = decode.read_square(str(tmp_path / name), model.size) / 255
        assert (x - ours).abs().max() < 2.5 / 255, name
        with torch.no_grad():
            p = model(x[None]).softmax(dim=1)[0]
        assert f"class{int(p.argmax())}" == row["class"], name
        assert float(p.max()) == pytest.approx(row["probability"], abs=0.02), name


@needs_onnx
def test_the_lines_that_are_shown_predict_as_predict(runs, tmp_path, monkeypatch):
    """Classes in another order, a temperature left out; lines that no longer run."""
    monkeypatch.setattr(runtime, "has_bf16", lambda device: False)      # model.onnx is in float32
    script(analyze, monkeypatch, "eval", runs["deit-lt"], "--out", tmp_path / "x.csv")
    script(analyze, monkeypatch, "export", runs["deit-lt"], "--out", tmp_path / "model")
    pictures = ["wide.png", "palette.png", "turned.jpg"]
    save_pictures(tmp_path)
    script(analyze, monkeypatch, "predict", "--checkpoint", runs["deit-lt"], "--topk", 3, "--csv",
           tmp_path / "p.csv", *(tmp_path / picture for picture in pictures))
    (tmp_path / "example.py").write_text(example())
    assert set(re.findall(r"onnxruntime|numpy|PIL|torch|analysis|engine", example())) == {
        "onnxruntime", "numpy", "PIL"}
    for picture, row in zip(pictures, csv.DictReader((tmp_path / "p.csv").open()), strict=True):
        process = subprocess.run([sys.executable, "example.py", picture], cwd=tmp_path,
                                 capture_output=True, text=True)
        answers = [line.rsplit(" ", 2) for line in process.stdout.splitlines()]
        assert [answer[0] for answer in answers] == [row[f"class{r}"] for r in ("", " 2", " 3")]
        for answer, r in zip(answers, ("", " 2", " 3"), strict=True):
            assert float(answer[1]) == pytest.approx(100 * float(row[f"probability{r}"]), abs=0.2)


@needs_onnx
def test_a_student_of_our_recipe_is_exported(tmp_path):
    """FastStem's padding or pooling in another way than torch's, any batch size lost."""
    torch.manual_seed(0)
    config = dict(method="deit-lt", model="micro", img_size=32, patch_size=8, drop_path=0,
                  stem="fast")
    net = build_student(config, 4, True).eval().requires_grad_(False)
    network = Network(net, "student", "", config, list("abcd"))
    lines = predict.export(network, str(tmp_path / "m"))
    assert sum("logits agree" in line for line in lines) == 2
